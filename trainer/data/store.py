"""Latents and text kept on the device: what 10-20 images need is a few MB, encoded once and indexed ever after."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling

from trainer.config import TrainConfig
from trainer.data.buckets import Placement
from trainer.data.cache import Cache, Tensors
from trainer.data.images import FORMATS, crop, open_rgb, turn
from trainer.data.scan import Image
from trainer.families import WINDOW, Family, Models, States
from trainer.families.clip import Tokens
from trainer.families.common import TEXT_ROWS
from trainer.plan import Plan
from trainer.step import Batch

TEXT_BUDGET = 2**30  # bytes of an encoder's cached states; above it the encoder stays and encodes each step
# At most this many pixels pass through the VAE in one batch, but at least one image. Measured on an H200 with SD1.5's: two images of 512 px
# at once save 3 ms each and take .75 GiB more, and an image that comes to the set would change the batches of those after it.
ENCODE_PIXELS = 512 * 512
TILE = 64  # latents of a side, where an image is encoded in tiles
CPU_PIXELS = 256 * 256  # as many on a CPU, whose caches are small: 12 images of 128 px take .39 s in fours, .55 s at once (one core)
READERS = min(4, os.cpu_count() or 1)  # threads that open images while others are encoded

T, R = TypeVar("T"), TypeVar("R")


def pixels(image: Image, placement: Placement, background: str) -> torch.Tensor:
    """An image as its bucket crops it: (3, H, W) float32 in [-1, 1]."""
    rgb = crop(open_rgb(image.path, background), placement.box, (placement.width, placement.height))
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 127.5 - 1


def mask(image: Image, placement: Placement, how: str) -> torch.Tensor | None:
    """How much each latent of an image counts, (h/8, w/8) float32 in [0, 1]; None: all of it does.

    From the file beside it, or with `how` "alpha" from its transparency; each latent has the mean over its pixels (EXIF turns the mask as
    it turns the image).
    """
    if how == "off" or not (image.mask or how == "alpha"):
        return None
    with PIL.Image.open(image.mask or image.path, formats=FORMATS) as found:
        if not image.mask and not found.has_transparency_data:
            return None
        upright = turn(found)
        grey = found.convert("L") if image.mask else found.convert("RGBA").getchannel("A")
    grey = grey.transpose(upright) if upright is not None else grey
    across, down = grey.width / image.width, grey.height / image.height
    left, top, right, bottom = placement.box
    box = left * across, top * down, min(right * across, grey.width), min(bottom * down, grey.height)
    small = grey.resize((placement.width // 8, placement.height // 8), Resampling.BOX, box=box)
    return torch.from_numpy(np.array(small)).float() / 255


def loss_weights(found: torch.Tensor, outside: float) -> torch.Tensor:
    """A mask (h, w) as weights of the loss whose mean is 1, so that a small subject counts as much as a large one; `outside`: the weight
    of what is not masked, against 1. A mask that counts nothing at all is as none."""
    weights = outside + (1 - outside) * found
    mean = weights.mean()
    return weights / mean if mean > 0 else torch.ones_like(weights)


def encode_images(
    family: Family,
    models: Models,
    images: Sequence[Image],
    placements: Sequence[Placement],
    background: str,
    flip: bool = False,
    cache: Cache | None = None,
) -> dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]]:
    """(mean, std) of the latents, each (C, h, w) on the device, for every (image index, mirrored).

    A batch's images are of one bucket, in their order, so that it is the same one in every run on these images. Where the GPU's memory is
    too small for one of them, they are encoded in overlapping tiles.
    """
    cache = cache or Cache()
    try:
        return _encode_images(family, models, images, placements, background, flip, cache, tiled=False)
    except torch.OutOfMemoryError:
        if max(p.width * p.height for p in placements) <= (8 * TILE) ** 2:
            raise
    gc.collect()  # here the error is gone, and with it what its frames held
    torch.cuda.empty_cache()
    cache.warn(
        "The GPU's memory is too small to encode an image at once. They are encoded in overlapping tiles, which differ a little where they "
        "meet. A lower dataset.resolution avoids it."
    )
    with models.tiling(TILE):
        return _encode_images(family, models, images, placements, background, flip, cache, tiled=True)


def _encode_images(
    family: Family,
    models: Models,
    images: Sequence[Image],
    placements: Sequence[Placement],
    background: str,
    flip: bool,
    cache: Cache,
    tiled: bool,
) -> dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]]:
    groups: dict[tuple[int, int], list[tuple[int, bool]]] = {}
    for k, p in enumerate(placements):
        groups.setdefault((p.width, p.height), []).extend([(k, f) for f in ((False, True) if flip else (False,))])
    batches = []
    limit = min(ENCODE_PIXELS, CPU_PIXELS) if models.device.type == "cpu" else ENCODE_PIXELS
    for (w, h), members in groups.items():
        size = max(1, limit // (w * h))
        batches += [members[at : at + size] for at in range(0, len(members), size)]

    def told(n: int) -> list[object]:
        rows = [[images[k].digest, dataclasses.astuple(placements[k]), f] for k, f in batches[n]]
        return [family.name, background, rows, *(["tiles"] if tiled else [])]

    def opened(n: int) -> torch.Tensor:
        rows = [(pixels(images[k], placements[k], background), f) for k, f in batches[n]]
        return torch.stack([row.flip(-1) if f else row for row, f in rows])

    def make(missing: list[int]) -> Iterator[Tensors]:
        with models.borrow("vae"):
            for x in _ahead(opened, missing):
                yield dict(zip(("mean", "std"), family.encode(models, x.to(models.device)), strict=True))

    found = cache.recall("images", [len(b) for b in batches], told, models.vae, models.device, make)
    out = {}
    for batch, made in zip(batches, found, strict=True):
        out |= dict(zip(batch, zip(*(made[name].to(models.device) for name in ("mean", "std")), strict=True), strict=True))
    return out


def _ahead(load: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """load(item) of each item, in order; the next ones are loaded meanwhile, by threads."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Texts:
    """Captions as the denoiser will be told of them: cached states of frozen encoders, tokens for the others. Rows go by index.

    Args:
        trained: the encoders that may carry an adapter.

    Attributes:
        live: the encoders that read their tokens anew at each step.
    """

    def __init__(
        self, family: Family, models: Models, captions: Sequence[str], trained: Container[str] = (), cache: Cache | None = None
    ) -> None:
        self.family, self.models, self.cache = family, models, cache or Cache()
        self.held: dict[str, States | Tokens] = {}
        self.windows: list[int] = []
        self.live: set[str] = set()
        self._blank: dict[str, States | Tokens] = {}
        for part in models.text:
            width = getattr(models.module(part).config, "hidden_size", None) or models.module(part).config.d_model
            if part in trained or len(captions) * models.windows * WINDOW * width * 4 > TEXT_BUDGET:
                self.live.add(part)
        self.extend(captions)

    def _read(self, part: str, captions: Sequence[str]) -> tuple[States | Tokens, list[int]]:
        family, models = self.family, self.models
        tokens = family.tokenize(models, part, captions)
        if part in self.live:
            return tokens.to(models.device), list(tokens.windows)
        pieces = [tokens.rows(p) for p in torch.arange(len(captions)).split(TEXT_ROWS)]

        def told(n: int) -> list[object]:
            weights = pieces[n].weights
            return [family.name, part, models.clip_skip, pieces[n].ids.tolist(), None if weights is None else weights.tolist()]

        def make(missing: list[int]) -> Iterator[Tensors]:
            with models.borrow(part):
                for n in missing:
                    with torch.no_grad():
                        made = family.encode_text(models, part, pieces[n].to(models.device))
                    yield {"hidden": made.hidden} if made.pooled is None else {"hidden": made.hidden, "pooled": made.pooled}

        sizes = [len(p.ids) for p in pieces]
        found = self.cache.recall("captions", sizes, told, models.module(part), models.device, make)
        whole = {name: torch.cat([f[name].to(models.device) for f in found]) for name in found[0]}
        return States(whole["hidden"], whole.get("pooled")), list(tokens.windows)

    def extend(self, captions: Sequence[str]) -> None:
        """Add captions. They are encoded by themselves, so that whoever adds the same ones in the same order has the same states."""
        if not captions:
            return
        most = [1] * len(captions)
        for part in self.models.text:
            new, windows = self._read(part, captions)
            most = [max(pair) for pair in zip(most, windows, strict=True)]
            self.held[part] = _stacked(self.held[part], new, partial(self._empty, part)) if part in self.held else new
        self.windows += most

    def _empty(self, part: str) -> States | Tokens:
        """The caption without words."""
        if part not in self._blank:
            self._blank[part] = self._read(part, [""])[0]
        return self._blank[part]

    def rows(self, index: torch.Tensor, captions: Sequence[int]) -> dict[str, States | Tokens]:
        """The rows `index`, on the device, which are `captions`: cut to the windows that the longest of them has."""
        windows = max(self.windows[k] for k in captions)
        return {part: held.rows(index, windows) for part, held in self.held.items()}


def _stacked(first: States | Tokens, second: States | Tokens, empty: Callable[[], States | Tokens]) -> States | Tokens:
    """Both, one after the other; the one with fewer windows is filled up with empty ones."""

    def wide(x: torch.Tensor, blank: Callable[[], torch.Tensor], columns: int) -> torch.Tensor:
        if x.shape[1] == columns:
            return x
        fill = blank().expand(len(x), *[-1] * (x.ndim - 1))
        return torch.cat([x, *[fill] * ((columns - x.shape[1]) // WINDOW)], 1)

    def joined(a: torch.Tensor, b: torch.Tensor, blank: Callable[[], torch.Tensor]) -> torch.Tensor:
        columns = max(a.shape[1], b.shape[1])
        return torch.cat([wide(a, blank, columns), wide(b, blank, columns)])

    if isinstance(first, States):
        pooled = None if first.pooled is None else torch.cat([first.pooled, second.pooled])
        return States(joined(first.hidden, second.hidden, lambda: empty().hidden), pooled)
    weights = [None if t.weights is None else t.weights for t in (first, second)]
    if any(w is not None for w in weights):
        full = [torch.ones(t.ids.shape, device=t.ids.device) if w is None else w for t, w in zip((first, second), weights, strict=True)]
        weights = joined(*full, lambda: torch.ones_like(empty().ids, dtype=full[0].dtype))
    else:
        weights = None
    return Tokens(joined(first.ids, second.ids, lambda: empty().ids), weights, (*first.windows, *second.windows))


class Store:
    """All that the steps of a plan need, on the device; `batch(n)` gathers step n's rows by index."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        family: Family,
        models: Models,
        trained: Container[str],
        cache: Cache | None = None,
    ) -> None:
        dataset, self.cache = config.dataset, cache
        found = encode_images(family, models, plan.images, plan.placements, dataset.background, dataset.flip, cache)
        place_of: dict[tuple[int, bool], int] = {}
        stacks: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (k, flip), moments in found.items():
            stack = stacks.setdefault(plan.bucket(k), [])
            place_of[k, flip] = len(stack)
            stack.append(moments)
        self.place_of = place_of
        self.bucket_of = [plan.bucket(k) for k in range(len(plan.images))]
        self.latents = {size: tuple(torch.stack(x) for x in zip(*rows, strict=True)) for size, rows in stacks.items()}
        self.family, self.models, self.known = family, models, len(plan.captions)
        self.text = Texts(family, models, plan.captions, trained, cache)
        sizes = {(k, flip): family.size((plan.images[k].width, plan.images[k].height), plan.placements[k], flip) for k, flip in place_of}
        self.sizes_of = None if None in sizes.values() else sizes
        self.masks = self._masks(config, plan, stacks)
        self.image_weights = [config.data[i.source].weight for i in plan.images]
        self._lay(plan)

    def _masks(
        self, config: TrainConfig, plan: Plan, stacks: dict[tuple[int, int], list[Any]]
    ) -> dict[tuple[int, int], torch.Tensor] | None:
        """The loss weights of each bucket's latents in their order, (n, 1, h, w) on the device; None where no image has a mask."""
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(lambda pair: mask(*pair, config.dataset.masks), zip(plan.images, plan.placements, strict=True)))
        if all(m is None for m in found):
            return None
        out = {size: torch.ones(len(rows), 1, size[1] // 8, size[0] // 8) for size, rows in stacks.items()}
        for (k, flip), place in self.place_of.items():
            if found[k] is not None:
                weights = loss_weights(found[k], config.dataset.unmasked_weight)
                out[self.bucket_of[k]][place, 0] = weights.flip(-1) if flip else weights
        return {size: weights.to(self.models.device) for size, weights in out.items()}

    def _lay(self, plan: Plan) -> None:
        weights, device = self.image_weights, self.models.device
        self.sizes = [plan.bucket(rows[0].image) for rows in plan.steps]
        self.total_weight = [sum(weights[r.image] for r in rows) for rows in plan.steps]
        self.captions = [[r.caption for r in rows] for rows in plan.steps]
        self.index = [torch.tensor([[self.place_of[r.image, r.flip], r.caption] for r in rows], device=device) for rows in plan.steps]
        self.weights = [torch.tensor([weights[r.image] for r in rows], device=device) for rows in plan.steps]
        self.priors = [[r.prior if r.prior is not None else r.caption for r in rows] for rows in plan.steps]
        self.prior_index = None
        if any(r.prior is not None for rows in plan.steps for r in rows):
            self.prior_index = [torch.tensor(rows, device=device) for rows in self.priors]
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
        prior = self.prior_index and self.text.rows(self.prior_index[n], self.priors[n])
        masks = self.masks and self.masks[self.sizes[n]].index_select(0, image)
        return Batch(mean.index_select(0, image), std.index_select(0, image), self.weights[n], text, size, masks, prior)

    def mean(self, image: int) -> torch.Tensor:
        """The mean of a training image's latents, (C, h, w), not mirrored."""
        return self.latents[self.bucket_of[image]][0][self.place_of[image, False]]

    def some_latents(self, count: int = 8) -> torch.Tensor:
        """`count` latents of the images of one bucket, (count, C, h, w), the same ones again where it has fewer."""
        found = next(iter(self.latents.values()))[0]
        return found[torch.arange(count, device=found.device) % len(found)]
