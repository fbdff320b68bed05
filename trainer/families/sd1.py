"""Stable Diffusion 1.x: AutoencoderKL, CLIP-L, UNet2DConditionModel; epsilon or v prediction.

The demo base is this family in another size.
"""

from __future__ import annotations

from trainer.families import Models
from trainer.families.unet import UNetFamily


class SD1(UNetFamily):
    name = "sd1"
    parts = ("unet", "text_1")

    def _skip(self, models: Models, part: str) -> int:
        return models.clip_skip
