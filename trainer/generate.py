"""Pictures from a base with or without a LoRA, the file read by diffusers' own loader: what other tools will show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.config import ModelConfig


class Studio:
    """A loaded base that makes pictures, with at most one LoRA on it, which diffusers' own loader puts there and takes off.

    Attributes: `path` of the base, `family`, `models` (with the LoRA while one is on), `hardware`, `native` (side in pixels).
    """

    def __init__(
        self, base: str, *, device: str, say: Callable[[str], None], dtype: str = "auto", model: ModelConfig | None = None
    ) -> None:
        """Load `base` (as model.source) by the other settings of `model`; `say` gets a sentence before a download.

        Raises ValueError for one that cannot be used.
        """
        import torch

        from trainer import bases, families
        from trainer.config import ModelConfig
        from trainer.families import sources
        from trainer.hardware import choose, torch_dtype

        self.hardware = choose(device, dtype)
        self.path = sources.resolve(base, say)
        model = model or ModelConfig()
        self.family = families.get(sources.family_of(self.path, model.family))
        number = torch_dtype(self.hardware.dtype)
        self.models = bases.load(self.path, self.family, number, torch.device(self.hardware.device), model)
        if self.models.prediction == "unknown":
            say(bases.measure(self.path, self.family, self.models))
        self.native = self.family.native_resolution(self.path, self.models.prediction)
        self.worn: tuple[Any, ...] | None = None
        self.pipe = self.family.pipeline(self.models)

    def wear(self, lora: Path | None, strength: float = 1.0, field: str = "--lora") -> None:
        """Put the LoRA of a file on at a strength, or none. Raises ValueError naming `field` for a file that does not fit."""
        if lora is None:
            if self.worn is not None:
                self.pipe.disable_lora()
            return
        check_lora(lora, self.family.name, field)
        stat = lora.stat()
        wanted = (lora.resolve(), stat.st_mtime_ns, stat.st_size)
        if self.worn != wanted:
            self._take_off()
            try:
                self.pipe.load_lora_weights(**_wearable(lora, self.family.name), adapter_name="lora")
            except (RuntimeError, ValueError):  # layers of other sizes, or none that the base has
                self._take_off()
                raise ValueError(
                    f"{field} is {lora}, whose layers do not fit the base {self.path}. Give the base that it was trained on."
                ) from None
            self.worn = wanted
        self.pipe.enable_lora()
        try:
            self.pipe.set_adapters(["lora"], [strength])
        except ValueError:  # no layer was found
            self._take_off()
            raise ValueError(
                f"{field} is {lora}, whose layers do not fit the base {self.path}. Give the base that it was trained on."
            ) from None

    def _take_off(self) -> None:
        self.pipe.unload_lora_weights()
        self.worn = None

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        steps: int = 20,
        guidance: float = 7.0,
        size: tuple[int | None, int | None] = (None, None),
        tick: Callable[[], None] | None = None,
    ) -> list[Image]:
        """One picture for each prompt and seed, `size` (width, height) or the base's own; `tick` runs after each denoising step."""
        width, height = (s or self.native for s in size)
        more = {"negative": negative, "steps": steps, "guidance": guidance, "size": (width, height), "tick": tick}
        return self.family.sample(self.models, prompts, seeds, **more)


def _wearable(lora: Path, family: str) -> dict[str, Any]:
    """What diffusers' loader is given: the file, or where diffusers reads nothing of such a file (SD3's first one) its tensors renamed."""
    from trainer.formats import FormatError, peft_names
    from trainer.formats.export import SECOND
    from trainer.tools.inspect import read_lora

    if (family, "kohya") in SECOND:
        try:
            naming, deltas = read_lora(lora)
        except FormatError as error:
            raise ValueError(str(error)) from None
        if naming != "peft":
            return {"pretrained_model_name_or_path_or_dict": peft_names.to_peft(family, deltas)}
    return {"pretrained_model_name_or_path_or_dict": lora.parent, "weight_name": lora.name}


def check_lora(lora: Path, family: str, field: str) -> None:
    """Raise ValueError for a file that is no LoRA, or one for another family than `family`."""
    from trainer.formats.probe import identify

    found = identify(lora)
    if found.kind != "lora":
        raise ValueError(f"{field} is {lora}, which is {found.what}. Give a LoRA file.")
    if found.family not in (None, family):
        raise ValueError(f"{field} is {lora}, which is {found.what}; the base is {family}. Give a LoRA that was trained for it.")


def generate(
    base: str,
    prompts: list[str],
    *,
    lora: Path | None = None,
    strength: float = 1.0,
    seed: int = 1,
    steps: int = 20,
    guidance: float = 7.0,
    negative: str = "",
    size: tuple[int | None, int | None] = (None, None),
    out: Path | None = None,
    device: str = "auto",
) -> list[Path]:
    """Sample each prompt from its own seed (`seed`, `seed` + 1, ...) and save `out`/SEED-NUMBER.png; returns the paths.

    Raises ValueError for a base or LoRA that cannot be used.
    """
    from trainer.families import sources

    def say(text: str) -> None:
        print(text, file=sys.stderr)  # stdout has the pictures' paths alone

    path = sources.resolve(base, say)
    if lora is not None:  # before the base is loaded, which takes long
        check_lora(lora, sources.family_of(path, "auto"), "--lora")
    folder = out or Path("pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {folder}, which cannot be made ({error.strerror}). Give another folder.") from None
    studio = Studio(str(path), device=device, say=say)
    studio.wear(lora, strength)
    seeds = [seed + k for k in range(len(prompts))]
    images = studio.sample(prompts, seeds, negative=negative, steps=steps, guidance=guidance, size=size)
    paths = []
    for k, image in enumerate(images):
        target, n = folder / f"{seed + k}-{k + 1}.png", 1
        while target.exists():
            target, n = folder / f"{seed + k}-{k + 1}-{n + 1}.png", n + 1
        image.save(target)
        paths.append(target)
    return paths
