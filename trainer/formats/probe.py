"""What a model file or folder is, from its header or its JSON files alone. Torch-free, never opens a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
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
    "sd3_medium": "Stable Diffusion 3 medium",
    "sd35_medium": "Stable Diffusion 3.5 medium",
    "sd35_large": "Stable Diffusion 3.5 large",
    "flux": "Flux",
}
RESOLUTIONS = {"sd1": 512, "sd2": 768, "sdxl": 1024, "sd3": 1024}  # of a single file, which does not say it
WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl_refiner", 2048: "sdxl"}  # of the text states that cross-attention reads
PIPELINES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "Flux": "flux", "StableDiffusion": "sd1"}
LORA_VERSIONS = {
    **{"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_": "sdxl", "sd3": "sd3", "flux": "flux", "stable-diffusion-v1/": "sd1"},
    **{"stable-diffusion-v2-": "sd2", "stable-diffusion-xl-": "sdxl", "stable-diffusion-3-": "sd3"},
}
LORA_ENDINGS = re.compile(
    r"[._](lora_(down|up|A|B|mid)\b|lora(_linear_layer)?\.(down|up)\b|lora_magnitude_vector|hada_w|lokr_w|dora_scale)"
    r"|\.(oft_(blocks|diag|R)\b|diff(_b)?$|[wb]_norm$|[ab]1\.weight$|on_input$)"
)
LDM = "model.diffusion_model."
FOUR_BITS = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
EDM = ("edm_mean", "edm_vpred.sigma_max")  # marker keys of Playground v2.5 and of CosXL
VAES = ("first_stage_model.", "vae.")
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # marker keys, as ComfyUI and Forge read them


@dataclass(frozen=True)
class Kind:
    """`kind`: a family (`sd1`, `sd2`, `sdxl`, `sdxl_refiner`, `sd3`, `flux`) for a whole checkpoint or diffusers folder, else
    `inpainting`, `unet`, `vae`, `text_encoder`, `lora`, `controlnet`, `embedding` or `unknown`; `what`: a sentence for people;
    `family`: the family it belongs to, where that shows; `variant`: where a family has several sizes (`sd3_medium`, `sd35_medium`,
    `sd35_large`), which one."""

    kind: str
    what: str
    family: str | None = None
    variant: str | None = None


def identify(path: Path) -> Kind:
    """What stands at `path`: a .safetensors file or a diffusers folder.

    Raises FormatError for a pickle, a damaged file, or a folder that is no diffusers model.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    metadata, tensors = read_header(path)
    return identify_header(tensors, metadata)


def weight_files(names: Iterable[str]) -> list[str]:
    """The files among `names`, those of one part of a diffusers folder, that hold its weights: one, or numbered pieces.

    Those of the fp16 variant are read where there are no others; EMA's and other variants never.
    """
    names = sorted(names)
    for end in ("", r"-\d+-of-\d+", r"\.fp16", r"(\.fp16-\d+-of-\d+|-\d+-of-\d+\.fp16)"):
        if found := [n for n in names if re.fullmatch(rf"(diffusion_pytorch_model|model){end}\.safetensors", n)]:
            return found
    return []


def native_resolution(source: Path, otherwise: int | None = None) -> int:
    """Side in pixels of the square that a base was made for, from its denoiser's and VAE's configuration.

    A single file does not say it: that is `otherwise`, or else what its family was made for. Raises FormatError for what is no model,
    and for a configuration that cannot be read.
    """
    source = Path(source)
    if not source.is_dir():
        return otherwise or RESOLUTIONS.get(identify(source).kind, 512)
    config = next((p for p in (source / n / "config.json" for n in ("unet", "transformer")) if p.is_file()), None)
    if config is None:
        return otherwise or 512
    try:
        factor = 2 ** (len(_read_json(source / "vae" / "config.json")["block_out_channels"]) - 1)
        return int(_read_json(config)["sample_size"]) * factor
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{source} does not say what size of picture it was made for. Download or copy it again.") from None


def prediction(path: Path) -> tuple[str | None, bool | None]:
    """What a base says of itself: (`epsilon` or `v_prediction`, whether its noise schedule ends in pure noise); None: it does not say.

    A folder says it in its scheduler's configuration, a single file by the marker keys `v_pred` and `ztsnr`, which count first, or
    by its metadata (ModelSpec's `prediction_type` and `predict_key`, sd-scripts' `ss_*`). Raises FormatError as `identify` does.
    """
    path = Path(path)
    if path.is_dir():
        config = _read_json(path / "scheduler" / "scheduler_config.json")
        said, zero = config.get("prediction_type"), config.get("rescale_betas_zero_snr")
        return said if said in ("epsilon", "v_prediction") else None, zero if isinstance(zero, bool) else None
    metadata, tensors = read_header(path)
    said, zero = _told(metadata)
    if ZERO_SNR in tensors:
        return "v_prediction", True
    return "v_prediction" if V_PREDICTION in tensors else said, zero


SD3_TEXTS = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g.", "text_encoder_3": "text_encoders.t5xxl."}


def text_encoders(path: Path) -> tuple[str, ...]:
    """Which of SD3's text encoders a base holds, by diffusers' names: those of CLIP-L, CLIP-G and T5 (`text_encoder_3`)."""
    path = Path(path)
    if path.is_dir():
        return tuple(n for n in SD3_TEXTS if (path / n).is_dir() and weight_files(f.name for f in (path / n).iterdir()))
    keys = read_header(path)[1]
    return tuple(n for n, prefix in SD3_TEXTS.items() if any(k.startswith(prefix) for k in keys))


def _told(metadata: Mapping[str, str]) -> tuple[str | None, bool | None]:
    """What the metadata of a single file says of its prediction and its schedule's end."""
    words = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction"}
    truth = {"true": True, "false": False}
    found = (words.get(str(metadata.get(f"modelspec.{k}", "")).strip().lower()) for k in ("prediction_type", "predict_key"))
    said = next(filter(None, found), None)
    parameterization = truth.get(str(metadata.get("ss_v_parameterization", "")).lower())
    if said is None and parameterization is not None:
        said = "v_prediction" if parameterization else "epsilon"
    if said is None and re.fullmatch(r"sd_v[12]\w*_v", metadata.get("ss_base_model_version", "")):
        said = "v_prediction"
    return said, truth.get(str(metadata.get("ss_zero_terminal_snr", "")).lower())


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
    if any(k.endswith(FOUR_BITS) for k in keys):
        return Kind("unknown", "a model whose weights were reduced to 4 bits (NF4 and the like); choose it in fp16, bf16 or fp8")
    if any(k in EDM for k in keys):
        return Kind("unknown", "a model trained on another noise schedule (EDM: Playground v2.5, CosXL), which is not supported")
    bare = {k.removeprefix(LDM): v for k, v in tensors.items()}
    if any(k.startswith("double_blocks.") for k in bare):
        return Kind("flux", f"a model of {TITLES['flux']}", "flux")
    if any(k.startswith("joint_blocks.") for k in bare):
        return _mmdit(tensors, bare)
    if any(k.startswith("input_blocks.") for k in bare):
        return _ldm(tensors, bare)
    if any_starts("down_blocks.", "up_blocks.", "transformer_blocks."):
        return Kind("unet", "one part of a diffusers model; choose the folder that holds model_index.json instead")
    if any_starts(*VAES, "decoder.conv_in", "encoder.conv_in", "decoder.up_blocks", "encoder.down_blocks"):
        return Kind("vae", "a VAE, which is only one part of a model")
    texts = (
        "text_model.",
        "cond_stage_model.",
        "conditioner.",
        "text_encoders.",
        "encoder.layers.",
        "encoder.block.",
        "transformer.resblocks.",
    )
    if any_starts(*texts):
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
    missing = _missing(tensors, {"VAE": VAES, "text encoder": ("cond_stage_model.", "conditioner.")})
    if missing:
        what = f"a checkpoint of {TITLES[family]} without {' and '.join(missing)}; choose a complete checkpoint"
        return Kind("unet", what, family)
    if family == "sdxl" and _missing(tensors, {"": ("conditioner.embedders.0.",)}):
        return Kind("unet", f"a checkpoint of {TITLES[family]} without its first text encoder; choose a complete checkpoint", family)
    return Kind(family, f"a checkpoint of {TITLES[family]}", family)


def _mmdit(tensors: Header, bare: Header) -> Kind:
    """A checkpoint of SD3's transformer in the original layout, whatever its width; text encoders may be files of their own.

    3.5 medium has a second attention in its first blocks; both 3.5 have norms of queries and keys, which 3 has not.
    """
    second = any(".attn2." in k for k in bare)
    norms = any(k.endswith(".attn.ln_q.weight") for k in bare)
    variant = "sd35_medium" if second else "sd35_large" if norms else "sd3_medium"
    channels = bare["x_embedder.proj.weight"][1][1] if "x_embedder.proj.weight" in bare else 16
    if channels != 16:
        what = f"an inpainting or editing model of {TITLES[variant]} ({channels} input channels instead of 16)"
        return Kind("inpainting", f"{what}; choose the ordinary model of that family", "sd3", variant)
    if _missing(tensors, {"VAE": VAES}):
        return Kind("unet", f"a checkpoint of {TITLES[variant]} without VAE; choose a checkpoint that has it", "sd3", variant)
    return Kind("sd3", f"a checkpoint of {TITLES[variant]}", "sd3", variant)


def _missing(tensors: Header, parts: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [what for what, prefixes in parts.items() if not any(k.startswith(prefixes) for k in tensors)]


def _lora_family(tensors: Header, metadata: Mapping[str, str]) -> str | None:
    """By names that only one family has, the width of cross-attention, metadata, the names of the blocks, the text encoder's width."""
    names = "\n".join(tensors)
    if re.search(r"double_blocks|single_transformer_blocks", names):
        return "flux"
    if re.search(r"joint_blocks|^(lora_)?transformer[._]", names, re.M):
        return "sd3"

    def by_width(pattern: str) -> str | None:
        key_of = re.compile(rf"{pattern}\.(lora_down|lora_A|hada_w1_b|diff)\b")
        found = (shape[-1] for key, (_, shape) in tensors.items() if shape and key_of.search(key))
        return next((WIDTHS[width] for width in found if width in (768, 1024, 2048)), None)

    said = (metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", ""))
    if family := by_width(r"attn2[._]to_[kv]") or next(
        (f for start, f in LORA_VERSIONS.items() if any(s.startswith(start) for s in said)), None
    ):
        return family
    large = r"lora_te2_|^text_encoder_2\.|clip_g\.|lora_unet_(in|out)put_blocks_|lora_unet_middle_block|lora_unet_label_emb"
    return "sdxl" if re.search(large, names, re.M) else by_width(r"self_attn[._][qkv]_proj")


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
    if "ControlNet" in name:
        return Kind("controlnet", f"a ControlNet pipeline of {TITLES[family]}, which is no base for training", family)
    if family == "flux":
        return Kind(family, f"a diffusers folder of {TITLES[family]}", family)
    config = path / ("transformer" if family == "sd3" else "unet") / "config.json"
    config = _read_json(config) if family == "sd1" or config.is_file() else {}
    variant = None
    if family == "sd1" and (config.get("use_linear_projection") or config.get("cross_attention_dim") == 1024):
        family = "sd2"
    if family == "sdxl" and config.get("cross_attention_dim") == 1280:
        family = "sdxl_refiner"
    if family == "sd3" and config:
        variant = "sd35_medium" if config.get("dual_attention_layers") else "sd35_large" if config.get("qk_norm") else "sd3_medium"
    title = TITLES[variant or family]
    usual = 16 if family == "sd3" else 4
    channels = config.get("in_channels", usual)
    if channels != usual:
        what = f"an inpainting or editing model of {title} ({channels} input channels instead of {usual})"
        return Kind("inpainting", f"{what}; choose the ordinary model of that family", family, variant)
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and str(_read_json(scheduler).get("_class_name", "")).startswith("EDM"):
        return Kind("unknown", "a model trained on another noise schedule (EDM: Playground v2.5, CosXL), which is not supported", family)
    return Kind(family, f"a diffusers folder of {title}", family, variant)


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise FormatError(f"{path} is missing or cannot be read, so the model folder is not complete. Download or copy it again.") from None
