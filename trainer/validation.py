"""A smooth loss: the same images, noise and timesteps at every measurement, so that only the adapter changes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer import randomness
from trainer.adapters import Adapter
from trainer.data.buckets import Placement
from trainer.data.scan import Image
from trainer.data.store import encode_images
from trainer.families import Cond, Family, Models

BATCH_PIXELS = 512 * 512 * 4


class FixedLoss:
    """Mean squared error of the prediction over fixed draws; timesteps are spread evenly over the whole range.

    Args:
        images, placements: what is measured, with captions as they stand (nothing shuffled or dropped).
        draws: noise draws for each image.
    """

    def __init__(
        self,
        family: Family,
        models: Models,
        images: Sequence[Image],
        placements: Sequence[Placement],
        *,
        background: str,
        draws: int,
        seed: int,
        text_trains: bool,
    ) -> None:
        self.family, self.models = family, models
        count = len(images) * draws
        order = randomness.host(seed, 0, "validation").sample(range(count), count)
        length = len(models.alphas_cumprod)
        generator = torch.Generator().manual_seed(randomness.key(seed, 0, "validation"))
        moments = encode_images(family, models, images, placements, background)
        groups: dict[tuple[int, int], list[int]] = {}
        for k, p in enumerate(placements):
            groups.setdefault((p.width, p.height), []).append(k)
        self.batches = []
        for (w, h), members in groups.items():
            rows = [(k, d) for k in members for d in range(draws)]
            for at in range(0, len(rows), max(1, BATCH_PIXELS // (w * h))):
                chunk = rows[at : at + max(1, BATCH_PIXELS // (w * h))]
                latents = torch.stack([moments[k, False][0] for k, _ in chunk])
                noise = torch.randn(latents.shape, generator=generator).to(models.device)
                t = torch.tensor([int((order[k * draws + d] + 0.5) / count * length) for k, d in chunk], device=models.device)
                tokens = family.tokenize(models, [images[k].caption for k, _ in chunk]).to(models.device)
                cond = None
                if not text_trains:
                    with torch.no_grad(), models.borrow(*(p for p in family.parts if p != "unet")):
                        cond = family.encode_text(models, tokens)
                self.batches.append((latents, noise, t, tokens, cond))

    @torch.no_grad()
    def measure(self, adapter: Adapter) -> float:
        """The loss with the adapter as it is now, its dropout off."""
        adapter.train(False)
        total, count = 0.0, 0
        for latents, noise, t, tokens, cond in self.batches:
            noisy, target = self.family.process(self.models, latents, noise, t)
            told: Cond = cond or self.family.encode_text(self.models, tokens)
            total += float((self.family.predict(self.models, noisy, t, told) - target).square().mean((1, 2, 3)).sum())
            count += len(latents)
        adapter.train(True)
        return total / count
