"""Which size each image is trained at. Buckets come from the data: only sizes that some image wants exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MERGE_LOSS = 0.06  # share of an image's area that it may lose to join a fuller bucket

STEP = 64  # sides are multiples of this unless the user says otherwise
SMALL = 256  # below this resolution steps are finer: the toy base is trained at 128 pixels
# The finest step that a family is trained at, and below SMALL pixels. SD3's transformer reads patches of 16 pixels, so no other size
# has a place in it; the UNets of SD1 and SD2 halve the latent three times, SDXL's twice (sd-scripts asserts the same 64 and 32).
FINEST = {"sd1": (64, 8), "sd2": (64, 8), "sdxl": (32, 8), "sd3": (32, 16)}

Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True)
class Placement:
    """Where one image goes and what of it is seen."""

    width: int  # of the bucket, in pixels
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in source pixels, of the bucket's aspect
    scale: float  # bucket pixels per source pixel; above 1 the image is enlarged
    kept: float  # share of the image's area inside the box, (0, 1]


def step_of(resolution: int, wanted: int | None = None, family: str | None = None) -> int:
    """What bucket sides are multiples of, in pixels: `wanted`, or else 64, and 8 (SD3: 16) below 256 pixels.

    Raises ValueError for one that is no multiple of the finest step of `family`.
    """
    finest = FINEST.get(family or "", (8, 8))[resolution < SMALL]
    step = wanted or (finest if resolution < SMALL else STEP)
    if step % finest:
        raise ValueError(
            f"dataset.bucket_step is {step}; at a resolution of {resolution} pixels this base takes multiples of {finest}. "
            f"Set dataset.bucket_step to {finest} or {2 * finest}, or leave it empty."
        )
    return step


def place(
    sizes: Sequence[Size],
    *,
    resolution: int,
    step: int,
    max_aspect: float,
    batch_size: int,
    focus: Sequence[tuple[float, float]] | None = None,
) -> list[Placement]:
    """One placement for each (width, height) in pixels, in the same order; no image is left out, whatever its shape.

    An image goes to the bucket that keeps the most of it. Where fewer than `batch_size` images share a bucket, each moves
    on to the fullest bucket that has at least as many images and keeps at most MERGE_LOSS less of it. The result doesn't
    depend on the order of `sizes`. What is seen of an image lies round its point of `focus` (shares of its sides), or round its centre.

    Raises ValueError if `step` is larger than `resolution`, so that no bucket exists.
    """
    buckets = candidates(resolution, step, max_aspect)
    best = {size: max((_kept(size, b), b[0] * b[1], b) for b in buckets)[-1] for size in set(sizes)}
    chosen = _merge([best[size] for size in sizes], sizes, batch_size)
    return [_placement(size, bucket, point) for size, bucket, point in zip(sizes, chosen, focus or [(0.5, 0.5)] * len(sizes), strict=True)]


def candidates(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Every bucket (width, height) that an image may go to, in rising order.

    Sides are multiples of `step`, from 2 * step (less only where `resolution` is less); the area is at most resolution
    squared, and no larger by another step of one of the sides, except for the square, whose sides are `resolution`
    rounded down; the longer side is at most `max_aspect` times the shorter. Raises ValueError as `place` does.
    """
    square = resolution // step * step
    if not square:
        raise ValueError(
            f"dataset.bucket_step is {step}; it must be at most the resolution, which is {resolution}. "
            f"Lower dataset.bucket_step or raise dataset.resolution."
        )
    area, least = resolution**2, min(2 * step, square)
    found = {(square, square)}
    for side in range(least, area // least + 1, step):
        other = area // side // step * step
        if other >= least and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found)


def _kept(size: Size, bucket: Size) -> float:
    """Share of an image's area that is left when it is cropped to the bucket's aspect. Equal aspects give exactly 1."""
    a, b = size[0] * bucket[1], size[1] * bucket[0]
    return min(a, b) / max(a, b)


def _merge(wanted: Sequence[Size], sizes: Sequence[Size], batch_size: int) -> list[Size]:
    """The buckets `wanted` by the images, where the images of short buckets join fuller ones, the shortest bucket first."""
    chosen = list(wanted)
    members: dict[Size, list[int]] = {}
    for index, bucket in enumerate(wanted):
        members.setdefault(bucket, []).append(index)
    for bucket in sorted(members, key=lambda b: (len(members[b]), b[0] * b[1], b)):
        if len(members[bucket]) >= batch_size:
            continue
        # Counted before any of this bucket's images moves, so that their order doesn't matter.
        fuller = {b: len(m) for b, m in members.items() if b != bucket and len(m) >= len(members[bucket])}
        for index in tuple(members[bucket]):
            least = _kept(sizes[index], wanted[index]) - MERGE_LOSS
            near = [(n, kept, b[0] * b[1], b) for b, n in fuller.items() if (kept := _kept(sizes[index], b)) >= least]
            if near:
                chosen[index] = max(near)[-1]
                members[bucket].remove(index)
                members[chosen[index]].append(index)
    return chosen


def _placement(size: Size, bucket: Size, focus: tuple[float, float]) -> Placement:
    (width, height), (w, h) = size, bucket
    wide = width * h >= height * w  # the image is the wider of the two: its sides go
    seen = (height * w / h, float(height)) if wide else (float(width), width * h / w)
    left, top = (_start(whole, part, point) for whole, part, point in zip(size, seen, focus, strict=True))
    box = left, top, min(left + seen[0], width), min(top + seen[1], height)
    return Placement(w, h, box, h / height if wide else w / width, _kept(size, bucket))


def _start(whole: int, part: float, point: float) -> float:
    """Where a piece of length `part` begins that has `point` (a share of `whole`) in its middle, or as near as it can."""
    return min(max(point * whole - part / 2, 0.0), max(whole - part, 0.0))
