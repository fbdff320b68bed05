"""Stable Diffusion XL: two text encoders (CLIP-L and OpenCLIP-G), and what it is told of an image's size and crop."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from trainer.data.buckets import Placement
from trainer.families import Cond, Models, States
from trainer.families.unet import UNetFamily


class SDXL(UNetFamily):
    name = "sdxl"
    parts = ("unet", "text_1", "text_2")
    skip: ClassVar = {"text_1": 2, "text_2": 2}
    final_norm = False

    def condition(self, models: Models, states: dict[str, States], size: torch.Tensor | None) -> Cond:
        """Both encoders' penultimate states side by side (768 + 1280), and the second one's pooled embedding."""
        assert size is not None, "SDXL is told each image's size"
        dtype = states["text_2"].hidden.dtype
        hidden = torch.cat([states["text_1"].hidden.to(dtype), states["text_2"].hidden], -1)
        return Cond(hidden, states["text_2"].pooled, size)

    def size(self, image: tuple[int, int], placement: Placement, flip: bool) -> tuple[float, ...]:
        """(height, width of the image as it was; top, left of the crop in the resized image; height, width of the bucket).

        SDXL's micro-conditioning (arXiv:2307.01952, section 2.2). In a mirrored image the crop's left is what was its right.
        """
        left, top, right, _ = placement.box
        side = image[0] - right if flip else left
        return (
            *map(float, reversed(image)),
            round(top * placement.scale),
            round(side * placement.scale),
            placement.height,
            placement.width,
        )

    def _added(self, cond: Cond, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.size.to(dtype)}

    def pipeline(self, models: Models) -> Any:
        from diffusers import StableDiffusionXLPipeline

        text, words = ([table[p] for p in self.parts[1:]] for table in (models.parts, models.tokenizers))
        unet, scheduler = models.parts["unet"], self.preview_scheduler(models)
        return StableDiffusionXLPipeline(models.vae, *text, *words, unet, scheduler, add_watermarker=False)
