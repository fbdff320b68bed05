"""The functions of `trainer.kernels` as Triton kernels. Import this module only where Triton is installed.

Sizes that differ between layers and buckets are not specialised on, so few variants are compiled; block sizes follow from shapes, there is
no autotuning, which would launch and wait. Element offsets are 64-bit. Interface as in `plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 64  # tile of the group norm kernels: COLUMNS divides the channel counts of every SD family
SUMMED = 128  # rows that are summed at once: all of a chunk's up to 8,192, so that nothing waits for an earlier read
CHUNKS = 64  # at most so many partial sums for each channel
MANY = ["hw", "per", "groups", "chunks", "rows"]


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, x in channels_last, (N, groups, 2) = mean, 1 / standard deviation, the shift."""
    x = x.contiguous(memory_format=torch.channels_last)
    shift = None if shift is None else shift.contiguous()
    y = torch.empty_like(x)
    stat = _sweep(x, x, shift, weight, bias, None, y, groups, eps, silu)
    return y, x, stat, shift


def group_norm_backward(
    g: Tensor, weight: Tensor, bias: Tensor, x: Tensor, stat: Tensor, shift: Tensor | None, groups: int, silu: bool
) -> Tensor:
    g = g.contiguous(memory_format=torch.channels_last)
    gx = torch.empty_like(x)
    _sweep(x, g, shift, weight, bias, stat, gx, groups, 0.0, silu)
    return gx


def _sweep(x, g, shift, weight, bias, stat, out, groups, eps, silu) -> Tensor:
    """Sums by channel and chunk of rows, two numbers for each group, then every element. `stat` is None in the forward pass."""
    n, c, h, w = x.shape
    hw, per, back = h * w, c // groups, stat is not None
    chunks = min(triton.cdiv(hw, SUMMED), CHUNKS)
    rows = triton.cdiv(hw, chunks)
    part = torch.empty(n, chunks, 2, c, device=x.device, dtype=torch.float32)
    pair = torch.empty(n, groups, 2, device=x.device, dtype=torch.float32)
    columns = triton.cdiv(c, COLUMNS)
    meta = {"BACK": back, "SILU": silu, "R": ROWS, "BC": COLUMNS, "num_warps": 2}
    with torch.cuda.device_of(x):
        more = {"BACK": back, "SILU": silu and back, "R": SUMMED, "BC": COLUMNS, "num_warps": 8}
        _channel_sums[(chunks, columns, n)](x, g, shift, weight, bias, stat, part, hw, c, per, groups, rows, **more)
        _group_pairs[(groups, n)](
            x, shift, part, pair, hw, c, per, groups, chunks, eps, BACK=back, BK=CHUNKS, BP=triton.next_power_of_2(per)
        )
        _every_element[(triton.cdiv(hw, ROWS), columns, n)](
            x, g, shift, weight, bias, stat if back else pair, pair, out, hw, c, per, groups, **meta
        )
    return pair


@triton.jit
def _silu_slope(z):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit(do_not_specialize=MANY)
def _channel_sums(
    x, g, shift, weight, bias, stat, part, hw, c, per, groups, rows,
    BACK: tl.constexpr, SILU: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Forward: sum of v and v^2, v = x less the channel's first value (or the squares would cancel where the mean is large), whatever the
    shift. Backward: sum of d and d * normed, d = gradient of the normed value."""
    chunk = tl.program_id(0)
    n = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < c
    start = n * hw * c
    if BACK:
        pair = stat + (n * groups + column // per) * 2
        mean = tl.load(pair, mask=inside, other=0)
        rstd = tl.load(pair + 1, mask=inside, other=0)
        scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
        below = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
        if shift is not None:
            mean -= tl.load(shift + n * c + column, mask=inside, other=0).to(tl.float32)
    else:
        mean = tl.load(x + start + column, mask=inside, other=0).to(tl.float32)
    one = tl.zeros([BC], tl.float32)
    two = tl.zeros([BC], tl.float32)
    end = tl.minimum(hw, (chunk + 1) * rows)
    for first in range(chunk * rows, end, R):
        row = first + tl.arange(0, R)
        mask = (row < end)[:, None] & inside[None, :]
        at = start + row[:, None].to(tl.int64) * c + column[None, :]
        v = tl.load(x + at, mask=mask, other=0).to(tl.float32) - mean[None, :]
        if BACK:
            v *= rstd[None, :]
            d = tl.load(g + at, mask=mask, other=0).to(tl.float32)
            if SILU:
                d *= _silu_slope(v * scale[None, :] + below[None, :])
            d *= scale[None, :]
            one += tl.sum(d, 0)
            two += tl.sum(d * v, 0)
        else:
            v = tl.where(mask, v, 0.0)
            one += tl.sum(v, 0)
            two += tl.sum(v * v, 0)
    out = part + (n * tl.num_programs(0) + chunk) * 2 * c + column
    tl.store(out, one, mask=inside)
    tl.store(out + c, two, mask=inside)


@triton.jit(do_not_specialize=MANY)
def _group_pairs(x, shift, part, pair, hw, c, per, groups, chunks, eps, BACK: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr):
    """Forward: mean and 1 / standard deviation of each group. Backward: mean of d and of d * normed."""
    group = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    chunk = tl.arange(0, BK)
    column = group * per + tl.arange(0, BP)
    inside = tl.arange(0, BP) < per
    at = part + (n * chunks + chunk[:, None]) * 2 * c + column[None, :]
    mask = (chunk < chunks)[:, None] & inside[None, :]
    one = tl.sum(tl.load(at, mask=mask, other=0), 0)
    two = tl.sum(tl.load(at + c, mask=mask, other=0), 0)
    height = hw * 1.0
    count = height * per
    out = pair + (n * groups + group) * 2
    if BACK:
        tl.store(out, tl.sum(one, 0) / count)
        tl.store(out + 1, tl.sum(two, 0) / count)
    else:
        first = tl.load(x + n * hw * c + column, mask=inside, other=0).to(tl.float32)
        if shift is not None:
            first += tl.load(shift + n * c + column, mask=inside, other=0).to(tl.float32)
        mean_c = first + one / height
        mean = tl.sum(mean_c, 0) / per
        apart = tl.where(inside, mean_c - mean, 0.0)
        within = tl.sum(two - one * one / height, 0)
        variance = tl.maximum(within + height * tl.sum(apart * apart, 0), 0.0) / count
        tl.store(out, mean)
        tl.store(out + 1, 1 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=MANY)
def _every_element(
    x, g, shift, weight, bias, stat, pair, out, hw, c, per, groups,
    BACK: tl.constexpr, SILU: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < c
    mask = (row < hw)[:, None] & inside[None, :]
    at = n * hw * c + row[:, None].to(tl.int64) * c + column[None, :]
    group = (n * groups + column // per) * 2
    mean = tl.load(stat + group, mask=inside, other=0)
    rstd = tl.load(stat + group + 1, mask=inside, other=0)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    below = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    if shift is not None:
        mean -= tl.load(shift + n * c + column, mask=inside, other=0).to(tl.float32)
    v = (tl.load(x + at, mask=mask, other=0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    z = v * scale[None, :] + below[None, :]
    if BACK:
        d = tl.load(g + at, mask=mask, other=0).to(tl.float32)
        if SILU:
            d *= _silu_slope(z)
        mean_d = tl.load(pair + group, mask=inside, other=0)
        mean_dv = tl.load(pair + group + 1, mask=inside, other=0)
        z = rstd[None, :] * (d * scale[None, :] - mean_d[None, :] - v * mean_dv[None, :])
    elif SILU:
        z *= tl.sigmoid(z)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=mask)


def geglu(p: Tensor) -> Tensor:
    p = p.contiguous()
    y = p.new_empty(*p.shape[:-1], p.shape[-1] // 2)
    _gate(p, p, y, y.shape[-1], False)
    return y


def geglu_backward(g: Tensor, p: Tensor) -> Tensor:
    """The gradient takes the place of p, which nothing reads after it: it is the largest tensor of a transformer block."""
    p = p.contiguous()
    _gate(p, g.contiguous(), p, g.shape[-1], True)
    return p


def _gate(p, g, out, h, back) -> None:
    count = p.numel() // (2 * h)
    with torch.cuda.device_of(p):
        _geglu[(triton.cdiv(count, 8), triton.cdiv(h, 256))](p, g, out, count, h, BACK=back, R=8, BC=256)


@triton.jit(do_not_specialize=["count"])
def _geglu(p, g, out, count, h, BACK: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (row < count)[:, None] & (column < h)[None, :]
    whole = row[:, None] * (2 * h) + column[None, :]
    half = row[:, None] * h + column[None, :]
    value = tl.load(p + whole, mask=mask, other=0).to(tl.float32)
    gate = tl.load(p + whole + h, mask=mask, other=0).to(tl.float32)
    # The normal distribution below the gate, to 8e-8 (Abramowitz and Stegun 1964, 7.1.26): erf alone would take longer than the memory
    far = tl.exp(-0.5 * gate * gate)
    t = 1 / (1 + 0.3275911 * 0.7071067811865476 * tl.abs(gate))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * far
    below = tl.where(gate < 0, tail, 1 - tail)
    if BACK:
        d = tl.load(g + half, mask=mask, other=0).to(tl.float32)
        slope = below + gate * far * 0.3989422804014327
        tl.store(out + whole, (d * gate * below).to(out.dtype.element_ty), mask=mask)
        tl.store(out + whole + h, (d * value * slope).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + half, (value * gate * below).to(out.dtype.element_ty), mask=mask)


def add_biased(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias, in the place of h, which is in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    c = h.shape[1]
    rows = h.numel() // c
    with torch.cuda.device_of(h):
        _add_biased[(triton.cdiv(rows, ROWS), triton.cdiv(c, COLUMNS))](x, h, bias, rows, c, R=ROWS, BC=COLUMNS, num_warps=2)
    return h


@triton.jit(do_not_specialize=["rows"])
def _add_biased(x, h, bias, rows, c, R: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < c
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * c + column[None, :]
    total = tl.load(x + at, mask=mask, other=0).to(tl.float32) + tl.load(h + at, mask=mask, other=0).to(tl.float32)
    total += tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(h + at, total.to(h.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (rows,), 1 / standard deviation (rows,)."""
    _, y, mean, rstd = _norm_rows(x, None, weight, bias, eps)
    return y, mean, rstd


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return _norm_rows(x, None if residual is None else residual.contiguous(), weight, bias, eps)


def layer_norm_backward(g: Tensor, weight: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, g_total: Tensor | None = None) -> Tensor:
    x, g = x.contiguous(), g.contiguous()
    g_total = None if g_total is None else g_total.contiguous()
    gx = torch.empty_like(x)
    count, d = mean.numel(), x.shape[-1]
    grid, meta = _row_blocks(count, d)
    with torch.cuda.device_of(x):
        _layer_norm_backward[grid](x, g, g_total, weight, mean, rstd, gx, count, d, **meta)
    return gx


def _norm_rows(x, residual, weight, bias, eps):
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    d = x.shape[-1]
    count = x.numel() // d
    mean, rstd = torch.empty(2, count, device=x.device, dtype=torch.float32).unbind()
    grid, meta = _row_blocks(count, d)
    with torch.cuda.device_of(x):
        _layer_norm[grid](x, residual, weight, bias, total, y, mean, rstd, count, d, eps, **meta)
    return total, y, mean, rstd


def _row_blocks(count: int, d: int) -> tuple[tuple[int], dict]:
    width = triton.next_power_of_2(d)
    height = max(1, 2048 // width)
    return (triton.cdiv(count, height),), {"R": height, "BD": width, "num_warps": 4 if width <= 4096 else 8}


@triton.jit(do_not_specialize=["count"])
def _layer_norm(x, residual, weight, bias, total, y, mean, rstd, count, d, eps, R: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BD)
    inside = column < d
    mask = (row < count)[:, None] & inside[None, :]
    at = row[:, None] * d + column[None, :]
    v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
        narrow = v.to(total.dtype.element_ty)
        tl.store(total + at, narrow, mask=mask)
        v = narrow.to(tl.float32)  # backward reads the rounded sum, so the norm is that of the rounded sum
    m = tl.sum(v, 1) / d
    v = tl.where(mask, v - m[:, None], 0.0)
    s = 1 / tl.sqrt(tl.sum(v * v, 1) / d + eps)
    v *= s[:, None]
    if weight is not None:
        v *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, m, mask=row < count)
    tl.store(rstd + row, s, mask=row < count)


@triton.jit(do_not_specialize=["count"])
def _layer_norm_backward(x, g, g_total, weight, mean, rstd, gx, count, d, R: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BD)
    inside = column < d
    mask = (row < count)[:, None] & inside[None, :]
    at = row[:, None] * d + column[None, :]
    m = tl.load(mean + row, mask=row < count, other=0)[:, None]
    s = tl.load(rstd + row, mask=row < count, other=0)[:, None]
    v = tl.where(mask, (tl.load(x + at, mask=mask, other=0).to(tl.float32) - m) * s, 0.0)
    w = tl.load(g + at, mask=mask, other=0).to(tl.float32)
    if weight is not None:
        w *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    w = s * (w - (tl.sum(w, 1) / d)[:, None] - v * (tl.sum(w * v, 1) / d)[:, None])
    if g_total is not None:
        w += tl.load(g_total + at, mask=mask, other=0).to(tl.float32)
    tl.store(gx + at, w.to(gx.dtype.element_ty), mask=mask)
