"""LoRA layers that keep only what the backward pass needs: the forward and backward of PEFT's plain LoRA, in the base's own dtype.

PEFT's layer casts its input to float32, lets autograd keep both products' inputs and adds three tensors; here the small products
are added in place, x and the rank-r product alone are kept, and the gradients go straight into their static buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from trainer import kernels
from trainer.lean.narrow import NarrowLinear, Packed, conv_backward, conv_input_gradient, join, kept, rows, wide


class Group:
    """LoRA layers over Linears that read the same input, computed as one: `weight` (sum of outs, in), wide or packed, holds theirs, one after the other.

    Attributes:
        layers: the PEFT layers; work: (down, up) of each in the base's dtype; grads: where their gradients are added, or None.
        fresh: whether `work` is known to be what the masters are.
        down: (sum of ranks, in), the work copies of all `down` as one tensor.
        frame: (sum of outs + sum of ranks, in + sum of ranks), where Triton serves and the weight is wide: `weight` with each layer's `up` to
            the right of its rows, `down` below. So the product of (x, h) with the upper rows, h = s x down', is the whole layer, and that of
            (g, s g up) with the left columns is the gradient of x: nothing is added to what a large product gave.
        alone: whether nobody else keeps x, so that it can be kept with h beside it.
    """

    def __init__(self, layers: Sequence[Any], name: str, alone: bool = True) -> None:
        self.layers, self.name, self.alone = layers, name, alone
        bases = [m.base_layer for m in layers]
        self.outs = [m.out_features for m in bases]
        self.ranks = [m.r[name] for m in layers]
        self.params = [w for m in layers for w in (m.lora_A[name].weight, m.lora_B[name].weight)]
        self.weight: torch.Tensor | Packed
        self.bias = bases[0].bias if len(bases) == 1 else None
        if len(bases) == 1:
            self.weight = kept(bases[0])
        elif isinstance(bases[0], NarrowLinear):  # one tensor holds all, and each layer's own weight is a view of its rows
            self.weight = join([m.packed for m in bases])
            for m, own in zip(bases, rows(self.weight, self.outs), strict=True):
                m.codes, m.scales = own.codes, own.scales
        else:
            self.weight = torch.cat([m.weight.detach() for m in bases])
            for m, own in zip(bases, self.weight.split(self.outs), strict=True):
                m.weight.data = own
        alike = len(set(self.outs)) == len(set(self.ranks)) == len({m.scaling[name] for m in layers}) == 1
        self.even = len(layers) > 1 and alike and self.params[1].numel() % 8 == 0  # then their `up` lie without gaps
        self.fresh = False
        self.down: torch.Tensor
        self.work: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.grads: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.down_grad: torch.Tensor
        self.triton: Any = None  # trainer.kernels.lora, where it serves these layers
        self.gradients: Any = None  # trainer.kernels.lora.Gradients, of all groups
        self.frame: torch.Tensor | None = None

    def choose(self, device: torch.device, dtype: torch.dtype) -> None:
        """Say whether Triton's kernels serve these layers."""
        if (len(self.layers) == 1 or self.even) and kernels.by_triton(torch.empty(0, device=device, dtype=dtype)):
            from trainer.kernels import lora

            self.triton = lora if lora.fits(self.ranks[0], (self.outs[0], self.params[0].shape[1]), dtype) else None
        rank = sum(self.ranks)
        if self.triton and not isinstance(self.weight, Packed) and rank % 8 == 0 and rank <= self.triton.LARGEST_RANK:
            outs, inputs = self.weight.shape
            self.frame = self.weight.new_zeros(outs + rank, self.triton.even(inputs + rank))[:, : inputs + rank]
            self.frame[:outs, :inputs] = self.weight.detach()
            self.weight = self.frame[:outs, :inputs]
            for m, own in zip(self.layers, self.weight.split(self.outs), strict=True):
                m.base_layer.weight.data = own

    def places(self) -> list[torch.Tensor]:
        """Where in the frame each `down` and `up` lies, in the order of `params`."""
        outs, inputs = self.weight.shape
        downs = self.frame[outs:, :inputs].split(self.ranks)
        ups = [m[:, i * self.ranks[0] :][:, : self.ranks[0]] for i, m in enumerate(self.frame[:outs, inputs:].split(self.outs))]
        return [x for pair in zip(downs, ups, strict=True) for x in pair]

    def stacked(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The `up` of all layers, which lie one after the other, as one (layers, out, rank)."""
        first = pairs[0][1]
        return first.as_strided((len(pairs), *first.shape), (first.numel(), *first.stride()))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (..., in) -> one (..., out) for each layer. Without gradients the masters are read, so that no copy can be out of date, but
        for as long as the copies are known to be fresh (see Weights).
        """
        scales = [m.scaling[self.name] for m in self.layers]
        if self.fresh or (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.params))):
            return self._form(x).apply(x, self, scales, *self.params)
        dtype = x.dtype
        down = torch.cat([p.detach().to(dtype) for p in self.params[::2]])
        flat = x.reshape(-1, x.shape[-1])
        y, _ = self._product(flat, down, [p.detach().to(dtype) for p in self.params[1::2]], scales)
        return tuple(piece.reshape(*x.shape[:-1], -1) for piece in y.split(self.outs, 1))

    def _form(self, x: torch.Tensor) -> type[torch.autograd.Function]:
        if self.triton and self.triton.whole(x[..., 0].numel(), sum(self.outs), x.shape[-1]):
            return _WholeLora
        if self.frame is not None:
            return _FramedLora
        return _EvenLora if self.even and x.device.type != "cpu" else _GroupLora  # elsewhere one large product is faster

    def input_gradient(self, g: torch.Tensor, low: torch.Tensor, scale: float) -> torch.Tensor:
        """(M, in) of g (M, sum of outs) and low (M, sum of ranks), what g becomes behind the `up`."""
        gx = g @ wide(self.weight)
        if self.triton and low.shape[1] <= self.triton.LARGEST_RANK:
            self.triton.add_low(gx[None], low, self.down.t()[None], scale)
            return gx
        return gx.addmm_(low, self.down, alpha=scale)

    def _product(
        self, x: torch.Tensor, down: torch.Tensor, ups: Sequence[torch.Tensor], scales: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(y (M, sum of outs), h (M, sum of ranks)) of x (M, in)."""
        weight = wide(self.weight).t()
        y = x @ weight if self.bias is None else torch.addmm(self.bias, x, weight)
        h = x @ down.t()
        if self.triton and len(ups) == 1:
            self.triton.add_low(y[None], h, ups[0][None], scales[0])
            return y, h
        for piece, low, up, scale in zip(y.split(self.outs, 1), h.split(self.ranks, 1), ups, scales, strict=True):
            piece.addmm_(low, up.t(), alpha=scale)
        return y, h


class _WholeLora(torch.autograd.Function):
    """_GroupLora by kernels that do a layer whole, for layers of the same size, rank and scale."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, scales: Sequence[float], *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = _rows(x)
        y, h = group.triton.forward(flat, wide(group.weight), group.bias, group.down, group.stacked(group.work), scales[0])
        ctx.save_for_backward(flat, h)
        ctx.group, ctx.scale, ctx.shape = group, scales[0], x.shape
        return tuple(y.view(len(y), *x.shape[:-1], -1).unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        group, ups, rows = ctx.group, ctx.group.stacked(ctx.group.work), [_rows(g) for g in gs]
        gx = None
        if ctx.needs_input_grad[0]:
            gx, low = group.triton.backward(rows, wide(group.weight), group.down, ups, ctx.scale)
            gx = gx.view(ctx.shape)
        elif ctx.needs_input_grad[3]:
            low = torch.cat([g @ up for g, up in zip(rows, ups, strict=True)], 1)
        if ctx.needs_input_grad[3]:
            group.gradients.add(x, h, rows, low, group.down_grad, group.stacked(group.grads), ctx.scale, ctx.scale)
        return gx, None, None, *[None] * len(group.params)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) as (M, D), each row dense."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _GroupLora(torch.autograd.Function):
    """y_i = x W_i' + b + s_i (x down_i') up_i'. Kept: x and x down'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, scales: Sequence[float], *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        y, h = group._product(flat, group.down, [up for _, up in group.work], scales)
        ctx.save_for_backward(flat, h)
        ctx.group, ctx.scales, ctx.shape = group, scales, x.shape
        return tuple(piece.view(*x.shape[:-1], -1) for piece in y.split(group.outs, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        group, scales = ctx.group, ctx.scales
        gs = [g.reshape(len(x), -1) for g in gs]
        g = gs[0] if len(gs) == 1 else torch.cat(gs, 1)
        low = torch.empty_like(h)  # gradient of h, without the scales
        for piece, own, (_, up) in zip(g.split(group.outs, 1), low.split(group.ranks, 1), group.work, strict=True):
            torch.mm(piece, up, out=own)
        same = all(s == scales[0] for s in scales)
        if not same:
            for own, scale in zip(low.split(group.ranks, 1), scales, strict=True):
                own.mul_(scale)
        factor = scales[0] if same else 1.0
        if ctx.needs_input_grad[3] and group.triton:
            group.gradients.add(x, h, [g], low, group.down_grad, group.stacked(group.grads), factor, factor)
        elif ctx.needs_input_grad[3]:
            group.down_grad.addmm_(low.t(), x, alpha=factor)
            for piece, own, (_, grad), scale in zip(g.split(group.outs, 1), h.split(group.ranks, 1), group.grads, scales, strict=True):
                grad.addmm_(piece.t(), own, alpha=scale)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = group.input_gradient(g, low, factor).view(ctx.shape)
        return gx, None, None, *[None] * len(group.params)


class _FramedLora(torch.autograd.Function):
    """_GroupLora by large products alone, see Group.frame."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, scales: Sequence[float], *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat, scale, outs, count = _rows(x), scales[0], len(group.weight), len(group.outs)
        if group.alone:
            both = group.triton.joined([flat], group.down.t()[None], scale)
            ctx.save_for_backward(both)
            if count == 1:
                y = F.linear(both, group.frame[:outs], group.bias)[None]
            else:  # so that each output is dense: attention reads it so
                y = torch.bmm(both.expand(count, *both.shape), group.frame[:outs].unflatten(0, (count, -1)).transpose(1, 2))
        else:
            y, h = group._product(flat, group.down, [group.work[0][1]], scales)
            ctx.save_for_backward(flat, h)
            y = y[None]
        ctx.group, ctx.scale, ctx.shape = group, scale, x.shape
        return tuple(y.view(count, *x.shape[:-1], -1).unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group, (outs, inputs) = ctx.group, ctx.group.weight.shape
        if group.alone:
            (x, h), up_scale = ctx.saved_tensors[0].split((inputs, sum(group.ranks)), 1), 1.0  # h with the scale in it
        else:
            (x, h), up_scale = ctx.saved_tensors, ctx.scale
        both = group.triton.joined([_rows(g) for g in gs], group.stacked(group.work), ctx.scale)
        if ctx.needs_input_grad[3]:
            pieces = list(both[:, :outs].split(group.outs, 1))
            group.gradients.add(x, h, pieces, both[:, outs:], group.down_grad, group.stacked(group.grads), 1.0, up_scale)
        gx = (both @ group.frame[:, :inputs]).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return gx, None, None, *[None] * len(group.params)


class _EvenLora(torch.autograd.Function):
    """_GroupLora for layers of the same size, rank and scale: batched products, of which each output is dense (attention reads it so)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, scales: Sequence[float], *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat, count = x.reshape(-1, x.shape[-1]), len(group.outs)
        weights = wide(group.weight).view(count, group.outs[0], -1).transpose(1, 2)
        y = torch.bmm(flat.expand(count, *flat.shape), weights)
        h = flat @ group.down.t()
        if group.triton:
            group.triton.add_low(y, h, group.stacked(group.work), scales[0])
        else:
            y.baddbmm_(h.view(len(flat), count, -1).transpose(0, 1), group.stacked(group.work).transpose(1, 2), alpha=scales[0])
        ctx.save_for_backward(flat, h)
        ctx.group, ctx.scale, ctx.shape = group, scales[0], x.shape
        return tuple(y.view(count, *x.shape[:-1], -1).unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        group, count = ctx.group, len(gs)
        g = torch.cat([g.reshape(len(x), -1) for g in gs], 1)
        each = g.view(len(x), count, -1).transpose(0, 1)
        low = torch.empty_like(h)  # gradient of h, without the scale
        torch.bmm(each, group.stacked(group.work), out=low.view(len(x), count, -1).transpose(0, 1))
        if ctx.needs_input_grad[3] and group.triton:
            group.gradients.add(x, h, list(each), low, group.down_grad, group.stacked(group.grads), ctx.scale, ctx.scale)
        elif ctx.needs_input_grad[3]:
            group.down_grad.addmm_(low.t(), x, alpha=ctx.scale)
            ups = group.stacked(group.grads)
            ups.baddbmm_(each.transpose(1, 2), h.view(len(x), count, -1).transpose(0, 1), alpha=ctx.scale)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = group.input_gradient(g, low, ctx.scale).view(ctx.shape)
        return gx, None, None, *[None] * len(group.params)


class Conv:
    """A LoRA layer over a Conv2d: `down` has the base's kernel, stride and padding, `up` is 1x1."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name
        base = layer.base_layer
        self.weight, self.bias, self.stride, self.padding = kept(base), base.bias, base.stride, base.padding
        self.params = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        self.ranks = [layer.r[name]]
        self.layers = [layer]
        self.triton = None
        self.fresh = False
        self.down: torch.Tensor
        self.down_grad: torch.Tensor
        self.work: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.grads: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.layer.scaling[self.name]
        if self.fresh or (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.params))):
            return _ConvLora.apply(x, self, scale, *self.params)
        return self._product(x, *(p.detach().to(x.dtype) for p in self.params), scale)[0]

    def _product(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.conv2d(x, wide(self.weight), self.bias, self.stride, self.padding)
        h = F.conv2d(x, down, None, self.stride, self.padding)
        return y.add_(F.conv2d(h, up), alpha=scale), h


class _ConvLora(torch.autograd.Function):
    """y = conv(x, W) + b + s conv1x1(conv(x, down), up). Kept: x and conv(x, down)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, conv: Conv, scale: float, *params: torch.Tensor) -> torch.Tensor:
        y, h = conv._product(x, *conv.work[0], scale)
        ctx.save_for_backward(x, h)
        ctx.conv, ctx.scale = conv, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        conv, trained = ctx.conv, ctx.needs_input_grad[3]
        down, up = conv.work[0]
        low, g_up = conv_backward(g, h, up, (1, 1), (0, 0), (True, trained))
        low.mul_(ctx.scale)
        gx, g_down = conv_backward(low, x, down, conv.stride, conv.padding, (ctx.needs_input_grad[0], trained))
        if trained:
            conv.grads[0][0].add_(g_down)
            conv.grads[0][1].add_(g_up, alpha=ctx.scale)
        if ctx.needs_input_grad[0]:
            gx = gx.add_(conv_input_gradient(g, x.shape, wide(conv.weight), conv.stride, conv.padding))
        return gx, None, None, None, None


class Weights:
    """Of all lean layers: their masters, gradients and, where the base is in 16 bits, work copies, each flat with a view for each tensor.

    `begin` is called before the gradients of each step and `collect` after each backward. Triton's kernels add to the float32 gradients
    themselves; what others leave in 16 bits is added by `collect`, and their layers come first.
    """

    def __init__(self, groups: Sequence[Group | Conv]) -> None:
        device, dtype = groups[0].params[0].device, groups[0].weight.dtype
        for g in groups:
            if isinstance(g, Group):
                g.choose(device, dtype)
        groups = sorted(groups, key=lambda g: g.triton is not None)
        self.groups = groups
        self.gradients: Any = None
        for g in groups:
            if g.triton:
                self.gradients = g.gradients = self.gradients or g.triton.Gradients()
        order = [p for g in groups for p in (*g.params[::2], *g.params[1::2])]  # the `down` of a group stand together
        sizes = [-(-p.numel() // 8) * 8 for p in order]  # each begins on 16 bytes
        self.master = torch.zeros(sum(sizes), device=device)
        self.grad = torch.zeros_like(self.master)
        self.work = self.master if dtype == torch.float32 else torch.zeros(sum(sizes), device=device, dtype=dtype)
        narrow = {p for g in groups if g.triton is None for p in g.params} if self.work is not self.master else set()
        self.work_grad = torch.zeros(sum(s for p, s in zip(order, sizes, strict=True) if p in narrow), device=device, dtype=dtype)
        views: dict[torch.nn.Parameter, list[torch.Tensor]] = {}
        starts, at = {}, 0
        for p, size in zip(order, sizes, strict=True):
            flats = (self.master, self.grad, self.work, self.work_grad if p in narrow else self.grad)
            views[p] = [x[at : at + p.numel()].view(p.shape) for x in flats]
            views[p][0].copy_(p.detach())
            p.data = views[p][0]
            starts[p] = at
            at += size
        self.grads = {p: v[1] for p, v in views.items()}
        for g in groups:
            downs, ups = g.params[::2], g.params[1::2]
            g.work = [(views[d][2], views[u][2]) for d, u in zip(downs, ups, strict=True)]
            g.grads = [(views[d][3], views[u][3]) for d, u in zip(downs, ups, strict=True)]
            if isinstance(g, Group):
                rows, columns = sum(g.ranks), downs[0].shape[1]
                assert len(downs) == 1 or all(d.numel() % 8 == 0 for d in downs)
                span = slice(starts[downs[0]], starts[downs[0]] + rows * columns)
                g.down = self.work[span].view(rows, columns)
                g.down_grad = (self.work_grad if downs[0] in narrow else self.grad)[span].view(rows, columns)
        framed = [(p, to) for g in groups if getattr(g, "frame", None) is not None for p, to in zip(g.params, g.places(), strict=True)]
        table = [[starts[p], to.data_ptr(), *to.shape, to.stride(0)] for p, to in framed]
        self.table, self.most = torch.tensor(table, device=device), max((p.numel() for p, _ in framed), default=0)

    def _renew(self) -> None:
        """Bring the work copies up to the masters."""
        if self.work is not self.master:
            self.work.copy_(self.master)
        if self.most:
            from trainer.kernels import lora

            lora.lay(self.work, self.table, self.most)

    def begin(self) -> None:
        """Bring the work copies up to the masters and set all gradients to zero."""
        self._renew()
        if self.gradients:
            self.gradients.forget()
        self.work_grad.zero_()
        self.grad.zero_()

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """For a while in which the masters do not change: passes without gradients read the work copies, made once, too."""
        self._renew()
        for g in self.groups:
            g.fresh = True
        try:
            yield
        finally:
            for g in self.groups:
                g.fresh = False

    def collect(self) -> None:
        """Add what the backward passes left, and left in 16 bits, to the float32 gradients."""
        if self.gradients:
            self.gradients.flush()
        if len(self.work_grad):
            self.grad[: len(self.work_grad)].add_(self.work_grad)
            self.work_grad.zero_()
