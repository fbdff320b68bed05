"""The settings drawer: every field of the configuration as a description of the control that edits it.

Walked from trainer.config's schema, so that a new field appears by itself; a label and a longer help stand here. What the
drawer does not show is listed in HIDDEN with the reason; a test fails for a field that is neither shown nor hidden.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import ModelConfig, TrainConfig

# Dotted field, or a whole section -> why the drawer does not show it.
HIDDEN = {
    "model.source": "chosen under Which model?",
    "data": "the images section of the page; the trigger and class word stand under What is it?",
    "output.name": "made from the name under What is it?",
    "adapter.kind": "there is one kind",
    "adapter.blocks": "ranks and rates of single blocks stand in the configuration file alone",
    "model.merge": "LoRAs that become a part of the base stand in the configuration file alone",
}
# Hidden, but kept with the draft as a whole when a configuration file names them.
KEPT = ("adapter.blocks", "model.merge")

SECTIONS = {
    "train": "Length and batch",
    "adapter": "LoRA",
    "part.unet": "UNet (SD 3: transformer)",
    "part.text_1": "Text encoder",
    "part.text_2": "Second text encoder",
    "optimizer": "Optimizer",
    "schedule": "Learning rate over time",
    "loss": "Loss and noise",
    "dataset": "Images and captions",
    "preview": "Sample images while training",
    "validation": "Validation",
    "output": "Saved files",
    "model": "Base model",
}

# Label, and help where the configuration's own description is too short for someone who meets the field here.
LABELS = {
    "model.family": ("Model family", "What kind of model the base is. Automatic reads it from the files."),
    "model.prediction": (
        "Prediction",
        "What the UNet predicts. Automatic reads the model's files, or measures it where they do not say it.",
    ),
    "model.zero_terminal_snr": (
        "Ends in pure noise",
        "Zero terminal SNR: the noise schedule is rescaled to end in pure noise, as NoobAI's v-prediction models have it. "
        "Empty reads it from the model's files.",
    ),
    "model.clip_skip": (
        "Clip skip",
        "Which layer of the text encoder is read, counted from the end: 1 is the last. Anime models of SD 1.5 were mostly trained with 2.",
    ),
    "model.text_encoders": (
        "Folder of text encoders",
        "Where clip_l, clip_g and t5xxl lie, for a single file that does not hold them, and T5's tokenizer.json. Empty: all are in the model.",
    ),
    "model.t5": (
        "T5",
        "The largest text encoder. Automatic uses it where it and its tokenizer are there; without it, captions are read by the two CLIPs. "
        "8-bit takes half its memory.",
    ),
    "dataset.resolution": (
        "Resolution",
        "Side in pixels of a square with the trained area. Images are scaled to about this area in their own shape. "
        "Empty takes what the base was made for (512 for SD 1.5, 1024 for SDXL and SD 3).",
    ),
    "dataset.bucket_step": (
        "Bucket step",
        "Sides of the training sizes are multiples of this many pixels: 64, or 32 for SDXL and SD 3, which crops less. "
        "Empty takes 64, or 8 below 256 pixels.",
    ),
    "dataset.max_aspect": ("Widest shape", "Longer side over shorter side, at most; images beyond it are cropped."),
    "dataset.max_upscale": ("Enlarged at most", "An image that must be enlarged by more than this gets a warning; it still trains."),
    "dataset.flip": ("Mirror images", "Also trains on mirrored images. Not for faces, text, or anything that has a left and a right."),
    "dataset.background": ("Background of transparent images", "The colour that transparent parts are laid on."),
    "dataset.shuffle_tags": ("Shuffle tags", "Shuffles the comma-separated parts of a caption at each visit. For tags, not sentences."),
    "dataset.keep_tags": (
        "Tags kept in place",
        "This many leading parts of a caption stay where they are and are never dropped. The part with the trigger always stays.",
    ),
    "dataset.keep_separator": (
        "Mark behind kept tags",
        "Parts of a caption before this mark, such as |||, stay in place as well. The mark itself is not trained.",
    ),
    "dataset.wildcards": ("Choices in captions", "{red|blue} in a caption gives one of them at each visit."),
    "dataset.masks": (
        "Masks",
        "What is white in an image's mask is learned, the rest only a little. The alpha channel can stand in for a mask.",
    ),
    "dataset.unmasked_weight": ("Weight outside masks", "How much the part outside a mask counts; the part inside counts 1."),
    "dataset.hold_out": (
        "Images held out",
        "Never trained on, but measured, so that learning by heart shows. Empty: 1 in 20 from 20 images on, none below.",
    ),
    "dataset.caption_dropout": ("Caption dropout", "Share of visits with an empty caption. 0.05 to 0.1 helps styles."),
    "dataset.tag_dropout": ("Tag dropout", "Share of a caption's movable parts left out at each visit."),
    "dataset.text_windows": (
        "Longest caption",
        "A caption of more than 75 tokens is read in windows of 75, up to this many; the rest is cut.",
    ),
    "dataset.prompt_weights": (
        "Weights in captions",
        "(word:1.2) and [word] in captions and sample prompts weigh words, as A1111 reads them. Otherwise brackets are just brackets.",
    ),
    "adapter.rank": ("Rank", "How much the LoRA can hold. 8 to 32 suits most; the file grows with it."),
    "adapter.alpha": (
        "Alpha",
        "The LoRA's effect is scaled by alpha / rank. Keep it equal to the rank, or lower the rates with it in mind.",
    ),
    "adapter.conv_rank": (
        "Rank of convolutions",
        "Of those larger than 1x1 (LoCon). Often half the rank or less. Empty takes the rank.",
    ),
    "adapter.conv_alpha": ("Alpha of convolutions", "Scales those by it / their rank. Empty gives them the same scale as all others."),
    "adapter.dropout": ("LoRA dropout", "Share of the LoRA's inputs that is left out at random in each step, against learning by heart."),
    "adapter.targets": ("Layers", "The kinds of layers that get an adapter. Convolutions add detail and size; the text encoder has none."),
    "adapter.start": (
        "Start from this LoRA",
        "A LoRA file that training goes on from, with the ranks that it has, instead of from nothing. Empty starts anew.",
    ),
    "part.unet.train": ("Train the UNet", "The part that draws. A LoRA without it changes the reading of words alone."),
    "part.unet.learning_rate": ("UNet learning rate", "Peak size of a step. 1e-4 is usual; with Prodigy set 1."),
    "part.unet.stop": ("UNet stops after", "Share of the run after which the UNet is left as it is."),
    "part.text_1.train": ("Train the text encoder", "The part that reads the prompt. Learning it helps a new word, and bleeds sooner."),
    "part.text_1.learning_rate": ("Text encoder learning rate", "Usually half the UNet's or less; with Prodigy set 1, like the UNet's."),
    "part.text_1.stop": ("Text encoder stops after", "Share of the run after which the text encoder is left as it is. 0.67: two thirds."),
    "part.text_2.train": ("Train the second text encoder", "The larger of the two. Most trainers leave it alone, and so do the presets."),
    "part.text_2.learning_rate": ("Second text encoder learning rate", "1e-5 to 2e-5 is usual; with Prodigy set 1, like the UNet's."),
    "part.text_2.stop": ("Second text encoder stops after", "Share of the run after which it is left as it is."),
    "optimizer.kind": (
        "Optimizer",
        "AdamW is the usual one. Its 8-bit kind saves a few MB on NVIDIA GPUs. Prodigy finds the step size itself: set the learning rates to 1.",
    ),
    "optimizer.beta1": ("Beta 1", "How long the mean of the gradients remembers. Rarely changed."),
    "optimizer.beta2": ("Beta 2", "How long the mean of their squares remembers. Rarely changed."),
    "optimizer.eps": ("Epsilon", "Keeps AdamW from dividing by zero. Rarely changed."),
    "optimizer.weight_decay": ("Weight decay", "Pulls the LoRA's weights towards zero a little in each step."),
    "optimizer.d_coef": ("Prodigy's factor", "Multiplies the step size that Prodigy finds. Below 1 is more careful."),
    "schedule.kind": ("Schedule", "How the learning rate runs from its peak to the end."),
    "schedule.warmup": ("Warm-up", "Share of the run over which the rate rises from zero."),
    "schedule.floor": ("End of the schedule", "The factor on the rate that is left at the end."),
    "schedule.restarts": ("Restarts", "Number of cosine cycles."),
    "loss.prior_weight": (
        "Prior preservation",
        "Keeps what the base shows for the class word (woman, dog), without class images. Often 0.5 to 1; each step takes more than twice as long. 0: off.",
    ),
    "loss.min_snr_gamma": ("Min-SNR gamma", "Weighs noise levels evenly, so that learning is steadier. 5 is usual; empty switches it off."),
    "loss.noise_offset": ("Noise offset", "Lets the LoRA learn very dark and very bright images. 0.03 to 0.1 where wanted."),
    "loss.timesteps": (
        "Noise levels",
        "How they are drawn. Logit-normal learns most at the middle ones, as SD 3 was trained; evenly gives each the same share.",
    ),
    "loss.logit_mean": (
        "Middle of the noise levels",
        "Above 0 learns more at noisy levels (composition), below 0 more at clear ones (detail).",
    ),
    "loss.logit_std": ("Spread of the noise levels", "Below 1 keeps closer to the middle."),
    "loss.shift": ("Shift of the noise levels", "Above 1 pushes them to the noisy end. Empty takes the model's own (3 for SD 3 and 3.5)."),
    "train.visits": ("Visits to each image", "How often each image is seen: the run's only length. Steps follow from it and the batch."),
    "train.batch_size": ("Batch size", "Images of one step. More is steadier and takes more memory."),
    "train.accumulation": ("Batch cut into", "Parts into which a batch is cut to save memory; the result is the same."),
    "train.max_grad_norm": ("Gradient limit", "A step's gradient is scaled down to this norm. Empty switches it off."),
    "train.memory": (
        "Save memory",
        "Automatic takes the first of the others that fits. Selective computes the feed-forward layers twice (8 % slower with SDXL), "
        "checkpointing every block (a third slower); 8 and 4 bits also pack the frozen model, which changes results a little.",
    ),
    "train.seed": ("Seed", "Another number draws other noise and another order."),
    "train.device": ("Device", "auto takes the best there is. Else cpu, cuda, cuda:1, mps or xpu."),
    "train.dtype": ("Precision of the base", "What the frozen model is cast to. The LoRA itself is always trained in 32 bits."),
    "train.attention": ("Attention", "PyTorch's own needs nothing else. xformers must be installed and needs an NVIDIA GPU."),
    "train.reproducible": ("Same to the last bit", "Two runs with the same settings give the same file, and take longer."),
    "preview.enabled": ("Make sample images", "Pictures at the start, at the end, and in between, so that you see it learn."),
    "preview.every": (
        "Sample images every",
        "Steps between sample images. Empty: eight times over the run, or as often as a tenth of its time allows. 0: only at the start and the end.",
    ),
    "preview.prompts": ("Prompts", "One prompt a line. Empty: four are made from your captions, trigger and class word."),
    "preview.quality": (
        "Quality words",
        "Put before each prompt that is made from your data, such as masterpiece, best quality. Prompts that you type stay as they are.",
    ),
    "preview.negative": ("Negative prompt", "What sample images should not show."),
    "preview.steps": ("Sampling steps", "Steps of the sampler for each sample image."),
    "preview.guidance": ("Guidance (CFG)", "How strictly sample images follow the prompt."),
    "preview.seed": ("Seed of sample images", "The same at each preview, so that pictures can be compared."),
    "preview.width": ("Width of sample images", "In pixels. Empty takes the training resolution."),
    "preview.height": ("Height of sample images", "In pixels. Empty takes the training resolution."),
    "validation.enabled": (
        "Measure the loss on fixed noise",
        "A smooth curve that can be compared over the run, unlike the loss of each step.",
    ),
    "validation.every": ("Measure every", "Steps between measurements. 0: only at the start and the end."),
    "validation.images": ("Images measured", "At most this many."),
    "validation.draws": ("Noise draws for each image", "More is smoother and takes longer."),
    "output.naming": (
        "Names inside the file",
        "The kohya names are read by A1111, Forge, ComfyUI and all others; PEFT names by diffusers.",
    ),
    "output.dtype": ("Precision of the file", "fp16 is read everywhere and half as large as fp32."),
    "output.thumbnail": ("Picture in the file", "Puts a small picture of the last sample into the file, where some programs show it."),
    "output.sidecars": (
        "Files beside it",
        "NAME.json tells web UIs the trigger word, NAME.png shows the last sample on the card there.",
    ),
    "output.save_every": (
        "Save the LoRA every",
        "Steps between LoRA files along the way, from which you pick the best. Empty: eight files over the run. 0: only at the end.",
    ),
    "output.checkpoint_every": (
        "Resumable state every",
        "Steps between states from which the run can go on after a crash. 0: only at the end.",
    ),
    "output.keep_checkpoints": ("Resumable states kept", "Older ones are deleted. LoRA files are not."),
    "output.title": ("Title", "Stands in the file. Empty takes the name."),
    "output.author": ("Author", "Stands in the file."),
    "output.description": ("Description", "Stands in the file, and on its card in other programs."),
    "output.license": ("Licence", "Stands in the file, for instance CC-BY-4.0."),
}

CHOICES = {
    "auto": "Automatic", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3 and 3.5", "skip": "Left out", "8bit": "8-bit", "alpha": "Masks and alpha", "off": "Ignored", "logit_normal": "Logit-normal", "uniform": "Evenly",
    "json": "NAME.json", "png": "NAME.png", "epsilon": "Noise (epsilon)", "v_prediction": "v prediction",
    "attention": "Attention", "feed_forward": "Feed-forward", "projections": "Projections", "convolutions": "Convolutions",
    "adamw": "AdamW", "adamw8bit": "AdamW 8-bit", "prodigy": "Prodigy", "constant": "Constant", "linear": "Linear", "cosine": "Cosine",
    "cosine_restarts": "Cosine with restarts", "sdpa": "PyTorch", "xformers": "xformers", "kohya": "kohya", "peft": "PEFT (diffusers)",
    "fast": "Keep everything", "selective": "Selective", "checkpointing": "Checkpointing", "4bit": "4-bit", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16",
}  # fmt: skip

# Bounds that a validator checks, so that the schema does not name them.
BOUNDS = {
    "dataset.resolution": {"min": 64, "max": 2048, "step": 8},
    "dataset.bucket_step": {"min": 8, "max": 256, "step": 8},
}
EMPTY = {
    "dataset.resolution": "the base's own",
    "dataset.bucket_step": "64, or 8 below 256 pixels",
    "dataset.keep_separator": "none",
    "dataset.hold_out": "1 in 20 from 20 images on",
    "adapter.start": "from nothing",
    "adapter.conv_rank": "the rank",
    "adapter.conv_alpha": "the same scale",
    "model.zero_terminal_snr": "as the model's files say",
    "model.text_encoders": "in the model",
    "loss.shift": "the model's own",
    "loss.min_snr_gamma": "off",
    "train.max_grad_norm": "off",
    "preview.width": "the training resolution",
    "preview.height": "the training resolution",
    "preview.prompts": "made from the data",
    "preview.every": "eight times over the run",
    "output.save_every": "eight files over the run",
    "output.title": "the name",
}
# A field is shown while each of these other fields has one of these values (a list: any of them).
WHEN: dict[str, dict[str, list[Any]]] = {
    "schedule.floor": {"schedule.kind": ["linear", "cosine", "cosine_restarts"]},
    "schedule.restarts": {"schedule.kind": ["cosine_restarts"]},
    "part.unet.learning_rate": {"part.unet.train": [True]},
    "part.unet.stop": {"part.unet.train": [True]},
    "part.text_1.learning_rate": {"part.text_1.train": [True]},
    "part.text_1.stop": {"part.text_1.train": [True]},
    "part.text_2.learning_rate": {"part.text_2.train": [True]},
    "part.text_2.stop": {"part.text_2.train": [True]},
    "adapter.conv_rank": {"adapter.targets": ["convolutions"]},
    "adapter.conv_alpha": {"adapter.targets": ["convolutions"]},
    "dataset.unmasked_weight": {"dataset.masks": ["auto", "alpha"]},
    "loss.logit_mean": {"loss.timesteps": ["logit_normal"]},
    "loss.logit_std": {"loss.timesteps": ["logit_normal"]},
    **{
        f"preview.{n}": {"preview.enabled": [True]}
        for n in ["every", "prompts", "quality", "negative", "steps", "guidance", "seed", "width", "height"]
    },
    **{f"validation.{n}": {"validation.enabled": [True]} for n in ["every", "images", "draws"]},
}
COLOURS = ("dataset.background",)
_UNETS, _TWO_TEXTS, _FLOW = ["sd1", "sd2", "sdxl"], ["sdxl", "sd3"], ["sd3"]
# Fields that only some families have; for the others what was set waits in the draft.
FAMILIES: dict[str, list[str]] = {
    "model.clip_skip": ["sd1"],
    **dict.fromkeys(("model.prediction", "model.zero_terminal_snr", "loss.min_snr_gamma", "loss.noise_offset"), _UNETS),
    **dict.fromkeys(("adapter.conv_rank", "adapter.conv_alpha"), _UNETS),
    **dict.fromkeys(("part.text_2.train", "part.text_2.learning_rate", "part.text_2.stop"), _TWO_TEXTS),
    **dict.fromkeys(("model.text_encoders", "model.t5", "loss.timesteps", "loss.logit_mean", "loss.logit_std", "loss.shift"), _FLOW),
}


@cache
def leaves() -> dict[str, list[tuple[type[BaseModel], FieldInfo]]]:
    """Every leaf field by its dotted name, with the models that have it (several for the kinds of an optimizer)."""
    out: dict[str, list[tuple[type[BaseModel], FieldInfo]]] = {}
    for key, model, info in _walk(TrainConfig, ""):
        out.setdefault(key, []).append((model, info))
    return out


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    for name, info in model.model_fields.items():
        below = _models(info.annotation)
        if not below:
            yield prefix + name, model, info
        for inner in below:
            yield from _walk(inner, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation may hold: itself, the members of a union, the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models(a)]


def hidden(key: str) -> str | None:
    """Why a field is not shown, or None."""
    return next((why for name, why in HIDDEN.items() if key == name or key.startswith(f"{name}.")), None)


def shown() -> list[str]:
    return [k for k in leaves() if hidden(k) is None]


@cache
def families() -> tuple[str, ...]:
    """The families that can be trained."""
    return tuple(f for f in get_args(ModelConfig.model_fields["family"].annotation) if f != "auto")


@cache
def defaults() -> dict[str, Any]:
    """Every shown field's default, JSON-able; of an optimizer's kinds the first that has the field."""
    out = {}
    for key in shown():
        model, info = leaves()[key][0]
        out[key] = plain(_default_of(key, model, info))
    return out


def _default_of(key: str, model: type[BaseModel], info: FieldInfo) -> Any:
    """A part's own default may be set by the class that holds it, so the value is read from a whole configuration where it can be."""
    node: Any = TrainConfig.model_construct(data=())
    for step in key.split("."):
        node = getattr(node, step, _NONE)
    return info.get_default(call_default_factory=True) if node is _NONE else node


_NONE = object()


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def applies(key: str, values: dict[str, Any], family: str) -> bool:
    """Whether the family and the chosen kind (of optimizer) have the field; `values` are effective values by dotted name."""
    if family not in FAMILIES.get(key, [family]):
        return False
    section = key.rpartition(".")[0]
    kind = values.get(f"{section}.kind")
    holders = leaves().get(key, [])
    if key == f"{section}.kind" or kind is None or not any("kind" in m.model_fields for m, _ in holders):
        return True
    return any(kind in get_args(m.model_fields["kind"].annotation) for m, _ in holders if "kind" in m.model_fields)


@cache
def _names() -> tuple[re.Pattern[str], dict[str, str]]:
    labels = {key: LABELS[key][0] for key in shown()} | {"data.1.folder": "The folder of images", "output.name": "The name"}
    return re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(labels, key=len, reverse=True)))})(?![\w.]*\w)"), labels


def in_words(text: str) -> str:
    """A sentence of the trainer as the page says it: labels instead of dotted names."""
    pattern, labels = _names()
    return pattern.sub(lambda m: labels[m[1]], text)


def optional(key: str) -> bool:
    """Whether the field may be empty; "" says so where null means to drop a change."""
    return _shape(key)[0]


@cache
def form() -> dict[str, Any]:
    """The answer of GET /api/form."""
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    order = {key: n for n, key in enumerate(LABELS)}  # a switch stands before what it switches
    for key in sorted(shown(), key=lambda k: order.get(k, len(order))):
        sections.setdefault(key.rpartition(".")[0], []).append(_field(key))
    return {
        "sections": [{"name": n, "title": SECTIONS.get(n, n), "fields": fields} for n, fields in sections.items() if fields],
        "hidden": dict(HIDDEN),
    }


def _field(key: str) -> dict[str, Any]:
    holders = leaves()[key]
    info = holders[0][1]
    label, text = LABELS.get(key, (key.rpartition(".")[2].replace("_", " ").capitalize(), ""))
    empty, choices, many, base = _shape(key)
    if base is bool and empty:  # a box cannot be empty
        choices = [True, False]
    kind = (
        "color" if key in COLOURS
        else "choices" if many and choices
        else "choice" if choices
        else "lines" if many
        else {bool: "boolean", int: "integer", float: "number"}.get(base, "text")
    )  # fmt: skip
    found: dict[str, Any] = {
        "key": key,
        "label": label,
        "help": text or _sentence(info.description or ""),
        "kind": kind,
        "default": defaults()[key],
        "optional": empty,
    }
    found |= {k: v for k, v in (_bounds(info) | BOUNDS.get(key, {})).items() if v is not None}
    if choices:
        found["choices"] = [[c, CHOICES.get(c, c) if isinstance(c, str) else "Yes" if c else "No"] for c in choices]
    if key in EMPTY:
        found["empty"] = EMPTY[key]
    when = dict(WHEN.get(key, {}))
    kinds = [k for m, _ in holders if "kind" in m.model_fields for k in get_args(m.model_fields["kind"].annotation)]
    section = key.rpartition(".")[0]
    if kinds and len(_kinds(section)) > 1 and set(kinds) != set(_kinds(section)) and not key.endswith(".kind"):
        when[f"{section}.kind"] = kinds
    if when:
        found["when"] = when
    found["families"] = FAMILIES.get(key)
    return found


def _kinds(section: str) -> list[str]:
    return [k for m, _ in leaves().get(f"{section}.kind", []) for k in get_args(m.model_fields["kind"].annotation)]


def _shape(key: str) -> tuple[bool, list[Any], bool, Any]:
    """(may be empty, allowed words, a list, base type) of a field."""
    optional, many, words, base = False, False, [], None
    for _, info in leaves()[key]:
        stack = [info.annotation]
        while stack:
            a = stack.pop()
            origin = get_origin(a)
            if a is type(None):
                optional = True
            elif origin is Literal:
                words += [w for w in get_args(a) if w not in words]
            elif origin is tuple:
                many = True
                stack += [x for x in get_args(a) if x is not ...]
            elif origin is Annotated:
                stack.append(get_args(a)[0])
            elif origin in (Union, types.UnionType):
                stack += get_args(a)
            else:
                base = a
    return optional, words, many, base


def _bounds(info: FieldInfo) -> dict[str, float | None]:
    """Lowest and highest allowed value and step; an open bound is given as it is, and the server says where a value touches it."""
    found: dict[str, float | None] = {"min": None, "max": None, "step": None}
    for m in info.metadata:
        for name, ours in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max"), ("multiple_of", "step")):
            if getattr(m, name, None) is not None:
                found[ours] = getattr(m, name)
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if not text or text.endswith(".") else ".")
