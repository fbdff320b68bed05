"""Florence-2 (Xiao et al. 2023, arXiv:2311.06242): a sentence or a paragraph for an image, by transformers' own Florence2 model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer import imports
from trainer.captioners.files import Shape
from trainer.captioners.texts import bare

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT = "florence-community/Florence-2-base-ft"
TASKS = {  # what the model was trained to be asked
    "caption": "What does the image describe?",
    "detailed": "Describe in detail what is shown in the image.",
    "more_detailed": "Describe with a paragraph what is shown in the image.",
}


class Config(BaseModel):
    """What can be set of Florence-2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a Florence-2 model in transformers' format")
    task: Literal["caption", "detailed", "more_detailed"] = Field("detailed", description="a short sentence, some sentences, a paragraph")
    max_tokens: int = Field(150, ge=1, le=1000, description="a caption ends after this many tokens at the latest")
    batch: int = Field(4, ge=1, le=256, description="images that are captioned at once")


def _problem(config: dict[str, Any]) -> str:
    if config.get("vision_config", {}).get("model_type") == "florence_vision":
        return ""
    return (
        "a Florence-2 in Microsoft's first format, which needs program code that comes with it; no code of a model is run here. "
        f"Give one in transformers' own format, like {DEFAULT}."
    )


SHAPE = Shape(
    "a Florence-2 model in transformers' format",
    DEFAULT,
    (("config.json",), ("preprocessor_config.json",), ("tokenizer.json", "vocab.json+merges.txt")),
    ("florence2",),
    _problem,
)


def build(config: Config, folder: Path, device: str, dtype: str, note: Callable[[str], None]) -> Callable[[Sequence[Image]], list[str]]:
    """Load the model onto `device` in `dtype` ("fp32", "bf16", "fp16"); the function captions a batch by beam search."""
    imports.light()
    import torch
    from transformers import AutoTokenizer, Florence2ForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # the other one needs torchvision
    from transformers.utils import logging

    from trainer.hardware import torch_dtype

    logging.disable_progress_bar()
    number = torch_dtype(dtype)
    model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=number, use_safetensors=True).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepare = CLIPImageProcessorPil.from_pretrained(folder)
    question = tokenizer(TASKS[config.task]).input_ids  # <s> question </s>
    longest = min(config.max_tokens, model.config.text_config.max_position_embeddings - 1)

    @torch.inference_mode()
    def caption(images: Sequence[Image]) -> list[str]:
        pixels = prepare(images=list(images), return_tensors="pt").pixel_values.to(device, number)
        places = [model.config.image_token_id] * tokens_of(model.config.vision_config, *pixels.shape[2:])
        asked = torch.tensor([places + question] * len(images), device=device)
        tokens = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            pixel_values=pixels,
            max_new_tokens=longest,
            num_beams=3,
            do_sample=False,
        )
        return [bare(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return caption


def tokens_of(vision: Any, height: int, width: int) -> int:
    """How many tokens a picture becomes: one for each place that the convolutions of the vision tower leave, and one for their mean."""
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    return height * width + 1
