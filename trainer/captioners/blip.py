"""BLIP (Li et al. 2022, arXiv:2201.12086): one English sentence for an image, by transformers' BlipForConditionalGeneration."""

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
    from PIL.Image import Image

# Of Salesforce's own models the large one alone has .safetensors files (1.9 GB, BSD-3-Clause); the base one is a pickle.
DEFAULT = "Salesforce/blip-image-captioning-large"
FIELD = "The captioner's source"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TEXTS = re.compile(
    r"(config|preprocessor_config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
)


class Config(BaseModel):
    """What can be set of BLIP."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a BLIP captioning model in transformers' format")
    max_tokens: int = Field(50, ge=1, le=200, description="a caption ends after this many tokens (about as many words) at the latest")
    batch: int = Field(4, ge=1, le=256, description="images that are captioned at once")


def resolve(source: str, say: Callable[[str], None]) -> Path:
    """The local folder of a BLIP model, fetched from the hub where `source` is an id. Raises SourceError with a sentence."""
    text = source.strip().strip("\"'")
    path = Path(text).expanduser()
    if text and path.exists():
        _check(path)
        return path.resolve()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        found = fetch(text, say, field=FIELD, anchor="config.json", wanted=_wanted, complete=_is_complete)
        _check(found)
        return found
    raise SourceError(f"{FIELD} is {source!r}, and there is no such folder. Give the folder of a BLIP model, or a hub id like {DEFAULT}.")


def build(config: Config, folder: Path, device: str, dtype: str) -> Callable[[Sequence[Image]], list[str]]:
    """Load the model onto `device` in `dtype` ("fp32", "bf16", "fp16"); the function captions a batch by beam search."""
    imports.light()
    import torch
    from transformers import BertTokenizerFast, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil  # the other one needs torchvision
    from transformers.utils import logging

    logging.disable_progress_bar()
    number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=number, use_safetensors=True).eval().to(device)
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    prepare = BlipImageProcessorPil.from_pretrained(folder)

    @torch.inference_mode()
    def caption(images: Sequence[Image]) -> list[str]:
        pixels = prepare(images=list(images), return_tensors="pt").pixel_values.to(device, number)
        tokens = model.generate(pixels, max_new_tokens=config.max_tokens, num_beams=3, do_sample=False)
        return [tidy(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return caption


def tidy(text: str) -> str:
    """A caption on one line without "arafed", a word that the large model made up and begins many captions with."""
    return " ".join(re.sub(r"\baraf\w*", "", text).split())


def _wanted(repo: str, siblings: list[Any]) -> list[Any]:
    """The files of a hub repository that `build` opens. Raises SourceError for one that cannot be loaded."""
    names = {f.rfilename for f in siblings}
    if problem := _problem(names):
        raise SourceError(f"{FIELD} is {repo!r}, a hub repository where {problem}")
    words = {"tokenizer.json"} if "tokenizer.json" in names else {"vocab.txt"}
    return [f for f in siblings if TEXTS.fullmatch(f.rfilename) or WEIGHTS.fullmatch(f.rfilename) or f.rfilename in words]


def _check(folder: Path) -> None:
    """Raise SourceError for the first file of a local folder that is missing or damaged, or that is of another kind of model."""
    if not folder.is_dir():
        raise SourceError(f"{FIELD} is {folder}, which is a file. Give the folder of a BLIP model, or a hub id like {DEFAULT}.")
    names = {p.name for p in folder.iterdir()}
    if problem := _problem(names):
        raise SourceError(f"{FIELD} is {folder}, where {problem}")
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise SourceError(f"{FIELD} is {folder}, where config.json cannot be read. Download or copy the model again.") from None
    kind = f"{config.get('model_type')} ({', '.join(config.get('architectures') or ['no architecture named'])})"
    if config.get("model_type") != "blip" or "BlipForConditionalGeneration" not in (config.get("architectures") or ()):
        raise SourceError(f"{FIELD} is {folder}, a model of the kind {kind}. Give a BLIP captioning model, like {DEFAULT}.")
    for name in sorted(n for n in names if WEIGHTS.fullmatch(n)):
        try:
            read_header(folder / name)
        except FormatError as error:
            raise SourceError(f"{FIELD} is {folder}, where {error}") from None


def _problem(names: set[str]) -> str:
    """The rest of a sentence on what a folder with these files lacks; empty where nothing does."""
    for name in ("config.json", "preprocessor_config.json"):
        if name not in names:
            return f"{name} is missing. Give a BLIP model in transformers' format, like {DEFAULT}."
    if not any(WEIGHTS.fullmatch(n) for n in names):
        if pickles := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))):
            return f"model.safetensors is missing; {pickles[0]} is a pickle and is not opened. Give one with .safetensors files, like {DEFAULT}."
        return f"model.safetensors is missing. Download or copy the model again, or give another, like {DEFAULT}."
    if not names & {"tokenizer.json", "vocab.txt"}:
        return "tokenizer.json and vocab.txt are both missing. Download or copy the model again."
    return ""


def _is_complete(folder: Path) -> bool:
    try:
        _check(folder)
    except (SourceError, OSError):
        return False
    return True
