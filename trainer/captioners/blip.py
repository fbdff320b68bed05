"""BLIP (Li et al. 2022, arXiv:2201.12086): one English sentence for an image, by transformers' BlipForConditionalGeneration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from trainer import imports
from trainer.captioners.files import Shape

if TYPE_CHECKING:
    from PIL.Image import Image

# Of Salesforce's own models the large one alone has .safetensors files (1.9 GB, BSD-3-Clause); the base one is a pickle.
DEFAULT = "Salesforce/blip-image-captioning-large"


class Config(BaseModel):
    """What can be set of BLIP."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a BLIP captioning model in transformers' format")
    max_tokens: int = Field(50, ge=1, le=200, description="a caption ends after this many tokens (about as many words) at the latest")
    batch: int = Field(4, ge=1, le=256, description="images that are captioned at once")


def _problem(config: dict[str, Any]) -> str:
    if "BlipForConditionalGeneration" in (config.get("architectures") or ()):
        return ""
    kind = ", ".join(config.get("architectures") or ["no architecture named"])
    return f"a model of the kind blip ({kind}), which writes no captions. Give a BLIP captioning model, like {DEFAULT}."


SHAPE = Shape(
    "a BLIP captioning model",
    DEFAULT,
    (("config.json",), ("preprocessor_config.json",), ("tokenizer.json", "vocab.txt")),
    ("blip",),
    _problem,
)


def build(config: Config, folder: Path, device: str, dtype: str, note: Callable[[str], None]) -> Callable[[Sequence[Image]], list[str]]:
    """Load the model onto `device` in `dtype` ("fp32", "bf16", "fp16"); the function captions a batch by beam search."""
    imports.light()
    import torch
    from transformers import BertTokenizerFast, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil  # the other one needs torchvision
    from transformers.utils import logging

    from trainer.hardware import torch_dtype

    logging.disable_progress_bar()
    number = torch_dtype(dtype)
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
