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
    exact = torch.cat([g[:, i * n : (i + 1) * n] @ du[i] for i in range(layers)], 1)
    assert apart(low, exact) < tolerance
    assert apart(gx, g @ dw + 0.7 * exact @ dd) < tolerance

    for left, up_, pieces in ((h, up, layers), (h, numbers(layers * rank, n).t()[None], 1)):
        if pieces == 1 and left.shape[1] > lora.LARGEST_RANK:
            continue
        sums = numbers(pieces, m, n)
        exact = sums.double() + 0.7 * left.double().view(m, pieces, -1).transpose(0, 1) @ up_.double().transpose(1, 2)
        lora.add_low(sums, left, up_, 0.7)
        assert apart(sums, exact) < tolerance

    down_grad, up_grad = numbers(layers * rank, k), numbers(layers, n, rank)
    wanted = down_grad.double() + 0.7 * low.double().T @ dx
    wanted_up = up_grad.double() + 0.7 * torch.stack([gs[i].double().T @ h.double()[:, i * rank : (i + 1) * rank] for i in range(layers)])
    lora.gradients(x, h, gs, low, down_grad, up_grad, 0.7)
    assert apart(down_grad, wanted) < tolerance
    assert apart(up_grad, wanted_up) < tolerance


@pytest.mark.skipif(not INTERPRETED, reason="the next test starts it in a process of its own")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_equal_float64(shape):
    check(shape, torch.float16, "cpu")  # the interpreter multiplies no bf16


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
