"""Frozen convolutions in float32 on the CPU.

A kernel of 1 is a product of matrices. One of 3 goes by Winograd's minimal filtering (Lavin and Gray 2015, arXiv:1509.09308): for a tile of
m x m pixels it takes (m + 2)^2 products in the place of 9 m^2, with weights that are transformed once. The gradient is the same with all
reversed (tiles in, tiles out and the kernel), for which the same weights serve.

oneDNN, which torch calls, brings a weight into its own order at each call: a kernel of 1280 channels on 8x8 pixels takes it 60 ms, and
72 ms backward, on a core that needs 20 and 20 for this; one of 320 channels on 32x32 pixels 20 ms against 9.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trainer.lean.narrow import conv_input_gradient

SHARE = 0.25  # of the free memory, at most, goes into transformed weights
SMALL = 2**18  # numbers of channels, one times the other, up to which there is a tile of 4, whose weights are 4 times the kernel's
# Where the polynomials of a tile are multiplied, beside infinity (Lavin and Gray take 0, +-1, +-2). With these, errors are 1.7 times those
# of oneDNN's sums for a tile of 4 and 0.6 times for one of 2, at 128 channels.
POINTS = {2: (0, 1, -1), 4: (0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}


def install(convolutions: Sequence[nn.Conv2d]) -> None:
    """Give frozen layers without groups or dilation their forward; `lean` holds what computes it."""
    tiles = [_tile(m) for m in convolutions]
    size = sum(m.weight.nbytes * {0: 0, 2: 16 / 9, 4: 2 * 36 / 9}[tile] for m, tile in zip(convolutions, tiles, strict=True))
    room = size < SHARE * psutil.virtual_memory().available
    for m, tile in zip(convolutions, tiles, strict=True):
        m.lean = Convolution(m, tile if room else 0)
        m.forward = m.lean.forward


def _tile(layer: nn.Conv2d) -> int:
    """The side of a layer's tiles; 0: it has none."""
    if layer.kernel_size != (3, 3) or layer.stride != (1, 1) or layer.padding != (1, 1) or min(layer.in_channels, layer.out_channels) < 32:
        return 0
    return 4 if layer.in_channels * layer.out_channels <= SMALL else 2


class Convolution:
    """A frozen layer's function and the gradient of its input. Should the layer move to another device, torch's own serve there."""

    def __init__(self, layer: nn.Conv2d, tile: int) -> None:
        self.layer, self.tile = layer, tile
        self.point = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
        if tile:
            self.filters = filters(layer.weight.detach(), tile)
            turned = self.filters.transpose(1, 2)
            self.turned = turned.contiguous() if tile == 4 else turned  # a third faster, for twice the memory

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return _Frozen.apply(x, self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) -> (N, O, H', W')."""
        m = self.layer
        if self.point and x.device.type == "cpu":
            return on_points(x, m.weight.flatten(1).t(), m.bias)
        if self._pays(x):
            return winograd(x, self.filters, self.tile, m.bias)
        return F.conv2d(x, m.weight, m.bias, m.stride, m.padding)

    def backward(self, g: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient of x, which has `shape`."""
        m = self.layer
        if self.point and g.device.type == "cpu":
            return on_points(g, m.weight.flatten(1), None)
        if self._pays(g):
            return winograd(g, self.turned, self.tile, None, back=True)
        return conv_input_gradient(g, shape, m.weight, m.stride, m.padding)

    def _pays(self, x: torch.Tensor) -> bool:
        """Whether tiles are faster for a map like x: of few small ones the products wait for their weights."""
        tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
        few = tiles < 16 or tiles * self.layer.in_channels * self.layer.out_channels < 2**17
        return x.device.type == "cpu" and (self.tile == 2 or (self.tile == 4 and not few))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        ctx.convolution, ctx.shape = convolution, x.shape
        return convolution(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.convolution.backward(g, ctx.shape), None


def on_points(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Each pixel of x (N, C, H, W) by weight (C, O), plus bias (O,): (N, O, H, W) in channels_last."""
    n, c, h, w = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(-1, c)
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(n, h, w, -1).permute(0, 3, 1, 2)


@functools.cache
def transforms(tile: int, dtype: torch.dtype, back: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(of pixels, of a kernel, of products) by Cook and Toom, each for both directions at once, with k = tile + 2.

    A tile of the outcome is products @ ((kernel @ a kernel's 9 numbers) * (pixels @ the k^2 pixels around it)): shapes (tile^2, k^2),
    (k^2, 9) and (k^2, k^2). `back`: for a kernel that is turned round, with the same numbers made of it.
    """
    points = POINTS[tile]
    k = len(points) + 1
    pixels, kernel, products = (torch.zeros(n, m, dtype=torch.float64) for n, m in ((k, k), (k, 3), (tile, k)))
    for i, a in enumerate((*points, math.inf)):
        others = [b for b in points if b != a]
        row = torch.ones(1, dtype=torch.float64)
        for b in others:  # times (z - b)
            row = torch.cat([row.new_zeros(1), row]) - b * torch.cat([row, row.new_zeros(1)])
        pixels[i, : len(row)] = row
        if a == math.inf:
            kernel[i, 2] = products[tile - 1, i] = 1
        else:
            kernel[i] = torch.tensor([1, a, a * a], dtype=torch.float64) / math.prod(a - b for b in others)
            products[:, i] = torch.tensor([a**power for power in range(tile)], dtype=torch.float64)
    if back:
        pixels, products = pixels.flip(1), products.flip(0)
    return tuple(torch.kron(m, m).to(dtype) for m in (pixels, kernel, products))


def filters(weight: torch.Tensor, tile: int) -> torch.Tensor:
    """(k^2, C, O) of a kernel (O, C, 3, 3)."""
    kernel = transforms(tile, weight.dtype)[1]
    return (kernel @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(-1, *weight.shape[1::-1])


def winograd(x: torch.Tensor, filters: torch.Tensor, tile: int, bias: torch.Tensor | None, back: bool = False) -> torch.Tensor:
    """Convolution of x (N, C, H, W) by a kernel of 3 with padding 1: (N, O, H, W) in channels_last.

    `back`: its gradient instead, by the same filters the other way round, (k^2, O, C).
    """
    n, c, height, width = x.shape
    h, w, k = -(-height // tile), -(-width // tile), tile + 2
    before, _, after = transforms(tile, x.dtype, back)
    padded = x.new_zeros(n, tile * h + 2, tile * w + 2, c)
    padded[:, 1 : height + 1, 1 : width + 1].copy_(x.permute(0, 2, 3, 1))
    whole, row, column, _ = padded.stride()
    tiles = padded.as_strided((k, k, n, h, w, c), (row, column, whole, tile * row, tile * column, 1)).reshape(k * k, -1)
    products = torch.bmm((before @ tiles).view(k * k, -1, c), filters)
    pieces = (after @ products.view(k * k, -1)).view(tile, tile, n, h, w, -1).permute(2, 3, 0, 4, 1, 5)
    y = x.new_empty(pieces.shape)
    if bias is None:
        y.copy_(pieces)
    else:
        torch.add(pieces, bias, out=y)
    y = y.view(n, tile * h, tile * w, -1).permute(0, 3, 1, 2)
    return y[:, :, :height, :width].contiguous(memory_format=torch.channels_last)
