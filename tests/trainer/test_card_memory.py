"""The Triton kernels compiled for consumer cards, without one: a tile must fit into a multiprocessor's memory, or the kernel does not start."""

from __future__ import annotations

import contextlib

import pytest
import torch

LIMIT = 99 * 1024  # bytes of shared memory for one program: compute capability 8.6, 8.9 and 12.0
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launches():
    """(kernel, arguments, keywords) of every kernel launch of a step's layers, on tensors that nothing is done with."""
    pytest.importorskip("triton", reason="Triton is not installed (the test extra has it on Linux)")
    from triton.runtime.jit import JITFunction

    from trainer.kernels import fused, lora, prompt_attention

    def tensor(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **more: seen.append((kernel, args, more)))
        patch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        for d in (40, 64):
            q, k = tensor(1, 4096, 8, d), tensor(1, 77, 8, d)
            prompt_attention.forward(q, k, k)
            prompt_attention.backward(q, q, k, k, True)
        for rank in (4, 16, lora.LARGEST_RANK):
            for rows in (77, 4096):
                x, weight, down, up = tensor(rows, 1280), tensor(3840, 1280), tensor(3 * rank, 1280), tensor(3, 1280, rank)
                gs = tensor(rows, 3840).split(1280, 1)
                y, h = lora.forward(x, weight, None, down, up, 1.0)
                _, low = lora.backward(list(gs), weight, down, up, 1.0)
                gradients = lora.Gradients()
                gradients.add(x, h, list(gs), low, down.float(), up.float(), 1.0, 1.0)
                gradients.flush()
                lora.add_low(y, h, up, 1.0)
                lora.joined(list(gs), up, 1.0)
        lora.joined([x], tensor(lora.LARGEST_RANK, 1280).t()[None], 1.0)
        x, bias = tensor(2, 640, 64, 64).contiguous(memory_format=torch.channels_last), tensor(640)
        _, *kept = fused.group_norm(x, bias, bias, 32, 1e-5, True)
        fused.group_norm_backward(x, bias, bias, *kept, 32, True)
        rows, weight = tensor(4096, 1280), tensor(1280)
        _, mean, rstd = fused.layer_norm(rows, weight, weight, 1e-5)
        fused.layer_norm_backward(rows, weight, rows, mean, rstd, rows)
    return seen


def kind(value):
    """How Triton names the type of an argument."""
    if isinstance(value, tuple):
        return tuple(kind(v) for v in value)
    return NAMES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"


def even(value, at):
    """Where in an argument tensors and multiples of 16 stand, of which Triton makes use."""
    if isinstance(value, tuple):
        return [path for i, v in enumerate(value) for path in even(v, (*at, i))]
    return [at] if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0) else []


@pytest.mark.parametrize("capability", [86, 120])
def test_every_tile_fits(launches, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert len(launches) > 30
    for kernel, args, more in launches:
        names = kernel.arg_names
        options = {name: more[name] for name in ("num_warps", "num_stages") if name in more}
        values = dict(zip(names, args, strict=False)) | {name: v for name, v in more.items() if name not in options}
        fixed = {name: v for name, v in values.items() if v is None or name in more or (isinstance(v, int) and v == 1)}
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in fixed else kind(values[n]) for n in names},
            constexprs={(names.index(n),): v for n, v in fixed.items()},
            attrs={path: [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in fixed for path in even(values[n], (i,))},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.metadata.shared <= LIMIT, f"{kernel.__name__} {more} takes {made.metadata.shared} bytes"
