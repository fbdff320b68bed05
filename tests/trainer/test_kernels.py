"""The frozen norms and activations against torch's autograd in float64: values, gradients, memory format, what is kept for backward.

The Triton form is checked by the same tests, run again in a process of its own under Triton's interpreter, and on CUDA by `pytest -m gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from trainer import kernels
from trainer.kernels import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GROUP_SHAPES = [(1, 320, 8, 8), (2, 960, 5, 7), (1, 1920, 4, 4), (1, 2560, 3, 2), (3, 30, 17, 9), (1, 64, 33, 41), (2, 320, 1, 1)]
ROW_SHAPES = [(2, 7, 320), (3, 77, 96), (1, 5, 1280), (4, 33), (9, 1536)]
# (B, S, T, H, D): a prompt, one whose heads are narrow, keys that fill a tile, wide heads and many keys, which torch's attention serves
ATTENTION_SHAPES = [(2, 150, 77, 2, 64), (1, 300, 77, 3, 40), (1, 64, 128, 1, 64), (1, 20, 8, 2, 80), (1, 20, 154, 2, 64)]
if INTERPRETED:  # slow: one program at a time, in numpy
    GROUP_SHAPES, ROW_SHAPES = [(1, 320, 5, 7), (3, 30, 17, 9), (1, 64, 33, 41), (2, 320, 1, 1)], [(3, 7, 320), (4, 33)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels, "by_triton", lambda x: x.dtype in kernels.FUSED_DTYPES)


def numbers(*shape, seed=0, dtype=torch.float32, device="cpu", offset=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * spread + offset).to(device, dtype)


def compare(function, reference, *inputs):
    """`function` on `inputs` against `reference` on the same numbers in float64: outputs, and gradients of all inputs."""
    dtype = inputs[0].dtype
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, wanted = function(*ours), reference(*exact)
    outputs, wanted = (outputs, wanted) if isinstance(outputs, tuple) else ((outputs,), (wanted,))
    weights = [numbers(*y.shape, seed=7, dtype=dtype, device=y.device) for y in outputs]
    got = torch.autograd.grad(outputs, ours, weights)
    want = torch.autograd.grad(wanted, exact, [w.double() for w in weights])
    for a, b in zip((*outputs, *got), (*wanted, *want), strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().clamp(min=1)
        assert ((a.double() - b).abs().max() / scale).item() < TOLERANCE[dtype]


def check_group_norm(shape, silu, dtype, device="cpu", offset=0.0, memory_format=torch.channels_last):
    c = shape[1]
    groups = 3 if c == 30 else 32
    x = numbers(*shape, dtype=dtype, device=device, offset=offset, spread=2).contiguous(memory_format=memory_format)
    weight, bias = (numbers(c, seed=s, dtype=dtype, device=device, offset=o) for s, o in ((1, 1), (2, 0)))

    def reference(x):
        y = F.group_norm(x, groups, weight.double(), bias.double(), 1e-5)
        return F.silu(y) if silu else y

    compare(lambda x: kernels.group_norm(x, weight, bias, groups, 1e-5, silu), reference, x)
    shift = numbers(*shape[:2], seed=3, dtype=dtype, device=device)
    compare(
        lambda x, s: kernels.group_norm(x, weight, bias, groups, 1e-5, silu, s), lambda x, s: reference(x + s[:, :, None, None]), x, shift
    )


def check_add_biased(shape, dtype, device="cpu", memory_format=torch.channels_last):
    x, h = (numbers(*shape, seed=s, dtype=dtype, device=device).contiguous(memory_format=memory_format) for s in (0, 1))
    bias = numbers(shape[1], seed=2, dtype=dtype, device=device)
    compare(lambda x, h: kernels.add_biased(x, h * 1, bias), lambda x, h: x + h + bias.double()[:, None, None], x, h)


def check_attention(shape, dtype, device="cpu"):
    b, s, t, h, d = shape
    q = numbers(b, s, h, d, dtype=dtype, device=device)
    k, v = (numbers(b, t, h, d, seed=i, dtype=dtype, device=device) for i in (1, 2))

    def reference(q, k, v):
        return torch.einsum("bhst,bthd->bshd", (torch.einsum("bshd,bthd->bhst", q, k) * d**-0.5).softmax(-1), v)

    compare(kernels.attention, reference, q, k, v)
    frozen = k, v
    compare(lambda q: kernels.attention(q, *frozen), lambda q: reference(q, *(x.double() for x in frozen)), q)


def check_geglu(shape, dtype, device="cpu"):
    def reference(p):
        value, gate = p.chunk(2, -1)
        return value * F.gelu(gate)

    compare(kernels.geglu, reference, numbers(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, spread=2))


def check_layer_norm(shape, affine, dtype, device="cpu", offset=0.0):
    d = shape[-1]
    weight, bias = (numbers(d, seed=s, dtype=dtype, device=device, offset=o) if affine else None for s, o in ((1, 1), (2, 0)))
    x = numbers(*shape, dtype=dtype, device=device, offset=offset)
    residual = numbers(*shape, seed=3, dtype=dtype, device=device)

    def reference(x):
        return F.layer_norm(x, (d,), weight.double() if affine else None, bias.double() if affine else None, 1e-5)

    compare(lambda x: kernels.layer_norm(x, weight, bias, 1e-5), reference, x)
    compare(
        lambda x, r: kernels.add_layer_norm(x, r, weight, bias, 1e-5),
        lambda x, r: ((x + r), reference(x + r)),
        x,
        residual,
    )
    compare(lambda x: kernels.add_layer_norm(x, None, weight, bias, 1e-5), lambda x: (x, reference(x)), x)


DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", GROUP_SHAPES, ids=str)
def test_group_norm_equals_float64(shape, silu, dtype):
    check_group_norm(shape, silu, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_add_biased_equals_float64(memory_format, dtype):
    check_add_biased((2, 96, 5, 7), dtype, memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETED else DTYPES, ids=str)  # it multiplies no bf16
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_equals_float64(shape, dtype):
    check_attention(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_geglu_equals_float64(shape, dtype):
    check_geglu(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_layer_norm_equals_float64(shape, affine, dtype):
    check_layer_norm(shape, affine, dtype)


@pytest.mark.parametrize("offset", [30.0, pytest.param(2000.0, marks=pytest.mark.skipif(not INTERPRETED, reason="torch's own group norm"))])
def test_a_large_mean_does_not_cancel(offset):
    """Plain sums of squares in float32, as torch's CPU kernel for channels_last has them, would lose the variance at 2000."""
    x = numbers(2, 320, 20, 20, offset=offset).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(320), torch.zeros(320)
    want = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
    assert (kernels.group_norm(x, weight, bias, 32, 1e-5, False).double() - want).abs().max() < 2e-3
    rows = numbers(6, 320, offset=2000.0)
    want = F.layer_norm(rows.double(), (320,))
    assert (kernels.layer_norm(rows, None, None, 1e-5).double() - want).abs().max() < 2e-3


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts bf16 off instead of rounding")
def test_wide_weights_on_a_narrow_input():
    """float32 scale and shift are used as they are, not rounded to the input's dtype first."""
    x = numbers(1, 64, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = numbers(64, seed=1, offset=1), numbers(64, seed=2)
    want = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5).bfloat16()
    got = kernels.group_norm(x, weight, bias, 32, 1e-5, False)
    assert got.dtype == torch.bfloat16
    assert (got != want).float().mean() < 0.01  # a different rounding of a tie, at most


def test_gradient_through_a_chain():
    """Norm, product, GEGLU, residual: the gradient of the first input and of a trained weight between the functions."""
    weight, bias = numbers(32, seed=1, offset=1), numbers(32, seed=2)

    def chain(ops, x, trained):
        weight_, bias_ = weight.to(x.dtype), bias.to(x.dtype)
        h = ops["group_norm"](x, weight_, bias_)
        h = h.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 32)
        total, y = ops["add_layer_norm"](h @ trained, h, weight_, bias_)
        y = ops["geglu"](torch.cat([y @ trained, y], -1))
        return (ops["layer_norm"](y + total, None, None) * torch.linspace(-1, 1, 32, dtype=x.dtype)).square().sum()

    ours = {
        "group_norm": lambda x, w, b: kernels.group_norm(x, w, b, 4, 1e-5, True),
        "add_layer_norm": lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b, 1e-5),
        "layer_norm": lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        "geglu": kernels.geglu,
    }
    stock = {
        "group_norm": lambda x, w, b: F.silu(F.group_norm(x, 4, w, b, 1e-5)),
        "add_layer_norm": lambda x, r, w, b: (x + r, F.layer_norm(x + r, (32,), w, b, 1e-5)),
        "layer_norm": lambda x, w, b: F.layer_norm(x, (32,), w, b, 1e-5),
        "geglu": lambda p: p[..., :32] * F.gelu(p[..., 32:]),
    }
    x, trained = numbers(2, 32, 6, 5), numbers(32, 32, seed=4, spread=0.2)
    narrow = [x.clone().requires_grad_(), trained.clone().requires_grad_()]
    wide = [x.double().requires_grad_(), trained.double().requires_grad_()]
    got = torch.autograd.grad(chain(ours, *narrow), narrow)
    want = torch.autograd.grad(chain(stock, *wide), wide)
    for a, b in zip(got, want, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-4


@pytest.mark.parametrize("unused", ["sum", "norm"])
def test_one_output_of_add_layer_norm_may_stay_unused(unused):
    x, residual = numbers(3, 16).requires_grad_(), numbers(3, 16, seed=1).requires_grad_()
    total, y = kernels.add_layer_norm(x, residual, None, None, 1e-5)
    used = y if unused == "sum" else total
    got = torch.autograd.grad((used * numbers(3, 16, seed=2)).sum(), (x, residual))
    exact = (x + residual).detach().double().requires_grad_()
    wanted = F.layer_norm(exact, (16,)) if unused == "sum" else exact
    (want,) = torch.autograd.grad((wanted * numbers(3, 16, seed=2)).sum(), exact)
    for g in got:
        torch.testing.assert_close(g.double(), want, atol=1e-5, rtol=1e-5)


def test_frozen_weights_get_no_gradient():
    weight, bias = torch.nn.Parameter(torch.ones(32)), torch.nn.Parameter(torch.zeros(32))
    x = numbers(1, 32, 4, 4).requires_grad_()
    kernels.group_norm(x, weight, bias, 4, 1e-5, True).sum().backward()
    kernels.layer_norm(numbers(3, 32).requires_grad_(), weight, bias, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


def test_add_layer_norm_refuses_broadcasting():
    with pytest.raises(ValueError, match="one shape and dtype"):
        kernels.add_layer_norm(numbers(2, 3, 8), numbers(3, 8), None, None, 1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(memory_format):
    x = numbers(2, 64, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
    y = kernels.group_norm(x, torch.ones(64), torch.zeros(64), 32, 1e-5, True)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y, memory_format=torch.contiguous_format))
    expected = torch.channels_last if INTERPRETED else memory_format
    assert y.is_contiguous(memory_format=expected)
    assert g.is_contiguous(memory_format=expected)
    check_group_norm((2, 64, 6, 5), True, torch.float32, memory_format=memory_format)


def test_strided_inputs_and_gradients():
    """What views hand over: a transposed activation, an expanded gradient."""
    x = numbers(5, 2, 64).transpose(0, 1)
    compare(kernels.geglu, lambda p: p[..., :32] * F.gelu(p[..., 32:]), x)
    compare(lambda x: kernels.layer_norm(x, None, None, 1e-5), lambda x: F.layer_norm(x, (64,)), x)
    leaf = x.detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    kernels.layer_norm(leaf, None, None, 1e-5)[..., :3].sum().backward()
    F.layer_norm(exact, (64,))[..., :3].sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def kept_bytes(function, frozen=()):
    """Bytes kept for backward, each storage once, without the `frozen` tensors."""
    storages = {}

    def pack(tensor):
        if not any(tensor is f for f in frozen):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    assert kept is not None
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_input_and_its_statistics_are_kept(dtype):
    c, n, size = 64, 2, dtype.itemsize
    weight, bias = torch.ones(c, dtype=dtype), torch.zeros(c, dtype=dtype)
    x = numbers(n, c, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    rows = numbers(n, 10, c, dtype=dtype).requires_grad_()
    other = numbers(n, 10, c, dtype=dtype, seed=1).requires_grad_()
    frozen = (weight, bias)
    got = {
        "group_norm": kept_bytes(lambda: kernels.group_norm(x, weight, bias, 32, 1e-5, True), frozen),
        "geglu": kept_bytes(lambda: kernels.geglu(rows), frozen),
        "layer_norm": kept_bytes(lambda: kernels.layer_norm(rows, weight, bias, 1e-5), frozen),
        "add_layer_norm": kept_bytes(lambda: kernels.add_layer_norm(rows, other, weight, bias, 1e-5), frozen),
    }
    two_float32 = 2 * 4
    assert got == {
        "group_norm": x.numel() * size + n * 32 * two_float32,
        "geglu": rows.numel() * size,
        "layer_norm": rows.numel() * size + n * 10 * two_float32,
        "add_layer_norm": rows.numel() * size + n * 10 * two_float32,
    }


def test_autocast_changes_nothing():
    x = numbers(2, 10, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kernels.layer_norm(x, None, None, 1e-5), kernels.geglu(x)
    outside = kernels.layer_norm(x, None, None, 1e-5), kernels.geglu(x)
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(inside, outside, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in for CUDA here")
def test_the_plain_form_serves_the_cpu():
    assert kernels._form(torch.zeros(1)) is plain


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs anywhere")
def test_triton_that_does_not_run_is_reported(monkeypatch):
    """Here it is missing, or has no GPU to run on; `find_spec` says that it is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", None)
    kernels._triton_runs.cache_clear()
    with pytest.warns(UserWarning, match=r"don't run on cpu .*Plain torch operations are used instead"):
        assert not kernels._triton_runs(torch.device("cpu"))
    kernels._triton_runs.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_triton_form_in_the_interpreter():
    """All tests of this file again, through the Triton kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (it comes with torch's CUDA builds)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


GPU_DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_every_function_on_cuda_equals_float64(dtype):
    assert kernels.by_triton(torch.zeros(1, device="cuda", dtype=dtype)), "the Triton form should serve this device"
    for shape in [*GROUP_SHAPES, (2, 640, 64, 64), (1, 320, 128, 128)]:
        for silu in (False, True):
            check_group_norm(shape, silu, dtype, "cuda")
            check_group_norm(shape, silu, dtype, "cuda", memory_format=torch.contiguous_format)
    for shape in [*ROW_SHAPES, (2, 4096, 640), (1, 1024, 2432)]:
        check_geglu(shape, dtype, "cuda")
        for affine in (False, True):
            check_layer_norm(shape, affine, dtype, "cuda")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check_add_biased((2, 320, 17, 9), dtype, "cuda", memory_format)
    for shape in [*ATTENTION_SHAPES, (4, 1024, 77, 20, 64), (1, 4096, 77, 8, 40)]:
        check_attention(shape, dtype, "cuda")


@pytest.mark.gpu
def test_attention_sums_its_parts_in_one_order():
    q, kv, g = (numbers(*shape, device="cuda", dtype=torch.bfloat16) for shape in [(1, 4096, 8, 40), (2, 1, 77, 8, 40), (1, 4096, 8, 40)])
    leaves = [x.requires_grad_() for x in (q, *kv.unbind())]
    first = torch.autograd.grad(kernels.attention(*leaves), leaves, g)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(kernels.attention(*leaves), leaves, g), strict=True))


@pytest.mark.gpu
def test_plain_form_on_cuda_equals_float64(monkeypatch):
    monkeypatch.setattr(kernels, "by_triton", lambda x: False)
    for dtype in GPU_DTYPES:
        check_group_norm((2, 960, 5, 7), True, dtype, "cuda")
        check_geglu((2, 7, 320), dtype, "cuda")
        check_layer_norm((2, 7, 320), True, dtype, "cuda")


@pytest.mark.gpu
def test_a_captured_graph_follows_its_input():
    """Forward and backward replayed on new numbers equal the eager run on them."""
    weight, bias = (numbers(320, seed=s, device="cuda", dtype=torch.bfloat16) for s in (1, 2))
    x = numbers(2, 320, 16, 16, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()

    def step(x):
        h = kernels.group_norm(x, weight, bias, 32, 1e-5, True).permute(0, 2, 3, 1).flatten(1, 2)
        total, y = kernels.add_layer_norm(h, h, weight, bias, 1e-5)
        y = kernels.geglu(torch.cat([y, kernels.layer_norm(total, None, None, 1e-5)], -1))
        return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x)
    with torch.no_grad():
        x.copy_(numbers(2, 320, 16, 16, seed=9))
    graph.replay()
    for a, b in zip(captured, step(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    """4.3 GB of bf16 in one tensor: its last rows are reached."""
    p = torch.zeros(2**20 + 64, 2048 + 64, device="cuda", dtype=torch.bfloat16)
    p[-1] = 2.0
    y = kernels.geglu(p)
    assert y[-1].float().sub(2 * F.gelu(torch.tensor(2.0)).item()).abs().max() < 0.02 and y[:-1].count_nonzero() == 0
