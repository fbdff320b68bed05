"""Linear layers that keep their weights in 8 bits: half the memory of bf16, for a frozen model that is only read (SD3's T5)."""

from __future__ import annotations

import torch


class Int8Linear(torch.nn.Module):
    """y = x W^T + b with W (out, in) as int8, one scale for each row (LLM.int8(), arXiv:2208.07339, section 2.1, without outliers).

    The weights are widened to the input's dtype where they are used, so that it works on every device.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(torch.empty(outputs, inputs, dtype=torch.int8))
        self.scale = torch.nn.Buffer(torch.empty(outputs, 1))
        self.bias = torch.nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 weight (out, in), float32 scale (out, 1)) of a weight; the largest of each row becomes 127."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


def replace_linears(model: torch.nn.Module) -> set[str]:
    """Put an empty Int8Linear in the place of each Linear of `model`; returns their paths."""
    paths = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for path in paths:
        old = model.get_submodule(path)
        with torch.device(old.weight.device):
            model.set_submodule(path, Int8Linear(old.in_features, old.out_features, old.bias is not None))
    return paths
