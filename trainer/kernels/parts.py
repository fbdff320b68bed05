"""Sums whose parts are made by several Triton programs and added up, in their order, by the one of them that is done last."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(4096, dtype=torch.int32, device=device)


def arrivals(device: torch.device, count: int) -> Tensor:
    """(at least `count`,) int32 zeros, in which programs count who is done. They are zero again after a kernel, so all kernels share them:
    those of one device run one after the other."""
    found = _counters(device)
    return found if count <= len(found) else torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit
def last(arrived, parts):
    """Whether all other parts have laid down theirs, asked once by each of them; `arrived` is the tile's counter."""
    tl.debug_barrier()
    done = tl.atomic_add(arrived, 1, sem="acq_rel") == parts - 1
    if done:
        tl.store(arrived, 0)
    return done


@triton.jit
def added_up(sums, tile, parts, step: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sum of `parts` tiles of the shape of `tile`, of which `sums` points to the first one's numbers and the next lies `step` further.

    So many as AT_ONCE are read before any is added; not from a cache that does not see what other programs wrote.
    """
    total = tl.zeros_like(tile)
    number = tl.zeros(tile.shape, tl.int32)
    for _ in range(0, parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(sums + i * step, mask=number + i < parts, other=0.0, cache_modifier=".cg")
        sums += AT_ONCE * step
        number += AT_ONCE
    return total
