"""PEFT naming, which diffusers' `load_lora_weights` reads and other tools read in part or not at all.

A layer is `PREFIX.path.lora_A.weight` (down) and `PREFIX.path.lora_B.weight` (up), without alpha: the scale is in `lora_B`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

import torch

from trainer.adapters import Delta
from trainer.formats import FormatError
from trainer.formats.factors import balanced

# family -> part -> the pipeline's component
COMPONENTS = {
    "sd1": {"unet": "unet", "text_1": "text_encoder"},
    "sd2": {"unet": "unet", "text_1": "text_encoder"},
    "sdxl": {"unet": "unet", "text_1": "text_encoder", "text_2": "text_encoder_2"},
    "sd3": {"unet": "transformer", "text_1": "text_encoder", "text_2": "text_encoder_2"},
}
ENDINGS = (".lora_A.weight", ".lora_B.weight")
CONFIGS = "lora_adapter_metadata"  # where diffusers' own files keep PEFT's configurations, as JSON


def stem(family: str, part: str, path: str) -> str:
    """`unet.<path>`, `transformer.<path>` or `text_encoder.text_model.<path>`. Raises FormatError for a part without a name."""
    component = COMPONENTS[family].get(part)
    if component is None:
        raise FormatError(f"part {part!r} has no PEFT name in {family}; parts of {family}: {', '.join(COMPONENTS[family])}.")
    if part == "unet" or path == "text_projection":
        return f"{component}.{path}"
    return f"{component}.text_model.{path.removeprefix('text_model.')}"


def to_peft(family: str, deltas: Iterable[Delta]) -> dict[str, torch.Tensor]:
    """The file's tensors, float32, contiguous. Raises FormatError for a delta that is not plain LoRA."""
    state = {}
    for d in deltas:
        if d.kind != "lora":
            raise FormatError(f"{d.part} {d.path} has a change of kind {d.kind!r}; PEFT files are written for kind 'lora' alone.")
        name, d = stem(family, d.part, d.path), balanced(d)
        state[name + ENDINGS[0]] = d.tensors["down"].float().contiguous()
        state[name + ENDINGS[1]] = (d.tensors["up"].double() * d.scale).float().contiguous()
    return state


def from_peft(family: str, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> list[Delta]:
    """The layers of a file, float32 on the CPU, sorted by name; text encoder paths without `text_model.`.

    The scale is 1 unless `metadata` holds the configurations that diffusers' own files carry.
    Raises FormatError for keys that are not plain LoRA of this family, and for layers without both matrices.
    """
    parts = {component: part for part, component in COMPONENTS[family].items()}
    configs = _configs(metadata)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        ending = next((e for e in ENDINGS if key.endswith(e)), None)
        if ending is None or key.partition(".")[0] not in parts:
            raise FormatError(
                f"{key} does not belong to a plain PEFT LoRA of {family}: {' or '.join(parts)} first, {' or '.join(ENDINGS)} last."
            )
        found.setdefault(key.removesuffix(ending), {})[ending] = tensor
    deltas = []
    for name, tensors in sorted(found.items()):
        if len(tensors) < 2:
            raise FormatError(f"{name} has only one of {' and '.join(ENDINGS)}; the file is damaged. Export it again.")
        component, _, path = name.partition(".")
        down, up = (tensors[e].float().cpu() for e in ENDINGS)
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or 0 in down.shape:
            raise FormatError(f"{name} has A {tuple(down.shape)} and B {tuple(up.shape)}, which do not fit. The file is damaged.")
        config = {k.removeprefix(component + "."): v for k, v in configs.items() if k.startswith(component + ".")}
        part = parts[component]
        live = path if part == "unet" else path.removeprefix("text_model.")
        deltas.append(Delta(part, live, "lora", {"down": down, "up": up}, _scale(config, path, down.shape[0])))
    return deltas


def _configs(metadata: Mapping[str, str]) -> dict:
    """PEFT's configurations by `component.field`. Raises FormatError where they are no such thing: the scale would be unknown."""
    try:
        configs = dict(json.loads(metadata.get(CONFIGS, "{}")))
        for key, value in configs.items():
            if key.endswith("lora_alpha"):
                float(value)
            if key.endswith("alpha_pattern"):
                [float(v) for v in dict(value or {}).values()]
    except (ValueError, TypeError):
        raise FormatError(f"Its metadata {CONFIGS} cannot be read, so the scale of its layers is unknown. Get the file anew.") from None
    return configs


def _scale(config: Mapping, path: str, rank: int) -> float:
    """PEFT's rule: alpha / rank, or alpha / sqrt(rank) with rsLoRA; the first matching pattern wins (peft `get_pattern_key`)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", path)), config.get("lora_alpha", rank))
    if "lora_alpha" not in config:
        return 1.0
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
