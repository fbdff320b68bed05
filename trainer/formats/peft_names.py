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

# family -> part -> the pipeline's component
COMPONENTS = {"sd1": {"unet": "unet", "text_1": "text_encoder"}}
ENDINGS = (".lora_A.weight", ".lora_B.weight")
CONFIGS = "lora_adapter_metadata"  # where diffusers' own files keep PEFT's configurations, as JSON


def stem(family: str, part: str, path: str) -> str:
    """`unet.<path>` or `text_encoder.text_model.<path>`. Raises FormatError for a part that the family has no name for."""
    component = COMPONENTS[family].get(part)
    if component is None:
        raise FormatError(f"part {part!r} has no PEFT name in {family}; parts of {family}: {', '.join(COMPONENTS[family])}.")
    return f"{component}.{path}" if part == "unet" else f"{component}.text_model.{path.removeprefix('text_model.')}"


def to_peft(family: str, deltas: Iterable[Delta]) -> dict[str, torch.Tensor]:
    """The file's tensors, float32, contiguous. Raises FormatError for a delta that is not plain LoRA."""
    state = {}
    for d in deltas:
        if d.kind != "lora":
            raise FormatError(f"{d.part} {d.path} has a change of kind {d.kind!r}; PEFT files are written for kind 'lora' alone.")
        name = stem(family, d.part, d.path)
        state[name + ENDINGS[0]] = d.tensors["down"].float().contiguous()
        state[name + ENDINGS[1]] = (d.tensors["up"].double() * d.scale).float().contiguous()
    return state


def from_peft(family: str, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> list[Delta]:
    """The layers of a file, float32 on the CPU, sorted by name; text encoder paths without `text_model.`.

    The scale is 1 unless `metadata` holds the configurations that diffusers' own files carry.
    Raises FormatError for keys that are not plain LoRA of this family, and for layers without both matrices.
    """
    parts = {component: part for part, component in COMPONENTS[family].items()}
    configs = json.loads(metadata.get(CONFIGS, "{}"))
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
        config = {k.removeprefix(component + "."): v for k, v in configs.items() if k.startswith(component + ".")}
        part = parts[component]
        live = path if part == "unet" else path.removeprefix("text_model.")
        deltas.append(Delta(part, live, "lora", {"down": down, "up": up}, _scale(config, path, down.shape[0])))
    return deltas


def _scale(config: Mapping, path: str, rank: int) -> float:
    """PEFT's rule: alpha / rank, or alpha / sqrt(rank) with rsLoRA; the first matching pattern wins (peft `get_pattern_key`)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", path)), config.get("lora_alpha", rank))
    if "lora_alpha" not in config:
        return 1.0
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
