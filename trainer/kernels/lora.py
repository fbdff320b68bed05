"""A LoRA layer over one or several Linears in few Triton kernels. Import this only where Triton is installed.

The frozen product and the low-rank one share the reading of their input: the tile of x that meets a tile of W also meets `down`, and what
comes of it meets `up` while the tile of the result is still in registers. So a layer's forward pass is one kernel in place of three, its
backward pass three in place of five to seven.

Shapes: x (M, K); `weight` (P * N, K) of P = 1 to 3 layers that read the same x, one below the other; `down` (P * R, K); `up` (P, N, R);
h = x down' (M, P * R); y (P, M, N). All are of one 16-bit dtype, the last dimension of each dense. Sums run in float32, in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_RANK = 64
# Up to this many operations (of x weight'), the whole layer is one kernel; above it cuBLAS' frozen product is quicker by more than the other
# kernels cost. Measured on an H200 (us, one kernel / cuBLAS and three): M 4096 x 320 x 320 7 / 12, 1024 x 1280 x 1280 15 / 17, 4096 x 640 x
# 1920 33 / 33, 4096 x 1280 x 1280 39 / 33. GPUs before it have the same matrix instructions in both.
WHOLE = 12e9
GROUP = 8  # rows of tiles that are computed before the next column, so that the weights are read from the L2 cache
PART = 8  # into at most so many parts the sum over the rows is cut where gradients are made


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
            x, weight, bias, down, up, y, h, scale, m, n, k, x.stride(0),
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
            gs[0], *more, weight, down, up, gx, low, scale, m, n, k, gs[0].stride(0), more[0].stride(0), more[1].stride(0),
            P=p, R=r, RB=_block(r), BM=bm, BN=bn, BK=bk, G=GROUP, EVEN=k % bk == 0 and n % bn == 0, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return gx, low


def gradients(x: Tensor, h: Tensor, gs: list[Tensor], low: Tensor, down_grad: Tensor, up_grad: Tensor, scale: float) -> None:
    """Add scale * low' x to `down_grad` (P * R, K) and scale * g_p' h_p to `up_grad` (P, N, R), both dense."""
    (m, k), (p, n, r) = x.shape, up_grad.shape
    bm, bc = 64, 64
    rows = triton.cdiv(triton.cdiv(m, min(triton.cdiv(m, bm), PART)), bm) * bm
    parts, size = triton.cdiv(m, rows), p * r * (k + n)
    sums = torch.empty(parts, size, device=x.device, dtype=torch.float32)
    more = [gs[min(i, p - 1)] for i in (1, 2)]
    with torch.cuda.device_of(x):
        _gradients[(p * triton.cdiv(k, bc) + p * triton.cdiv(n, bc), parts)](
            x, h, gs[0], *more, low, sums, m, n, k, rows, size, x.stride(0), gs[0].stride(0), more[0].stride(0), more[1].stride(0),
            P=p, R=r, RB=_block(r), BM=bm, BC=bc, num_warps=4, num_stages=3,
        )  # fmt: skip
        _add[(triton.cdiv(size, 1024),)](sums, down_grad, up_grad, scale, parts, p * r * k, size, B=1024)


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
    x, weight, bias, down, up, y, h, scale, M, N, K, x_row,
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
    at_w = weight + (piece * N + columns)[None, :] * K + depth[:, None]
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
    g0, g1, g2, weight, down, up, gx, low, scale, M, N, K, row0, row1, row2,
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
        at_w = weight + (piece * N + depth).to(tl.int64)[:, None] * K + columns[None, :]
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
            at_w += BN * K
            at_u += BN * R
        narrow = own.to(gx.dtype.element_ty)
        if column == 0:
            tl.store(low + rows.to(tl.int64)[:, None] * (P * R) + (piece * R + ranks)[None, :], narrow, mask=inside & ranked[None, :])
        theirs = tl.load(
            down + (piece * R + ranks)[:, None] * K + columns[None, :], mask=ranked[:, None] & (columns < K)[None, :], other=0.0
        )
        total += scale * tl.dot(narrow, theirs)
    tl.store(gx + rows.to(tl.int64)[:, None] * K + columns[None, :], total.to(gx.dtype.element_ty), mask=inside & (columns < K)[None, :])


@triton.jit(do_not_specialize=["M", "rows"])
def _gradients(
    x, h, g0, g1, g2, low, sums, M, N, K, rows, size, x_row, row0, row1, row2,
    P: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the rows: the first programs of low' x, the others of g' h; one after the other in `sums`."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    begin = part * rows
    end = tl.minimum(M, begin + rows)
    across = tl.arange(0, BM)
    ranks = tl.arange(0, RB)
    ranked = ranks < R
    to = sums + part.to(tl.int64) * size
    wide = tl.cdiv(K, BC)
    if pid < P * wide:
        piece = pid // wide
        columns = pid % wide * BC + tl.arange(0, BC)
        inside = (columns < K)[None, :]
        total = tl.zeros([RB, BC], tl.float32)
        for first in range(begin, end, BM):
            row = (first + across).to(tl.int64)
            there = row < end
            at_low = low + row[None, :] * (P * R) + (piece * R + ranks)[:, None]
            one = tl.load(at_low, mask=ranked[:, None] & there[None, :], other=0.0)
            two = tl.load(x + row[:, None] * x_row + columns[None, :], mask=there[:, None] & inside, other=0.0)
            total = tl.dot(one, two, total)
        tl.store(to + (piece * R + ranks)[:, None] * K + columns[None, :], total, mask=ranked[:, None] & inside)
    else:
        tall = tl.cdiv(N, BC)
        pid -= P * wide
        for piece in tl.static_range(P):
            if pid // tall == piece:
                g = g0 if piece == 0 else g1 if piece == 1 else g2
                g_row = row0 if piece == 0 else row1 if piece == 1 else row2
                columns = pid % tall * BC + tl.arange(0, BC)
                inside = (columns < N)[:, None]
                own = tl.zeros([BC, RB], tl.float32)
                for first in range(begin, end, BM):
                    row = (first + across).to(tl.int64)
                    there = row < end
                    one = tl.load(g + row[None, :] * g_row + columns[:, None], mask=inside & there[None, :], other=0.0)
                    at_h = h + row[:, None] * (P * R) + (piece * R + ranks)[None, :]
                    two = tl.load(at_h, mask=there[:, None] & ranked[None, :], other=0.0)
                    own = tl.dot(one, two, own)
                at_up = to + P * R * K + (piece * N + columns)[:, None] * R + ranks[None, :]
                tl.store(at_up, own, mask=inside & ranked[None, :])


@triton.jit(do_not_specialize=["parts"])
def _add(sums, down_grad, up_grad, scale, parts, split, size, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < size
    total = tl.zeros([B], tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + part * size + at, mask=inside, other=0.0)
    total *= scale
    first = at < split
    one = tl.load(down_grad + at, mask=inside & first, other=0.0).to(tl.float32)
    two = tl.load(up_grad + at - split, mask=inside & (at >= split), other=0.0).to(tl.float32)
    total += one + two
    tl.store(down_grad + at, total.to(down_grad.dtype.element_ty), mask=inside & first)
    tl.store(up_grad + at - split, total.to(up_grad.dtype.element_ty), mask=inside & (at >= split))
