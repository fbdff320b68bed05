"""bfloat16 on a CPU: each product is float32's, rounded once, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.kernels import widened


def net(x, w, conv, bias):
    """A linear layer, an attention, a convolution."""
    h = F.linear(x, w, bias)
    q = h.view(2, 16, 4, 8).transpose(1, 2)
    h = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 4, 4, 32).permute(0, 3, 1, 2)
    return F.conv2d(h, conv, padding=1)


def test_outcomes_and_gradients_are_as_near_as_the_dtype_allows():
    torch.manual_seed(0)
    leaves = [
        (spread * torch.randn(*shape)).bfloat16() for shape, spread in (((2, 16, 24), 1), ((32, 24), 0.2), ((8, 32, 3, 3), 0.1), ((32,), 1))
    ]
    ours, exact = ([x.detach().clone().to(dtype).requires_grad_() for x in leaves] for dtype in (torch.bfloat16, torch.float64))
    with widened.Widened():
        y = net(*ours)
        y.square().mean().backward()
    want = net(*exact)
    want.square().mean().backward()
    for a, b in zip((y, *(x.grad for x in ours)), (want, *(x.grad for x in exact)), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_each_product_is_float32s_rounded_once():
    torch.manual_seed(0)
    a, b, c = (torch.randn(64, 64).bfloat16() for _ in range(3))
    wide = (a.float() @ b.float()).bfloat16()
    into, added = torch.empty_like(a), c.clone()
    with widened.Widened():
        assert torch.equal(a @ b, wide)
        torch.mm(a, b, out=into)
        assert added.addmm_(a, b, alpha=0.5) is added
    assert torch.equal(into, wide)
    assert torch.equal(added, torch.addmm(c.float(), a.float(), b.float(), alpha=0.5).bfloat16())
    with widened.Widened():  # other dtypes are let alone
        exact = a.float() @ b.float()
    assert exact.dtype == torch.float32 and torch.equal(exact, a.float() @ b.float())


def test_only_bf16_on_a_cpu_without_it_is_widened(monkeypatch):
    for native in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert isinstance(widened.where_needed("cpu", "bf16"), widened.Widened) is not native
        assert not isinstance(widened.where_needed("cpu", "fp32"), widened.Widened)
        assert not isinstance(widened.where_needed("cuda", "bf16"), widened.Widened)
