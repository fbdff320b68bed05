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
PROGRAMS = 128  # about so many share the rows of the backward pass, each with sums of its own of the gradients of k and v
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
    sums = torch.empty(b * h, parts, 2, (meta["BT"] + meta["BU"]) * meta["BD"], device=q.device, dtype=torch.float32) if keys else None
    with torch.cuda.device_of(q):
        _backward[(parts, b * h)](
            q, k, v, g, gq, both, sums, arrivals(q.device, b * h), *_strides(q, k, v, g),
            s, t, h, each, d**-0.5 * LOG2_E, d**-0.5, D=d, **meta, num_warps=8,
        )  # fmt: skip
    return gq, *(both if keys else (None, None))


def _blocks(t: int, d: int) -> dict[str, int]:
    """Tiles: 77 keys are one of 64 and one of 16 (`BU`), which is less work than one of 128."""
    whole = max(16, triton.next_power_of_2(t))
    rest = triton.next_power_of_2(max(16, t - whole // 2))
    two = t > 16 and rest < whole // 2
    return {"BM": 64, "BT": whole // 2 if two else whole, "BU": rest if two else 0, "BD": max(16, triton.next_power_of_2(d))}


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
    D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    depth = tl.arange(0, BD)
    there = (rows < S)[:, None] & (depth < D)[None, :]
    tile = tl.load(q + (image * qb + head * qh + rows[:, None] * qs) * 8 + depth[None, :], mask=there, other=0.0)
    k += (image * kb + head * kh) * 8
    v += (image * vb + head * vh) * 8
    scores = _scores(tile, _keys(k, kt, 0, T, D, BT, BD), 0, T, scale)
    top = tl.max(scores, 1)
    if BU:
        more = _scores(tile, _keys(k, kt, BT, T, D, BU, BD), BT, T, scale)
        top = tl.maximum(top, tl.max(more, 1))
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype.element_ty), _keys(v, vt, 0, T, D, BT, BD))
    if BU:
        p = tl.exp2(more - top[:, None])
        total += tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype.element_ty), _keys(v, vt, BT, T, D, BU, BD), out)
    at = y + ((image * S + rows[:, None]) * H + head) * D + depth[None, :]
    tl.store(at, (out / total[:, None]).to(y.dtype.element_ty), mask=there)


@triton.jit
def _keys(at, row, first: tl.constexpr, T, D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr):
    """(B, BD) of keys or values from `first` on, 8 * `row` apart."""
    keys = first + tl.arange(0, B)
    depth = tl.arange(0, BD)
    return tl.load(at + (keys[:, None] * row).to(tl.int64) * 8 + depth[None, :], mask=(keys < T)[:, None] & (depth < D)[None, :], other=0.0)


@triton.jit
def _scores(tile, key, first: tl.constexpr, T, scale):
    """Of each row and key, to the base of 2 as `scale` has its logarithm in it; -inf past the last key."""
    keys = first + tl.arange(0, key.shape[0])
    return tl.where((keys < T)[None, :], tl.dot(tile, tl.trans(key)) * scale, -float("inf"))


@triton.jit(do_not_specialize=["S", "T", "H", "each"])
def _backward(
    q, k, v, g, gq, both, sums, arrived, qb, qs, qh, kb, kt, kh, vb, vt, vh, gb, gs, gh, S, T, H, each, scale, factor,
    D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    part = tl.program_id(0)
    depth = tl.arange(0, BD)
    k += (image * kb + head * kh) * 8
    v += (image * vb + head * vh) * 8
    key, value = _keys(k, kt, 0, T, D, BT, BD), _keys(v, vt, 0, T, D, BT, BD)
    g_key, g_value = tl.zeros([BD, BT], tl.float32), tl.zeros([BD, BT], tl.float32)
    if BU:
        key2, value2 = _keys(k, kt, BT, T, D, BU, BD), _keys(v, vt, BT, T, D, BU, BD)
        g_key2, g_value2 = tl.zeros([BD, BU], tl.float32), tl.zeros([BD, BU], tl.float32)
    for i in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(S, BM))):
        rows = (i * BM + tl.arange(0, BM)).to(tl.int64)
        there = (rows < S)[:, None] & (depth < D)[None, :]
        tile = tl.load(q + (image * qb + head * qh + rows[:, None] * qs) * 8 + depth[None, :], mask=there, other=0.0)
        grad = tl.load(g + (image * gb + head * gh + rows[:, None] * gs) * 8 + depth[None, :], mask=there, other=0.0)
        p = _scores(tile, key, 0, T, scale)
        top = tl.max(p, 1)
        if BU:
            p2 = _scores(tile, key2, BT, T, scale)
            top = tl.maximum(top, tl.max(p2, 1))
            p2 = tl.exp2(p2 - top[:, None])
        p = tl.exp2(p - top[:, None])
        total = tl.sum(p, 1)
        if BU:
            total += tl.sum(p2, 1)
            p2 *= (1 / total)[:, None]
        p *= (1 / total)[:, None]
        d = p * tl.dot(grad, tl.trans(value))
        mean = tl.sum(d, 1)
        if BU:
            d2 = p2 * tl.dot(grad, tl.trans(value2))
            mean += tl.sum(d2, 1)
            d2 = ((d2 - p2 * mean[:, None]) * factor).to(key.dtype)
        d = ((d - p * mean[:, None]) * factor).to(key.dtype)
        own = tl.dot(d, key)
        if BU:
            own = tl.dot(d2, key2, own)
        at = gq + ((image * S + rows[:, None]) * H + head) * D + depth[None, :]
        tl.store(at, own.to(gq.dtype.element_ty), mask=there)
        if both is not None:
            g_key = tl.dot(tl.trans(tile), d, g_key)
            g_value = tl.dot(tl.trans(grad), p.to(key.dtype), g_value)
            if BU:
                g_key2 = tl.dot(tl.trans(tile), d2, g_key2)
                g_value2 = tl.dot(tl.trans(grad), p2.to(key.dtype), g_value2)
    if both is not None:
        step: tl.constexpr = 2 * (BT + BU) * BD
        sums += tl.program_id(1).to(tl.int64) * tl.num_programs(0) * step
        mine = sums + part * step
        tl.store(mine + _at(0, BT, BD), g_key)
        tl.store(mine + _at(BT * BD, BT, BD), g_value)
        if BU:
            tl.store(mine + _at(2 * BT * BD, BU, BD), g_key2)
            tl.store(mine + _at((2 * BT + BU) * BD, BU, BD), g_value2)
        if last(arrived + tl.program_id(1), tl.num_programs(0)):
            parts = tl.num_programs(0)
            g_key = added_up(sums + _at(0, BT, BD), g_key, parts, step, 1)
            g_value = added_up(sums + _at(BT * BD, BT, BD), g_value, parts, step, 1)
            both += (image * T * H + head) * D
            values = both + tl.num_programs(1).to(tl.int64) * T * D
            _store(both, g_key, 0, T, H, D)
            _store(values, g_value, 0, T, H, D)
            if BU:
                g_key2 = added_up(sums + _at(2 * BT * BD, BU, BD), g_key2, parts, step, 1)
                g_value2 = added_up(sums + _at((2 * BT + BU) * BD, BU, BD), g_value2, parts, step, 1)
                _store(both, g_key2, BT, T, H, D)
                _store(values, g_value2, BT, T, H, D)


@triton.jit
def _at(first: tl.constexpr, B: tl.constexpr, BD: tl.constexpr):
    """Where the numbers of a (BD, B) tile lie whose first is number `first`."""
    return first + tl.arange(0, BD)[:, None] * B + tl.arange(0, B)[None, :]


@triton.jit
def _store(at, tile, first: tl.constexpr, T, H, D: tl.constexpr):
    """Write (BD, B) gradients to the keys from `first` on of (T, H, D)."""
    keys = first + tl.arange(0, tile.shape[1])
    depth = tl.arange(0, tile.shape[0])
    tl.store(at + keys[None, :] * (H * D) + depth[:, None], tile.to(at.dtype.element_ty), mask=(keys < T)[None, :] & (depth < D)[:, None])
