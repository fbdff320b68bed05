"""Latents and text kept on the device: what 10-20 images need is a few MB, encoded once and indexed ever after."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import torch

from trainer.config import TrainConfig
from trainer.data.buckets import Placement
from trainer.data.images import crop, open_rgb
from trainer.data.scan import Image
from trainer.families import WINDOW, Family, Models, States
from trainer.families.clip import Tokens
from trainer.families.common import TEXT_ROWS
from trainer.plan import Plan
from trainer.step import Batch

TEXT_BUDGET = 2**30  # bytes of an encoder's cached states; above it the encoder stays and encodes each step
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


class Texts:
    """Captions as the denoiser will be told of them: cached states of frozen encoders, tokens for the others. Rows go by index.

    Args:
        trained: the encoders that may carry an adapter; they read their tokens anew at each step.
    """

    def __init__(self, family: Family, models: Models, captions: Sequence[str], trained: Container[str] = ()) -> None:
        self.family, self.models = family, models
        self.held: dict[str, States | Tokens] = {}
        self.windows: list[int] = []
        self.empty: dict[str, States | Tokens] = {}
        for part in models.text:
            width = getattr(models.module(part).config, "hidden_size", None) or models.module(part).config.d_model
            live = part in trained or len(captions) * models.windows * WINDOW * width * 4 > TEXT_BUDGET
            self.empty[part] = self._read(part, [""], live)[0]
        self.extend(captions)

    @property
    def live(self) -> set[str]:
        """The encoders that read at each step."""
        return {part for part, held in self.empty.items() if isinstance(held, Tokens)}

    def _read(self, part: str, captions: Sequence[str], live: bool) -> tuple[States | Tokens, list[int]]:
        tokens = self.family.tokenize(self.models, part, captions)
        windows, tokens = list(tokens.windows), tokens.to(self.models.device)
        if live:
            return tokens, windows
        with torch.no_grad(), self.models.borrow(part):
            pieces = torch.arange(len(captions), device=self.models.device).split(TEXT_ROWS)
            found = [self.family.encode_text(self.models, part, tokens.rows(p)) for p in pieces]
        return States(
            torch.cat([f.hidden for f in found]), None if found[0].pooled is None else torch.cat([f.pooled for f in found])
        ), windows

    def extend(self, captions: Sequence[str]) -> None:
        """Add captions. They are encoded by themselves, so that whoever adds the same ones in the same order has the same states."""
        if not captions:
            return
        most = [1] * len(captions)
        for part, empty in self.empty.items():
            new, windows = self._read(part, captions, isinstance(empty, Tokens))
            most = [max(pair) for pair in zip(most, windows, strict=True)]
            self.held[part] = _stacked(self.held[part], new, empty) if part in self.held else new
        self.windows += most

    def rows(self, index: torch.Tensor, captions: Sequence[int]) -> dict[str, States | Tokens]:
        """The rows `index`, on the device, which are `captions`: cut to the windows that the longest of them has."""
        windows = max(self.windows[k] for k in captions)
        return {part: held.rows(index, windows) for part, held in self.held.items()}


def _stacked(first: States | Tokens, second: States | Tokens, empty: States | Tokens) -> States | Tokens:
    """Both, one after the other; the one with fewer windows is filled up with empty ones."""

    def wide(x: torch.Tensor, blank: torch.Tensor, columns: int) -> torch.Tensor:
        times = (columns - x.shape[1]) // WINDOW
        fill = blank[:, :WINDOW].expand(len(x), *blank.shape[1:]) if times else blank
        return torch.cat([x, *[fill] * times], 1)

    def joined(a: torch.Tensor, b: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
        columns = max(a.shape[1], b.shape[1])
        return torch.cat([wide(a, blank, columns), wide(b, blank, columns)])

    if isinstance(first, States):
        pooled = None if first.pooled is None else torch.cat([first.pooled, second.pooled])
        return States(joined(first.hidden, second.hidden, empty.hidden), pooled)
    weights = [None if t.weights is None else t.weights for t in (first, second)]
    if any(w is not None for w in weights):
        full = [torch.ones(t.ids.shape, device=t.ids.device) if w is None else w for t, w in zip((first, second), weights, strict=True)]
        weights = joined(*full, torch.ones(empty.ids.shape, device=empty.ids.device))
    else:
        weights = None
    return Tokens(joined(first.ids, second.ids, empty.ids), weights, (*first.windows, *second.windows))


class Store:
    """All that the steps of a plan need, on the device; `batch(n)` gathers step n's rows by index."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        family: Family,
        models: Models,
        trained: Container[str],
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
        self.family, self.models, self.known = family, models, len(plan.captions)
        self.text = Texts(family, models, plan.captions, trained)
        sizes = {(k, flip): family.size((plan.images[k].width, plan.images[k].height), plan.placements[k], flip) for k, flip in place_of}
        self.sizes_of = None if None in sizes.values() else sizes
        self.image_weights = [config.data[i.source].weight for i in plan.images]
        self._lay(plan)

    def _lay(self, plan: Plan) -> None:
        weights, device = self.image_weights, self.models.device
        self.sizes = [plan.bucket(rows[0].image) for rows in plan.steps]
        self.total_weight = [sum(weights[r.image] for r in rows) for rows in plan.steps]
        self.captions = [[r.caption for r in rows] for rows in plan.steps]
        self.index = [torch.tensor([[self.place_of[r.image, r.flip], r.caption] for r in rows], device=device) for rows in plan.steps]
        self.weights = [torch.tensor([weights[r.image] for r in rows], device=device) for rows in plan.steps]
        self.told_sizes = None
        if self.sizes_of:
            self.told_sizes = [torch.tensor([self.sizes_of[r.image, r.flip] for r in rows], device=device) for rows in plan.steps]

    def extend(self, plan: Plan) -> None:
        """Serve the steps of `plan`, which goes on from the one so far (trainer.plan.relaid): its new captions are added.

        They are encoded by themselves, so that a resumed run, which extends in the same order, has the same states to the last bit.
        """
        self.text.extend(plan.captions[self.known :])
        self.known = len(plan.captions)
        self._lay(plan)

    def batch(self, n: int) -> Batch:
        """The rows of step `n`, all of them: every process draws for the whole batch and takes its part."""
        mean, std = self.latents[self.sizes[n]]
        image, caption = self.index[n].unbind(1)
        text = self.text.rows(caption, self.captions[n])
        size = self.told_sizes and self.told_sizes[n]
        return Batch(mean.index_select(0, image), std.index_select(0, image), self.weights[n], text, size)

    def some_latents(self, count: int = 8) -> torch.Tensor:
        """`count` latents of the images of one bucket, (count, C, h, w), the same ones again where it has fewer."""
        found = next(iter(self.latents.values()))[0]
        return found[torch.arange(count, device=found.device) % len(found)]
