"""bfloat16 on a CPU without instructions for it: products are computed in float32 and rounded once.

There torch multiplies bfloat16 by loops of its own, which take 8 to 150 times as long as float32 (measured on an AVX2 machine: a linear
layer 8 times, its gradient 145 times, a convolution 12 times). Memory is that of bfloat16 but for the layer at work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
PRODUCTS = {
    *(aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, aten.mv, aten.addmv),
    *(aten.convolution, aten.convolution_backward),
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward),
}


def where_needed(device: str | torch.device, dtype: str) -> AbstractContextManager[Any]:
    """A context for all that computes in `dtype` ("bf16", ...) on `device`: Widened where it helps, else one that does nothing."""
    slow = str(device) == "cpu" and dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Widened() if slow else nullcontext()


class Widened(TorchDispatchMode):
    """Has every product of bfloat16 tensors computed in float32, forward and backward, whoever calls it; results have their own dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS or not any(_narrow(x) for x in args):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(lambda x: x.float() if _narrow(x) else x, (args, kwargs))
        out = func(*wide_args, **wide_kwargs)
        into = kwargs.get("out") if "out" in kwargs else args[0] if func.overloadpacket.__name__.endswith("_") else None
        if into is not None:
            return into.copy_(out) if _narrow(into) else into
        if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
            return out[0].bfloat16(), out[1]  # the second, sums of exponentials, is in float32 in any case
        return tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x, out)


def _narrow(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16
