"""Merge a LoRA into the weights of the frozen base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from trainer.adapters import Delta, plain

MEND = "Give a LoRA for a base of this kind."


@torch.no_grad()
def merge(parts: Mapping[str, torch.nn.Module], deltas: Iterable[Delta], strength: float) -> list[str]:
    """Add `strength` times the change of `deltas` to the weights of `parts`, in place, and say in sentences what was done.

    Each layer is summed in float32, on its own device, and rounded once to its own dtype. Raises ValueError with a sentence for layers
    that the base has not or has in other sizes, for quantised ones, and for what is not a number any more; only the last comes
    after other layers have changed.
    """
    changes = [d for d in deltas if d.tensors["up"].any() and d.tensors["down"].any()]
    if not changes:
        return ["The LoRA that was to be merged changes nothing: all its layers are zero."]
    known = {part: {plain(path): m for path, m in root.named_modules() if hasattr(m, "weight")} for part, root in parts.items()}
    unknown = [f"{d.part} {d.path}" for d in changes if plain(d.path) not in known.get(d.part, {})]
    if unknown:
        raise ValueError(f"it changes {len(unknown)} layers that the base does not have, the first is {unknown[0]}. {MEND}")
    layers = [known[d.part][plain(d.path)] for d in changes]
    for d, layer in zip(changes, layers, strict=True):
        if not layer.weight.is_floating_point() or type(layer) not in (torch.nn.Linear, torch.nn.Conv2d):
            raise ValueError(
                f"the base's layer {d.part} {d.path} is a {type(layer).__name__}, and LoRAs are merged into plain ones that are not quantised. "
                "Load the base without 8 bits."
            )
        sizes = d.tensors["up"].shape[0], d.tensors["down"][0].numel()
        if sizes != (layer.weight.shape[0], layer.weight[0].numel()):
            raise ValueError(f"its layer {d.part} {d.path} has other sizes than the base's. {MEND}")
    for d, layer in zip(changes, layers, strict=True):
        weight = layer.weight
        down, up = (d.tensors[k].to(weight.device, torch.float32).flatten(1) for k in ("down", "up"))
        merged = (weight.float() + strength * d.scale * (up @ down).view(weight.shape)).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"with it, {d.part} {d.path} is not a number any more. The file is damaged, or its strength is too high.")
        weight.copy_(merged)
    return [f"A LoRA of {len(changes)} layers was merged into the base at strength {strength:g}."]
