"""Where the subject of a picture is likely to be, so that a crop keeps it. Arithmetic on a thumbnail: no model, a few milliseconds.

What stands out is found by the spectral residual of the thumbnail (Hou and Zhang 2007, "Saliency Detection: A Spectral Residual
Approach"): what is left of the log spectrum when its local mean is taken away, on brightness and two colour contrasts, weighed towards
the middle, where people put what they photograph. A mask that is there says it better, and counts instead; so do faces, where they are
asked for and OpenCV 4 is installed (the cascade of Viola and Jones 2001 that comes with it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from trainer.data.images import FORMATS, open_rgb

FACE_SIDE = 320  # pixels of the longer side in which faces are looked for
SIDE = 64  # pixels of the longer side; the paper's own scale
BLUR = 2.5  # pixels at that size, as in the paper's code
MIDDLE = 0.35  # deviation of the weight towards the middle, in shares of a side
PLAIN = 2.0  # of 255: below this deviation there is nothing to stand out


def point(path: Path, kept: tuple[float, float], mask: Path | None = None, face: bool = False) -> tuple[float, float]:
    """The middle of the piece of a picture that holds most of its subject, in shares of its sides; `kept`: what the piece has of each side.

    `face`: the subject is a face, if there is one. Raises one of trainer.data.images.DAMAGED for a file that does not decode.
    """
    if mask:
        with PIL.Image.open(mask, formats=FORMATS) as image:
            found = np.asarray(_small(image.convert("L")), np.float64)
    else:
        image = open_rgb(path, least=FACE_SIDE if face else 2 * SIDE)
        found = faces(image) if face else None
        if found is None:
            found = salience(_small(image))
    return _middle(found.sum(0), kept[0]), _middle(found.sum(1), kept[1])


def salience(image: PIL.Image.Image) -> np.ndarray:
    """How much each pixel of a small RGB picture stands out, (h, w), 0 or more."""
    r, g, b = np.moveaxis(np.asarray(image, np.float64), -1, 0)
    height, width = r.shape
    out = np.zeros((height, width))
    for channel in ((r + g + b) / 3, r - g, b - (r + g) / 2):
        if channel.std() < PLAIN:
            continue
        spectrum = np.fft.fft2(channel)
        log = np.log(np.abs(spectrum) + 1e-9)
        around = sum(np.roll(log, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
        found = _blurred(np.abs(np.fft.ifft2(np.exp(log - around + 1j * np.angle(spectrum)))) ** 2)
        out += found / found.max()
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    middle = np.exp(-0.5 * ((y[:, None] / MIDDLE) ** 2 + (x[None] / MIDDLE) ** 2))
    return out * middle if out.any() else middle


def faces(image: PIL.Image.Image) -> np.ndarray | None:
    """Where faces are that look at us, (h, w) of 0 and 1 on a small scale; None without any, or without OpenCV 4."""
    try:
        import cv2

        cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    except (ImportError, AttributeError):  # OpenCV 5 has it no more
        return None
    scale = FACE_SIDE / max(image.size)
    small = image.convert("L").resize([max(1, round(side * scale)) for side in image.size], Resampling.BOX)
    boxes = cascade.detectMultiScale(np.asarray(small), 1.1, 6, minSize=(FACE_SIDE // 12,) * 2)
    found = np.zeros((small.height, small.width))
    for x, y, width, height in boxes:
        found[y : y + height, x : x + width] = 1
    return found if len(boxes) else None


def _middle(line: np.ndarray, share: float) -> float:
    """The middle of the window of `share` of a line that holds most of it, where that leaves a choice; else the line's own middle."""
    n, total = len(line), line.sum()
    length = round(share * n)
    if not total:
        return 0.5
    centre = float(((np.arange(n) + 0.5) * line).sum() / total / n)
    if not 0 < length < n:
        return centre
    sums = np.convolve(line, np.ones(length), "valid")
    best = np.flatnonzero(sums >= sums.max() * 0.995)  # of windows that hold the same, the one in the subject's own middle
    starts = (best + length / 2) / n
    return float(np.clip(starts[np.argmin(np.abs(starts - centre))], share / 2, 1 - share / 2))


def _small(image: PIL.Image.Image) -> PIL.Image.Image:
    scale = SIDE / max(image.size)
    return image.resize((max(8, round(image.width * scale)), max(8, round(image.height * scale))), Resampling.BOX)


def _blurred(values: np.ndarray) -> np.ndarray:
    reach = round(3 * BLUR)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / BLUR) ** 2)
    for axis in (0, 1):
        values = np.apply_along_axis(lambda row: np.convolve(np.pad(row, reach, "edge"), kernel / kernel.sum(), "valid"), axis, values)
    return values
