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


class Blip:
    """A loaded model: captions of images, and what its vision encoder makes of them.

    Attributes:
        states: (N, D) of the N images of the last call, float32 on the CPU.
    """

    def __init__(self, config: Config, folder: Path, device: str, dtype: str) -> None:
        imports.light()
        import torch
        from transformers import BertTokenizerFast, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil  # the other one needs torchvision
        from transformers.utils import logging

        from trainer.hardware import torch_dtype

        logging.disable_progress_bar()
        self.config, self.device, self.number, self.inference = config, device, torch_dtype(dtype), torch.inference_mode
        self.model = BlipForConditionalGeneration.from_pretrained(folder, dtype=self.number, use_safetensors=True).eval().to(device)
        self.tokenizer = BertTokenizerFast.from_pretrained(folder)
        self.prepare = BlipImageProcessorPil.from_pretrained(folder)
        self.model.vision_model.register_forward_hook(self._see)

    def __call__(self, images: Sequence[Image]) -> list[str]:
        """Captions by beam search."""
        with self.inference():
            tokens = self.model.generate(self._pixels(images), max_new_tokens=self.config.max_tokens, num_beams=3, do_sample=False)
        return [tidy(text) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def look(self, images: Sequence[Image]) -> None:
        """Make the `states` of images alone."""
        with self.inference():
            self.model.vision_model(self._pixels(images))

    def _pixels(self, images: Sequence[Image]) -> Any:
        return self.prepare(images=list(images), return_tensors="pt").pixel_values.to(self.device, self.number)

    def _see(self, module: Any, given: Any, made: Any) -> None:
        self.states = made.last_hidden_state[:, 0].float().cpu().numpy()


def build(config: Config, folder: Path, device: str, dtype: str, note: Callable[[str], None]) -> Blip:
    """Load the model onto `device` in `dtype` ("fp32", "bf16", "fp16")."""
    return Blip(config, folder, device, dtype)


def tidy(text: str) -> str:
    """A caption on one line without "arafed", a word that the large model made up and begins many captions with."""
    return " ".join(re.sub(r"\baraf\w*", "", text).split())
