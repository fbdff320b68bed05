"""Model families: the only place that knows how SD1, SD2, ... differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Cond:
    """What the denoiser is told besides the noisy latents. `hidden`: (B, T, D) text states."""

    hidden: torch.Tensor

    def rows(self, index: torch.Tensor) -> Cond:
        """The rows `index` (a 1-D integer tensor on the same device)."""
        return Cond(self.hidden.index_select(0, index))


@dataclass
class Models:
    """A loaded base. `parts` holds the modules that may carry an adapter; what is `parked` lives on the CPU between uses."""

    parts: dict[str, torch.nn.Module]
    vae: torch.nn.Module
    tokenizer: Any
    scheduler: dict[str, Any]
    prediction: str
    alphas_cumprod: torch.Tensor
    device: torch.device
    parked: set[str] = field(default_factory=set)

    def module(self, name: str) -> torch.nn.Module:
        return self.vae if name == "vae" else self.parts[name]

    def park(self, *names: str) -> None:
        """Move modules to the CPU until they are borrowed."""
        for name in names:
            self.parked.add(name)
            self.module(name).to("cpu")

    @contextmanager
    def borrow(self, *names: str) -> Iterator[None]:
        """Have modules on the device for a while."""
        for name in names:
            self.module(name).to(self.device)
        try:
            yield
        finally:
            for name in self.parked.intersection(names):
                self.module(name).to("cpu")


class Family(Protocol):
    """One model family. Shapes: pixels (B, 3, H, W) in [-1, 1]; latents (B, C, H/8, W/8), scaled; t (B,) int64 or float."""

    name: str
    parts: tuple[str, ...]

    def native_resolution(self, source: Path) -> int: ...

    def load(self, source: Path, dtype: torch.dtype, device: torch.device, prediction: str, attention: str) -> Models: ...

    def targets(self, models: Models, part: str, kinds: Sequence[str]) -> list[str]: ...

    def count(self, source: Path, kinds: Sequence[str], rank: int) -> dict[str, tuple[int, int]]: ...

    def tokenize(self, models: Models, captions: Sequence[str]) -> torch.Tensor: ...

    def encode_text(self, models: Models, tokens: torch.Tensor) -> Cond: ...

    def encode(self, models: Models, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def timesteps(self, models: Models, count: int, generator: torch.Generator) -> torch.Tensor: ...

    def process(self, models: Models, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def weight(self, models: Models, t: torch.Tensor, min_snr_gamma: float | None) -> torch.Tensor: ...

    def predict(self, models: Models, noisy: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor: ...

    def sample(
        self,
        models: Models,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        tick: Callable[[], None] | None = None,
    ) -> list[Image.Image]: ...


def get(name: str) -> Family:
    """The family called `name`. Raises KeyError for an unknown one (the configuration allows known ones alone)."""
    from trainer.families import sd1

    FAMILIES: dict[str, Family] = {"sd1": sd1.SD1()}
    return FAMILIES[name]
