"""Sample images during a run. They draw from generators of their own, so training never notices them."""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from trainer import plan
from trainer.adapters import Adapter
from trainer.config import TrainConfig
from trainer.families import Family, Models
from trainer.run_dir import RunDir
from trainer.sampler import Sampler


class Previews:
    """The sample images of a run, and the time that they take of it.

    Args:
        trained: the parts that carry an adapter: text encoders among them read the prompts anew each time.
        size: (width, height) in pixels, where the settings leave it open.
        say: gets sentences for the user.

    Attributes:
        adapter: set before the first call of `make`; room: see Sampler.
    """

    adapter: Adapter

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        models: Models,
        trained: Container[str],
        size: tuple[int, int],
        run: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.run, self._say = config.preview, run, say
        self.size = config.preview.width or size[0], config.preview.height or size[1]
        self.frozen = [part for part in models.text if part not in trained]
        self.sampler = Sampler(family, models, frozen=self.frozen, graphs=True, attention=config.train.attention, say=say)
        self.cost: float | None = None  # seconds that the last one took; of the very first without what is done but once
        self._spent = 0.0  # seconds, since the training began
        self._began, self._first = time.perf_counter(), 0
        self._told = False

    def read(self, prompts: tuple[str, ...]) -> None:
        """Have the frozen encoders read the prompts now, while there is room on the device."""
        if self.config.enabled:
            self.sampler.read(prompts, self.config.negative, self.config.guidance, only=self.frozen)

    def make(self, prompts: tuple[str, ...], step: int) -> list[str]:
        """Sample every prompt with its fixed seed and save the pictures; returns their file names in `run.previews`."""
        begun, warm = time.perf_counter(), []
        with self.adapter.at_rest():
            images = self.sampler(
                prompts,
                [self.config.seed + k for k in range(len(prompts))],
                negative=self.config.negative,
                steps=self.config.steps,
                guidance=self.config.guidance,
                size=self.size,
                tick=lambda: warm.append(time.perf_counter()),
            )
        names = []
        for k, image in enumerate(images):
            path = self.run.preview(step, k)
            temp = path.with_suffix(".tmp")
            image.save(temp, "PNG", compress_level=1)  # at 1024 px .1 instead of .3 s, for a sixth more bytes
            temp.replace(path)
            names.append(path.name)
        end = time.perf_counter()
        self.cost = end - (warm[0] if self.cost is None else begun)  # Triton compiles in the very first step, for up to 8 s
        self._spent += end - begun
        return names

    def begin(self, step: int) -> None:
        """The training begins now, at `step`."""
        self._began, self._first, self._spent = time.perf_counter(), step, 0.0

    def due(self, step: int, total: int) -> bool:
        """Whether those that the schedule has after `step` steps are made: always where the user has set how often, else if there is time.

        It goes by the clock, and so may which steps have previews; what is learnt does not depend on them.
        """
        if self.config.every is not None:
            return True
        each = (time.perf_counter() - self._began - self._spent) / max(1, step - self._first)
        cost = self.cost or 0.0
        fits = plan.spares(self._spent, cost, each, step, total)
        if not fits and not self._told:
            self._told = True
            self._say(
                f"Sample images take {cost:.1f} s each time. Fewer are made along the way, so that they take at most "
                f"{plan.PREVIEW_SHARE:.0%} of the time; preview.every makes them as often as you like."
            )
        return fits
