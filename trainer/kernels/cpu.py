"""The functions of `trainer.kernels` for float32 on the CPU, where time is dearer than memory: what backward would compute again is kept.

Of the demo base's step this saves one millisecond in 40. Interface as in `plain`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels import plain
from trainer.kernels.plain import add_layer_norm, layer_norm, layer_norm_backward

__all__ = ["add_layer_norm", "geglu", "geglu_backward", "group_norm", "group_norm_backward", "layer_norm", "layer_norm_backward"]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor | None, ...]:
    """y, x, mean (N, groups), rstd (N, groups), what the SiLU took."""
    y, x, mean, rstd = plain.group_norm(x, weight, bias, groups, eps, False)
    return (F.silu(y), x, mean, rstd, y) if silu else (y, x, mean, rstd, None)


def group_norm_backward(
    g: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, normed: Tensor | None, groups: int, silu: bool
) -> Tensor:
    if silu:
        g = torch.ops.aten.silu_backward(g, normed)
    return plain.group_norm_backward(g, weight, bias, x, mean, rstd, groups, False)


def geglu(p: Tensor) -> tuple[Tensor, ...]:
    """y, value, gate, gelu(gate). torch takes up to twice as long for a gate whose rows do not follow each other."""
    value, gate = p.chunk(2, dim=-1)
    gate = gate.contiguous()
    open = F.gelu(gate)
    return open * value, value, gate, open


def geglu_backward(g: Tensor, value: Tensor, gate: Tensor, open: Tensor) -> Tensor:
    return torch.cat([g * open, torch.ops.aten.gelu_backward(g * value, gate)], -1)
