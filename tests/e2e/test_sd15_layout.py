"""Stable Diffusion 1.5's real layout with random weights: trained at 512 px, exported under the names that sd-scripts writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from trainer import events
from trainer.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "assets" / "models" / "sd1"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("sd15") / "base"
    shutil.copytree(CONFIGS, folder)
    torch.manual_seed(0)
    parts = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder")),
    }
    for name in list(parts):
        parts.pop(name).half().save_pretrained(folder / name)
    return folder


@pytest.mark.slow
def test_three_steps_at_512_px(base, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for k, size in enumerate([(640, 640), (800, 600), (512, 700)]):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20 + k).convert("RGB").save(images / f"{k}.png")
        (images / f"{k}.txt").write_text(f"a fractal number {k}")
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        model.source = {json.dumps(str(base))}
        data = [{{folder = "images", trigger = "ohwx"}}]
        adapter = {{rank = 4, alpha = 4, targets = ["attention", "feed_forward", "projections"]}}
        train = {{visits = 1, batch_size = 1, device = "cpu", dtype = "fp32"}}
        preview.enabled = false
        validation.enabled = false
        output = {{name = "fractal", checkpoint_every = 0}}
        """
    )
    out = tmp_path / "run"
    assert main(["train", str(config), "--run-dir", str(out)]) == 0
    log = {e["type"]: e for e in events.read(out / "events.jsonl")}
    assert log["started"]["total"] == 3
    assert sorted(b[:2] for b in log["started"]["buckets"]) == [[448, 576], [512, 512], [576, 448]]
    assert log["exported"]["modules"] == {"unet": 192, "text_1": 72}
    with safe_open(out / "fractal.safetensors", "pt") as file:
        keys = set(file.keys())
        assert len(keys) == 792
        shapes = {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": (4, 320),
            "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768),
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight": (2560, 4),
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320, 1, 1),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.lora_up.weight": (1280, 4),
            "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight": (3072, 4),
            "lora_te_text_model_encoder_layers_0_self_attn_out_proj.alpha": (),
        }
        for key, shape in shapes.items():
            assert tuple(file.get_tensor(key).shape) == shape, key
        ups = [file.get_tensor(k) for k in keys if k.endswith("lora_up.weight")]
        assert sum(bool(u.any()) for u in ups) > 250  # three steps reached nearly every layer
