"""kohya naming, which A1111, Forge, ComfyUI, SD.Next, InvokeAI, diffusers, sd-scripts and LyCORIS read (SD3: three of them).

A layer is `STEM.lora_down.weight` (r, in[, kh, kw]), `STEM.lora_up.weight` (out, r[, 1, 1]) and `STEM.alpha` (0-dim); W changes by
`alpha / r * up @ down`. STEM is a prefix for the part and the module path with "_" for ".": SD1 and SD2 use diffusers' block names, SDXL
LDM's, SD3 the original MMDiT's with q, k and v fused. Source: kohya-ss/sd-scripts `networks/lora.py`, `lora_sd3.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from trainer.adapters import Delta
from trainer.formats import FormatError, ldm_names, sd3_names
from trainer.formats.factors import balanced

# family -> part -> prefix of its stems; text_3, SD3's T5, is read only
PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_1": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_1": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_1": "lora_te1_", "text_2": "lora_te2_"},
    "sd3": {"unet": "lora_unet_", "text_1": "lora_te1_", "text_2": "lora_te2_", "text_3": "lora_te3_"},
}
# prefixes that some writers use instead: diffusers' own converter writes lora_te1_ for every family, OneTrainer has its own for SD3
ALIASES = {
    "sd1": {"lora_te1_": "text_1"},
    "sd2": {"lora_te1_": "text_1"},
    "sdxl": {"lora_te_": "text_1"},
    "sd3": {"lora_transformer_": "unet"},
}
LDM_BLOCKS = ("sdxl",)
ENDINGS = ("lora_down.weight", "lora_up.weight", "alpha")
MOST_EXACT = 85  # three times an integer up to this is held by bf16 exactly

# Module names that contain "_" themselves; needed to turn a stem back into a path.
_NAMES = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "conv_norm_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1", "layer_norm2"),
    *("final_layer_norm", "input_blocks", "output_blocks", "middle_block", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("time_embed", "label_emb", "joint_blocks", "x_block", "context_block", "adaLN_modulation", "context_embedder", "x_embedder"),
    *("t_embedder", "y_embedder", "final_layer", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "ff_context", "norm1_context"),
    *("norm_out", "pos_embed", "time_text_embed", "timestep_embedder", "text_embedder", "wi_0", "wi_1"),
)
_WORD = re.compile("|".join(sorted(_NAMES, key=len, reverse=True)) + r"|[^_]+")


def layers(parts: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    """{part: {module path: weight shape}} of every Linear and Conv2d of a base, with or without a PEFT adapter on it."""
    return {
        part: {
            path.removesuffix(".base_layer"): tuple(module.weight.shape)
            for path, module in root.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in path
        }
        for part, root in parts.items()
    }


def canonical(part: str, path: str) -> str:
    """A live module path without the `text_model.` level, which CLIP encoders have or lack by class and version of transformers."""
    return path if part == "unet" else path.removeprefix("text_model.")


def stem(family: str, part: str, path: str) -> str:
    """The stem that is written for the layer at `path` of the live model; of SD3's q, k and v, that of the fused layer.

    Raises FormatError for a part or a layer that the family has no name for.
    """
    if part == "unet" and family in LDM_BLOCKS:
        path = ldm_names.to_ldm(path)
    if part == "unet" and family == "sd3":
        path = sd3_names.to_original(path)[0]
    return plain_stem(family, part, path)


def plain_stem(family: str, part: str, path: str) -> str:
    """The stem of the module `path` as it is called, with the `text_model` level that transformers 5.6 dropped from CLIPTextModel."""
    prefix = PREFIXES[family].get(part)
    if prefix is None:
        raise FormatError(f"part {part!r} has no kohya name in {family}; parts of {family}: {', '.join(PREFIXES[family])}.")
    if part in ("text_1", "text_2") and path != "text_projection":
        path = "text_model." + path.removeprefix("text_model.")
    return prefix + path.replace(".", "_")


def locate(family: str, name: str) -> tuple[str, tuple[str, ...]]:
    """(part, module paths) of a stem: one path, or the three of SD3's fused q, k and v; text paths without `text_model.`.

    Both block names of a UNet and both namings of SD3 are read. Raises FormatError for what is no layer of the family.
    """
    part, path = _parse(family, name)
    if is_original(family, part, path):
        return part, sd3_names.to_diffusers(path)
    return part, (ldm_names.to_diffusers(path) if part == "unet" and family != "sd3" else path,)


def _parse(family: str, name: str) -> tuple[str, str]:
    """(part, module path in the file's own layout)."""
    known = {prefix: part for part, prefix in PREFIXES[family].items()} | ALIASES[family]
    for prefix, part in known.items():
        if name.startswith(prefix):
            return part, canonical(part, ".".join(_WORD.findall(name.removeprefix(prefix))))
    raise FormatError(f"{name} is no layer of {family}; its names start with {' or '.join(PREFIXES[family].values())}.")


def is_original(family: str, part: str, path: str) -> bool:
    """True for a path of the original MMDiT, as against diffusers' (which the naming with lora_transformer_ has)."""
    return family == "sd3" and part == "unet" and not path.startswith(sd3_names.DIFFUSERS)


def common_alpha(deltas: Iterable[Delta], times: int = 1) -> float:
    """The one alpha of a part: scale * rank of most of its layers, as a number that fp16 and bf16 hold exactly, `times` it too.

    That is an integer up to 256, else the nearest power of two from 2^-8 to 2^12. diffusers reads one alpha per part only.
    """
    counts = Counter(round(d.scale * d.tensors["down"].shape[0], 6) for d in deltas if d.scale > 0)
    value = counts.most_common(1)[0][0] if counts else 1.0
    if value == int(value) and 1 <= value <= (256 if times == 1 else MOST_EXACT):
        return value
    return 2.0 ** min(12, max(-8, round(math.log2(max(value, 2**-8)))))


def folded(family: str, deltas: Iterable[Delta]) -> Iterator[tuple[str, str, dict[str, torch.Tensor]]]:
    """(part, path, {ending: tensor}) of each layer to write; float32, contiguous. SD3's transformer has the original's paths here.

    A part has one alpha; what differs from it is folded into `lora_up`. A fused layer of SD3 has that alpha once for each LoRA stacked
    in it, so that its factors stay what they were. Raises FormatError for a delta that is not plain LoRA.
    """
    deltas = list(deltas)
    for d in deltas:
        if d.kind != "lora":
            raise FormatError(f"{d.part} {d.path} has a change of kind {d.kind!r}; files are written for kind 'lora' alone.")
    for part in dict.fromkeys(d.part for d in deltas):
        own = [d for d in deltas if d.part == part]
        fused = family == "sd3" and part == "unet"
        common = common_alpha(own, times=3 if fused else 1)
        for d, stacked in sd3_names.fuse(own) if fused else ((d, 1) for d in own):
            d = balanced(d)
            alpha, down = common * stacked, d.tensors["down"]
            up = (d.tensors["up"].double() * (d.scale * down.shape[0] / alpha)).float()
            yield part, d.path, dict(zip(ENDINGS, (down.float().contiguous(), up.contiguous(), torch.tensor(alpha)), strict=True))


def to_kohya(family: str, deltas: Iterable[Delta]) -> dict[str, torch.Tensor]:
    """The file's tensors, as `folded` gives them. Raises FormatError for a delta that is not plain LoRA."""
    state = {}
    for part, path, tensors in folded(family, deltas):
        name = plain_stem(family, part, path) if family == "sd3" else stem(family, part, path)
        state |= {f"{name}.{ending}": tensor for ending, tensor in tensors.items()}
    return state


def from_kohya(family: str, state: Mapping[str, torch.Tensor]) -> list[Delta]:
    """The layers of a file, float32 on the CPU, sorted by stem; paths as `locate` gives them. A missing alpha means scale 1, as all
    readers take it.

    Raises FormatError for keys of other kinds (LoHa, LoKr, DoRA, ...), other families, and layers without both matrices.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, ending = key.partition(".")
        if ending not in ENDINGS:
            raise FormatError(
                f"{key} does not belong to a plain LoRA, whose keys end in {', '.join(ENDINGS)}. Use a plain LoRA or LoCon file."
            )
        found.setdefault(name, {})[ending] = tensor
    deltas = []
    for name, tensors in sorted(found.items()):
        locate(family, name)
        part, path = _parse(family, name)
        deltas += layer_deltas(family, part, path, tensors, name)
    return deltas


def layer_deltas(family: str, part: str, path: str, tensors: Mapping[str, torch.Tensor], name: str) -> list[Delta]:
    """The changes that {ending: tensor} of one layer make, three where q, k and v are fused; `path` is that in the file's own layout.

    Raises FormatError for a layer (called `name`) without both matrices, or with two that do not fit.
    """
    missing = [e for e in ENDINGS[:2] if e not in tensors]
    if missing:
        raise FormatError(f"{name} has no {' and no '.join(missing)}; the file is damaged. Export it again.")
    down, up = (tensors[e].float().cpu() for e in ENDINGS[:2])
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or 0 in down.shape:
        raise FormatError(f"{name} has down {tuple(down.shape)} and up {tuple(up.shape)}, which do not fit. The file is damaged.")
    if tensors.get("alpha") is not None and tensors["alpha"].numel() != 1:
        raise FormatError(f"{name} has an alpha of shape {tuple(tensors['alpha'].shape)}; it must be one number. The file is damaged.")
    scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
    d = Delta(part, path, "lora", {"down": down, "up": up}, scale)
    if is_original(family, part, path):
        return sd3_names.split(d)
    return [replace(d, path=ldm_names.to_diffusers(path))] if part == "unet" and family != "sd3" else [d]
