"""A smooth loss: the same images, noise and timesteps at every measurement, so that only the adapter changes it."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from trainer import randomness
from trainer.adapters import Adapter
from trainer.data.buckets import Placement
from trainer.data.cache import Cache
from trainer.data.scan import Image
from trainer.data.store import Texts, encode_images
from trainer.families import Family, Models
from trainer.step import condition

BATCH_PIXELS = 512 * 512 * 4


class FixedLoss:
    """Mean squared error of the prediction over fixed draws; timesteps are spread evenly over the whole range.

    Args:
        images, placements: what is measured, with captions as they stand (nothing shuffled or dropped).
        draws: noise draws for each image; trained: the text encoders that may carry an adapter: they read anew at each measurement.
        latents: the images' own, (C, h, w) each, where they are known already.
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
        trained: Container[str],
        latents: Sequence[torch.Tensor] | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.family, self.models = family, models
        count = len(images) * draws
        order = randomness.host(seed, 0, "validation").sample(range(count), count)
        generator = torch.Generator().manual_seed(randomness.key(seed, 0, "validation"))
        if latents is None:
            moments = encode_images(family, models, images, placements, background, cache=cache)
            latents = [moments[k, False][0] for k in range(len(images))]
        self.text = Texts(family, models, [i.caption for i in images], trained, cache)
        groups: dict[tuple[int, int], list[int]] = {}
        for k, p in enumerate(placements):
            groups.setdefault((p.width, p.height), []).append(k)
        self.batches = []
        for (w, h), members in groups.items():
            rows = [(k, d) for k in members for d in range(draws)]
            for at in range(0, len(rows), max(1, BATCH_PIXELS // (w * h))):
                chunk = rows[at : at + max(1, BATCH_PIXELS // (w * h))]
                clean = torch.stack([latents[k] for k, _ in chunk])
                noise = torch.randn(clean.shape, generator=generator).to(models.device)
                t = family.spread(models, [(order[k * draws + d] + 0.5) / count for k, d in chunk])
                captions = [k for k, _ in chunk]
                sizes = [family.size((images[k].width, images[k].height), placements[k], False) for k in captions]
                told = None if None in sizes else torch.tensor(sizes, device=models.device)
                self.batches.append((clean, noise, t, torch.tensor(captions, device=models.device), captions, told))

    @torch.no_grad()
    def measure(self, adapter: Adapter) -> float:
        """The loss with the adapter as it is now, its dropout off."""
        adapter.train(False)
        total, count = 0.0, 0
        for latents, noise, t, index, captions, size in self.batches:
            noisy, target = self.family.process(self.models, latents, noise, t)
            cond = condition(self.family, self.models, self.text.rows(index, captions), size)
            total += float((self.family.predict(self.models, noisy, t, cond) - target).square().mean((1, 2, 3)).sum())
            count += len(latents)
        adapter.train(True)
        return total / count
