"""A LoRA layer's Triton kernels against float64: under Triton's interpreter (in a process of its own), and on CUDA by `pytest -m gpu`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# (M, K, N, layers, rank): tiles that are full and cut in each direction, ranks that fill a matrix instruction and that don't
SHAPES = [
    (96, 48, 64, 3, 16),
    (77, 80, 112, 2, 8),
    (130, 128, 128, 3, 16),
    (77, 128, 256, 2, 4),
    (65, 64, 64, 1, 64),
    (600, 128, 64, 2, 48),
]


def apart(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def check(shape, dtype, device):
    from trainer.kernels import lora

    m, k, n, layers, rank = shape
    assert lora.fits(rank, (n, k), dtype)
    draw = torch.Generator().manual_seed(sum(shape))

    def numbers(*size, spread=1.0):
        return (torch.randn(size, generator=draw) * spread).to(device, dtype)

    x, weight, down = numbers(m, k), numbers(layers * n, k, spread=k**-0.5), numbers(layers * rank, k, spread=k**-0.5)
    up, bias = numbers(layers, n, rank, spread=rank**-0.5), numbers(layers * n)
    gs = list(numbers(m, layers * n).split(n, 1))  # rows that lie apart
    tolerance = {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    dx, dw, dd, du = (t.double() for t in (x, weight, down, up))

    y, h = lora.forward(x, weight, bias, down, up, 0.7)
    low_rank = (dx @ dd.T).view(m, layers, rank).transpose(0, 1)
    exact = (dx @ dw.T + bias.double()).view(m, layers, n).transpose(0, 1) + 0.7 * low_rank @ du.transpose(1, 2)
    assert apart(y, exact) < tolerance
    assert apart(h, dx @ dd.T) < tolerance

    gx, low = lora.backward(gs, weight, down, up, 0.7)
    g = torch.cat(gs, 1).double()
    exact_low = torch.cat([g[:, i * n : (i + 1) * n] @ du[i] for i in range(layers)], 1)
    assert apart(low, exact_low) < tolerance
    assert apart(gx, g @ dw + 0.7 * exact_low @ dd) < tolerance

    for left, up_, pieces in ((h, up, layers), (h, numbers(layers * rank, n).t()[None], 1)):
        if pieces == 1 and left.shape[1] > lora.LARGEST_RANK:
            continue
        sums = numbers(pieces, m, n)
        exact = sums.double() + 0.7 * left.double().view(m, pieces, -1).transpose(0, 1) @ up_.double().transpose(1, 2)
        lora.add_low(sums, left, up_, 0.7)
        assert apart(sums, exact) < tolerance

    xh, gl = lora.joined([x], down.t()[None], 0.7), lora.joined(gs, up, 0.7)
    assert torch.equal(xh[:, :k], x)
    assert torch.equal(gl[:, : layers * n], torch.cat(gs, 1))
    assert apart(xh[:, k:], 0.7 * dx @ dd.T) < tolerance
    assert apart(gl[:, layers * n :], 0.7 * exact_low) < tolerance

    strided = (xh[:, :k], xh[:, k:], list(gl[:, : layers * n].split(n, 1)), gl[:, layers * n :])  # with the scale in them
    for scales, (own_x, own_h, own_gs, own_low) in (((0.7, 0.7), (x, h, gs, low)), ((1.0, 1.0), strided)):
        down_grad, up_grad = numbers(layers * rank, k), numbers(layers, n, rank)
        wanted = down_grad.double() + 0.7 * exact_low.T @ dx
        wanted_up = up_grad.double() + 0.7 * torch.stack([gs[i].double().T @ (dx @ dd[i * rank : (i + 1) * rank].T) for i in range(layers)])
        made = lora.Gradients()
        made.add(own_x, own_h, own_gs, own_low, down_grad, up_grad, *scales)
        made.flush()
        assert apart(down_grad, wanted) < tolerance
        assert apart(up_grad, wanted_up) < tolerance


def check_lay(dtype, device):
    from trainer.kernels import lora

    work = torch.randn(3000, device=device).to(dtype)
    homes = [torch.zeros(40, 100, dtype=dtype, device=device), torch.zeros(70, 30, dtype=dtype, device=device)]
    to = [homes[0][5:25, 7:57], homes[1][:, 16:24]]
    table = torch.tensor([[begin, t.data_ptr(), *t.shape, t.stride(0)] for begin, t in zip((16, 1200), to, strict=True)], device=device)
    lora.lay(work, table, 1000)
    assert torch.equal(to[0], work[16:1016].view(20, 50))
    assert torch.equal(to[1], work[1200:1760].view(70, 8))
    assert sum(t.count_nonzero() for t in homes) == 1000 + 560


@pytest.mark.skipif(not INTERPRETED, reason="the next test starts it in a process of its own")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_equal_float64(shape):
    check(shape, torch.float16, "cpu")  # the interpreter multiplies no bf16


def check_group(layers, alone, dtype, device, monkeypatch):
    """Layers over one input, as the lean step computes them by large products with the adapter's beside them."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from torch import nn

    from trainer import kernels
    from trainer.kernels import lora
    from trainer.lean.lora import Group, Weights

    torch.manual_seed(layers)
    m, k, n, rank, scale = 70, 64, 48, 8, 0.7
    bases = [nn.Linear(k, n, bias=layers == 1, device=device, dtype=dtype).requires_grad_(False) for _ in range(layers)]
    config = LoraConfig(r=rank, lora_alpha=scale * rank, init_lora_weights=False)
    made = [Linear(base, "default", config, r=rank, lora_alpha=scale * rank) for base in bases]
    for layer in made:
        layer.lora_A.float(), layer.lora_B.float()
    weights = [base.weight.detach().double() for base in bases]
    monkeypatch.setattr(kernels, "by_triton", lambda x: True)
    monkeypatch.setattr(lora, "whole", lambda *_: False)
    group = Group(made, "default", alone)
    holder = Weights([group])
    assert group.frame is not None
    holder.begin()
    x = torch.randn(2, m // 2, k, device=device).to(dtype).requires_grad_()
    gs = list(torch.randn(2, m // 2, layers * n, device=device).to(dtype).split(n, 2))
    torch.autograd.backward(group(x), gs)  # of a step that breaks off here
    holder.begin()
    x.grad = None
    ys = group(x)
    assert type(ys[0].grad_fn).__name__ == "_FramedLoraBackward"
    torch.autograd.backward(ys, gs)
    holder.collect()

    tolerance = {torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    dx, total = x.detach().double(), 0
    for layer, base, weight, y, g in zip(made, bases, weights, ys, gs, strict=True):
        assert torch.equal(base.weight.double(), weight)
        down, up = (w["default"].weight for w in (layer.lora_A, layer.lora_B))
        dd, du, dg = down.detach().to(dtype).double(), up.detach().to(dtype).double(), g.double()
        bias = 0 if base.bias is None else base.bias.double()
        assert apart(y, dx @ weight.T + bias + scale * dx @ dd.T @ du.T) < tolerance
        total = total + dg @ weight + scale * dg @ du @ dd
        assert apart(holder.grads[down], scale * (dg @ du).flatten(0, 1).T @ dx.flatten(0, 1)) < tolerance
        assert apart(holder.grads[up], scale * dg.flatten(0, 1).T @ (dx @ dd.T).flatten(0, 1)) < tolerance
    assert apart(x.grad, total) < tolerance
    with holder.fresh(), torch.no_grad():
        assert torch.equal(torch.stack(group(x)), torch.stack(ys))
    assert not group.fresh
    with torch.no_grad():
        assert apart(torch.stack(group(x)), torch.stack(ys).double()) < tolerance


GROUPS = [(3, True), (2, True), (1, True), (1, False)]


@pytest.mark.skipif(not INTERPRETED, reason="the next test starts it in a process of its own")
@pytest.mark.parametrize("layers, alone", GROUPS)
def test_interpreted_groups_equal_float64(layers, alone, monkeypatch):
    check_group(layers, alone, torch.float16, "cpu", monkeypatch)


@pytest.mark.skipif(not INTERPRETED, reason="the next test starts it in a process of its own")
def test_interpreted_copies_lie_where_they_should():
    check_lay(torch.float16, "cpu")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_kernels_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (it comes with torch's CUDA builds)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not gpu", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_on_cuda_equal_float64(dtype):
    for shape in [*SHAPES, (4096, 320, 320, 3, 16), (1024, 1280, 1280, 1, 16), (154, 768, 640, 2, 32)]:
        check(shape, dtype, "cuda")
    check_lay(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layers, alone", GROUPS)
def test_groups_on_cuda_equal_float64(layers, alone, monkeypatch):
    check_group(layers, alone, torch.bfloat16, "cuda", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("m, k, n, layers, rank", [(16384, 640, 640, 3, 16), (4096, 1280, 1280, 1, 64), (4096, 320, 320, 3, 8)])
def test_kernels_give_the_same_bits_each_time(m, k, n, layers, rank):
    """Sums in one order, and no read of what another thread has yet to write: at real sizes, where that would show."""
    from trainer.kernels import lora

    def numbers(*size):
        return torch.randn(*size, device="cuda").to(torch.bfloat16)

    x, weight, down, up = numbers(m, k), numbers(layers * n, k), numbers(layers * rank, k), numbers(layers, n, rank)
    gs = list(numbers(m, layers * n).split(n, 1))

    def all_of_them():
        y, h = lora.forward(x, weight, None, down, up, 0.5)
        gx, low = lora.backward(gs, weight, down, up, 0.5)
        sums = [torch.zeros(layers * rank, k, device="cuda"), torch.zeros(layers, n, rank, device="cuda")]
        made = lora.Gradients()
        made.add(x, h, gs, low, *sums, 1.0, 1.0)
        made.flush()
        lora.add_low(y, h, up, 1.0)
        return [y, gx, *sums, lora.joined([x], down.t()[None], 0.5), lora.joined(gs, up, 0.5)]

    first = all_of_them()
    assert apart(first[-2][:, k:], 0.5 * x.double() @ down.double().T) < 3e-3
    assert apart(first[-1][:, layers * n :], 0.5 * torch.cat([g.double() @ u.double() for g, u in zip(gs, up, strict=True)], 1)) < 3e-3
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(all_of_them(), first, strict=True))
