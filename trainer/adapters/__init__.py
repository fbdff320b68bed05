"""Adapters: what is trained on top of the frozen base, behind one small handle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Delta:
    """The change of one layer of the base, as plain tensors.

    Attributes:
        part: the part of the base that the layer belongs to, such as `unet` or `text_1`.
        path: dotted module path in the live model, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
        kind: `lora`: W changes by `scale * up @ down` (convolutions: flattened, then reshaped).
        tensors: for `lora`: `down` (r, in) or (r, in, kh, kw) and `up` (out, r) or (out, r, 1, 1); float32 on the CPU.
        scale: the true scale, whatever made it up (alpha / rank, rsLoRA, strength).
    """

    part: str
    path: str
    kind: str
    tensors: dict[str, torch.Tensor]
    scale: float


class Adapter(Protocol):
    """What the loop, export, checkpoints and previews know of an adapter."""

    def parameters(self, part: str) -> list[torch.nn.Parameter]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: dict[str, torch.Tensor]) -> None: ...

    def start(self, deltas: Iterable[Delta]) -> None: ...

    def deltas(self) -> Iterator[Delta]: ...

    def disabled(self) -> AbstractContextManager[None]: ...

    def train(self, mode: bool) -> None: ...

    @property
    def notes(self) -> Iterable[str]: ...

    strength: float


def build(config: Any, parts: dict[str, torch.nn.Module], targets: dict[str, list[str]], seed: int) -> Adapter:
    """Attach the configured adapter to `targets` (module paths for each part) of `parts`."""
    from trainer.adapters import lora

    ADAPTERS = {"lora": lora.build}
    return ADAPTERS[config.kind](config, parts, targets, seed)
