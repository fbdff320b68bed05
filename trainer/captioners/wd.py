"""WD taggers, version 3 (SmilingWolf): Danbooru's tags for an image, by a classifier in ONNX.

A model's folder holds model.onnx, whose input is (N, side, side, 3) and whose output is a probability for each row of selected_tags.csv.
Its own code lays a picture on a white square, resizes that (bicubic) to the input's side and gives it as BGR in float32 from 0 to 255.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import PIL.Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainer.captioners.files import FIELD, Shape
from trainer.families.sources import SourceError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT = "SmilingWolf/wd-vit-tagger-v3"
CHARACTER, RATING = "4", "9"  # Danbooru's numbers for kinds of tags; all others are general
SHAPE = Shape("a WD tagger", DEFAULT, (("model.onnx",), ("selected_tags.csv",)))


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Config(BaseModel):
    """What can be set of a WD tagger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a WD tagger (model.onnx and selected_tags.csv)")
    batch: int = Field(4, ge=1, le=256, description="images that are tagged at once")
    general: float = Field(0.35, ge=0, le=1, description="tags from this probability on are written")
    character: float = Field(0.85, ge=0, le=1, description="names of known characters from this probability on are written")
    spaces: bool = Field(True, description="long_hair becomes long hair; emoticons such as ^_^ stay")
    rating: bool = Field(False, description="the most probable rating (general, sensitive, questionable, explicit) is the last tag")
    blocked: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="tags that are never written, with commas between"
    )
    characters_first: bool = Field(True, description="names of characters come before the other tags")
    escape: bool = Field(False, description=r"brackets become \( and \), for tools that read bare ones as weights")


def build(config: Config, folder: Path, device: str, dtype: str, note: Callable[[str], None]) -> Callable[[Sequence[Image]], list[str]]:
    """Load the classifier; the function tags a batch. `note` is told on which processor it runs and why. It has a precision of its own."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError(
            "Tags need the package onnxruntime, which is missing. Run `python launch.py update`, or `pip install onnxruntime`."
        )
    import onnxruntime

    names, kinds = read_tags(folder / "selected_tags.csv")
    providers, reason = choose(device, onnxruntime.get_available_providers())
    onnxruntime.disable_telemetry_events()  # which Microsoft's builds for Windows send else
    onnxruntime.set_default_logger_severity(3)
    try:
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=providers)
    except Exception as error:  # its errors share no class but Exception
        raise SourceError(f"{FIELD} is {folder}, where model.onnx cannot be read ({error}). Download or copy the model again.") from None
    if session.get_providers()[0] == "CPUExecutionProvider" and len(providers) > 1:
        reason = "Tags are computed on the CPU, because the installed onnxruntime finds no CUDA libraries that fit it."
    note(reason)
    (entry, *_), (output, *_) = session.get_inputs(), session.get_outputs()
    if len(entry.shape) != 4 or entry.shape[3] != 3 or not isinstance(entry.shape[1], int) or entry.shape[1] != entry.shape[2]:
        raise SourceError(
            f"{FIELD} is {folder}, where model.onnx takes {entry.shape}; a WD tagger takes [N, side, side, 3]. Give one, like {DEFAULT}."
        )
    if output.shape[1] != len(names):
        raise SourceError(
            f"{FIELD} is {folder}, where model.onnx knows {output.shape[1]} tags and selected_tags.csv {len(names)}. They are of two models: "
            "download or copy both again."
        )
    at_once = entry.shape[0] if isinstance(entry.shape[0], int) else config.batch

    def caption(images: Sequence[Image]) -> list[str]:
        pixels = np.stack([prepare(image, entry.shape[1]) for image in images])
        rows: list[np.ndarray] = []
        for at in range(0, len(pixels), at_once):
            piece = pixels[at : at + at_once]
            if isinstance(entry.shape[0], int):  # a model of one fixed batch: what is missing in the last is filled up, and dropped
                piece = np.resize(piece, (at_once, *piece.shape[1:]))
            rows += list(session.run([output.name], {entry.name: piece})[0])
        return [text(config, names, kinds, row) for row in rows[: len(images)]]

    return caption


def choose(device: str, available: Sequence[str]) -> tuple[list[Any], str]:
    """(providers for onnxruntime, the reason in a sentence) for a device of torch."""
    kind, _, number = device.partition(":")
    if kind == "cuda" and "CUDAExecutionProvider" in available:
        return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), "CPUExecutionProvider"], (
            "Tags are computed on the GPU, because the installed onnxruntime can use it."
        )
    if kind == "cpu":
        return ["CPUExecutionProvider"], "Tags are computed on the CPU, as everything here."
    return ["CPUExecutionProvider"], (
        "Tags are computed on the CPU, because the installed onnxruntime has no GPU part; a picture takes about a second so."
    )


def prepare(image: Image, side: int) -> np.ndarray:
    """(side, side, 3) of an upright RGB image, BGR in float32 from 0 to 255: in the middle of a white square, resized by cubics."""
    longest = max(image.size)
    square = PIL.Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), PIL.Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32)[:, :, ::-1]


def read_tags(path: Path) -> tuple[list[str], list[str]]:
    """(names, kinds) of the tags in the order of the model's output. Raises SourceError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["name"], row["category"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        rows = []
    if not rows:
        raise SourceError(f"{FIELD} is {path.parent}, where {path.name} cannot be read. Download or copy the model again.")
    return [name for name, _ in rows], [kind for _, kind in rows]


def text(config: Config, names: Sequence[str], kinds: Sequence[str], row: np.ndarray) -> str:
    """The caption from an image's probabilities (tags,): the most probable tags first, names of characters before or behind them."""
    blocked = {plain(tag) for tag in config.blocked}
    general, characters = [], []
    for n in np.argsort(-row, kind="stable"):
        kind, name = kinds[n], names[n]
        if kind == RATING or plain(name) in blocked:
            continue
        if row[n] >= (config.character if kind == CHARACTER else config.general):
            (characters if kind == CHARACTER else general).append(name)
    found = characters + general if config.characters_first else general + characters
    ratings = [n for n, kind in enumerate(kinds) if kind == RATING]
    if config.rating and ratings:
        found.append(names[max(ratings, key=lambda n: row[n])])
    return ", ".join(written(config, name) for name in found)


def written(config: Config, name: str) -> str:
    name = spaced(name) if config.spaces else name
    return re.sub(r"([()])", r"\\\1", name) if config.escape else name


def spaced(name: str) -> str:
    """A tag with spaces for underscores. What has no two letters side by side is an emoticon (^_^, >_<, o_o) and stays."""
    return name.replace("_", " ") if re.search(r"[^\W_]{2}", name) else name


def plain(tag: str) -> str:
    """A tag as it is compared: however it was typed."""
    return tag.replace("_", " ").replace("\\", "").strip().casefold()
