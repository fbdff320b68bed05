"""Any image file as an upright, opaque sRGB picture, and a piece of it at a given size."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageCms, features
from PIL.Image import Resampling, Transpose

PIXEL_LIMIT = 200_000_000
# Pillow's own guard warns from 89 million pixels, which a stitched photo has. It stays on, and gives up at twice this.
PIL.Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT

# By content, not by name: a WebP called .jpg is read. A closed list, since Pillow would hand an EPS to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", *(("AVIF",) if features.check("avif") else ()))

# What Pillow raises on damaged bytes (found by flipping some in files of each format; RuntimeError is AVIF's).
DAMAGED = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, MemoryError, struct.error, zlib.error)

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDEWAYS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)  # these swap the sides


def turn(image: PIL.Image.Image) -> Transpose | None:
    """What makes a loaded image upright by its EXIF orientation; None if it is upright, or its EXIF block is damaged."""
    try:
        return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except DAMAGED:
        return None


def open_rgb(path: Path, background: str = "#ffffff", least: int | None = None) -> PIL.Image.Image:
    """The image at `path`, upright, in mode RGB (sRGB), with transparent parts laid on `background` (`#rrggbb`).

    With `least`, a JPEG may come at a half, a quarter or an eighth of its size, its shorter side at least so many pixels: much quicker.
    Reads FORMATS, and TIFF and GIF (the first frame) too. Raises OSError if it cannot be read, or one of
    DAMAGED if it cannot be decoded; `scan` has tried each file before.
    """
    with PIL.Image.open(path, formats=(*FORMATS, "TIFF", "GIF")) as image:
        if least:
            shrink(image, least)
        image.load()
        return to_rgb(image, background)


def shrink(image: PIL.Image.Image, least: int) -> None:
    """Let a JPEG that is not loaded yet come at a half, a quarter or an eighth, its shorter side at least so many pixels."""
    if (scale := least / min(image.size)) < 1:
        image.draft(image.mode, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def to_rgb(image: PIL.Image.Image, background: str = "#ffffff") -> PIL.Image.Image:
    """A loaded image upright, in mode RGB (sRGB), with transparent parts laid on `background`."""
    upright = turn(image)
    rgb = _rgb(image, background)
    return rgb.transpose(upright) if upright is not None else rgb


def crop(image: PIL.Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> PIL.Image.Image:
    """`box` (left, top, right, bottom in pixels of `image`, fractions allowed) of an RGB image at `size` (width, height).

    Cut and resized in one go: a fractional box is honoured, and the filter sees the true neighbours beyond the box's edges.
    Raises ValueError if the box leaves the image.
    """
    return image.resize(size, Resampling.LANCZOS, box=box, reducing_gap=None)


def _rgb(image: PIL.Image.Image, background: str) -> PIL.Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        return _to_srgb(_eight_bits(image), profile)
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
    rgb = _to_srgb(image, profile)
    if alpha is not None:
        canvas = PIL.Image.new("RGB", rgb.size, background)
        canvas.paste(rgb, mask=alpha)
        rgb = canvas
    return rgb


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """A 16-bit, 32-bit or float image as 8-bit grey, the whole range scaled; Pillow's own conversion clips it to white.

    Files don't say their range. Integers are taken as 16 bits wide, 31 if a value needs it; floats as 0 to 1, or else to
    255, 65535 or the largest value, the first that holds all. Below 0 is black, and so is what is no number.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
    top = values.max()
    ranges = (1, 255, 65535, top) if image.mode == "F" else (65535, 2**31)
    white = next(r for r in ranges if top <= r)
    return PIL.Image.fromarray(np.rint(np.clip(values, 0, None) * (255 / white)).astype(np.uint8))


def _to_srgb(image: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """An image without alpha in RGB: through its embedded ICC profile, or plainly.

    A profile that is damaged, or for other channels than the image has, is left aside, as browsers do.
    """
    if profile and features.check("littlecms2"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == "RGB" and image.mode != "CMYK":
                image = image.convert("RGB")
            if image.mode == {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space):
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")
