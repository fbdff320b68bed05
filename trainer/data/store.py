"""Latents and text kept on the device: what 10-20 images need is a few MB, encoded once and indexed ever after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.config import TrainConfig
from trainer.data.buckets import Placement
from trainer.data.images import crop, open_rgb
from trainer.data.scan import Image
from trainer.families import Cond, Family, Models
from trainer.plan import Plan
from trainer.step import Batch

TEXT_BUDGET = 2**30  # bytes of cached text states; above it the encoder stays and encodes each step
ENCODE_PIXELS = 512 * 512 * 2  # at most this many pixels pass through the VAE in one batch


def pixels(image: Image, placement: Placement, background: str) -> torch.Tensor:
    """An image as its bucket crops it: (3, H, W) float32 in [-1, 1]."""
    rgb = crop(open_rgb(image.path, background), placement.box, (placement.width, placement.height))
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 127.5 - 1


def encode_images(
    family: Family,
    models: Models,
    images: Sequence[Image],
    placements: Sequence[Placement],
    background: str,
    flip: bool = False,
) -> dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]]:
    """(mean, std) of the latents, each (C, h, w) on the device, for every (image index, mirrored)."""
    groups: dict[tuple[int, int], list[tuple[int, bool]]] = {}
    for k, p in enumerate(placements):
        groups.setdefault((p.width, p.height), []).extend([(k, f) for f in ((False, True) if flip else (False,))])
    out = {}
    with models.borrow("vae"):
        for (w, h), members in groups.items():
            size = max(1, ENCODE_PIXELS // (w * h))
            for at in range(0, len(members), size):
                chunk = members[at : at + size]
                rows = [(pixels(images[k], placements[k], background), f) for k, f in chunk]
                x = torch.stack([row.flip(-1) if f else row for row, f in rows])
                mean, std = family.encode(models, x.to(models.device))
                out |= {m: (mean[j], std[j]) for j, m in enumerate(chunk)}
    return out


@torch.no_grad()
def encode_captions(family: Family, models: Models, captions: Sequence[str]) -> Cond:
    """Text states of every caption, (N, T, D) on the device, by the encoders as they are now."""
    with models.borrow(*(p for p in family.parts if p != "unet")):
        tokens = family.tokenize(models, captions).to(models.device)
        return Cond(torch.cat([family.encode_text(models, chunk).hidden for chunk in tokens.split(32)]))


class Store:
    """All that the steps of a plan need, on the device; `batch(n)` gathers step n's rows by index."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        family: Family,
        models: Models,
        text_trains: bool,
    ) -> None:
        found = encode_images(family, models, plan.images, plan.placements, config.dataset.background, config.dataset.flip)
        place_of: dict[tuple[int, bool], int] = {}
        stacks: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (k, flip), moments in found.items():
            stack = stacks.setdefault(plan.bucket(k), [])
            place_of[k, flip] = len(stack)
            stack.append(moments)
        self.place_of = place_of
        self.latents = {size: tuple(torch.stack(x) for x in zip(*rows, strict=True)) for size, rows in stacks.items()}
        self.tokens, self.cond = None, None
        hidden = getattr(getattr(models.parts["text_1"], "config", None), "hidden_size", 768)
        tokens = family.tokenize(models, plan.captions)
        if text_trains or tokens.numel() * hidden * 4 > TEXT_BUDGET:
            self.tokens = tokens.to(models.device)
        else:
            self.cond = encode_captions(family, models, plan.captions)
        self.family, self.models, self.known = family, models, len(plan.captions)
        self.image_weights = [config.data[i.source].weight for i in plan.images]
        self._lay(plan)

    def _lay(self, plan: Plan) -> None:
        weights, device = self.image_weights, self.models.device
        self.sizes = [plan.bucket(rows[0].image) for rows in plan.steps]
        self.total_weight = [sum(weights[r.image] for r in rows) for rows in plan.steps]
        table = [[(self.place_of[r.image, r.flip], r.caption, weights[r.image]) for r in rows] for rows in plan.steps]
        self.index = [torch.tensor([[a, b] for a, b, _ in rows], device=device) for rows in table]
        self.weights = [torch.tensor([w for _, _, w in rows], device=device) for rows in table]

    def extend(self, plan: Plan) -> None:
        """Serve the steps of `plan`, which goes on from the one so far (trainer.plan.relaid): its new captions are added.

        They are encoded by themselves, so that a resumed run, which extends in the same order, has the same states to the last bit.
        """
        new = plan.captions[self.known :]
        if new and self.cond is not None:
            self.cond = Cond(torch.cat([self.cond.hidden, encode_captions(self.family, self.models, new).hidden]))
        elif new:
            self.tokens = torch.cat([self.tokens, self.family.tokenize(self.models, new).to(self.models.device)])
        self.known = len(plan.captions)
        self._lay(plan)

    def batch(self, n: int) -> Batch:
        """The rows of step `n`, all of them: every process draws for the whole batch and takes its part."""
        mean, std = self.latents[self.sizes[n]]
        image, caption = self.index[n].unbind(1)
        cond = self.cond.rows(caption) if self.cond else None
        tokens = None if self.tokens is None else self.tokens.index_select(0, caption)
        return Batch(mean.index_select(0, image), std.index_select(0, image), self.weights[n], cond, tokens)
