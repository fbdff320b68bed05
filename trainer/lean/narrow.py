"""Frozen weights in 8 or 4 bits, widened where they are used and dropped again: QLoRA's base (arXiv:2305.14314).

Both forms keep blocks of 64 weights, in the order in which the wide weight lies in memory, each with one scale:
4 bits: NormalFloat 4 (appendix E), two weights to a byte, the first in its upper half (as bitsandbytes has it); scales in bfloat16,
so 4.25 bits a weight. 8 bits: whole numbers from -127 to 127; scales in float32, so 8.5 bits a weight.

Widened by one Triton kernel where Triton runs, by bitsandbytes on other CUDA devices where it is installed, by torch anywhere else; all
multiply in float32 and round once, so that they agree to the last bit.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trainer import kernels

BLOCK = 64
SMALLEST = 1024  # weights with fewer numbers stay as they are
AT_ONCE = 2**22  # numbers that are packed at once, each of which takes some 12 bytes meanwhile
BLOCKS = {"down_blocks", "mid_block", "up_blocks", "transformer_blocks", "block"}  # what is packed; what stands before and after is not
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Packed:
    """A weight in 8 or 4 bits.

    Attributes:
        codes: (n,) int8, or (n / 2,) uint8 of 4-bit numbers; scales: (n / 64,); n is a multiple of 64.
        shape, dtype: of the wide weight. One with four dimensions is channels_last.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    def wide(self) -> torch.Tensor:
        """The weight as a new tensor."""
        flat = (_wide4 if self.codes.dtype == torch.uint8 else _wide8)(self.codes, self.scales, self.dtype)
        if len(self.shape) == 2:
            return flat.view(self.shape)
        out, inputs, *kernel = self.shape
        return flat.view(out, *kernel, inputs).permute(0, 3, 1, 2)


@torch.no_grad()
def pack(weight: torch.Tensor, bits: int) -> Packed:
    """A weight (out, in) or (out, in, h, w) in `bits` 8 or 4, on its own device; its number of elements is a multiple of 64."""
    flat = (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).contiguous().flatten()
    form = {8: _pack8, 4: _pack4}[bits]
    codes, scales = zip(*(form(piece.float().view(-1, BLOCK)) for piece in flat.split(AT_ONCE)), strict=True)
    return Packed(torch.cat(codes), torch.cat(scales), tuple(weight.shape), weight.dtype)


def join(parts: Sequence[Packed]) -> Packed:
    """Linear weights over the same inputs as one, one below the other; `rows` takes it apart again."""
    first = parts[0]
    outs = sum(p.shape[0] for p in parts)
    return Packed(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), (outs, *first.shape[1:]), first.dtype)


def rows(whole: Packed, outs: Sequence[int]) -> list[Packed]:
    """Views of `whole`, `outs` rows each; each of them has a multiple of 64 numbers."""
    width = whole.shape[1]
    codes = whole.codes.split([n * width // (2 if whole.codes.dtype == torch.uint8 else 1) for n in outs])
    scales = whole.scales.split([n * width // BLOCK for n in outs])
    return [Packed(c, s, (n, width), whole.dtype) for c, s, n in zip(codes, scales, outs, strict=True)]


def _pack8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scales).round().to(torch.int8).flatten(), scales.flatten()


def _wide8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if kernels.by_triton(scales):
        from trainer.kernels import narrow as form

        return form.widen8(codes, scales, dtype)
    out = torch.empty(len(scales), BLOCK, dtype=dtype, device=codes.device)
    return torch.mul(codes.view(-1, BLOCK), scales[:, None], out=out).flatten()


def _pack4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = x.abs().amax(1, keepdim=True).clamp(min=1e-30).to(torch.bfloat16)
    table = _table(x.device)
    codes = torch.bucketize(x / scales, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales.flatten()


def _wide4(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if kernels.by_triton(scales):
        from trainer.kernels import narrow as form

        return form.widen4(codes, scales, _table(codes.device), dtype)
    if codes.is_cuda and _library():
        return torch.ops.bitsandbytes.dequantize_4bit(codes, scales.float(), BLOCK, "nf4", [2 * len(codes)], dtype)
    return plain4(codes, scales, dtype)


def plain4(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(2n,) of `dtype`, from codes (n,) uint8 and scales (2n / 64,), by torch alone."""
    values = F.embedding(codes.int(), _pairs(codes.device))
    out = torch.empty(len(scales), BLOCK, dtype=dtype, device=codes.device)
    return torch.mul(values.view(-1, BLOCK), scales[:, None], out=out).flatten()


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, device=device)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """(256, 2): what the two halves of a byte stand for."""
    table = _table(device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)


@functools.cache
def _library() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes import functional  # noqa: F401 (it registers torch.ops.bitsandbytes; trainer.imports lets a mere import wait)

    return True


class _Narrow(nn.Module):
    """What NarrowLinear and NarrowConv2d share: `weight` widens at each reading, so that whoever reads it is told the truth."""

    def _keep(self, packed: Packed, bias: nn.Parameter | None) -> None:
        self.codes, self.scales = nn.Buffer(packed.codes), nn.Buffer(packed.scales)
        self.shape, self.dtype = packed.shape, packed.dtype
        self.bias = bias

    @property
    def packed(self) -> Packed:
        return Packed(self.codes, self.scales, self.shape, self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        return self.packed.wide()


class NarrowLinear(_Narrow, nn.Linear):
    """A frozen nn.Linear whose weight is packed. The wide one lives only while it is multiplied, in the backward pass once more."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self._keep(packed, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenLinear.apply(x, self.packed, self.bias)


class NarrowConv2d(_Narrow, nn.Conv2d):
    """The same for an nn.Conv2d."""

    def __new__(cls, *args: Any, **more: Any) -> nn.Conv2d:
        if args and not isinstance(args[0], Packed):  # PEFT makes an adapter's convolutions by the class of the base's: they are plain
            return nn.Conv2d(*args, **more)
        return super().__new__(cls)

    def __init__(self, packed: Packed, old: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            setattr(self, name, getattr(old, name))
        self.transposed, self.output_padding = False, (0, 0)
        self._keep(packed, old.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenConv.apply(x, self.packed, self.bias, self.stride, self.padding)


def kept(layer: nn.Module) -> torch.Tensor | Packed:
    """The weight of a Linear or Conv2d as it is kept."""
    return layer.packed if isinstance(layer, _Narrow) else layer.weight


def wide(weight: torch.Tensor | Packed) -> torch.Tensor:
    return weight.wide() if isinstance(weight, Packed) else weight


class FrozenLinear(torch.autograd.Function):
    """x W^T + b of x (..., in) with a packed W, of which nothing is kept but the packed form."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.wide(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return g @ ctx.weight.wide(), None, None


class FrozenConv(torch.autograd.Function):
    """A convolution whose weight, wide or packed, is frozen, so that its input is not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> torch.Tensor:
        ctx.weight, ctx.how, ctx.shape = weight, (stride, padding), x.shape
        ctx.pointwise = _pointwise(x, weight.shape, stride, padding)
        if ctx.pointwise:  # a linear layer: its bias is added in the product, where cuDNN would sweep over the result once more
            return F.linear(x.permute(0, 2, 3, 1), wide(weight).flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, wide(weight), bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.pointwise:
            return (g.permute(0, 2, 3, 1) @ wide(ctx.weight).flatten(1)).permute(0, 3, 1, 2), None, None, None, None
        return conv_input_gradient(g, ctx.shape, wide(ctx.weight), *ctx.how), None, None, None, None


def _pointwise(x: torch.Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    one = tuple(shape[2:]) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    return one and x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)


def conv_input_gradient(
    g: torch.Tensor, shape: torch.Size, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    """Gradient of a convolution's input of `shape`, whose values it does not need."""
    if not g.is_cuda:
        x = g.new_empty(1).expand(shape)  # its shape is read
        return conv_backward(g, x, weight, stride, padding, (True, False))[0]
    # The transposed convolution. cuDNN's convolution_backward would take its memory format from the input, and copy g to it and back.
    sides = zip(shape[2:], g.shape[2:], weight.shape[2:], stride, padding, strict=True)
    rest = [size - ((out - 1) * step + kernel - 2 * pad) for size, out, kernel, step, pad in sides]
    return F.conv_transpose2d(g, weight, None, tuple(stride), tuple(padding), tuple(rest))


def conv_backward(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], want: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gradient of x, gradient of the weight) of a convolution, each where it is wanted."""
    return torch.ops.aten.convolution_backward(g, x, weight, None, list(stride), list(padding), [1, 1], False, [0, 0], 1, [*want, False])[
        :2
    ]


def pack_layers(model: nn.Module, bits: int, device: torch.device, home: torch.device, blocks: Set[str] = BLOCKS) -> int:
    """Put packed layers in the place of the large frozen ones inside the modules of `model` named in `blocks`; returns how many.

    One weight at a time goes to `device`, is packed there and dropped; the packed ones, as all else of the model, end on `home`.
    Convolutions are those with a kernel of 1 or 3 without groups or dilation.
    """
    count = 0
    for path, module in list(model.named_modules()):
        if not _large(path, module, blocks):
            continue
        packed = pack(module.weight.detach().to(device), bits)
        packed = Packed(packed.codes.to(home), packed.scales.to(home), packed.shape, packed.dtype)
        model.set_submodule(path, NarrowLinear(packed, module.bias) if type(module) is nn.Linear else NarrowConv2d(packed, module))
        count += 1
    model.to(home)
    return count


def _large(path: str, module: nn.Module, blocks: Set[str] = BLOCKS) -> bool:
    if type(module) not in (nn.Linear, nn.Conv2d) or blocks.isdisjoint(path.split(".")):
        return False
    if type(module) is nn.Conv2d:
        usual = (
            module.kernel_size in ((1, 1), (3, 3)) and module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        )
        if not usual or isinstance(module.padding, str):
            return False
    return module.weight.numel() >= SMALLEST and module.weight.numel() % BLOCK == 0
