"""Widening weights of 4 and 8 bits, each as one Triton kernel (formats: trainer.lean.narrow). Import this only where Triton is installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # weights to a scale
PIECE = 2048  # weights that one program widens


def widen4(codes: Tensor, scales: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(2n,) of `dtype`: table[half] * scale in float32, rounded once; codes (n,) uint8, scales (2n / 64,), table (16,) float32."""
    out = torch.empty(2 * len(codes), device=codes.device, dtype=dtype)
    with torch.cuda.device_of(codes):
        _widen4[(triton.cdiv(len(out), PIECE),)](codes, scales, table, out, len(out), B=BLOCK, P=PIECE)
    return out


def widen8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) of `dtype`: code * scale in float32, rounded once; codes (n,) int8, scales (n / 64,)."""
    out = torch.empty(len(codes), device=codes.device, dtype=dtype)
    with torch.cuda.device_of(codes):
        _widen8[(triton.cdiv(len(out), PIECE),)](codes, scales, out, len(out), B=BLOCK, P=PIECE)
    return out


@triton.jit(do_not_specialize=["n"])
def _widen8(codes, scales, out, n, B: tl.constexpr, P: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * P
    at = tl.arange(0, P)
    inside = at < n - first
    code = tl.load(codes + first + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + first // B + at // B, mask=inside, other=0).to(tl.float32)
    tl.store(out + first + at, (code * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _widen4(codes, scales, table, out, n, B: tl.constexpr, P: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * P
    at = tl.arange(0, P)
    inside = at < n - first
    byte = tl.load(codes + first // 2 + at // 2, mask=inside, other=0).to(tl.int32)
    half = tl.where(at % 2 == 0, byte >> 4, byte) & 15
    scale = tl.load(scales + first // B + at // B, mask=inside, other=0).to(tl.float32)
    tl.store(out + first + at, (tl.load(table + half) * scale).to(out.dtype.element_ty), mask=inside)
