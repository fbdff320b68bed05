"""Measures on generated pictures of the drawn world: colours by pixel medians, subjects by a small classifier."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from trainer.demo import world

CLASSES = (*world.SUBJECTS, *world.HELD_OUT_SUBJECTS)


class SubjectClassifier(nn.Sequential):
    """Names the subject of a 128-pixel picture. Input (B, 3, 128, 128) in [-1, 1], output logits (B, len(CLASSES))."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        widths = (3, 24, 48, 96, 160)
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.Conv2d(b, b, 3, 1, 1, groups=b, bias=False), nn.Conv2d(b, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(CLASSES)))


def load_classifier(path: Path) -> SubjectClassifier:
    """The classifier that was trained beside the demo base (`assets/demo/classifier.safetensors`), in eval mode."""
    from safetensors.torch import load_file

    model = SubjectClassifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL images of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    array = np.stack([np.asarray(i.convert("RGB")) for i in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def name_subjects(classifier: SubjectClassifier, images: Sequence[Image.Image]) -> list[str]:
    return [CLASSES[k] for k in classifier(to_pixels(images)).argmax(1).tolist()]


def nearest_colour(rgb: Sequence[float]) -> str:
    return min(world.COLOURS, key=lambda name: math.dist(world.COLOURS[name], rgb))


def name_colours(image: Image.Image) -> tuple[str, str]:
    """(subject colour, background colour) of a picture with a plain background.

    The background's region is the outer ring of 6 pixels; the subject's region is every pixel at least 70 (RGB distance)
    from the background's median. Each region's colour is the palette colour nearest to its channel-wise median.
    """
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    ring = np.ones(array.shape[:2], bool)
    ring[6:-6, 6:-6] = False
    ground = np.median(array[ring], axis=0)
    subject = np.linalg.norm(array - ground, axis=-1) > 70
    colour = np.median(array[subject], axis=0) if subject.sum() > 40 else ground
    return nearest_colour(colour), nearest_colour(ground)


def colour_prompts(count: int, seed: int) -> list[world.Scene]:
    """Scenes on plain backgrounds for the colour and subject measure, subjects in turn, colours drawn."""
    rng = random.Random(seed)
    names = list(world.SUBJECTS)
    scenes = []
    for k in range(count):
        colour = rng.choice(list(world.COLOURS))
        scenes.append(world.Scene(names[k % len(names)], colour, rng.choice(("", "big")), ground=world.contrasting(colour, rng)))
    return scenes


def score(images: Sequence[Image.Image], scenes: Sequence[world.Scene], classifier: SubjectClassifier) -> dict[str, float]:
    """Share of pictures with the right subject, subject colour and background colour, each in [0, 1]."""
    subjects = name_subjects(classifier, images)
    colours = [name_colours(i) for i in images]
    n = len(images)
    return {
        "subject": sum(a == s.subject for a, s in zip(subjects, scenes, strict=True)) / n,
        "subject_colour": sum(c[0] == s.colour for c, s in zip(colours, scenes, strict=True)) / n,
        "background_colour": sum(c[1] == s.ground for c, s in zip(colours, scenes, strict=True)) / n,
    }


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; inputs (B, 3, H, W) in [-1, 1]."""
    mse = (a.float() - b.float().clamp(-1, 1)).pow(2).mean((1, 2, 3)).clamp_min(1e-10)
    return float((10 * torch.log10(4 / mse)).mean())
