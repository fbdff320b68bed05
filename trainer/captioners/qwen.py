"""Qwen's small vision-language models (Qwen2-VL, 2.5-VL, 3-VL: arXiv:2409.12191, 2502.13923, 2511.21631): they do as the prompt says.

So they can leave out of a caption what the LoRA shall learn: what captions name stays changeable by words, what they pass over in silence
goes into the trigger word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer import imports
from trainer.captioners.files import Shape, gib, read_json
from trainer.captioners.texts import bare

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT = "Qwen/Qwen3-VL-2B-Instruct"
SHAPE = Shape(
    "a Qwen vision-language model (Qwen2-VL, Qwen2.5-VL or Qwen3-VL)",
    DEFAULT,
    (("config.json",), ("preprocessor_config.json",), ("tokenizer.json", "vocab.json+merges.txt")),
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
IMAGE = "<|image_pad|>"
PIXELS = 2**20  # of a picture at most: about a thousand tokens. Captions need no more, and the models' own limit is 16 times that
ROOM = 1.5  # GiB beside the weights: what was read and written so far, for a batch of pictures
LAYERS = frozenset({"layers"})  # of the language model, which are kept in 4 bits where memory is short; eyes and vocabulary are not

_FORM = "Write one or two plain sentences, without lists and without guesses. Do not begin with “The image”."
PROMPTS = {
    "": f"Describe this image. {_FORM}",
    "character": (
        "Describe this image, in which a {subject} is the main figure, and call it just “{subject}”. Say what it does, its pose and "
        "expression, what it wears and holds, what is around it, the light, and how much of it is in view and from where. Say nothing of "
        f"what always belongs to it: its face, hair, eyes, skin, fur, colours, markings, body or kind. {_FORM}"
    ),
    "style": (
        "Describe what is to be seen in this image: who or what, what happens, the surroundings. Say nothing of how it is made: no word on "
        f"style, medium, technique, brush or line, colour scheme, mood, artist or quality. {_FORM}"
    ),
    "object": (
        "Describe this image, in which a {subject} is the main thing, and call it just “{subject}”. Say where it is, what lies, stands or "
        "happens around it, who uses it, the light, and from where and how closely it is seen. Say nothing of what always belongs to it: "
        f"its shape, material, colours, parts, pattern or writing. {_FORM}"
    ),
}
SUBJECTS = {"character": "figure", "object": "thing"}


class Config(BaseModel):
    """What can be set of a Qwen model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(DEFAULT, description="hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model")
    purpose: Literal["", "character", "style", "object"] = Field("", description="what the LoRA is for: chooses the prompt")
    class_word: str = Field("", description="what the subject is called in captions, in a word: cat, woman, chair")
    prompt: str = Field("", max_length=4000, description="what to write; empty: what suits the purpose. {subject} becomes the class word")
    max_tokens: int = Field(120, ge=1, le=1000, description="a caption ends after this many tokens at the latest")
    batch: int = Field(2, ge=1, le=64, description="images that are captioned at once")


def prompt_of(config: Config) -> str:
    """What the model is asked about each image."""
    words = config.prompt.strip() or PROMPTS[config.purpose]
    return words.replace("{subject}", config.class_word.strip() or SUBJECTS.get(config.purpose, "subject"))


def build(config: Config, folder: Path, device: str, dtype: str, note: Callable[[str], None]) -> Callable[[Sequence[Image]], list[str]]:
    """Load the model onto `device`; the function captions a batch, each token the likeliest.

    Its layers are kept in `dtype` ("fp32", "bf16", "fp16") where memory allows it, else in 4 bits or bf16: `note` is told which and why.
    """
    imports.light()
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # the other one needs torchvision
    from transformers.utils import logging

    from trainer.hardware import torch_dtype
    from trainer.kernels import widened
    from trainer.lean.narrow import pack_layers

    logging.disable_progress_bar()
    dtype, packed, reason = choose(folder, device, dtype, free_gib(device))
    note(reason)
    number = torch_dtype(dtype)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=number, use_safetensors=True).eval().requires_grad_(False)
    if packed:
        pack_layers(model, 4, torch.device(device), torch.device(device), LAYERS)
    else:
        model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prepare = Qwen2VLImageProcessorPil.from_pretrained(folder)
    size = {"shortest_edge": prepare.size["shortest_edge"], "longest_edge": min(prepare.size["longest_edge"], PIXELS)}
    template = tokenizer.chat_template
    if template is None and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if template is None:
        raise ValueError(f"The captioner's source is {folder}, which has no chat template. Give {SHAPE.what}, like {DEFAULT}.")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt_of(config)}]}]
    asked = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False, add_generation_prompt=True)

    @torch.inference_mode()
    def caption(images: Sequence[Image]) -> list[str]:
        seen = prepare(images=list(images), size=size, return_tensors="pt")
        counts = (seen.image_grid_thw.prod(1) // prepare.merge_size**2).tolist()
        words = tokenizer([asked.replace(IMAGE, IMAGE * n) for n in counts], padding=True, return_tensors="pt").to(device)
        with widened.where_needed(device, dtype):
            tokens = model.generate(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                mm_token_type_ids=(words.input_ids == model.config.image_token_id).int(),  # 1: a token of a picture
                pixel_values=seen.pixel_values.to(device, number),
                image_grid_thw=seen.image_grid_thw.to(device),
                max_new_tokens=config.max_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,  # of generation_config.json, for drawing
                top_p=None,
                top_k=None,
            )
        return [bare(text) for text in tokenizer.batch_decode(tokens[:, words.input_ids.shape[1] :], skip_special_tokens=True)]

    return caption


def free_gib(device: str) -> float:
    """GiB that are free for the model: on a CUDA device its own, else the computer's."""
    import psutil
    import torch

    from trainer import hardware

    own = hardware.free_gib(torch.device(device))
    return psutil.virtual_memory().available / 2**30 if own is None else own


def choose(folder: Path, device: str, dtype: str, free: float) -> tuple[str, bool, str]:
    """(dtype, whether the layers are packed in 4 bits, the reason in a sentence) for so many GiB of free memory.

    bf16 stands in for fp16, whose range these models overflow: they say "!!!!" then. Raises ValueError where nothing fits.
    """
    dtype = "bf16" if dtype == "fp16" else dtype
    gpu = device.startswith("cuda")
    where = "of the GPU's memory" if gpu else "of memory"
    full = gib(folder, lambda name, shape: 4 if dtype == "fp32" else 2) + ROOM
    if full <= free:
        return dtype, False, f"The captioner is kept in {dtype}: it takes about {full:.1f} GiB, and {free:.1f} GiB {where} are free."
    if gpu:
        small = gib(folder, lambda name, shape: 4.25 / 8 if len(shape) == 2 and LAYERS & {*name.split(".")} else 2) + ROOM
        how, packed, smaller = "its layers are kept in 4 bits, which changes a word here and there", True, dtype
    else:
        small = gib(folder, lambda name, shape: 2) + ROOM
        how, packed, smaller = "it is kept in bf16, which is slower here", False, "bf16"
    if small <= free:
        return (
            smaller,
            packed,
            (f"In {dtype} the captioner would take about {full:.1f} GiB, and {free:.1f} GiB {where} are free: {how} ({small:.1f} GiB)."),
        )
    raise ValueError(
        f"This captioner takes at least {small:.1f} GiB {where}, and {free:.1f} GiB are free. Close other programs that use it, or choose a "
        "smaller captioner under Settings."
    )
