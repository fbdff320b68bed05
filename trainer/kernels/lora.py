"""A LoRA layer over one or several Linears in few Triton kernels. Import this only where Triton is installed.

The frozen product and the low-rank one share the reading of their input: the tile of x that meets a tile of W also meets `down`, and what
comes of it meets `up` while the tile of the result is still in registers. So a layer's forward pass is one kernel in place of three, its
backward pass one in place of three. Where cuBLAS' frozen product is quicker, it takes the low-rank one in: `joined` puts h beside x, and
`up` stands beside `weight`. `Gradients` are those of `down` and `up`, of a block's layers at once.

Shapes: x (M, K); `weight` (P * N, K) of P = 1 to 3 layers that read the same x, one below the other; `down` (P * R, K); `up` (P, N, R);
h = x down' (M, P * R); y (P, M, N). All are of one 16-bit dtype, the last dimension of each dense; the rows of x, `weight`, h and the
gradients may lie apart. Sums run in float32, in one order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.parts import added_up, arrivals, last

LARGEST_RANK = 64
# Up to this many operations (of x weight'), the whole layer is one kernel; above it cuBLAS' frozen product is quicker by more than the other
# kernels cost. Measured on an H200 (us, one kernel / cuBLAS and three, of which `joined` has made one since): M 4096 x 320 x 320 7 / 12,
# 1024 x 1280 x 1280 15 / 17, 4096 x 640 x 1920 33 / 33, 4096 x 1280 x 1280 39 / 33. GPUs before it have the same matrix instructions in both.
WHOLE = 12e9
GROUP = 8  # rows of tiles that are computed before the next column, so that the weights are read from the L2 cache
JOINED = 264  # about so many programs of `joined`, and no fewer than there are tiles of rows
JOBS = 16  # gradients that are made at once: those of a transformer's block
PROGRAMS, FEWEST = 528, 256  # about so many programs make them, each from so many rows at least


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
    y = xs[0].new_empty(m, even(p * (k + r)))[:, : p * (k + r)]
    more = [xs[min(i, p - 1)] for i in (1, 2)]
    bm, bk = 64, 64
    stages = 4 if _block(r) == 16 else 1  # read ahead, a wider `low` gave wrong sums now and then with Triton 3.6 on an H200
    tiles = triton.cdiv(m, bm)
    each = triton.cdiv(triton.cdiv(k, bk), max(1, JOINED // (tiles * p)))
    parts = triton.cdiv(triton.cdiv(k, bk), each)
    sums = torch.empty(tiles * p, parts, bm * _block(r), device=y.device, dtype=torch.float32) if parts > 1 else None
    with torch.cuda.device_of(y):
        _joined[(parts, tiles, p)](
            xs[0], *more, low, y, sums, arrivals(y.device, tiles * p), scale, m, k, each, y.stride(0),
            xs[0].stride(0), more[0].stride(0), more[1].stride(0), *low.stride(),
            R=r, RB=_block(r), BM=bm, BK=bk, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return y


def even(columns: int) -> int:
    """How far rows of so many numbers lie apart, so that Triton knows that each begins on 16 bytes."""
    return -(-columns // 16) * 16


def lay(work: Tensor, table: Tensor, most: int) -> None:
    """Copy tensors of `work` (flat) to where they lie in other ones. `table` (tensors, 5), int64: where each begins in `work`, the address
    that it goes to, its rows, its columns, and how many numbers the rows lie apart there; `most` numbers are in the largest."""
    size = 4096
    with torch.cuda.device_of(work):
        _lay[(triton.cdiv(most, size), len(table))](work, table, SIZE=size, num_warps=4)


class Gradients:
    """Gradients of several layers, made by one kernel: one alone is done before it has filled a GPU."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def add(
        self, x: Tensor, h: Tensor, gs: list[Tensor], low: Tensor, down_grad: Tensor, up_grad: Tensor, down_scale: float, up_scale: float
    ) -> None:
        """Have down_scale * low' x added to `down_grad` (P * R, K) and up_scale * g_p' h_p to `up_grad` (P, N, R): by now, or by `flush`."""
        rank = up_grad.shape[2]
        if self._jobs and (len(self._jobs) + 2 * len(gs) > JOBS or self._jobs[0][2].shape[0] != rank):
            self.flush()
        for own_low, own_h, g, down, up in zip(
            low.split(rank, 1), h.split(rank, 1), gs, down_grad.split(rank), up_grad.unbind(), strict=True
        ):
            self._jobs += [(own_low, x, down, down_scale), (own_h, g, up.t(), up_scale)]
        if len(self._jobs) == JOBS:  # at once, so that the next block finds their memory free
            self.flush()

    def forget(self) -> None:
        """Drop those that wait, of a step that broke off."""
        self._jobs = []

    def flush(self) -> None:
        """Make those that wait."""
        if not self._jobs:
            return
        jobs, self._jobs = self._jobs, []
        bm, bc = 64, 64
        rank = jobs[0][2].shape[0]
        tiles = [triton.cdiv(broad.shape[1], bc) for _, broad, _, _ in jobs]
        whole = sum(n * len(broad) for n, (_, broad, _, _) in zip(tiles, jobs, strict=True))  # rows of all tiles
        rows = max(FEWEST, triton.cdiv(triton.cdiv(whole, PROGRAMS), bm) * bm)
        programs = sum(n * triton.cdiv(len(broad), rows) for n, (_, broad, _, _) in zip(tiles, jobs, strict=True))
        thin, broad, out, scales = (list(column) for column in zip(*jobs, *[jobs[0]] * (JOBS - len(jobs)), strict=True))
        device, unit = out[0].device, math.gcd(rank, 16)
        sums = torch.empty(programs, _block(rank) * bc, device=device, dtype=torch.float32)
        with torch.cuda.device_of(sums):
            _gradients[(programs,)](
                tuple(thin), tuple(broad), tuple(out), tuple(scales),
                tuple(len(x) for x in broad), tuple(x.shape[1] if i < len(jobs) else 0 for i, x in enumerate(broad)),
                tuple(x.stride(0) // unit for x in thin), tuple(x.stride(0) for x in broad),
                tuple(x.stride(0) for x in out), tuple(x.stride(1) for x in out),
                sums, arrivals(device, sum(tiles)), rows,
                J=JOBS, R=rank, RB=_block(rank), U=unit, BM=bm, BC=bc, num_warps=4, num_stages=3,
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


@triton.jit(do_not_specialize=["M", "each"])
def _joined(
    x0, x1, x2, low, y, sums, arrived, scale, M, K, each, y_row, row0, row1, row2, low_piece, low_row, low_rank,
    R: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each program copies a part of the columns and sums over them; the last part of a tile to be done adds up all of them."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    piece, pieces = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    x = x0 if piece == 0 else x1 if piece == 1 else x2
    x_row = row0 if piece == 0 else row1 if piece == 1 else row2
    rows = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    ranks = tl.arange(0, RB)
    inside, ranked = (rows < M)[:, None], ranks < R
    y += rows[:, None] * y_row
    total = tl.zeros([BM, RB], tl.float32)
    for i in range(part * each, tl.minimum(tl.cdiv(K, BK), part * each + each)):
        columns = i * BK + tl.arange(0, BK)
        mask = inside & (columns < K)[None, :]
        tile = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=mask, other=0.0)
        at_low = low + piece * low_piece + columns[:, None] * low_row + ranks[None, :] * low_rank
        total = tl.dot(tile, tl.load(at_low, mask=(columns < K)[:, None] & ranked[None, :], other=0.0), total)
        tl.store(y + piece * K + columns[None, :], tile, mask=mask)
    at = y + pieces * K + (piece * R + ranks)[None, :]
    mask = inside & ranked[None, :]
    if sums is None:
        tl.store(at, (scale * total).to(y.dtype.element_ty), mask=mask)
    else:
        tile_number = tl.program_id(1) * pieces + tl.program_id(2)
        sums += tile_number.to(tl.int64) * parts * (BM * RB) + tl.arange(0, BM)[:, None] * RB + ranks[None, :]
        tl.store(sums + part * (BM * RB), total)
        if last(arrived + tile_number, parts):
            total = added_up(sums, total, parts, BM * RB, 2)
            tl.store(at, (scale * total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _lay(work, table, SIZE: tl.constexpr):
    table += tl.program_id(1) * 5
    begin = tl.load(table)
    to = tl.load(table + 1).to(tl.pointer_type(work.dtype.element_ty))
    rows, columns = tl.load(table + 2).to(tl.int32), tl.load(table + 3).to(tl.int32)
    apart = tl.load(table + 4)
    number = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = number < rows * columns
    tl.store(to + number // columns * apart + number % columns, tl.load(work + begin + number, mask=there), mask=there)


@triton.jit(do_not_specialize=["heights", "thin_rows", "out_ranks", "out_columns", "rows"])
def _gradients(
    thins, broads, outs, scales, heights, widths, thin_rows, broad_rows, out_ranks, out_columns, sums, arrived, rows,
    J: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out += scale * thin' broad of J jobs: `thin` (height, R), `broad` (height, width). A program sums over a part of the rows of one tile;
    the last part of a tile to be done adds up all of them. `thin_rows` are in units of U, by which Triton reads more than one number at once."""
    pid = tl.program_id(0)
    first, first_tile = 0, 0  # of the job
    program, tile_number = 0, 0  # the same of the next one
    thin, broad, out, scale = thins[0], broads[0], outs[0], scales[0]
    height, width, thin_row, broad_row = heights[0], widths[0], thin_rows[0], broad_rows[0]
    out_rank, out_column = out_ranks[0], out_columns[0]
    for j in tl.static_range(J):
        if pid >= program:
            thin, broad, out, scale = thins[j], broads[j], outs[j], scales[j]
            height, width, thin_row, broad_row = heights[j], widths[j], thin_rows[j], broad_rows[j]
            out_rank, out_column = out_ranks[j], out_columns[j]
            first, first_tile = program, tile_number
        program += tl.cdiv(widths[j], BC) * tl.cdiv(heights[j], rows)
        tile_number += tl.cdiv(widths[j], BC)
    parts = tl.cdiv(height, rows)
    tile, part = (pid - first) // parts, (pid - first) % parts
    columns = tile * BC + tl.arange(0, BC)
    ranks = tl.arange(0, RB)
    ranked, inside = (ranks < R)[:, None], (columns < width)[None, :]
    end = tl.minimum(height, part * rows + rows)
    total = tl.zeros([RB, BC], tl.float32)
    for begin in range(part * rows, end, BM):
        row = (begin + tl.arange(0, BM)).to(tl.int64)
        there = row < end
        one = tl.load(thin + row[None, :] * (thin_row * U) + ranks[:, None], mask=ranked & there[None, :], other=0.0)
        two = tl.load(broad + row[:, None] * broad_row + columns[None, :], mask=there[:, None] & inside, other=0.0)
        total = tl.dot(one, two, total)
    at = sums + (first + tile * parts).to(tl.int64) * (RB * BC) + ranks[:, None] * BC + tl.arange(0, BC)[None, :]
    tl.store(at + part * (RB * BC), total)
    if last(arrived + first_tile + tile, parts):
        total = added_up(at, total, parts, RB * BC, 4)
        to = out + ranks[:, None] * out_rank + columns[None, :] * out_column
        mask = ranked & inside
        tl.store(to, (tl.load(to, mask=mask, other=0.0).to(tl.float32) + scale * total).to(to.dtype.element_ty), mask=mask)
