"""How quick a run is: what is left of it in seconds, and whether its steps take far longer than the GPU needs for them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

STEPS = 20  # before the rest is forecast: kernels are compiled and graphs captured in the first ones
SPILLED = 12  # a step that takes so many times longer than its arithmetic: what fits takes 2 to 6 times as long


class Pace:
    """Times the steps from `start` on, and what is done between them.

    `limit`: seconds that a step's arithmetic takes on this GPU, where a slower one would mean that its memory spills into the computer's;
    else None.
    """

    def __init__(self, start: int, limit: float | None = None) -> None:
        self.start, self.limit = start, limit
        self.each: float | None = None  # seconds of a step, of late
        self.hooks: dict[str, float] = {}  # seconds that each of the things between the steps took last
        self._step, self._time = start, time.perf_counter()

    def pause(self, seconds: float) -> None:
        """The steps stood still for so long."""
        self._time += seconds

    def lap(self, step: int) -> float:
        """Seconds of the steps since the last lap, of which `step` is the last."""
        now = time.perf_counter()
        spent, count = now - self._time, step - self._step
        self._step, self._time = step, now
        if step - self.start > 1:  # the very first is no measure
            self.each = spent / count
        return spent

    def left(self, step: int, total: int, due: Mapping[str, Collection[int]]) -> float | None:
        """Seconds until the run ends, with what is `due` on the way (name -> steps) and at its end; None: too early to say."""
        if step == total:
            return 0.0
        if self.each is None or (step - self.start < STEPS and total - self.start > 2 * STEPS):
            return None
        return self.each * (total - step) + sum(self.hooks.get(k, 0.0) * (1 + sum(t > step for t in times)) for k, times in due.items())

    def spilled(self, step: int) -> str | None:
        """A sentence, once, where the steps are as slow as with a memory that spills."""
        if self.limit is None or self.each is None or step - self.start < STEPS:
            return None
        limit, self.limit = self.limit, None
        if self.each < SPILLED * limit:
            return None
        return (
            f"A step takes {self.each:.2g} s, {self.each / limit:.0f} times as long as its arithmetic needs on this GPU. Most likely its memory is "
            "full and the driver uses the computer's instead. Close other programs that use the GPU, or stop, and train with a smaller "
            "train.memory or dataset.resolution."
        )


def limit(device: Any, tflop: float, dtype: str) -> float | None:
    """Seconds that `tflop` take on `device` at the rate of large products of matrices, which is measured (in a few hundredths of a second),
    where its memory may spill; else None."""
    import torch

    from trainer.hardware import spills, torch_dtype

    if device.type != "cuda" or not spills() or not tflop:
        return None
    kind = torch_dtype(dtype)
    a = torch.randn(2048, 2048, device=device, dtype=kind)
    times = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(8):
            a @ a
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return tflop * 1e12 * min(times) / (8 * 2 * 2048**3)
