"""The functions of `trainer.kernels` in torch operations. Forward: the result, then what backward needs besides weight and bias."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, ...]:
    """y, x, mean (N, groups), rstd (N, groups)."""
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=_layout(x))
    wide = _wide(x)
    y, mean, rstd = torch.native_group_norm(wide, weight.to(wide.dtype), bias.to(wide.dtype), n, c, h * w, groups, eps)
    if silu:
        y = F.silu(y, inplace=True)
    return y.to(x.dtype), x, mean, rstd


def group_norm_backward(g: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool) -> Tensor:
    n, c, h, w = x.shape
    wide = _wide(x)
    g = g.to(wide.dtype).contiguous(memory_format=_layout(x))
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    if silu:
        scale = rstd.repeat_interleave(c // groups, 1) * weight
        shift = bias - mean.repeat_interleave(c // groups, 1) * scale
        normed = torch.addcmul(shift[:, :, None, None], wide, scale[:, :, None, None])
        g = torch.ops.aten.silu_backward(g, normed)
    gx, _, _ = torch.ops.aten.native_group_norm_backward(g, wide, mean, rstd, weight, n, c, h * w, groups, (True, False, False))
    return gx.to(x.dtype)


def geglu(p: Tensor) -> Tensor:
    value, gate = p.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def geglu_backward(g: Tensor, p: Tensor) -> Tensor:
    value, gate = p.chunk(2, dim=-1)
    gp = torch.empty_like(p)
    g_value, g_gate = gp.chunk(2, dim=-1)
    torch.mul(g, F.gelu(gate), out=g_value)
    g_gate.copy_(torch.ops.aten.gelu_backward(g * value, gate))
    return gp


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (..., 1), rstd (..., 1)."""
    wide = _wide(x)
    y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], _as(weight, wide), _as(bias, wide), eps)
    return y.to(x.dtype), mean, rstd


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """x + residual (None: x), its norm, mean, rstd."""
    total = x if residual is None else x + residual
    return total, *layer_norm(total, weight, bias, eps)


def layer_norm_backward(g: Tensor, weight: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, g_total: Tensor | None = None) -> Tensor:
    """Gradient of x; `g_total` is the gradient that reaches x beside the norm."""
    wide = _wide(x)
    gx, _, _ = torch.ops.aten.native_layer_norm_backward(
        g.to(wide.dtype), wide, x.shape[-1:], mean, rstd, _as(weight, wide), None, (True, False, False)
    )
    if g_total is not None:
        gx = gx.add_(g_total)
    return gx.to(x.dtype)


def _layout(x: Tensor) -> torch.memory_format:
    """torch's group norm computes in channels_last on the CPU only, and not where a single image has another stride than it would need."""
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and x.stride(0) * len(x) == x.numel():
        return torch.channels_last
    return torch.contiguous_format


def _wide(x: Tensor) -> Tensor:
    """x in float32 (float64 stays), since torch keeps the statistics of 16-bit inputs in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)
