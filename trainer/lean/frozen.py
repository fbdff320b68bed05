"""The frozen layers of diffusers' UNet and VAE in forms that keep less for the backward pass and leave channels-last as it is."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainer import kernels
from trainer.lean.narrow import FrozenConv, NarrowConv2d, kept


def install(model: nn.Module) -> None:
    """Exchange the `forward` of the layers that are known here; all others stay. The model's weights must be frozen."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for m in model.modules():
        if type(m) is nn.Conv2d and m.padding_mode == "zeros" and m.groups == 1 and m.dilation == (1, 1):
            m.forward = MethodType(_conv, m)
        elif type(m) is nn.GroupNorm:
            m.forward = MethodType(_group_norm, m)
        elif type(m) is nn.LayerNorm:
            m.forward = MethodType(_layer_norm, m)
        elif type(m) is GEGLU:
            m.forward = MethodType(_geglu, m)
        elif type(m) is ResnetBlock2D and _usual_resnet(m):
            m.forward = MethodType(_resnet, m)
        elif type(m) is Transformer2DModel and m.is_input_continuous:
            m._get_output_for_continuous_inputs = MethodType(_to_pixels, m)
        elif type(m) is BasicTransformerBlock and m.norm_type == "layer_norm" and m.pos_embed is None and m.attn2 is not None:
            m.forward = MethodType(_block, m)


def _conv(self: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)


def _group_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if x.ndim == 3:  # (B, C, S), as a VAE's attention has it
        return _group_norm(self, x.unsqueeze(2)).squeeze(2)
    return kernels.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, False)


def _layer_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return kernels.layer_norm(x, self.weight, self.bias, self.eps)


def _geglu(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return kernels.geglu(self.proj(x))


def _usual_resnet(m: Any) -> bool:
    plain = m.upsample is None and m.downsample is None and not m.skip_time_act and m.time_embedding_norm == "default"
    return plain and isinstance(m.nonlinearity, nn.SiLU) and isinstance(m.norm1, nn.GroupNorm) and m.dropout.p == 0


def _resnet(self: Any, x: torch.Tensor, temb: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
    h, shift = _without_bias(self.conv1, kernels.group_norm(x, *_norm(self.norm1), True))
    if self.time_emb_proj is not None:
        t = self.time_emb_proj(F.silu(temb))
        shift = t if shift is None else t + shift
    elif shift is not None:
        shift = shift.expand(len(x), -1)
    h, bias = _without_bias(self.conv2, kernels.group_norm(h, *_norm(self.norm2), True, shift))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    h = x + h if bias is None else kernels.add_biased(x, h, bias)
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def _norm(m: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor, int, float]:
    return m.weight, m.bias, m.num_groups, m.eps


def _without_bias(conv: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(what a convolution makes of x, the bias still to be added): cuDNN adds it in a sweep of its own, which others can save it."""
    if type(conv) not in (nn.Conv2d, NarrowConv2d) or conv.bias is None or not kernels.by_triton(x):
        return conv(x), None
    return FrozenConv.apply(x, kept(conv), None, conv.stride, conv.padding), conv.bias


def _to_pixels(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> torch.Tensor:
    """diffusers copies to the plain layout here, which every convolution after it would have to undo."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    pixels = hidden_states.view(batch_size, height, width, -1).permute(0, 3, 1, 2)
    return (pixels if self.use_linear_projection else self.proj_out(pixels)) + residual


def _block(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """A transformer block, each addition made together with the norm that follows it."""
    x, h = kernels.add_layer_norm(hidden_states, None, self.norm1.weight, self.norm1.bias, self.norm1.eps)
    h = self.attn1(h, encoder_hidden_states if self.only_cross_attention else None)
    x, h = kernels.add_layer_norm(h, x, self.norm2.weight, self.norm2.bias, self.norm2.eps)
    h = self.attn2(h, encoder_hidden_states)
    x, h = kernels.add_layer_norm(h, x, self.norm3.weight, self.norm3.bias, self.norm3.eps)
    return self.ff(h) + x
