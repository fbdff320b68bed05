"""Model families: the only place that knows how SD1, SD2, SDXL and SD3 differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from trainer.config import LoraConfig, LossConfig, ModelConfig
    from trainer.data.buckets import Placement
    from trainer.families.clip import Tokens

WINDOW = 77  # tokens that a text encoder reads at once; a longer caption takes several such windows


@dataclass(frozen=True)
class States:
    """What one text encoder makes of N captions. `hidden`: (N, windows * 77, D); `pooled`: (N, P), or None where there is none."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, index: torch.Tensor, windows: int | None = None) -> States:
        """The rows `index` (a 1-D integer tensor on the same device), of the first `windows` windows."""
        hidden = self.hidden if windows is None else self.hidden[:, : windows * WINDOW]
        return States(hidden.index_select(0, index), None if self.pooled is None else self.pooled.index_select(0, index))


@dataclass(frozen=True)
class Cond:
    """What the denoiser is told besides the noisy latents.

    `hidden`: (B, T, D) text states; `pooled`: (B, P) text embedding (SDXL, SD3); `size`: (B, 6) size and crop in pixels (SDXL).
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None
    size: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> Cond:
        """The rows `index` (a 1-D integer tensor on the same device)."""
        return Cond(*(None if x is None else x.index_select(0, index) for x in (self.hidden, self.pooled, self.size)))


@dataclass
class Models:
    """A loaded base.

    Attributes:
        parts: the modules that may carry an adapter: `unet` (the denoiser, whatever its kind), `text_1`, `text_2`.
        frozen: text encoders that never carry one (SD3's T5, as `text_3`).
        tokenizers: for each text encoder that is there.
        scheduler: its configuration, as it is in effect.
        prediction: `epsilon`, `v_prediction`, `flow`, or `unknown` until it is measured (see trainer.families.prediction).
        alphas_cumprod: (steps,) of the noise schedule; None for flow matching.
        windows, weighted: how prompts are read: at most so many windows of 75 tokens; whether (word:1.2) weighs words.
        parked: what lives on the CPU between uses.
        bits: of the denoiser's large weights: 16 (32 on a base in float32), or 8 or 4 where they are packed.
        arriving: the future of the denoiser's weights, where they are still being read; until `arrive` it is on the meta device.
    """

    parts: dict[str, torch.nn.Module]
    vae: torch.nn.Module
    tokenizers: dict[str, Any]
    scheduler: dict[str, Any]
    prediction: str
    alphas_cumprod: torch.Tensor | None
    device: torch.device
    frozen: dict[str, torch.nn.Module] = field(default_factory=dict)
    clip_skip: int = 1
    windows: int = 3
    weighted: bool = False
    parked: set[str] = field(default_factory=set)
    bits: int = 16
    notes: list[str] = field(default_factory=list)
    arriving: Future[None] | None = None

    def arrive(self) -> None:
        """Wait until the denoiser's weights are there. Raises what loading them raises."""
        if self.arriving:
            self.arriving.result()
            self.arriving = None

    @property
    def text(self) -> tuple[str, ...]:
        """The text encoders that are there."""
        return tuple(self.tokenizers)

    def module(self, name: str) -> torch.nn.Module:
        return self.vae if name == "vae" else self.frozen.get(name) or self.parts[name]

    def park(self, *names: str) -> None:
        """Move modules to the CPU until they are borrowed."""
        for name in names:
            self.parked.add(name)
            _move(self.module(name), "cpu")

    def fetch(self, *names: str) -> None:
        """Have parked modules on the device from now on."""
        for name in self.parked.intersection(names):
            _move(self.module(name), self.device)
            self.parked.remove(name)

    @contextmanager
    def borrow(self, *names: str) -> Iterator[None]:
        """Have parked modules on the device for a while; what is there already is left as it is, where views of its weights may be in use."""
        modules = [self.module(name) for name in self.parked.intersection(names)]
        tables = [table for module in modules for m in module.modules() for table in (m._parameters, m._buffers)]
        home = [(table, name, t, t.data) for table in tables for name, t in table.items() if t is not None]
        try:
            for module in modules:
                _move(module, self.device)
            yield
        finally:
            for table, name, t, data in home:  # they are frozen: nothing need be copied back
                t.data = data
                table[name] = t
            for module in modules:
                _move(module, "cpu")

    @contextmanager
    def tiling(self, side: int) -> Iterator[None]:
        """Have the VAE work in overlapping tiles of `side` latents, by diffusers: less memory, slight differences between tiles."""
        vae = self.vae
        kept = vae.tile_latent_min_size, vae.tile_sample_min_size
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, 8 * side
        vae.enable_tiling()
        try:
            yield
        finally:
            vae.disable_tiling()
            vae.tile_latent_min_size, vae.tile_sample_min_size = kept


class Family(Protocol):
    """One model family. Shapes: pixels (B, 3, H, W) in [-1, 1]; latents (B, C, H/8, W/8), scaled; t (B,) int64 or float."""

    name: str
    parts: tuple[str, ...]

    def native_resolution(self, source: Path, prediction: str = "auto") -> int: ...

    def load(
        self,
        source: Path,
        dtype: torch.dtype,
        device: torch.device,
        model: ModelConfig | None = None,
        attention: str = "sdpa",
        beside: Executor | None = None,
    ) -> Models: ...

    def set_prediction(self, models: Models, prediction: str) -> None: ...

    def targets(self, models: Models, part: str, kinds: Sequence[str]) -> list[str]: ...

    def count(self, source: Path, adapter: LoraConfig) -> dict[str, tuple[int, int]]: ...

    def tokenize(self, models: Models, part: str, captions: Sequence[str]) -> Tokens: ...

    def encode_text(self, models: Models, part: str, tokens: Tokens) -> States: ...

    def condition(self, models: Models, states: dict[str, States], size: torch.Tensor | None) -> Cond: ...

    def read(self, models: Models, part: str, texts: Sequence[str]) -> tuple[States, tuple[int, ...]]: ...

    def conditions(self, models: Models, prompts: Sequence[str], size: tuple[int, int]) -> Cond: ...

    def whole(self, models: Models, size: tuple[int, int], rows: int) -> torch.Tensor | None: ...

    def size(self, image: tuple[int, int], placement: Placement, flip: bool) -> tuple[float, ...] | None: ...

    def encode(self, models: Models, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def timesteps(self, models: Models, count: int, generator: torch.Generator, loss: LossConfig) -> torch.Tensor: ...

    def spread(self, models: Models, shares: Sequence[float]) -> torch.Tensor: ...

    def process(self, models: Models, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def weight(self, models: Models, t: torch.Tensor, min_snr_gamma: float | None) -> torch.Tensor: ...

    def predict(self, models: Models, noisy: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor: ...

    def pipeline(self, models: Models) -> Any: ...

    def preview_scheduler(self, models: Models) -> Any: ...

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
    from trainer.families import sd1, sd2, sd3, sdxl

    FAMILIES: dict[str, Family] = {"sd1": sd1.SD1(), "sd2": sd2.SD2(), "sdxl": sdxl.SDXL(), "sd3": sd3.SD3()}
    return FAMILIES[name]


def _move(module: torch.nn.Module, device: torch.device | str) -> None:
    from trainer.staging import move

    move(module, device)
