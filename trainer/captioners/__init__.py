"""Captioners: models that write a sentence or tags for an image. Each is a settings model, the shape of its files and a function that
loads it; none imports torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from trainer.captioners import blip, florence, qwen, wd
from trainer.captioners.files import Shape, peek

if TYPE_CHECKING:
    from PIL.Image import Image

Caption = Callable[[Sequence["Image"]], list[str]]  # upright RGB images of any sizes -> a caption for each
Style = Literal["sentences", "tags"]


@dataclass(frozen=True)
class Captioner:
    """How a captioner is set, found and made.

    config: pydantic model with `source` and `batch` and their defaults, and what else can be set.
    shape: the files of its models, for trainer.captioners.files.
    build: (config, folder, device, dtype name, note) -> Caption. Loads the model; it is freed with the function. `note` gets sentences on
        how it is run and why. A captioner with `states` and `look`, as blip.Blip has them, also tells which images are alike.
    """

    style: Style
    config: type[BaseModel]
    shape: Shape
    build: Callable[[Any, Path, str, str, Callable[[str], None]], Caption]


CAPTIONERS: dict[str, Captioner] = {
    "blip": Captioner("sentences", blip.Config, blip.SHAPE, blip.build),
    "florence": Captioner("sentences", florence.Config, florence.SHAPE, florence.build),
    "qwen": Captioner("sentences", qwen.Config, qwen.SHAPE, qwen.build),
    "wd": Captioner("tags", wd.Config, wd.SHAPE, wd.build),
}


@dataclass(frozen=True)
class Known:
    """A model of the hub that is offered. `mb`: what is fetched of it, in millions of bytes; None: not known before it is asked for."""

    source: str
    kind: str
    title: str
    why: str
    licence: str
    mb: int | None


KNOWN = (
    Known(blip.DEFAULT, "blip", "BLIP large", "One short sentence; quick on any machine.", "BSD-3-Clause", 1880),
    Known(
        florence.DEFAULT,
        "florence",
        "Florence-2 base",
        "Some sentences with more detail, by a small model (0.23 billion parameters).",
        "MIT",
        None,
    ),
    Known(
        "florence-community/Florence-2-large-ft",
        "florence",
        "Florence-2 large",
        "The same, seen more closely (0.77 billion parameters).",
        "MIT",
        None,
    ),
    Known(
        qwen.DEFAULT, "qwen", "Qwen3-VL 2B", "Does as it is told: it leaves out of captions what the LoRA shall learn.", "Apache-2.0", 4270
    ),
    Known("Qwen/Qwen3-VL-4B-Instruct", "qwen", "Qwen3-VL 4B", "The same with fewer mistakes; for GPUs from 8 GB.", "Apache-2.0", 8890),
    Known(wd.DEFAULT, "wd", "WD tagger, ViT", "Danbooru's tags; quick, also on the CPU.", "Apache-2.0", 379),
    Known(
        "SmilingWolf/wd-eva02-large-tagger-v3", "wd", "WD tagger, EVA02 large", "The same, fewer misses; slow on a CPU.", "Apache-2.0", 1260
    ),
)


def kind_of(source: str, default: str = "blip") -> str:
    """Which captioner a hub id or folder is for, by its files (a hub id's are asked for); `default` where that can't be told."""
    for known in KNOWN:
        if known.source == source.strip():
            return known.kind
    names, model_type = peek(source)
    if "selected_tags.csv" in names:
        return "wd"
    return next((kind for kind, captioner in CAPTIONERS.items() if model_type in captioner.shape.types), default)
