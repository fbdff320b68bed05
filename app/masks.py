"""Masks beside the images of a data set, as trainer/data/scan.py reads them: `a-masklabel.png` of `a.png`, white counts, black does not."""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
from PIL.Image import Resampling

from app.errors import Problem
from trainer.data.images import DAMAGED, FORMATS, turn
from trainer.data.scan import MASK, MASK_ASPECT

BY_WORDS = "Mask by words: "  # how the label of such a job begins, which cannot be taken back while it writes
LARGEST = 1024  # pixels of a mask's longer side: each latent has the mean over 8 x 8 pixels of the bucket, so more shows nothing


def is_mask(name: str) -> bool:
    return name.lower().endswith(MASK)


def name_of(image: str) -> str:
    """The file name of an image's mask."""
    return f"{Path(image).stem}{MASK}"


def there(folder: Path, images: list[str]) -> dict[str, Path]:
    """The mask of each image of a folder that has one."""
    found = {f.name.lower(): f for f in folder.iterdir() if is_mask(f.name)} if folder.is_dir() else {}
    return {image: found[name_of(image).lower()] for image in images if name_of(image).lower() in found}


def stamp(mask: Path) -> int:
    """Another number for each content of a mask's file; 0 where another thread has just moved it."""
    try:
        return mask.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def fits(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether the trainer takes a mask of that size (width, height) for an image of that size."""
    return abs(mask[0] * image[1] / (mask[1] * image[0]) - 1) <= MASK_ASPECT


def cleaned(raw: bytes, image: tuple[int, int]) -> bytes | None:
    """A mask that was sent for an image of that size as it is kept: a grey PNG, at most LARGEST pixels a side; None: nothing in it counts.

    Raises Problem for what is no picture, or one of another shape.
    """
    try:
        with PIL.Image.open(io.BytesIO(raw), formats=FORMATS) as found:
            grey = found.convert("L")
    except DAMAGED as error:
        raise Problem(f"The mask is no picture that can be read ({error}). Send a PNG, white where the image counts.") from None
    if not fits(grey.size, image):
        raise Problem(f"The mask has {grey.width} x {grey.height} pixels, of another shape than the image ({image[0]} x {image[1]}).")
    return _png(grey) if grey.getextrema()[1] else None


def of_alpha(path: Path) -> bytes | None:
    """The transparency of the image at `path` as its mask; None where it has none. Raises one of DAMAGED."""
    with PIL.Image.open(path, formats=FORMATS) as image:
        if not image.has_transparency_data:
            return None
        upright, alpha = turn(image), image.convert("RGBA").getchannel("A")
    low, high = alpha.getextrema()
    if low == 255 or not high:
        return None
    return _png(alpha.transpose(upright) if upright is not None else alpha)


def _png(grey: PIL.Image.Image) -> bytes:
    scale = LARGEST / max(grey.size)
    if scale < 1:
        grey = grey.resize((max(1, round(grey.width * scale)), max(1, round(grey.height * scale))), Resampling.BOX)
    out = io.BytesIO()
    grey.save(out, "PNG")
    return out.getvalue()
