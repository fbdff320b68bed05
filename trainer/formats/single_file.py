"""Load a Stable Diffusion 1.x checkpoint from one `.safetensors` file, offline: weights from the file, configurations from assets/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trainer.formats import FormatError
from trainer.formats.probe import identify

CONFIGS = Path(__file__).resolve().parents[2] / "assets" / "models" / "sd1"
TEXT_PREFIX = "cond_stage_model.transformer."


def load_sd1(path: Path, dtype: torch.dtype, config_dir: Path = CONFIGS) -> dict[str, Any]:
    """{"unet", "vae", "text_encoder", "tokenizer", "scheduler"} of the checkpoint at `path`, on the CPU, in eval mode.

    The UNet and the text encoder are cast to `dtype`; the VAE is float32. `config_dir` is a folder in diffusers' layout without
    weights: the sizes of the model, its tokenizer and its scheduler. Nothing is fetched from anywhere.
    Raises FormatError when the file is no complete SD1.x checkpoint of those sizes.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path = Path(path)
    found = identify(path)
    if found.kind != "sd1":
        raise FormatError(f"{path.name} is {found.what}. Needed here: a complete Stable Diffusion 1.x checkpoint.")
    state = load_file(path)
    local = {"config": str(config_dir), "local_files_only": True}
    try:
        unet = diffusers.UNet2DConditionModel.from_single_file(dict(state), subfolder="unet", torch_dtype=dtype, **local)
        vae = diffusers.AutoencoderKL.from_single_file(dict(state), subfolder="vae", torch_dtype=torch.float32, **local)
        with torch.device("meta"):
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(config_dir / "text_encoder", local_files_only=True))
        text = text.to_empty(device="cpu").to(dtype)
        # transformers 5 has neither the `text_model` level nor stored position ids; some old merges lack the level as well.
        names = {k.removeprefix(TEXT_PREFIX).removeprefix("text_model."): k for k in state if k.startswith(TEXT_PREFIX)}
        names.pop("embeddings.position_ids", None)
        text.load_state_dict({n: state[k] for n, k in names.items()})
        text.embeddings.position_ids = torch.arange(text.config.max_position_embeddings).expand(1, -1)
    except (ValueError, KeyError, RuntimeError) as error:
        raise FormatError(
            f"{path.name} does not fit the layout of Stable Diffusion 1.x: {error}. Download it again or choose another."
        ) from error
    for name, model in {"UNet": unet, "VAE": vae}.items():
        missing = [n for n, p in model.state_dict().items() if p.is_meta]
        if missing:
            raise FormatError(
                f"{path.name} lacks {len(missing)} tensors of the {name}, such as {missing[0]}. Download it again or choose another."
            )
    settings = json.loads((config_dir / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    tokenizer = CLIPTokenizer.from_pretrained(config_dir / "tokenizer", local_files_only=True)
    return {"unet": unet, "vae": vae, "text_encoder": text.eval(), "tokenizer": tokenizer, "scheduler": scheduler}
