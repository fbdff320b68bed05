"""kohya naming, which A1111, Forge, ComfyUI, SD.Next, InvokeAI, diffusers, sd-scripts and LyCORIS all read.

A layer is `STEM.lora_down.weight` (r, in[, kh, kw]), `STEM.lora_up.weight` (out, r[, 1, 1]) and `STEM.alpha` (0-dim); W changes by
`alpha / r * up @ down`. STEM is a prefix for the part and the module path with "_" for "."; SD1.x uses diffusers' block names.
Source: kohya-ss/sd-scripts `networks/lora.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from trainer.adapters import Delta
from trainer.formats import FormatError

# family -> part -> prefix of its stems
PREFIXES = {"sd1": {"unet": "lora_unet_", "text_1": "lora_te_"}}
# prefixes that some writers use instead (diffusers' own converter writes lora_te1_ for every family)
ALIASES = {"sd1": {"lora_te1_": "text_1"}}
ENDINGS = ("lora_down.weight", "lora_up.weight", "alpha")

# Module names that contain "_" themselves; needed to turn a stem back into a path.
_NAMES = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "linear_1", "linear_2"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
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


def stem(family: str, part: str, path: str) -> str:
    """The stem of the layer at `path` of the live model, with the `text_model` level that transformers 5.6 dropped.

    Raises FormatError for a part that the family has no name for.
    """
    prefix = PREFIXES[family].get(part)
    if prefix is None:
        raise FormatError(f"part {part!r} has no kohya name in {family}; parts of {family}: {', '.join(PREFIXES[family])}.")
    path = path if part == "unet" else "text_model." + path.removeprefix("text_model.")
    return prefix + path.replace(".", "_")


def locate(family: str, name: str) -> tuple[str, str]:
    """(part, module path) of a stem; text encoder paths without `text_model.`, as transformers 5 has them.

    Raises FormatError for a prefix that the family does not have.
    """
    known = {prefix: part for part, prefix in PREFIXES[family].items()} | ALIASES[family]
    for prefix, part in known.items():
        if name.startswith(prefix):
            path = ".".join(_WORD.findall(name.removeprefix(prefix)))
            return part, path if part == "unet" else path.removeprefix("text_model.")
    raise FormatError(f"{name} is no layer of {family}; its names start with {' or '.join(PREFIXES[family].values())}.")


def common_alpha(deltas: Iterable[Delta]) -> float:
    """The one alpha of a part: scale * rank of most of its layers, as a number that fp16 and bf16 hold exactly.

    That is an integer up to 256, else the nearest power of two from 2^-8 to 2^12. diffusers reads one alpha per part only.
    """
    counts = Counter(round(d.scale * d.tensors["down"].shape[0], 6) for d in deltas if d.scale > 0)
    value = counts.most_common(1)[0][0] if counts else 1.0
    if value == int(value) and 1 <= value <= 256:
        return value
    return 2.0 ** min(12, max(-8, round(math.log2(max(value, 2**-8)))))


def to_kohya(family: str, deltas: Iterable[Delta]) -> dict[str, torch.Tensor]:
    """The file's tensors, float32, contiguous. What differs from the part's one alpha is folded into `lora_up`.

    Raises FormatError for a delta that is not plain LoRA.
    """
    deltas = list(deltas)
    for d in deltas:
        if d.kind != "lora":
            raise FormatError(f"{d.part} {d.path} has a change of kind {d.kind!r}; kohya files are written for kind 'lora' alone.")
    alphas = {part: common_alpha(d for d in deltas if d.part == part) for part in {d.part for d in deltas}}
    state = {}
    for d in deltas:
        name, alpha = stem(family, d.part, d.path), alphas[d.part]
        down, up = d.tensors["down"], d.tensors["up"]
        state[f"{name}.lora_down.weight"] = down.float().contiguous()
        state[f"{name}.lora_up.weight"] = (up.double() * (d.scale * down.shape[0] / alpha)).float().contiguous()
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def from_kohya(family: str, state: Mapping[str, torch.Tensor]) -> list[Delta]:
    """The layers of a file, float32 on the CPU, sorted by stem. A missing alpha means scale 1, as all readers take it.

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
        part, path = locate(family, name)
        missing = [e for e in ENDINGS[:2] if e not in tensors]
        if missing:
            raise FormatError(f"{name} has no {' and no '.join(missing)}; the file is damaged. Export it again.")
        down, up = (tensors[e].float().cpu() for e in ENDINGS[:2])
        scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
        deltas.append(Delta(part, path, "lora", {"down": down, "up": up}, scale))
    return deltas
