"""SD1, SD2 and SDXL: a UNet that tells noise (or v) from noisy latents on a schedule of 1,000 discrete timesteps (DDPM)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.config import LossConfig, ModelConfig
from trainer.families import Cond, Models
from trainer.families.common import Common

UNET_TARGETS = {
    "attention": r"attentions\.\d+\..*\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r".*\.ff\.net\.(0\.proj|2)",
    "projections": r".*attentions\.\d+\.proj_(in|out)",
    "convolutions": r".*(resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|(down|up)samplers\.0\.conv)",
}


class UNetFamily(Common):
    unet_targets = UNET_TARGETS

    def schedule(self, models: Models, source: Path, model: ModelConfig) -> None:
        """DDPM, with noise or v predicted, as the files or `model` say; `unknown` where neither does.

        Raises ValueError for settings that contradict each other.
        """
        from trainer.formats import probe

        said, zero = probe.prediction(source)
        if model.zero_terminal_snr is not None:
            zero = model.zero_terminal_snr
        if model.prediction != "auto":
            said = model.prediction
        if zero:
            if said == "epsilon":
                raise ValueError(
                    f"{source} predicts noise (epsilon), which cannot be told from pure noise: set model.zero_terminal_snr to false."
                )
            said = "v_prediction"
        models.scheduler["rescale_betas_zero_snr"] = bool(zero)
        self.set_prediction(models, said or "unknown")

    def set_prediction(self, models: Models, prediction: str) -> None:
        """Say what the UNet predicts: `epsilon` or `v_prediction` (or `unknown`)."""
        from diffusers import DDPMScheduler

        models.prediction = prediction
        models.scheduler["prediction_type"] = "epsilon" if prediction == "unknown" else prediction
        alphas = DDPMScheduler.from_config(models.scheduler).alphas_cumprod
        models.alphas_cumprod = alphas.to(device=models.device, dtype=torch.float32)

    def timesteps(self, models: Models, count: int, generator: torch.Generator, loss: LossConfig) -> torch.Tensor:
        """(count,) int64, each timestep as likely as the others."""
        return torch.randint(len(models.alphas_cumprod), (count,), generator=generator, device=models.device)

    def spread(self, models: Models, shares: Sequence[float]) -> torch.Tensor:
        """The timesteps that stand at `shares`, each in [0, 1), of the way from clean to noise."""
        length = len(models.alphas_cumprod)
        return torch.tensor([int(share * length) for share in shares], device=models.device)

    def process(self, models: Models, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy latents, target) at `t`. DDPM (arXiv:2006.11239, eq. 4); v prediction (arXiv:2202.00512, appendix D)."""
        a = models.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = noise if models.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        return noisy, target

    def weight(self, models: Models, t: torch.Tensor, min_snr_gamma: float | None) -> torch.Tensor:
        """Loss weight (B,) at `t`: min-SNR (arXiv:2303.09556): min(snr, gamma) / snr, or / (snr + 1) for v prediction.

        The SNR is that of the schedule in use, so of the rescaled one where it ends in pure noise.
        """
        if min_snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        a = models.alphas_cumprod[t]
        snr = a / (1 - a)
        return snr.clamp(max=min_snr_gamma) / (snr if models.prediction == "epsilon" else snr + 1)

    def predict(self, models: Models, noisy: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """The UNet's output in float32, (B, C, h, w)."""
        unet = models.parts["unet"]
        dtype = unet.dtype
        noisy = noisy.to(dtype=dtype, memory_format=torch.channels_last)
        return unet(noisy, t, cond.hidden.to(dtype), added_cond_kwargs=self._added(cond, dtype), return_dict=False)[0].float()

    def _added(self, cond: Cond, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        return None

    def preview_scheduler(self, models: Models) -> Any:
        """DPM-Solver++ with Karras sigmas; on a schedule that ends in pure noise evenly from the very end (arXiv:2305.08891)."""
        from diffusers import DPMSolverMultistepScheduler

        zero = models.scheduler["rescale_betas_zero_snr"]
        more = {"timestep_spacing": "trailing"} if zero else {"use_karras_sigmas": True}
        return DPMSolverMultistepScheduler.from_config(models.scheduler, **more)

    def pipeline(self, models: Models) -> Any:
        from diffusers import StableDiffusionPipeline

        m, scheduler = models, self.preview_scheduler(models)
        text, words = m.parts["text_1"], m.tokenizers["text_1"]
        return StableDiffusionPipeline(m.vae, text, words, m.parts["unet"], scheduler, None, None, requires_safety_checker=False)
