"""CLIPSeg (Lüddecke and Ecker 2022, arXiv:2112.10003): where in an image something is that words name, by transformers' own class.

Chosen among what transformers loads without remote code and without torchvision: it is told in words what to look for, so that one model
serves persons, cats and chairs; its refined checkpoint has .safetensors files (600 MB) and the licence Apache-2.0. Its masks are coarse
(352 pixels a side), as is what is made of them: a latent stands for 8 x 8 pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from trainer import imports
from trainer.families.sources import SourceError, fetch
from trainer.formats import FormatError
from trainer.formats.metadata import read_header

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DEFAULT = "CIDAS/clipseg-rd64-refined"
FIELD = "The masker's source"
WEIGHTS = "model.safetensors"
NEEDED = ("config.json", "preprocessor_config.json", WEIGHTS)
WORDS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})  # either will do
TEXTS = re.compile(r"(config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|vocab)\.json|merges\.txt")
SURE, MAYBE = 0.5, 0.3  # probabilities: from the first on a pixel is white, below the second black


class Config(BaseModel):
    """What can be set of CLIPSeg."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a CLIPSeg model in transformers' format")
    batch: int = Field(4, ge=1, le=256, description="images that are looked at at once")


def resolve(source: str, say: Callable[[str], None]) -> Path:
    """The local folder of a CLIPSeg model, fetched from the hub where `source` is an id. Raises SourceError with a sentence."""
    text = source.strip().strip("\"'")
    path = Path(text).expanduser()
    if text and path.exists():
        _check(path)
        return path.resolve()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        found = fetch(text, say, field=FIELD, anchor="config.json", wanted=_wanted, complete=_is_complete)
        _check(found)
        return found
    raise SourceError(
        f"{FIELD} is {source!r}, and there is no such folder. Give the folder of a CLIPSeg model, or a hub id like {DEFAULT}."
    )


def build(folder: Path, device: str, dtype: str) -> Callable[[Sequence[Image], str], list[np.ndarray]]:
    """Load the model onto `device` in `dtype` ("fp32", "bf16", "fp16").

    The function takes upright RGB images and words, and gives for each image how much each place shows what they say: (h, w) of the model's
    own size, stretched to the image's, 0 to 1.
    """
    imports.light()
    import torch
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # the other one needs torchvision
    from transformers.utils import logging

    logging.disable_progress_bar()
    number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = CLIPSegForImageSegmentation.from_pretrained(folder, dtype=number, use_safetensors=True).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    prepare = ViTImageProcessorPil.from_pretrained(folder)
    most = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def find(images: Sequence[Image], words: str) -> list[np.ndarray]:
        pixels = prepare(images=list(images), return_tensors="pt").pixel_values.to(device, number)
        tokens = tokenizer([words] * len(images), return_tensors="pt", truncation=True, max_length=most).to(device)
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels).logits
        likely = logits.float().reshape(len(images), *pixels.shape[-2:]).sigmoid()
        return list(((likely - MAYBE) / (SURE - MAYBE)).clamp(0, 1).cpu().numpy())

    return find


def _wanted(repo: str, siblings: list[Any]) -> list[Any]:
    """The files of a hub repository that `build` opens. Raises SourceError for one that cannot be loaded."""
    if problem := _problem({f.rfilename for f in siblings}):
        raise SourceError(f"{FIELD} is {repo!r}, a hub repository where {problem}")
    return [f for f in siblings if TEXTS.fullmatch(f.rfilename) or f.rfilename == WEIGHTS]


def _check(folder: Path) -> None:
    """Raise SourceError for the first file of a local folder that is missing or damaged, or that is of another kind of model."""
    if not folder.is_dir():
        raise SourceError(f"{FIELD} is {folder}, which is a file. Give the folder of a CLIPSeg model, or a hub id like {DEFAULT}.")
    if problem := _problem({p.name for p in folder.iterdir()}):
        raise SourceError(f"{FIELD} is {folder}, where {problem}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SourceError(f"{FIELD} is {folder}, where config.json cannot be read. Download or copy the model again.") from None
    if kind != "clipseg":
        raise SourceError(f"{FIELD} is {folder}, a model of the kind {kind}. Give a CLIPSeg model, like {DEFAULT}.")
    try:
        read_header(folder / WEIGHTS)
    except FormatError as error:
        raise SourceError(f"{FIELD} is {folder}, where {error}") from None


def _problem(names: set[str]) -> str:
    """The rest of a sentence on what a folder with these files lacks; empty where nothing does."""
    pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if WEIGHTS not in names and pickles:
        return f"{WEIGHTS} is missing; {pickles[0]} is a pickle and is not opened. Give one with .safetensors files, like {DEFAULT}."
    if missing := [n for n in NEEDED if n not in names]:
        return f"{missing[0]} is missing. Give a CLIPSeg model in transformers' format, like {DEFAULT}."
    if not any(files <= names for files in WORDS):
        return "tokenizer.json is missing. Download or copy the model again."
    return ""


def _is_complete(folder: Path) -> bool:
    try:
        _check(folder)
    except (SourceError, OSError):
        return False
    return True
