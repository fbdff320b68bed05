"""ComfyUI's own naming, which it alone reads: the names of its modules, as its LoRA extraction writes them.

A layer is `PATH.lora_down.weight`, `PATH.lora_up.weight` and `PATH.alpha`, with the numbers of kohya's; PATH is `diffusion_model.` and
the path in the original (LDM, MMDiT) code, or `text_encoders.`, the encoder and its path. Source: ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from trainer.adapters import Delta
from trainer.formats import FormatError, kohya, ldm_names, sd3_names

PREFIXES = {
    family: {"unet": "diffusion_model."} | {part: f"text_encoders.{name}.transformer." for part, name in encoders.items()}
    for family, encoders in {
        "sd1": {"text_1": "clip_l"},
        "sd2": {"text_1": "clip_h"},
        "sdxl": {"text_1": "clip_l", "text_2": "clip_g"},
        "sd3": {"text_1": "clip_l", "text_2": "clip_g"},
    }.items()
}
STARTS = ("diffusion_model.", "text_encoders.")


def stem(family: str, part: str, path: str) -> str:
    """What the layer at `path` of the live model is called; of SD3's q, k and v, the fused layer. Raises FormatError for an unknown one."""
    if part == "unet":
        path = sd3_names.to_original(path)[0] if family == "sd3" else ldm_names.to_ldm(path, attention_first=family == "sdxl")
    return _plain(family, part, path)


def _plain(family: str, part: str, path: str) -> str:
    prefix = PREFIXES[family].get(part)
    if prefix is None:
        raise FormatError(f"part {part!r} has no name of ComfyUI's in {family}; parts of {family}: {', '.join(PREFIXES[family])}.")
    if part != "unet" and path != "text_projection":
        path = "text_model." + path.removeprefix("text_model.")
    return prefix + path


def to_comfy(family: str, deltas: Iterable[Delta]) -> dict[str, torch.Tensor]:
    """The file's tensors, as `kohya.folded` gives them. Raises FormatError for a delta that is not plain LoRA."""
    state = {}
    for part, path, tensors in kohya.folded(family, deltas):
        name = _plain(family, part, path) if family == "sd3" else stem(family, part, path)
        state |= {f"{name}.{ending}": tensor for ending, tensor in tensors.items()}
    return state


def locate(family: str, name: str) -> tuple[str, str]:
    """(part, path in the file's own layout) of a stem. Raises FormatError for what is no layer of the family."""
    for part, prefix in PREFIXES[family].items():
        if name.startswith(prefix):
            return part, kohya.canonical(part, name.removeprefix(prefix))
    raise FormatError(f"{name} is no layer of {family}; its names start with {' or '.join(PREFIXES[family].values())}.")


def from_comfy(family: str, state: Mapping[str, torch.Tensor]) -> list[Delta]:
    """The layers of a file, float32 on the CPU, sorted by name. Raises FormatError as `kohya.from_kohya` does."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        ending = next((e for e in kohya.ENDINGS if key.endswith(f".{e}")), None)
        if ending is None:
            raise FormatError(
                f"{key} does not belong to a plain LoRA, whose keys end in {', '.join(kohya.ENDINGS)}. Use a plain LoRA file."
            )
        found.setdefault(key.removesuffix(f".{ending}"), {})[ending] = tensor
    return [d for name, t in sorted(found.items()) for d in kohya.layer_deltas(family, *locate(family, name), t, name)]
