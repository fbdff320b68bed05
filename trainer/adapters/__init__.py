"""Adapters: what is trained on top of the frozen base, behind one small handle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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

    def groups(self, part: str) -> list[tuple[float, list[torch.nn.Parameter]]]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: dict[str, torch.Tensor]) -> None: ...

    def start(self, deltas: Iterable[Delta]) -> None: ...

    def deltas(self) -> Iterator[Delta]: ...

    def disabled(self) -> AbstractContextManager[None]: ...

    def at_rest(self) -> AbstractContextManager[None]: ...

    def train(self, mode: bool) -> None: ...

    @property
    def notes(self) -> Iterable[str]: ...

    strength: float


Ranks = Mapping[str, Mapping[str, int]]  # part -> module path -> rank


def plain(path: str) -> str:
    """A module path without the `text_model.` level, which text encoders have or lack by class: files leave it out."""
    return path.removeprefix("text_model.")


def ranks_of(deltas: Iterable[Delta]) -> Ranks:
    """The rank of each layer that `deltas` change. Layers of zeros, which some files hold for their readers' sake, have none."""
    out: dict[str, dict[str, int]] = {}
    for d in deltas:
        if d.tensors["up"].any() and d.tensors["down"].any():
            out.setdefault(d.part, {})[d.path] = d.tensors["down"].shape[0]
    return out


def build(config: Any, parts: dict[str, torch.nn.Module], targets: dict[str, list[str]], seed: int, ranks: Ranks | None = None) -> Adapter:
    """Attach the configured adapter to `targets` (module paths for each part) of `parts`.

    `ranks`, of a file or checkpoint that will be loaded into it, take the place of the configured ones where they are given.
    Raises ValueError with a sentence for settings that fit no layer.
    """
    from trainer.adapters import lora

    ADAPTERS = {"lora": lora.build}
    return ADAPTERS[config.kind](config, parts, targets, seed, ranks)
