"""Load a Stable Diffusion 1.x checkpoint from one `.safetensors` file, offline: weights from the file, configurations from assets/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.formats import FormatError
from trainer.formats.probe import identify

CONFIGS = Path(__file__).resolve().parents[2] / "assets" / "models" / "sd1"
TEXT_PREFIX = "cond_stage_model.transformer."


def load_sd1(path: Path, dtype: torch.dtype, config_dir: Path = CONFIGS) -> dict[str, Any]:
    """{"unet", "vae", "text_encoder", "tokenizer", "scheduler"} of the checkpoint at `path`, on the CPU, in eval mode.

    The UNet and the text encoder are cast to `dtype`; the VAE is float32. `config_dir` is a folder in diffusers' layout without
    weights: the sizes of the model, its tokenizer and its scheduler. Nothing is fetched from anywhere. Names are converted by
    diffusers' own single-file code; `from_single_file` itself would not say which tensors a file lacks.
    Raises FormatError when the file is no complete SD1.x checkpoint of those sizes.
    """
    import diffusers
    from diffusers.loaders import single_file_utils as ldm
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path = Path(path)
    found = identify(path)
    if found.kind != "sd1":
        raise FormatError(f"{path.name} is {found.what}. Needed here: a complete Stable Diffusion 1.x checkpoint.")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(diffusers.UNet2DConditionModel.load_config(config_dir / "unet"))
        vae = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(config_dir / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(config_dir / "text_encoder", local_files_only=True))
    try:
        state = load_file(path)
        _fill(unet, ldm.convert_ldm_unet_checkpoint(state, unet.config), dtype, f"{path.name}: the UNet")
        _fill(vae, ldm.convert_ldm_vae_checkpoint(state, vae.config), torch.float32, f"{path.name}: the VAE")
    except (KeyError, SafetensorError) as error:
        raise FormatError(f"{path.name} is damaged or lacks a tensor: {error}. Download it again or choose another.") from error
    # transformers 5 has neither the `text_model` level nor stored position ids; some old merges lack the level as well.
    names = {k.removeprefix(TEXT_PREFIX).removeprefix("text_model."): t for k, t in state.items() if k.startswith(TEXT_PREFIX)}
    _fill(text, names, dtype, f"{path.name}: the text encoder")
    text.embeddings.position_ids = torch.arange(text.config.max_position_embeddings).expand(1, -1)
    settings = json.loads((config_dir / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    tokenizer = CLIPTokenizer.from_pretrained(config_dir / "tokenizer", local_files_only=True)
    return {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "scheduler": scheduler}


def _fill(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, what: str) -> None:
    """Give a model on the meta device its weights, as copies: the file may be moved or replaced later."""
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in tensors]
    if missing:
        raise FormatError(f"{what} lacks {len(missing)} tensors, the first is {missing[0]}. Download it again or choose another.")
    for key, want in wanted.items():
        if tensors[key].shape != want.shape:
            size = f"{key} has the shape {tuple(tensors[key].shape)}, Stable Diffusion 1.x has {tuple(want.shape)}"
            raise FormatError(f"{what} is of another size: {size}. Choose an ordinary Stable Diffusion 1.x checkpoint.")
    model.load_state_dict({k: tensors[k].to(dtype, copy=True) for k in wanted}, assign=True)
    model.eval()
