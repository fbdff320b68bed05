"""The lean step: what nearly everyone trains (LoRA and LoCon on frozen weights) computed with fewer products, copies and kept tensors.

PEFT keeps configuration, parameters and names, diffusers the models. Modules get another `forward`, nothing else: names, parameters and
results (to rounding) stay as they are. What has no lean form, such as dropout on the adapter, is left as it was.
"""

from __future__ import annotations

import functools
import re
from types import MethodType
from typing import Any

import torch
from torch import nn

from trainer import kernels
from trainer.lean.lora import Conv, Group, Weights
from trainer.lean.narrow import NarrowConv2d, NarrowLinear, kept

SHARING = re.compile(r"(.*\.)(to_[qkv]|(?:add_)?[qkv]_proj|to_out\.0)")  # layers whose input others may keep, too
QKV = re.compile(r"(.*\.attn[12])\.(to_q|to_k|to_v)")  # of the UNets; layers of one attention that read the same input


def install(parts: dict[str, nn.Module], layers: dict[str, dict[str, Any]], name: str) -> Weights | None:
    """Give the frozen layers of a UNet among `parts`, and PEFT's plain `layers` (part -> module path -> layer), their lean forward.

    Returns the holder of the weights of the adapter `name`; None where one of its layers has no lean form (dropout, a base in several
    dtypes): then all stay as PEFT made them.
    """
    from diffusers import UNet2DConditionModel

    from trainer.lean import frozen

    for model in parts.values():
        if type(model) is UNet2DConditionModel:
            frozen.install(model)
    every = [m for found in layers.values() for m in found.values()]
    dtypes = {kept(m.base_layer).dtype for m in every}
    if len(dtypes) != 1 or not all(_plain(m, name) for m in every):
        return None
    groups: list[Group | Conv] = []
    for part, found in layers.items():
        shared = _shared(parts[part], found, name)
        for members in shared:
            group = Group([found[path] for path in members], name)
            groups.append(group)
            attention = parts[part].get_submodule(QKV.fullmatch(members[0])[1])
            attention.lean_group = group
        grouped = {path for members in shared for path in members}
        for path, m in found.items():
            if path in grouped:
                m.forward = MethodType(_grouped, m)
            elif isinstance(m.base_layer, nn.Conv2d):
                groups.append(conv := Conv(m, name))
                m.forward = conv
            else:
                groups.append(group := Group([m], name, alone=_alone(path, grouped)))
                m.forward = MethodType(_first, group)
    return Weights(groups)


def recompute(model: nn.Module, what: str, keep_random: bool) -> None:
    """Have the backward pass compute the `feed_forward` layers of a denoiser anew, or its whole `blocks`, instead of keeping what they need.

    Feed-forward layers keep the most for the least arithmetic. `keep_random`: they draw (dropout), so the same numbers are drawn again;
    that reads the generator's state on the host, which a CUDA graph cannot do.
    """
    from diffusers.models.attention import FeedForward
    from torch.utils.checkpoint import checkpoint

    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=keep_random)
    if what == "blocks":
        model.enable_gradient_checkpointing(again)
    elif what == "feed_forward":
        for m in model.modules():
            if type(m) is FeedForward:
                m.forward = functools.partial(again, m.forward)


def _first(group: Group, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return group(x)[0]


def _alone(path: str, grouped: set[str]) -> bool:
    """Whether only the layer at `path` keeps its input: attention keeps what `to_out` reads, and q, k and v by themselves read the same."""
    fits = SHARING.fullmatch(path)
    return not fits or (fits[2] == "to_q" and f"{fits[1]}to_k" in grouped)  # k and v of a cross-attention read something else


def _grouped(layer: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("a layer of a shared product was called by itself")


def _plain(m: Any, name: str) -> bool:
    from peft.tuners.lora.layer import Conv2d, Linear

    if type(m) not in (Linear, Conv2d) or not isinstance(m.lora_dropout[name], nn.Identity) or list(m.lora_A) != [name]:
        return False
    base = m.base_layer
    if type(base) in (nn.Conv2d, NarrowConv2d):
        return base.groups == 1 and base.dilation == (1, 1) and base.padding_mode == "zeros"
    return type(base) in (nn.Linear, NarrowLinear)


def _shared(model: nn.Module, found: dict[str, Any], name: str) -> list[list[str]]:
    """Paths of layers that may become one product: q, k, v of a self-attention, k and v of a cross-attention."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    together: dict[str, list[str]] = {}
    for path in found:
        if fits := QKV.fullmatch(path):
            together.setdefault(fits[1], []).append(path)
    out = []
    for at, paths in together.items():
        attention = model.get_submodule(at)
        if type(attention) is not Attention or type(attention.processor) is not AttnProcessor2_0 or not _usual(attention):
            continue
        kinds = ("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v")
        paths = [f"{at}.{kind}" for kind in kinds if f"{at}.{kind}" in paths]
        if len(paths) < len(kinds) or any(found[p].base_layer.bias is not None for p in paths):
            continue
        if all(found[p].lora_A[name].weight.numel() % 8 == 0 for p in paths):
            attention.set_processor(SharedAttention())
            out.append(paths)
    return out


def _usual(attention: Any) -> bool:
    """Whether the attention is as Stable Diffusion's UNets have it, without norms, residual or rescaling of its own."""
    extras = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k)
    return not any(extras) and not attention.norm_cross and not attention.residual_connection and attention.rescale_output_factor == 1


class SharedAttention:
    """diffusers' attention processor for an attention with a `lean_group`: q, k and v (or k and v) come from one product."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        assert attention_mask is None and hidden_states.ndim == 3
        if attn.is_cross_attention:
            states = attn.to_q(hidden_states), *attn.lean_group(encoder_hidden_states)
        else:
            states = attn.lean_group(hidden_states)
        out = kernels.attention(*(x.unflatten(-1, (attn.heads, -1)) for x in states))
        return attn.to_out[0](out.flatten(2))
