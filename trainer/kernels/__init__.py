"""Norms, activations and attention of a frozen network, for training an adapter inside it.

A LoRA step needs gradients with respect to activations only: scales and shifts of the frozen norms get none. So each function here is one
`torch.autograd.Function` that keeps its input and a few float32 statistics, nothing else, and recomputes the rest in its backward pass.
Outputs have the dtype of the input, also under autocast; every sum runs in float32 (float64 for float64 inputs).

Two forms with the same interface, equal to rounding: `fused` (Triton; one to three kernels a call, no host wait, shapes fixed by the inputs,
so safe in a CUDA graph) and `plain` (torch operations, for the CPU, MPS and CUDA without Triton). `by_triton` chooses. Attention has a
Triton form for few keys alone, and is torch's own elsewhere.

GELU in its tanh form has no function here: torch's own keeps its input only and is one kernel already.
"""

import functools
import importlib.util
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels import plain

__all__ = ["add_biased", "add_layer_norm", "attention", "geglu", "group_norm", "layer_norm"]

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None = None) -> Tensor:
    """GroupNorm (Wu and He 2018) of x (N, C, H, W), or of x + `shift` (N, C), with frozen weight and bias (C,), then SiLU if `silu`. C is a
    multiple of `groups`.

    The fused form answers in channels_last whatever x has; the plain one in x's own memory format on the CPU, else contiguous.
    """
    if shift is not None and not by_triton(x):
        x, shift = x + shift[:, :, None, None], None
    return _GroupNorm.apply(x, shift, weight, bias, groups, eps, silu)


def add_biased(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias of x and h (N, C, H, W) and a frozen bias (C,). The sum may be written over h, which no other function may keep."""
    if not (by_triton(h) and h.is_contiguous(memory_format=torch.channels_last)):
        return x + (h + bias[:, None, None])
    return _AddBiased.apply(x, h, bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v (Vaswani et al. 2017) of q (B, S, H, D) and k, v (B, T, H, D): (B, S, H, D).

    By a kernel of our own where there are few keys, as in attention to a prompt; else by torch's.
    """
    if by_triton(q):
        from trainer.kernels import prompt_attention as own

        if own.fits(q, k, v):
            return _Attention.apply(q, k, v)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2)


def geglu(p: Tensor) -> Tensor:
    """value * gelu(gate), erf form, of p (..., 2H) = value, gate (Shazeer 2020, "GLU variants improve transformer"): (..., H).

    The backward pass may write over p, which no other function may keep.
    """
    return _GEGLU.apply(p)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (Ba et al. 2016) over the last dimension D of x (..., D) with frozen weight and bias (D,), each of which may be None."""
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm(x + residual)), for x and residual of one shape and dtype. Keeps the sum, which the caller keeps anyway.
    Without a residual (x, layer_norm(x)): who goes on with that x has its gradient added to the norm's in the same kernel.

    Raises: ValueError when shapes or dtypes differ (no broadcasting: the gradient is one tensor for both).
    """
    if residual is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(
            f"add_layer_norm needs two tensors of one shape and dtype, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(residual.shape)} {residual.dtype}: expand or cast one of them first."
        )
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps, silu):
        ctx.form, ctx.groups, ctx.silu = _form(x), groups, silu
        y, *kept = ctx.form.group_norm(x, weight, bias, groups, eps, silu, *(() if shift is None else (shift,)))
        ctx.save_for_backward(weight, bias, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, bias, *kept = ctx.saved_tensors
        gx = ctx.form.group_norm_backward(g, weight, bias, *kept, ctx.groups, ctx.silu)
        g_shift = gx.sum((2, 3), dtype=torch.float32).to(gx.dtype) if ctx.needs_input_grad[1] else None
        return gx, g_shift, None, None, None, None, None


class _AddBiased(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, bias):
        ctx.mark_dirty(h)
        return _form(h).add_biased(x, h, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, g, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        from trainer.kernels import prompt_attention as own

        ctx.own = own
        ctx.save_for_backward(q, k, v)
        return own.forward(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.own.backward(g, *ctx.saved_tensors, any(ctx.needs_input_grad[1:]))


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        ctx.form = _form(p)
        ctx.save_for_backward(p)
        return ctx.form.geglu(p)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.form.geglu_backward(g, *ctx.saved_tensors)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.form = _form(x)
        y, mean, rstd = ctx.form.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(weight, x, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.form.layer_norm_backward(g, *ctx.saved_tensors), None, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        ctx.form = _form(x)
        ctx.set_materialize_grads(False)
        total, y, mean, rstd = ctx.form.add_layer_norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(weight, total, mean, rstd)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, g_total, g):
        # None: that output took no part in the loss
        gx = g_total if g is None else ctx.form.layer_norm_backward(g, *ctx.saved_tensors, g_total)
        return gx, gx if ctx.needs_input_grad[1] else None, None, None, None


def _form(x: Tensor):
    """The module that computes for x: `fused` or `plain`."""
    if not by_triton(x):
        return plain
    from trainer.kernels import fused

    return fused


def by_triton(x: Tensor) -> bool:
    """Whether Triton kernels compute for tensors of x's device and dtype."""
    return x.is_cuda and x.dtype in FUSED_DTYPES and _triton_runs(x.device)


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton is installed and a first kernel compiles and starts on `device`; warns when it is there and doesn't."""
    if importlib.util.find_spec("triton") is None:
        return False
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):  # the oldest NVIDIA generation that Triton supports
        return False
    try:
        from trainer.kernels import fused

        fused.geglu(torch.zeros(1, 16, device=device, dtype=torch.bfloat16))
    except Exception as error:  # no C compiler (CalledProcessError), no ptxas (TritonError), a driver that doesn't fit: said below
        warnings.warn(
            f"Triton is installed, but its kernels don't run on {device} ({type(error).__name__}: {error}). Plain torch operations are used "
            "instead: same results, slower. Installing a C compiler (gcc) often helps.",
            stacklevel=2,
        )
        return False
    return True
