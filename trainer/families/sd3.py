"""Stable Diffusion 3 and 3.5: a transformer (MMDiT) trained by flow matching; CLIP-L, CLIP-G and, where it is there, T5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from trainer.config import LossConfig, ModelConfig
from trainer.families import Cond, Models, States
from trainer.families.common import Common

STEPS = 1000  # what timesteps are counted in; the transformer is told 1000 * sigma


class SD3(Common):
    name = "sd3"
    parts = ("unet", "text_1", "text_2")
    denoiser = "transformer"
    attentions = ("sdpa",)
    skip: ClassVar = {"text_1": 2, "text_2": 2}
    final_norm = False
    unet_targets: ClassVar = {
        "attention": r"(attn|attn2)\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        "feed_forward": r"(ff|ff_context)\.net\.(0\.proj|2)",
        "projections": r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
    }

    def schedule(self, models: Models, source: Path, model: ModelConfig) -> None:
        """Flow matching, whatever the files say."""
        models.prediction = "flow"

    def set_prediction(self, models: Models, prediction: str) -> None:
        assert prediction == "flow"

    def encode_text(self, models: Models, part: str, tokens: Any) -> States:
        states = super().encode_text(models, part, tokens)
        assert part == "text_3" or states.pooled is not None
        return states

    def condition(self, models: Models, states: dict[str, States], size: torch.Tensor | None) -> Cond:
        """CLIP-L and CLIP-G side by side, widened with zeros to T5's width, followed by T5's states; pooled: both CLIPs'.

        Zeros stand in for T5 where it is left out, as in diffusers (arXiv:2403.03206, appendix B.3: it was dropped in training too).
        """
        first, second = states["text_1"], states["text_2"]
        width = models.parts["unet"].config.joint_attention_dim
        told = torch.cat([first.hidden, second.hidden.to(first.hidden.dtype)], -1)
        told = torch.nn.functional.pad(told, (0, width - told.shape[-1]))
        t5 = states["text_3"].hidden.to(told.dtype) if "text_3" in states else torch.zeros_like(told)
        return Cond(torch.cat([told, t5], 1), torch.cat([first.pooled, second.pooled.to(first.pooled.dtype)], -1))

    def shift(self, models: Models, loss: LossConfig | None = None) -> float:
        """How far noise levels are pushed up: sigma = shift * u / (1 + (shift - 1) * u)."""
        own = loss.shift if loss else None
        return float(own or models.scheduler.get("shift", 3.0))

    def timesteps(self, models: Models, count: int, generator: torch.Generator, loss: LossConfig) -> torch.Tensor:
        """(count,) float32 in (0, 1000): u is logit-normal or uniform, then shifted (arXiv:2403.03206, sections 3.1 and 5.3.2)."""
        if loss.timesteps == "uniform":
            u = torch.rand(count, generator=generator, device=models.device)
        else:
            u = torch.sigmoid(loss.logit_mean + loss.logit_std * torch.randn(count, generator=generator, device=models.device))
        return self._shifted(u, self.shift(models, loss)) * STEPS

    def spread(self, models: Models, shares: Sequence[float]) -> torch.Tensor:
        """The timesteps that stand at `shares`, each in [0, 1), of the way from clean to noise."""
        return self._shifted(torch.tensor(shares, device=models.device), self.shift(models)) * STEPS

    @staticmethod
    def _shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
        return shift * u / (1 + (shift - 1) * u)

    def process(self, models: Models, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy latents, target) at `t`: on the straight line from latents to noise, whose direction is the target (rectified flow)."""
        sigma = (t / STEPS).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise - latents

    def weight(self, models: Models, t: torch.Tensor, min_snr_gamma: float | None) -> torch.Tensor:
        """1 everywhere: the draw of the timesteps is the weighting."""
        return torch.ones(t.shape, device=t.device)

    def predict(self, models: Models, noisy: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """The transformer's output in float32, (B, C, h, w)."""
        model = models.parts["unet"]
        dtype = model.dtype
        return model(noisy.to(dtype), cond.hidden.to(dtype), cond.pooled.to(dtype), t, return_dict=False)[0].float()

    def preview_scheduler(self, models: Models) -> Any:
        """Euler's method along the flow, at the base's own shift, as in training."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(models.scheduler, use_dynamic_shifting=False)

    def pipeline(self, models: Models) -> Any:
        from diffusers import StableDiffusion3Pipeline

        scheduler = self.preview_scheduler(models)
        both = [x for p in ("text_1", "text_2") for x in (models.parts[p], models.tokenizers[p])]
        t5 = models.frozen.get("text_3"), models.tokenizers.get("text_3")
        return StableDiffusion3Pipeline(models.parts["unet"], scheduler, models.vae, *both, *t5)
