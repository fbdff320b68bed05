"""A LoRA layer over one or several Linears in few Triton kernels. Import this only where Triton is installed.

The frozen product and the low-rank one share the reading of their input: the tile of x that meets a tile of W also meets `down`, and what
comes of it meets `up` while the tile of the result is still in registers. So a layer's forward pass is one kernel in place of three, its
backward pass two in place of five to seven. Where cuBLAS' frozen product is quicker, the low-rank ones are added to it by `add_low`.

Shapes: x (M, K); `weight` (P * N, K) of P = 1 to 3 layers that read the same x, one below the other; `down` (P * R, K); `up` (P, N, R);
h = x down' (M, P * R); y (P, M, N). All are of one 16-bit dtype, the last dimension of each dense; the rows of x, `weight`, h and the
gradients may lie apart. Sums run in float32, in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.parts import added_up, arrivals, last

LARGEST_RANK = 64
# Up to this many operations (of x weight'), the whole layer is one kernel; above it cuBLAS' frozen product is quicker by more than the other
# kernels cost. Measured on an H200 (us, one kernel / cuBLAS and three): M 4096 x 320 x 320 7 / 12, 1024 x 1280 x 1280 15 / 17, 4096 x 640 x
# 1920 33 / 33, 4096 x 1280 x 1280 39 / 33. GPUs before it have the same matrix instructions in both.
WHOLE = 12e9
GROUP = 8  # rows of tiles that are computed before the next column, so that the weights are read from the L2 cache
PROGRAMS, PARTS = 480, 16  # about so many share the rows where gradients are made, in at most so many parts


def fits(rank: int, sides: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether layers with this rank and these sides (N, K) can be computed here."""
    return rank <= LARGEST_RANK and rank % 4 == 0 and all(s % 16 == 0 for s in sides) and dtype in (torch.bfloat16, torch.float16)


def whole(rows: int, outs: int, inputs: int) -> bool:
    """Whether `forward` and `backward` are the quickest way for so many rows, outputs (of all layers) and inputs."""
    return 2 * rows * outs * inputs <= WHOLE


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y (P, M, N), h (M, P * R)): y_p = x weight_p' + bias_p + scale * (x down_p') up_p'."""
    (m, k), (p, n, r) = x.shape, up.shape
    y = x.new_empty(p, m, n)
    h = x.new_empty(m, p * r)
    bm, bn, bk, stages = _tile(m)
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn), p)
    with torch.cuda.device_of(x):
        _forward[grid](
            x, weight, bias, down, up, y, h, scale, m, n, k, x.stride(0), weight.stride(0),
            R=r, RB=_block(r), BM=bm, BN=bn, BK=bk, G=GROUP, EVEN=k % bk == 0 and n % bn == 0, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return y, h


def backward(gs: list[Tensor], weight: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(gradient of x (M, K), low (M, P * R)) of gradients g_p (M, N), whose rows may lie apart: low_p = g_p up_p, without the scale."""
    (m, n), k, (p, _, r) = gs[0].shape, down.shape[1], up.shape
    gx = gs[0].new_empty(m, k)
    low = gs[0].new_empty(m, p * r)
    bm, bk, bn, stages = _tile(m)
    grid = (triton.cdiv(m, bm) * triton.cdiv(k, bk),)
    more = [gs[min(i, p - 1)] for i in (1, 2)]
    with torch.cuda.device_of(gx):
        _backward[grid](
            gs[0], *more, weight, down, up, gx, low, scale, m, n, k, gs[0].stride(0), more[0].stride(0), more[1].stride(0), weight.stride(0),
            P=p, R=r, RB=_block(r), BM=bm, BN=bn, BK=bk, G=GROUP, EVEN=k % bk == 0 and n % bn == 0, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return gx, low


def add_low(y: Tensor, h: Tensor, up: Tensor, scale: float) -> None:
    """Add scale * h_p up_p' to each y_p of y (P, M, N), dense; h (M, P * R), up (P, N, R) with any strides."""
    p, m, n = y.shape
    r = up.shape[2]
    bm, bn = 32, 128
    with torch.cuda.device_of(y):
        _add_low[(triton.cdiv(m, bm), triton.cdiv(n, bn), p)](
            y, h, up, scale, m, n, h.stride(0), *up.stride(), R=r, RB=_block(r), BM=bm, BN=bn, num_warps=4
        )


def joined(xs: list[Tensor], low: Tensor, scale: float) -> Tensor:
    """(M, P * K + P * R): the x_p (M, K), whose rows may lie apart, side by side, then scale * x_p low_p; low (P, K, R) with any strides."""
    (m, k), (p, _, r) = xs[0].shape, low.shape
    y = xs[0].new_empty(m, p * (k + r))
    more = [xs[min(i, p - 1)] for i in (1, 2)]
    bm, bk = 64, 128
    with torch.cuda.device_of(y):
        _joined[(triton.cdiv(m, bm), p)](
            xs[0], *more, low, y, scale, m, k, xs[0].stride(0), more[0].stride(0), more[1].stride(0), *low.stride(),
            R=r, RB=_block(r), BM=bm, BK=bk, num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


def lay(work: Tensor, table: Tensor, most: int) -> None:
    """Copy tensors of `work` (flat) to where they lie in other ones. `table` (tensors, 5), int64: where each begins in `work`, the address
    that it goes to, its rows, its columns, and how many numbers the rows lie apart there; `most` numbers are in the largest."""
    size = 4096
    with torch.cuda.device_of(work):
        _lay[(triton.cdiv(most, size), len(table))](work, table, SIZE=size, num_warps=4)


def gradients(
    x: Tensor, h: Tensor, gs: list[Tensor], low: Tensor, down_grad: Tensor, up_grad: Tensor, down_scale: float, up_scale: float
) -> None:
    """Add down_scale * low' x to `down_grad` (P * R, K) and up_scale * g_p' h_p to `up_grad` (P, N, R), both dense."""
    (m, k), (p, n, r) = x.shape, up_grad.shape
    bm, bc = 64, 64
    tiles = p * triton.cdiv(k, bc) + p * triton.cdiv(n, bc)
    rows = triton.cdiv(triton.cdiv(m, max(1, min(PROGRAMS // tiles, PARTS))), bm) * bm
    parts = triton.cdiv(m, rows)
    sums = torch.empty(tiles, parts, _block(r) * bc, device=x.device, dtype=torch.float32)
    more = [gs[min(i, p - 1)] for i in (1, 2)]
    with torch.cuda.device_of(x):
        _gradients[(tiles, parts)](
            x, h, gs[0], *more, low, sums, arrivals(x.device, tiles), down_grad, up_grad, down_scale, up_scale,
            m, n, k, rows, x.stride(0), h.stride(0), low.stride(0), gs[0].stride(0), more[0].stride(0), more[1].stride(0),
            P=p, R=r, RB=_block(r), BM=bm, BC=bc, num_warps=4, num_stages=3,
        )  # fmt: skip


def _tile(m: int) -> tuple[int, int, int, int]:
    """(rows, columns, depth, stages) of a tile. With rank 64 they take 98 KB of a multiprocessor's memory at most, as consumer cards have."""
    return (64, 128, 64, 3) if m >= 512 else (64, 64, 64, 4)


def _block(rank: int) -> int:
    """What a rank takes in a tile: matrix instructions are 16 wide."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _order(pid, m, n, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
    """(row, column) of tile `pid`, G rows of tiles at a time."""
    rows = tl.cdiv(m, BM)
    columns = tl.cdiv(n, BN)
    first = pid // (G * columns) * G
    height = tl.minimum(rows - first, G)
    inner = pid % (G * columns)
    return first + inner % height, inner // height


@triton.jit(do_not_specialize=["M"])
def _forward(
    x, weight, bias, down, up, y, h, scale, M, N, K, x_row, w_row,
    R: tl.constexpr, RB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1).to(tl.int64)
    row, column = _order(tl.program_id(0), M, N, BM, BN, G)
    rows = row * BM + tl.arange(0, BM)
    columns = column * BN + tl.arange(0, BN)
    ranks = tl.arange(0, RB)
    ranked = ranks < R
    depth = tl.arange(0, BK)
    inside = (rows < M)[:, None]
    at_x = x + (rows % M).to(tl.int64)[:, None] * x_row + depth[None, :]  # rows past the end are computed and not stored
    at_w = weight + (piece * N + columns)[None, :] * w_row + depth[:, None]
    at_d = down + (piece * R + ranks)[None, :] * K + depth[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    low = tl.zeros([BM, RB], tl.float32)
    for first in range(0, K, BK):
        if EVEN:
            tile = tl.load(at_x)
            total = tl.dot(tile, tl.load(at_w), total)
            low = tl.dot(tile, tl.load(at_d) if R == RB else tl.load(at_d, mask=ranked[None, :], other=0.0), low)
        else:
            deep = depth < K - first
            tile = tl.load(at_x, mask=deep[None, :], other=0.0)
            total = tl.dot(tile, tl.load(at_w, mask=deep[:, None] & (columns < N)[None, :], other=0.0), total)
            low = tl.dot(tile, tl.load(at_d, mask=deep[:, None] & ranked[None, :], other=0.0), low)
        at_x += BK
        at_w += BK
        at_d += BK
    narrow = low.to(x.dtype.element_ty)
    pieces = tl.num_programs(1)
    if column == 0:
        tl.store(h + rows.to(tl.int64)[:, None] * (pieces * R) + (piece * R + ranks)[None, :], narrow, mask=inside & ranked[None, :])
    own = tl.load(up + piece * N * R + columns[None, :] * R + ranks[:, None], mask=(columns < N)[None, :] & ranked[:, None], other=0.0)
    total += scale * tl.dot(narrow, own)
    if bias is not None:
        total += tl.load(bias + piece * N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at_y = y + (piece * M + rows)[:, None] * N + columns[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=inside & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _backward(
    g0, g1, g2, weight, down, up, gx, low, scale, M, N, K, row0, row1, row2, w_row,
    P: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row, column = _order(tl.program_id(0), M, K, BM, BK, G)
    rows = row * BM + tl.arange(0, BM)
    columns = column * BK + tl.arange(0, BK)
    ranks = tl.arange(0, RB)
    ranked = ranks < R
    depth = tl.arange(0, BN)
    inside = (rows < M)[:, None]
    total = tl.zeros([BM, BK], tl.float32)
    for piece in tl.static_range(P):
        g = g0 if piece == 0 else g1 if piece == 1 else g2
        g_row = row0 if piece == 0 else row1 if piece == 1 else row2
        at_g = g + (rows % M).to(tl.int64)[:, None] * g_row + depth[None, :]
        at_w = weight + (piece * N + depth).to(tl.int64)[:, None] * w_row + columns[None, :]
        at_u = up + (piece * N + depth)[:, None] * R + ranks[None, :]
        own = tl.zeros([BM, RB], tl.float32)
        for first in range(0, N, BN):
            if EVEN:
                tile = tl.load(at_g)
                total = tl.dot(tile, tl.load(at_w), total)
                own = tl.dot(tile, tl.load(at_u) if R == RB else tl.load(at_u, mask=ranked[None, :], other=0.0), own)
            else:
                deep = depth < N - first
                tile = tl.load(at_g, mask=deep[None, :], other=0.0)
                total = tl.dot(tile, tl.load(at_w, mask=deep[:, None] & (columns < K)[None, :], other=0.0), total)
                own = tl.dot(tile, tl.load(at_u, mask=deep[:, None] & ranked[None, :], other=0.0), own)
            at_g += BN
            at_w += BN * w_row
            at_u += BN * R
        narrow = own.to(gx.dtype.element_ty)
        if column == 0:
            tl.store(low + rows.to(tl.int64)[:, None] * (P * R) + (piece * R + ranks)[None, :], narrow, mask=inside & ranked[None, :])
        theirs = tl.load(
            down + (piece * R + ranks)[:, None] * K + columns[None, :], mask=ranked[:, None] & (columns < K)[None, :], other=0.0
        )
        total += scale * tl.dot(narrow, theirs)
    tl.store(gx + rows.to(tl.int64)[:, None] * K + columns[None, :], total.to(gx.dtype.element_ty), mask=inside & (columns < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def _add_low(
    y, h, up, scale, M, N, h_row, up_piece, up_column, up_rank, R: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    piece = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, RB)
    inside, across, ranked = (rows < M)[:, None], (columns < N)[None, :], ranks < R
    low = tl.load(h + rows[:, None] * h_row + (piece * R + ranks)[None, :], mask=inside & ranked[None, :], other=0.0)
    at_up = up + piece * up_piece + columns[None, :] * up_column + ranks[:, None] * up_rank
    own = tl.load(at_up, mask=across & ranked[:, None], other=0.0)
    at = y + (piece * M + rows[:, None]) * N + columns[None, :]
    total = tl.load(at, mask=inside & across, other=0.0).to(tl.float32) + scale * tl.dot(low, own)
    tl.store(at, total.to(y.dtype.element_ty), mask=inside & across)


@triton.jit(do_not_specialize=["M"])
def _joined(
    x0, x1, x2, low, y, scale, M, K, row0, row1, row2, low_piece, low_row, low_rank,
    R: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1).to(tl.int64)
    pieces = tl.num_programs(1)
    x = x0 if piece == 0 else x1 if piece == 1 else x2
    x_row = row0 if piece == 0 else row1 if piece == 1 else row2
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ranks = tl.arange(0, RB)
    inside, ranked = (rows < M)[:, None], ranks < R
    y += rows[:, None] * (pieces * (K + R))
    total = tl.zeros([BM, RB], tl.float32)
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        mask = inside & (columns < K)[None, :]
        tile = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=mask, other=0.0)
        at_low = low + piece * low_piece + columns[:, None] * low_row + ranks[None, :] * low_rank
        total = tl.dot(tile, tl.load(at_low, mask=(columns < K)[:, None] & ranked[None, :], other=0.0), total)
        tl.store(y + piece * K + columns[None, :], tile, mask=mask)
    at = y + pieces * K + (piece * R + ranks)[None, :]
    tl.store(at, (scale * total).to(y.dtype.element_ty), mask=inside & ranked[None, :])


@triton.jit
def _lay(work, table, SIZE: tl.constexpr):
    table += tl.program_id(1) * 5
    begin = tl.load(table)
    to = tl.load(table + 1).to(tl.pointer_type(work.dtype.element_ty))
    rows, columns, apart = tl.load(table + 2), tl.load(table + 3), tl.load(table + 4)
    number = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = number < rows * columns
    tl.store(to + number // columns * apart + number % columns, tl.load(work + begin + number, mask=there), mask=there)


@triton.jit(do_not_specialize=["M", "rows"])
def _gradients(
    x, h, g0, g1, g2, low, sums, arrived, down_grad, up_grad, down_scale, up_scale, M, N, K, rows, x_row, h_row, low_row, row0, row1, row2,
    P: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the rows: the first tiles of low' x, the others of g' h. The last part of a tile to be done adds up all of them."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    begin = part * rows
    end = tl.minimum(M, begin + rows)
    across = tl.arange(0, BM)
    ranks = tl.arange(0, RB)
    ranked = ranks < R
    each = tl.arange(0, BC)
    parts = tl.num_programs(1)
    sums += pid.to(tl.int64) * parts * (RB * BC)
    own_sums = sums + part * (RB * BC)
    arrived += pid
    wide = tl.cdiv(K, BC)
    if pid < P * wide:
        piece = pid // wide
        columns = pid % wide * BC + each
        inside = (columns < K)[None, :]
        total = tl.zeros([RB, BC], tl.float32)
        for first in range(begin, end, BM):
            row = (first + across).to(tl.int64)
            there = row < end
            at_low = low + row[None, :] * low_row + (piece * R + ranks)[:, None]
            one = tl.load(at_low, mask=ranked[:, None] & there[None, :], other=0.0)
            two = tl.load(x + row[:, None] * x_row + columns[None, :], mask=there[:, None] & inside, other=0.0)
            total = tl.dot(one, two, total)
        at = ranks[:, None] * BC + each[None, :]
        tl.store(own_sums + at, total)
        if last(arrived, parts):
            total = added_up(sums + at, total, parts, RB * BC, 4)
            to = down_grad + (piece * R + ranks)[:, None] * K + columns[None, :]
            mask = ranked[:, None] & inside
            tl.store(to, (tl.load(to, mask=mask, other=0.0).to(tl.float32) + down_scale * total).to(to.dtype.element_ty), mask=mask)
    else:
        tall = tl.cdiv(N, BC)
        pid -= P * wide
        for piece in tl.static_range(P):
            if pid // tall == piece:
                g = g0 if piece == 0 else g1 if piece == 1 else g2
                g_row = row0 if piece == 0 else row1 if piece == 1 else row2
                columns = pid % tall * BC + each
                inside = (columns < N)[:, None]
                own = tl.zeros([BC, RB], tl.float32)
                for first in range(begin, end, BM):
                    row = (first + across).to(tl.int64)
                    there = row < end
                    one = tl.load(g + row[None, :] * g_row + columns[:, None], mask=inside & there[None, :], other=0.0)
                    at_h = h + row[:, None] * h_row + (piece * R + ranks)[None, :]
                    two = tl.load(at_h, mask=there[:, None] & ranked[None, :], other=0.0)
                    own = tl.dot(one, two, own)
                at = each[:, None] * RB + ranks[None, :]
                tl.store(own_sums + at, own)
                if last(arrived, parts):
                    own = added_up(sums + at, own, parts, RB * BC, 4)
                    to = up_grad + (piece * N + columns)[:, None] * R + ranks[None, :]
                    mask = inside & ranked[None, :]
                    tl.store(to, (tl.load(to, mask=mask, other=0.0).to(tl.float32) + up_scale * own).to(to.dtype.element_ty), mask=mask)
