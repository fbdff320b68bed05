"""Which images a captioner can hardly tell apart, by what its vision encoder makes of them.

How far apart two images lie means something else in each model. So they are alike here where they differ less from each other than an image
from its own middle: then all that a second one adds is another cut-out.
"""

from __future__ import annotations

import numpy as np
from PIL.Image import Image, Resampling

MIDDLES = 12  # images whose middles are looked at; their median is what counts
LEAST, MOST = 6, 1000  # images; of fewer or more nothing is said: many are compared each with each
KEPT = 0.8  # of each side


def middle(image: Image) -> Image:
    """The middle of an image, at the image's own size."""
    width, height = image.size
    x, y = width * (1 - KEPT) / 2, height * (1 - KEPT) / 2
    return image.resize(image.size, Resampling.BICUBIC, box=(x, y, width - x, height - y))


def alike(states: np.ndarray, middles: np.ndarray) -> list[int]:
    """The images that are alike to the one that most are alike to, itself among them, by their numbers.

    `states` (N, D) of the images, `middles` (K, D) of the middles of the first K; they are compared by their cosine.
    """
    states, middles = (
        x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (states.astype(np.float64), middles.astype(np.float64))
    )
    own = np.median(1 - (states[: len(middles)] * middles).sum(1))
    near = 1 - states @ states.T < own
    return np.flatnonzero(near[near.sum(1).argmax()]).tolist()
