"""Arithmetic on low-rank changes, from their factors alone: no whole weight is ever built."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trainer.adapters import Delta

SMALL = 2.0**-12  # an `up` smaller than this takes a power of two from its `down`, which leaves the product as it is


def norm(delta: Delta) -> float:
    """||scale * up @ down||, Frobenius, in float64."""
    return _norm(*_factors(delta))


def relative_error(found: Delta, live: Delta) -> float:
    """||change found - change live|| / ||change live||, Frobenius; 0 when both are zero, infinite when only the live one is.

    Computed in float64 from the factors' Gram matrices (||up @ down||^2 = sum(up'up * down down')).
    """
    (down_1, up_1), (down_2, up_2) = _factors(found), _factors(live)
    error, size = _norm(torch.cat([down_1, down_2]), torch.cat([up_1, -up_2], 1)), _norm(down_2, up_2)
    return error / size if size else (float("inf") if error else 0.0)


def rms(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) / tensor.numel() ** 0.5


def balanced(delta: Delta) -> Delta:
    """The same change with a power of two moved from down to a small up, as in a LoRA that was trained for a few steps only.

    fp16 has steps of 6e-8 below 6e-5, so small values lose their digits there.
    """
    down, up = rms(delta.tensors["down"]), rms(delta.tensors["up"]) * abs(delta.scale)
    if not (0 < up < SMALL and up < down):
        return delta
    factor = 2.0 ** round(math.log2(down / up) / 2)
    return replace(delta, tensors={"down": delta.tensors["down"] / factor, "up": delta.tensors["up"] * factor})


def _factors(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    return delta.tensors["down"].double().flatten(1), delta.tensors["up"].double().flatten(1) * delta.scale


def _norm(down: torch.Tensor, up: torch.Tensor) -> float:
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())
