"""Attention to a few keys, as to a prompt's 77 tokens, in one Triton kernel for each direction. Import this only where Triton is installed.

General kernels walk over the keys with running sums and keep the result and its sums for the backward pass, which takes three to five of
them. Here all keys fit into one tile: so a row's softmax is made at once, and the backward pass makes it again from q and k alone.

Shapes: q (B, S, H, D); k, v (B, T, H, D) with T <= KEYS; any strides but for D, which is dense. Sums run in float32, in one order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.parts import added_up, arrivals, last

KEYS = 128
WIDEST = 64  # numbers of a head, D; above it the tiles ask for more of a multiprocessor's memory than consumer cards have
PROGRAMS = 256  # about so many share the rows of the backward pass, each with sums of its own of the gradients of k and v
LOG2_E = 1.4426950408889634


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether they can be computed here: numbers in 16 bits, whose heads begin on 16 bytes."""
    even = all(n % 8 == 0 for x in (q, k, v) for n in (*x.stride()[:3], x.shape[3])) and q.stride(3) == k.stride(3) == v.stride(3) == 1
    return even and k.shape[1] <= KEYS and q.shape[3] <= WIDEST and q.dtype in (torch.bfloat16, torch.float16)


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v: (B, S, H, D), dense."""
    (b, s, h, d), t = q.shape, k.shape[1]
    y = torch.empty(b, s, h, d, device=q.device, dtype=q.dtype)
    meta = _blocks(t, d)
    with torch.cuda.device_of(q):
        _forward[(triton.cdiv(s, meta["BM"]), b * h)](q, k, v, y, *_strides(q, k, v), s, t, h, d**-0.5 * LOG2_E, D=d, **meta, num_warps=4)
    return y


def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, the latter two where `keys` is true, of the gradient g (B, S, H, D) of what `forward` returns."""
    (b, s, h, d), t = q.shape, k.shape[1]
    if g.stride(3) != 1 or any(n % 8 for n in g.stride()[:3]):
        g = g.contiguous()
    gq = torch.empty(b, s, h, d, device=q.device, dtype=q.dtype)
    both = torch.empty(2, b, t, h, d, device=q.device, dtype=q.dtype) if keys else None
    meta = _blocks(t, d) | ({"BM": 128, "num_stages": 3} if _roomy(q.device) else {"BM": 64, "num_stages": 2})
    tiles = triton.cdiv(s, meta["BM"])
    each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // (b * h))))
    parts = triton.cdiv(tiles, each)
    sums = torch.empty(b * h, parts, 2, meta["BT"] * meta["BD"], device=q.device, dtype=torch.float32) if keys else None
    with torch.cuda.device_of(q):
        _backward[(parts, b * h)](
            q, k, v, g, gq, both, sums, arrivals(q.device, b * h), *_strides(q, k, v, g),
            s, t, h, each, d**-0.5 * LOG2_E, d**-0.5, D=d, **meta, num_warps=8,
        )  # fmt: skip
    return gq, *(both if keys else (None, None))


def _blocks(t: int, d: int) -> dict[str, int]:
    return {"BM": 64, "BT": max(16, triton.next_power_of_2(t)), "BD": max(16, triton.next_power_of_2(d))}


@functools.cache
def _roomy(device: torch.device) -> bool:
    """Whether a multiprocessor has the memory for the larger tile (144 KB), as data centers' GPUs have; consumer cards have 99 KB."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 150 * 1024


def _strides(*tensors: Tensor) -> list[int]:
    """In units of 8, by which the kernels multiply them, so that Triton reads 16 bytes at once."""
    return [n // 8 for x in tensors for n in x.stride()[:3]]


@triton.jit(do_not_specialize=["S", "T", "H"])
def _forward(
    q, k, v, y, qb, qs, qh, kb, kt, kh, vb, vt, vh, S, T, H, scale,
    D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    keys = tl.arange(0, BT)
    depth = tl.arange(0, BD)
    deep = (depth < D)[None, :]
    there = (rows < S)[:, None] & deep
    known = (keys < T)[:, None] & deep
    tile = tl.load(q + (image * qb + head * qh + rows[:, None] * qs) * 8 + depth[None, :], mask=there, other=0.0)
    key = tl.load(k + (image * kb + head * kh + keys[:, None] * kt) * 8 + depth[None, :], mask=known, other=0.0)
    value = tl.load(v + (image * vb + head * vh + keys[:, None] * vt) * 8 + depth[None, :], mask=known, other=0.0)
    p, total = _softmax(tile, key, keys, T, scale)
    out = tl.dot(p.to(value.dtype), value) / total[:, None]
    at = y + ((image * S + rows[:, None]) * H + head) * D + depth[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=there)


@triton.jit
def _softmax(tile, key, keys, T, scale):
    """(exp of each score less the row's largest, their sums). `scale` has the logarithm's base in it."""
    scores = tl.where((keys < T)[None, :], tl.dot(tile, tl.trans(key)) * scale, -float("inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit(do_not_specialize=["S", "T", "H", "each"])
def _backward(
    q, k, v, g, gq, both, sums, arrived, qb, qs, qh, kb, kt, kh, vb, vt, vh, gb, gs, gh, S, T, H, each, scale, factor,
    D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    part = tl.program_id(0)
    keys = tl.arange(0, BT)
    depth = tl.arange(0, BD)
    deep = (depth < D)[None, :]
    known = (keys < T)[:, None] & deep
    key = tl.load(k + (image * kb + head * kh + keys[:, None] * kt) * 8 + depth[None, :], mask=known, other=0.0)
    value = tl.load(v + (image * vb + head * vh + keys[:, None] * vt) * 8 + depth[None, :], mask=known, other=0.0)
    g_key = tl.zeros([BT, BD], tl.float32)
    g_value = tl.zeros([BT, BD], tl.float32)
    for i in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(S, BM))):
        rows = (i * BM + tl.arange(0, BM)).to(tl.int64)
        there = (rows < S)[:, None] & deep
        tile = tl.load(q + (image * qb + head * qh + rows[:, None] * qs) * 8 + depth[None, :], mask=there, other=0.0)
        grad = tl.load(g + (image * gb + head * gh + rows[:, None] * gs) * 8 + depth[None, :], mask=there, other=0.0)
        p, total = _softmax(tile, key, keys, T, scale)
        p *= (1 / total)[:, None]
        d = p * tl.dot(grad, tl.trans(value))
        d = ((d - p * tl.sum(d, 1)[:, None]) * factor).to(key.dtype)
        at = gq + ((image * S + rows[:, None]) * H + head) * D + depth[None, :]
        tl.store(at, tl.dot(d, key).to(gq.dtype.element_ty), mask=there)
        if both is not None:
            g_key = tl.dot(tl.trans(d), tile, g_key)
            g_value = tl.dot(tl.trans(p.to(key.dtype)), grad, g_value)
    if both is not None:
        sums += tl.program_id(1).to(tl.int64) * tl.num_programs(0) * (2 * BT * BD) + keys[:, None] * BD + depth[None, :]
        mine = sums + part * (2 * BT * BD)
        tl.store(mine, g_key)
        tl.store(mine + BT * BD, g_value)
        if last(arrived + tl.program_id(1), tl.num_programs(0)):
            at = both + ((image * T + keys[:, None]) * H + head) * D + depth[None, :]
            tl.store(at, added_up(sums, g_key, tl.num_programs(0), 2 * BT * BD, 1).to(both.dtype.element_ty), mask=known)
            at += tl.num_programs(1).to(tl.int64) * T * D
            tl.store(at, added_up(sums + BT * BD, g_value, tl.num_programs(0), 2 * BT * BD, 1).to(both.dtype.element_ty), mask=known)
