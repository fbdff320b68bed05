"""Captioners: models that write a sentence or tags for an image. Each is a settings model and two functions; none imports torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.captioners import blip

if TYPE_CHECKING:
    from PIL.Image import Image

Caption = Callable[[Sequence["Image"]], list[str]]  # upright RGB images of any sizes -> a caption for each


@dataclass(frozen=True)
class Captioner:
    """How a captioner is set, found and made.

    config: pydantic model with `source`, `max_tokens` and `batch` and their defaults.
    resolve: (source, say) -> local folder; `say` gets a sentence before a download. Raises ValueError with a sentence.
    build: (config, folder, device, dtype name) -> Caption. Loads the model; it is freed with the function.
    """

    style: str  # "sentences" | "tags"
    config: type[blip.Config]
    resolve: Callable[[str, Callable[[str], None]], Path]
    build: Callable[[Any, Path, str, str], Caption]


CAPTIONERS: dict[str, Captioner] = {"blip": Captioner("sentences", blip.Config, blip.resolve, blip.build)}
