"""What the page shows of a picture: a small and a large version, and what is odd about it. Pillow and numpy alone.

Everything is kept in the cache by the picture's content (SHA-256), so that a picture is decoded once, whatever it is called. What
was not used for long goes at the app's start (`prune`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from app.errors import Problem
from trainer.data import scan
from trainer.data.buckets import Placement
from trainer.data.images import DAMAGED, FORMATS, open_rgb, shrink, to_rgb
from trainer.run_dir import replace

THUMB, FULL = 320, 2048  # longest side in pixels
QUALITY = {THUMB: 82, FULL: 88}
_VERSION = 2  # of what is kept; another one is looked at again
MOST_BYTES, OLDEST_S = 10**9, 90 * 24 * 3600  # what the cache may hold after `prune`, and for how long without being used
_DAY = 24 * 3600

# Sharpness is the variance of the Laplacian over that of the picture itself, in the blocks that show something, with the short
# side at 512 pixels (what Stable Diffusion sees); the tenth best block of a hundred counts, so that a soft background is allowed.
# Photos and drawings measured 0.5 to 14; blurred by a Gaussian of 1 pixel at that size 0.04 to 0.8, of 2 pixels 0.01 to 0.06 (small
# icons to 0.13), of 3 pixels below 0.03 (icons 0.08). Below 0.06 fine detail is gone at the size that is trained.
SHARP_SIDE, BLURRED = 512, 0.06
NEAR = 4  # of 64 bits of the difference hash; re-saved and resized copies differ in 0 to 3
NEAR_COLOUR = 10  # of 255, mean difference of 8 x 8 colours: two plain pictures have the same hash whatever their colours
CUT = 0.1  # share of an image that a bucket may cut off unremarked


@dataclass(frozen=True)
class Look:
    """What was seen of a picture.

    width, height: upright, in pixels; sharp: see BLURRED, None where nothing in it has any contrast; hash: 64-bit difference hash;
    colours: 8 x 8 x RGB, 0 to 255; bars: share of the picture that is a border without a picture, see `bars`; transparent, animated:
    whether it is; mode: Pillow's mode in the file, as CMYK.
    """

    width: int
    height: int
    sharp: float | None
    hash: int
    colours: bytes
    bars: float
    transparent: bool
    animated: bool
    mode: str


_looks: dict[str, Look] = {}


class Seeing:
    """Looks at pictures while trainer.data.scan.inspect decodes them (its Eyes), and keeps what it sees in `cache`."""

    least = SHARP_SIDE

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def knows(self, digest: str) -> tuple[int, int] | None:
        look = _kept(digest, self.cache)
        return (look.width, look.height) if look else None

    def see(self, digest: str, image: PIL.Image.Image, size: tuple[int, int]) -> None:
        found = _see(digest, image, size, self.cache)
        kept = asdict(found) | {"colours": found.colours.hex(), "version": _VERSION}
        _write(self.cache / "pictures" / f"{digest}.json", json.dumps(kept).encode())
        _looks[digest] = found


def inspect(path: Path, cache: Path) -> tuple[str, int, int] | str:
    """trainer.data.scan.inspect of a picture, with a look at it where it was not seen before."""
    return scan.inspect(path, Seeing(cache))


def inspect_all(paths: Sequence[Path], cache: Path, tick: Callable[[], None] = lambda: None) -> list[tuple[str, int, int] | str]:
    """trainer.data.scan.inspect of each picture, in threads, with a look at each that was not seen before.

    `tick` is called after each; what it raises ends the work.
    """

    def one(path: Path) -> tuple[str, int, int] | str:
        found = inspect(path, cache)
        tick()
        return found

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        work = [pool.submit(one, path) for path in paths]
        try:
            return [each.result() for each in work]
        finally:
            for each in work:
                each.cancel()


def look(path: Path, digest: str, cache: Path) -> Look:
    """What is to see in the picture at `path` with that SHA-256; its thumbnail is made on the way.

    Raises DAMAGED for a file that does not decode; trainer.data.scan.inspect has tried it before.
    """
    if found := _kept(digest, cache):
        return found
    with PIL.Image.open(path, formats=FORMATS) as image, scan.alone_if(image.width * image.height):
        width, height = image.size
        shrink(image, Seeing.least)
        image.load()
        sideways = scan.turn(image) in scan.SIDEWAYS
        Seeing(cache).see(digest, image, (height, width) if sideways else (width, height))
    return _looks[digest]


def look_all(pictures: Sequence[tuple[Path, str]], cache: Path) -> list[Look | None]:
    """`look` at each (path, digest); None for a file that does not decode. Those that `inspect_all` saw cost nothing."""

    def one(picture: tuple[Path, str]) -> Look | None:
        try:
            return look(*picture, cache)
        except DAMAGED:
            return None

    return [one(picture) for picture in pictures]


def forget() -> None:
    """Forget what stands in the cache as well, to read it anew."""
    _looks.clear()


def _kept(digest: str, cache: Path) -> Look | None:
    if digest in _looks:
        return _looks[digest]
    kept = cache / "pictures" / f"{digest}.json"
    try:
        values = json.loads(kept.read_text(encoding="utf-8"))
        if values.pop("version") != _VERSION:
            return None
        found = Look(**values | {"colours": bytes.fromhex(values["colours"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    used(kept)
    return _looks.setdefault(digest, found)


def _see(digest: str, image: PIL.Image.Image, size: tuple[int, int], cache: Path) -> Look:
    mode, animated = image.mode, getattr(image, "n_frames", 1) > 1
    transparent = image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    rgb = to_rgb(image)
    small = _fit(rgb, THUMB)
    _save(small, _picture(cache, digest, THUMB), THUMB)
    colours = small.resize((8, 8), Resampling.BOX).tobytes()
    return Look(*size, sharpness(rgb), difference_hash(small), colours, bars(small), transparent, animated, mode)


def sharpness(image: PIL.Image.Image) -> float | None:
    """How sharp an RGB picture is at the size that is trained, see BLURRED; None where no part of it has contrast."""
    grey = image.convert("L")
    scale = SHARP_SIDE / min(grey.size)
    if scale < 1:
        grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Resampling.LANCZOS, reducing_gap=3)
    g = np.asarray(grey, np.float32)
    edges = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    own, edged = _variances(g[1:-1, 1:-1]), _variances(edges)
    shares = edged[own > 100] / own[own > 100]
    return float(np.quantile(shares, 0.9)) if len(shares) else None


def _variances(pixels: np.ndarray) -> np.ndarray:
    """Of each of 8 x 8 blocks of (h, w); what is left over at the right and below counts for none."""
    h, w = (n // 8 for n in pixels.shape)
    blocks = pixels[: 8 * h, : 8 * w].reshape(8, h, 8, w)
    return blocks.var(axis=(1, 3)) if h and w else np.zeros(0)


BAR, PLAIN, SHOWS = 0.03, 6, 0.6


def bars(image: PIL.Image.Image) -> float:
    """Share of an RGB picture that is two bars of one colour along opposite sides, as films and screenshots have; else 0.

    A bar is at least BAR of the side wide, differs by at most PLAIN of 255 in itself and from the other one, and ends at once: SHOWS of
    the line behind it is another colour. So a plain background around a subject is none, whose outline begins somewhere.
    """
    step = -(-max(image.size) // 160)  # as many pixels tell as much
    whole = np.asarray(image)[::step, ::step].astype(np.int16)
    return max(_bars(whole), _bars(whole.transpose(1, 0, 2)))


def _bars(lines: np.ndarray) -> float:
    """Of (lines, pixels, RGB): the share of the lines that the first and the last ones make as bars."""
    n, colour = len(lines), np.median(lines[0], axis=0)
    other = (np.abs(lines - colour).max(axis=2) > PLAIN).mean(axis=1)  # of each line, the share that has another colour
    shows = np.flatnonzero(other > 0.02)
    if not len(shows):
        return 0.0
    first, last = int(shows[0]), int(shows[-1])
    behind = other[first : first + 3].max(), other[max(0, last - 2) : last + 1].max()  # an edge may be soft
    wide = min(first, n - 1 - last) >= max(2, BAR * n)
    return (first + n - 1 - last) / n if wide and min(behind) >= SHOWS else 0.0


def difference_hash(image: PIL.Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than its right neighbour."""
    g = np.asarray(image.convert("L").resize((9, 8), Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(g[:, 1:] > g[:, :-1]).tobytes(), "big")


def twins(looks: Sequence[Look]) -> list[list[int]]:
    """Groups of pictures that are nearly the same, by their indices; those that are like no other are in none."""
    if len(looks) < 2:
        return []
    hashes = np.array([x.hash for x in looks], np.uint64)
    colours = np.stack([np.frombuffer(x.colours, np.uint8) for x in looks]).astype(np.int16)
    group = list(range(len(looks)))
    for k in range(len(looks) - 1):
        near = np.flatnonzero(np.bitwise_count(hashes[k + 1 :] ^ hashes[k]) <= NEAR) + k + 1
        for other in near[np.abs(colours[near] - colours[k]).mean(axis=1) <= NEAR_COLOUR]:
            old, new = group[other], group[k]
            if old != new:
                group = [new if g == old else g for g in group]
    members: dict[int, list[int]] = {}
    for k, g in enumerate(group):
        members.setdefault(g, []).append(k)
    return [m for m in members.values() if len(m) > 1]


def badges(
    size: tuple[int, int], look: Look | None, placed: Placement | None, twin: str | None, max_aspect: float, max_upscale: float
) -> list[dict[str, str]]:
    """What is to say about an image of `size` (width, height) in pixels: {"kind", "text"} each. `twin`: a near duplicate's name."""
    (width, height), found = size, []

    def add(kind: str, text: str) -> None:
        found.append({"kind": kind, "text": text})

    if placed and placed.scale > max_upscale:
        least = [math.ceil(side * placed.scale / max_upscale) for side in size]
        add(
            "small",
            f"It has {width} x {height} pixels and is enlarged {placed.scale:.1f} times to {placed.width} x {placed.height}, which looks soft. "
            f"Use a version of at least {least[0]} x {least[1]}, or train at a lower resolution.",
        )
    if look and look.sharp is not None and look.sharp < BLURRED:
        add("blurred", "It looks blurred, and the LoRA learns that too. Use a sharper picture, unless the blur is meant.")
    if twin:
        add("duplicate", f"It is nearly the same picture as {twin}, which then counts twice. Remove one of them.")
    if max(width, height) > max_aspect * min(width, height):
        add(
            "long",
            f"Its sides are 1 to {max(width, height) / min(width, height):.1f}, and images are trained at 1 to {max_aspect:g} at most: "
            "much is cut off. Crop it to the part that matters.",
        )
    if look and look.bars:
        add("bars", f"{look.bars:.0%} of it are plain bars along two sides, which the LoRA learns too. Cut them off.")
    if look:
        if look.transparent:
            add("odd", "Parts of it are transparent; the background colour of the data set settings (white) is put behind them.")
        if look.animated:
            add("odd", "It is animated; only its first picture is trained.")
        if look.mode == "CMYK":
            add("odd", "Its colours are for print (CMYK) and are converted; look whether they are right.")
    if placed and 1 - placed.kept > CUT:
        add(
            "crop",
            f"{1 - placed.kept:.0%} of it is cut off to fit {placed.width} x {placed.height}. Crop it yourself if what matters is cut.",
        )
    return found


def version(path: Path, digest: str, side: int, cache: Path) -> Path:
    """The picture upright as WebP, at most `side` (THUMB or FULL) pixels wide and high; made where it is not in the cache.

    Raises Problem for a file that does not decode any more.
    """
    target = _picture(cache, digest, side)
    if not used(target):
        try:
            _save(_fit(open_rgb(path, least=side), side), target, side)
        except DAMAGED as error:
            raise Problem(f"{path.name} cannot be shown: {error}. Copy it again, or remove it.", 404) from None
    return target


def used(path: Path) -> bool:
    """Whether a file of the cache is there; its time tells, to a day, when it was last used."""
    try:
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


def prune(cache: Path, most: int = MOST_BYTES, oldest: float = OLDEST_S) -> int:
    """Delete the cached pictures that were not used for `oldest` seconds, then the longest unused ones until `most` bytes are left.

    Returns the bytes that were freed. Everything here can be made again.
    """
    found = []
    for folder in (cache / "pictures", cache / "previews"):  # the second: the runs' thumbnails, app/run_reader.py
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        now = entry.stat(follow_symlinks=False)
                        found.append((now.st_mtime, now.st_size, Path(entry.path)))
    left, freed, end = sum(size for _, size, _ in found), 0, time.time() - oldest
    for at, size, path in sorted(found):
        torn = path.suffix == ".tmp" and time.time() - at > _DAY  # of a process that was killed while it wrote
        if at >= end and left <= most and not torn:
            continue
        with contextlib.suppress(OSError):  # in use (Windows), or gone
            path.unlink()
            left, freed = left - size, freed + size
    return freed


def _picture(cache: Path, digest: str, side: int) -> Path:
    return cache / "pictures" / f"{digest}-{side}.webp"


def _fit(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    scale = min(1.0, side / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return (
        image.resize(size, Resampling.HAMMING, reducing_gap=1.5) if scale < 1 else image
    )  # a higher one shows no difference, and is slower


def _save(image: PIL.Image.Image, target: Path, side: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        image.save(temp, "WEBP", quality=QUALITY[side], method=2)
        replace(temp, target)
    finally:
        temp.unlink(missing_ok=True)


def _write(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{uuid.uuid4().hex}.tmp")  # several threads may write the same one
    try:
        temp.write_bytes(raw)
        replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
