"""Stable Diffusion 1.x: AutoencoderKL, CLIP text encoder, UNet2DConditionModel; epsilon or v prediction.

The demo base is this family in another size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trainer.families import Cond, Models
from trainer.formats.probe import native_resolution

UNET_TARGETS = {
    "attention": r"attentions\.\d+\..*\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r".*\.ff\.net\.(0\.proj|2)",
    "projections": r".*attentions\.\d+\.proj_(in|out)",
    "convolutions": r".*(resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|(down|up)samplers\.0\.conv)",
}
TEXT_TARGETS = {
    "attention": r".*self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "feed_forward": r".*mlp\.fc[12]",
}
CONFIGS = Path(__file__).resolve().parents[2] / "assets" / "models" / "sd1"
PREVIEW_PIXELS = 512 * 512  # at most this many pixels are sampled in one batch


def _targets(model: torch.nn.Module, part: str, kinds: Sequence[str]) -> list[str]:
    table = UNET_TARGETS if part == "unet" else TEXT_TARGETS
    patterns = [re.compile(rf"(.*\.)?{table[k]}") for k in kinds if k in table]
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return [n for n, m in model.named_modules() if isinstance(m, layers) and any(p.fullmatch(n) for p in patterns)]


class SD1:
    name = "sd1"
    parts = ("unet", "text_1")

    def native_resolution(self, source: Path) -> int:
        """Side in pixels of the square that the base was made for, read from the UNet's configuration; 512 for single files."""
        return native_resolution(source)

    def load(self, source: Path, dtype: torch.dtype, device: torch.device, prediction: str, attention: str) -> Models:
        """Load a diffusers folder or a single `.safetensors` file, frozen, the UNet and text encoder cast to `dtype`.

        The VAE stays float32: it runs once for each image. No safety checker is loaded.
        """
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # it lasts for milliseconds and would break into the run's own bar
        if source.is_dir():
            unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=dtype)
            text = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=dtype)
            vae = AutoencoderKL.from_pretrained(source / "vae", torch_dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
            scheduler = json.loads((source / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        else:
            from trainer.formats.single_file import load_sd1

            found = load_sd1(source, dtype)
            unet, text, vae, tokenizer = found["unet"], found["text_encoder"], found["vae"].float(), found["tokenizer"]
            scheduler = dict(found["scheduler"].config)
        if attention == "xformers":
            unet.enable_xformers_memory_efficient_attention()
        unet.to(memory_format=torch.channels_last)
        for module in (unet, text, vae):
            module.requires_grad_(False).eval().to(device)
        if prediction == "auto":
            prediction = scheduler.get("prediction_type", "epsilon")
        scheduler["prediction_type"] = prediction
        alphas = DDPMScheduler.from_config(scheduler).alphas_cumprod.to(device=device, dtype=torch.float32)
        return Models({"unet": unet, "text_1": text}, vae, tokenizer, scheduler, prediction, alphas, device)

    def targets(self, models: Models, part: str, kinds: Sequence[str]) -> list[str]:
        """Module paths of `part` that `kinds` stand for, in the model's own order."""
        return _targets(models.parts[part], part, kinds)

    def count(self, source: Path, kinds: Sequence[str], rank: int) -> dict[str, tuple[int, int]]:
        """(layers, adapter parameters) for each part, from the configurations alone: no weight is read."""
        from accelerate import init_empty_weights
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        folder = source if source.is_dir() else CONFIGS
        with init_empty_weights():
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        out = {}
        for part, model in (("unet", unet), ("text_1", text)):
            modules = dict(model.named_modules())
            shapes = [modules[p].weight.shape for p in _targets(model, part, kinds)]
            out[part] = len(shapes), sum(min(rank, *s[:2]) * (s[0] + s[1:].numel()) for s in shapes)
        return out

    def tokenize(self, models: Models, captions: Sequence[str]) -> torch.Tensor:
        """Token ids (N, T), padded and cut to the encoder's length."""
        length = models.tokenizer.model_max_length
        return models.tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

    def encode_text(self, models: Models, tokens: torch.Tensor) -> Cond:
        """Last hidden states, after the final layer norm (clip skip 1)."""
        return Cond(models.parts["text_1"](tokens).last_hidden_state)

    @torch.no_grad()
    def encode(self, models: Models, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the scaled latents' distribution, each (B, C, H/8, W/8) float32."""
        posterior = models.vae.encode(pixels.to(models.vae.dtype)).latent_dist
        scale = models.vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def timesteps(self, models: Models, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(models.alphas_cumprod), (count,), generator=generator, device=models.device)

    def process(self, models: Models, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy latents, target) at `t`. DDPM (arXiv:2006.11239, eq. 4); v prediction (arXiv:2202.00512, appendix D)."""
        a = models.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = noise if models.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        return noisy, target

    def weight(self, models: Models, t: torch.Tensor, min_snr_gamma: float | None) -> torch.Tensor:
        """Loss weight (B,) at `t`: min-SNR (arXiv:2303.09556): min(snr, gamma) / snr, or / (snr + 1) for v prediction."""
        if min_snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        a = models.alphas_cumprod[t]
        snr = a / (1 - a)
        return snr.clamp(max=min_snr_gamma) / (snr if models.prediction == "epsilon" else snr + 1)

    def predict(self, models: Models, noisy: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        unet = models.parts["unet"]
        dtype = unet.dtype
        noisy = noisy.to(dtype=dtype, memory_format=torch.channels_last)
        return unet(noisy, t, cond.hidden.to(dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def sample(
        self,
        models: Models,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        tick: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of `size` (width, height) by DPM-Solver++ (Karras sigmas), one for each prompt, each from its own seed on the CPU.

        `tick` is called after each denoising step; what it raises ends the sampling.
        """
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        pipe = StableDiffusionPipeline(
            models.vae,
            models.parts["text_1"],
            models.tokenizer,
            models.parts["unet"],
            DPMSolverMultistepScheduler.from_config(models.scheduler, use_karras_sigmas=True),
            None,
            None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)

        def after(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if tick:
                tick()
            return kept

        vae_dtype = models.vae.dtype
        batch = max(1, PREVIEW_PIXELS // (size[0] * size[1]))
        images: list[Image.Image] = []
        with models.borrow("text_1", "vae"):
            for k in range(0, len(prompts), batch):
                latents = pipe(
                    list(prompts[k : k + batch]),
                    negative_prompt=[negative] * len(prompts[k : k + batch]),
                    generator=[torch.Generator().manual_seed(s) for s in seeds[k : k + batch]],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    width=size[0],
                    height=size[1],
                    output_type="latent",
                    callback_on_step_end=after,
                ).images
                pixels = models.vae.decode(latents.to(vae_dtype) / models.vae.config.scaling_factor, return_dict=False)[0]
                images += pipe.image_processor.postprocess(pixels.float(), output_type="pil")
        return images
