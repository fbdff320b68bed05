"""What a model file or folder is, from its header or its JSON files alone. Torch-free, never opens a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.formats import FormatError
from trainer.formats.metadata import read_header

Header = Mapping[str, tuple[str, tuple[int, ...]]]

TITLES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl_refiner": "the SDXL refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
}
WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl_refiner", 2048: "sdxl"}  # of the text states that cross-attention reads
PIPELINES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "Flux": "flux", "StableDiffusion": "sd1"}
LORA_VERSIONS = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_": "sdxl", "sd3": "sd3", "flux": "flux", "stable-diffusion-v1/": "sd1"}
LORA_ENDINGS = re.compile(r"\.(lora_(down|up|A|B|mid)\b|lora\.(down|up)\b|hada_w|lokr_w|oft_blocks|dora_scale|diff$)")
LDM = "model.diffusion_model."


@dataclass(frozen=True)
class Kind:
    """`kind`: a family (`sd1`, `sd2`, `sdxl`, `sdxl_refiner`, `sd3`, `flux`) for a whole checkpoint or diffusers folder, else
    `inpainting`, `unet`, `vae`, `text_encoder`, `lora`, `controlnet`, `embedding` or `unknown`; `what`: a sentence for people;
    `family`: the family it belongs to, where that shows."""

    kind: str
    what: str
    family: str | None = None


def identify(path: Path) -> Kind:
    """What stands at `path`: a .safetensors file or a diffusers folder.

    Raises FormatError for a pickle, a damaged file, or a folder that is no diffusers model.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    metadata, tensors = read_header(path)
    return identify_header(tensors, metadata)


def native_resolution(source: Path, otherwise: int = 512) -> int:
    """Side in pixels of the square that a base was made for, from its UNet's and VAE's configuration; `otherwise` for single files.

    Raises FormatError for a configuration that cannot be read.
    """
    config = source / "unet" / "config.json"
    if not config.is_file():
        return otherwise
    try:
        factor = 2 ** (len(_read_json(source / "vae" / "config.json")["block_out_channels"]) - 1)
        return int(_read_json(config)["sample_size"]) * factor
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{source} does not say what size of picture it was made for. Download or copy it again.") from None


def identify_header(tensors: Header, metadata: Mapping[str, str]) -> Kind:
    """What a file with these tensors, {key: (dtype, shape)}, is."""
    keys = list(tensors)

    def any_starts(*prefixes: str) -> bool:
        return any(k.startswith(prefixes) for k in keys)

    if any(LORA_ENDINGS.search(k) for k in keys):
        family = _lora_family(tensors, metadata)
        return Kind("lora", f"a LoRA for {TITLES[family]}" if family else "a LoRA whose base model cannot be told", family)
    if any_starts("control_model.", "controlnet_cond_embedding.", "controlnet_blocks.", "input_hint_block."):
        return Kind("controlnet", "a ControlNet, which is no base for training")
    if len(keys) <= 4 and any(k in ("emb_params", "clip_l", "clip_g") or k.startswith("<") for k in keys):
        return Kind("embedding", "a textual inversion embedding, which is no base for training")
    bare = {k.removeprefix(LDM): v for k, v in tensors.items()}
    if any(k.startswith("double_blocks.") for k in bare):
        return Kind("flux", f"a model of {TITLES['flux']}", "flux")
    if any(k.startswith("joint_blocks.") for k in bare):
        return Kind("sd3", f"a model of {TITLES['sd3']}", "sd3")
    if any(k.startswith("input_blocks.") for k in bare):
        return _ldm(tensors, bare)
    if any_starts("down_blocks.", "up_blocks.", "transformer_blocks."):
        return Kind("unet", "one part of a diffusers model; choose the folder that holds model_index.json instead")
    if any_starts("first_stage_model.", "decoder.conv_in", "encoder.conv_in", "decoder.up_blocks", "encoder.down_blocks"):
        return Kind("vae", "a VAE, which is only one part of a model")
    if any_starts("text_model.", "cond_stage_model.", "conditioner.", "encoder.layers.", "encoder.block.", "transformer.resblocks."):
        return Kind("text_encoder", "a text encoder, which is only one part of a model")
    return Kind("unknown", f"no model that is known here ({len(keys)} tensors{f', the first is {keys[0]}' if keys else ''})")


def _ldm(tensors: Header, bare: Header) -> Kind:
    """A checkpoint in the original (LDM) layout: family by its text encoders, else by the width of cross-attention."""
    width = next((v[1][-1] for k, v in bare.items() if k.endswith("attn2.to_k.weight")), None)
    encoders = {
        "sdxl": "conditioner.embedders.1.",
        "sdxl_refiner": "conditioner.embedders.0.model.",
        "sd2": "cond_stage_model.model.",
        "sd1": "cond_stage_model.transformer.",
    }
    family = next((f for f, prefix in encoders.items() if any(k.startswith(prefix) for k in tensors)), None)
    if family is None and width is not None:
        family = WIDTHS.get(width)
    if family is None:
        return Kind("unknown", f"a UNet that is not known here (its cross-attention reads text states of width {width})")
    channels = bare["input_blocks.0.0.weight"][1][1] if "input_blocks.0.0.weight" in bare else 4
    if channels != 4:
        what = f"an inpainting or editing model of {TITLES[family]} ({channels} input channels instead of 4)"
        return Kind("inpainting", f"{what}; choose the ordinary model of that family", family)
    missing = [
        what
        for what, prefixes in {"VAE": ("first_stage_model.",), "text encoder": ("cond_stage_model.", "conditioner.")}.items()
        if not any(k.startswith(prefixes) for k in tensors)
    ]
    if missing:
        what = f"a checkpoint of {TITLES[family]} without {' and '.join(missing)}; choose a complete checkpoint"
        return Kind("unet", what, family)
    return Kind(family, f"a checkpoint of {TITLES[family]}", family)


def _lora_family(tensors: Header, metadata: Mapping[str, str]) -> str | None:
    """By names that only one family has, then by the width of cross-attention or text encoder, then by metadata."""
    names = "\n".join(tensors)
    if re.search(r"double_blocks|single_transformer_blocks", names):
        return "flux"
    if re.search(r"joint_blocks|^(lora_)?transformer[._]", names, re.M):
        return "sd3"
    if re.search(r"lora_te2_|^text_encoder_2\.|lora_unet_(in|out)put_blocks_|lora_unet_middle_block", names, re.M):
        return "sdxl"
    for key, (_, shape) in tensors.items():
        if re.search(r"(attn2[._]to_[kv]|self_attn[._][qkv]_proj)\.(lora_down|lora_A)\.", key) and shape[-1] in (768, 1024, 2048):
            return WIDTHS[shape[-1]]
    said = (metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", ""))
    return next((f for start, f in LORA_VERSIONS.items() if any(s.startswith(start) for s in said)), None)


def _folder(path: Path) -> Kind:
    index = path / "model_index.json"
    if not index.is_file():
        raise FormatError(
            f"{path} is no diffusers model: it has no model_index.json. Choose the folder that holds it, or a .safetensors file."
        )
    name = str(_read_json(index).get("_class_name", ""))
    family = next((f for start, f in PIPELINES.items() if name.startswith(start)), None)
    if family is None:
        return Kind("unknown", f"a diffusers model of a kind that is not known here ({name or 'without _class_name'})")
    if family == "sd1":
        unet = _read_json(path / "unet" / "config.json")
        if unet.get("use_linear_projection") or unet.get("cross_attention_dim") == 1024:
            family = "sd2"
        if unet.get("in_channels", 4) != 4:
            return Kind(
                "inpainting", f"an inpainting or editing model of {TITLES[family]}; choose the ordinary model of that family", family
            )
    if "ControlNet" in name:
        return Kind("controlnet", f"a ControlNet pipeline of {TITLES[family]}, which is no base for training", family)
    return Kind(family, f"a diffusers folder of {TITLES[family]}", family)


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise FormatError(f"{path} is missing or cannot be read, so the model folder is not complete. Download or copy it again.") from None
