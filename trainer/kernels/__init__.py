"""Norms and activations of a frozen network, for training an adapter inside it.

A LoRA step needs gradients with respect to activations only: scales and shifts of the frozen norms get none. So each function here is one
`torch.autograd.Function` that keeps its input and a few float32 statistics, nothing else, and recomputes the rest in its backward pass.
Outputs have the dtype of the input, also under autocast; every sum runs in float32 (float64 for float64 inputs).

Two forms with the same interface, equal to rounding: `fused` (Triton; one to three kernels a call, no host wait, shapes fixed by the inputs,
so safe in a CUDA graph) and `plain` (torch operations, for the CPU, MPS and CUDA without Triton). `by_triton` chooses.

GELU in its tanh form has no function here: torch's own keeps its input only and is one kernel already.
"""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels import plain

__all__ = ["add_layer_norm", "geglu", "group_norm", "layer_norm"]

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """GroupNorm (Wu and He 2018) of x (N, C, H, W) with frozen weight and bias (C,), then SiLU if `silu`. C is a multiple of `groups`.

    The fused form answers in channels_last whatever x has; the plain one in x's own memory format on the CPU, else contiguous.
    """
    return _GroupNorm.apply(x, weight, bias, groups, eps, silu)


def geglu(p: Tensor) -> Tensor:
    """value * gelu(gate), erf form, of p (..., 2H) = value, gate (Shazeer 2020, "GLU variants improve transformer"): (..., H).

    The backward pass may write over p, which no other function may keep.
    """
    return _GEGLU.apply(p)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (Ba et al. 2016) over the last dimension D of x (..., D) with frozen weight and bias (D,), each of which may be None."""
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm(x + residual)), for x and residual of one shape and dtype. Keeps the sum, which the caller keeps anyway.

    Raises: ValueError when shapes or dtypes differ (no broadcasting: the gradient is one tensor for both).
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_layer_norm needs two tensors of one shape and dtype, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(residual.shape)} {residual.dtype}: expand or cast one of them first."
        )
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        ctx.form, ctx.groups, ctx.silu = _form(x), groups, silu
        y, *kept = ctx.form.group_norm(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(weight, bias, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, bias, *kept = ctx.saved_tensors
        return ctx.form.group_norm_backward(g, weight, bias, *kept, ctx.groups, ctx.silu), None, None, None, None, None


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
        return gx, gx, None, None, None


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
