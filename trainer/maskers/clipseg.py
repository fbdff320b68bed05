"""CLIPSeg (Lüddecke and Ecker 2022, arXiv:2112.10003): where in an image something is that words name, by transformers' own class.

Chosen among what transformers loads without remote code and without torchvision: it is told in words what to look for, so that one model
serves persons, cats and chairs; its refined checkpoint has .safetensors files (600 MB) and the licence Apache-2.0. Its masks are coarse
(352 pixels a side), as is what is made of them: a latent stands for 8 x 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from trainer import imports
from trainer.captioners.files import Shape

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DEFAULT = "CIDAS/clipseg-rd64-refined"
SHAPE = Shape(
    "a CLIPSeg model",
    DEFAULT,
    (("config.json",), ("preprocessor_config.json",), ("tokenizer.json", "vocab.json+merges.txt")),
    ("clipseg",),
    field="The masker's source",
)
SURE, MAYBE = 0.5, 0.3  # probabilities: from the first on a pixel is white, below the second black


class Config(BaseModel):
    """What can be set of CLIPSeg."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a CLIPSeg model in transformers' format")
    batch: int = Field(4, ge=1, le=256, description="images that are looked at at once")


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

    from trainer.hardware import torch_dtype

    logging.disable_progress_bar()
    number = torch_dtype(dtype)
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
