"""Configurations of other trainers as changes of the draft: kohya_ss's JSON, sd-scripts' TOML, OneTrainer's JSON, and our own.

What has the same meaning here is carried over, under the name it had; everything else that was set is listed with the reason.
Nothing is guessed: where a value there means something else here, the reason says what to set instead.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import Problem
from trainer.config import TrainConfig

OFF: tuple[Any, ...] = (None, "", 0, 0.0, False, "0", "None", "none", "NONE", [], {})
LORA = ["attention", "feed_forward", "projections"]  # what a plain LoRA of sd-scripts trains
TWO_ENCODERS = ("sdxl", "sd3")


@dataclass
class Import:
    """`changes`: our dotted fields; `fields`: those of the draft itself; `carried`: our field -> "theirs = value"."""

    origin: str
    changes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    own: dict[str, Any] | None = None  # a configuration of ours, whole

    def put(self, ours: str, value: Any, key: str, theirs: Any) -> None:
        where = self.fields if "." not in ours else self.changes
        where[ours] = value
        self.carried[ours] = f"{key} = {_text(theirs)}"

    def leave(self, key: str, value: Any, why: str) -> None:
        self.left_out.append({"key": key, "value": _text(value), "why": why})


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def read(name: str, text: str, images: int = 0) -> Import:
    """What a configuration file says. `images`: number of images of the draft, by which steps become visits. Raises Problem."""
    try:
        raw = json.loads(text) if name.lower().endswith(".json") or text.lstrip("\ufeff \n\t").startswith("{") else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise Problem(f"{name} cannot be read: {error}. Give a .toml or .json configuration as it was saved.") from None
    if not isinstance(raw, dict):
        raise Problem(f"{name} holds a {type(raw).__name__} instead of settings. Give the trainer's configuration file.")
    if "preset" in raw or any(isinstance(raw.get(k), dict) for k in ("adapter", "part", "train", "loss", "schedule")):
        return _ours(raw)
    if "training_method" in raw or {"model_type", "base_model_name"} & raw.keys():
        return _one_trainer(raw, images)
    flat = _flat(raw)
    if flat.keys() & {
        "network_dim",
        "network_module",
        "train_batch_size",
        "LoRA_type",
        "pretrained_model_name_or_path",
        "num_repeats",
        "network_alpha",
    }:
        return _kohya(flat, images)
    raise Problem(f"{name} is no configuration that is known here. Known are ours, kohya_ss, sd-scripts and OneTrainer.")


def _ours(raw: dict[str, Any]) -> Import:
    found = Import("LoRA Atelier")
    own = dict(raw)
    data = own.get("data")
    if isinstance(data, list) and data and isinstance(data[0], dict):
        for n, entry in enumerate(data, 1):
            if isinstance(entry, dict) and "folder" in entry:
                found.leave(f"data.{n}.folder", entry["folder"], "images are added in the images section; name this folder there")
        own["data"] = [{**{k: v for k, v in data[0].items() if k in ("trigger", "class_word", "visits")}, "folder": "."}]
    unknown = [k for k in own if k not in (*TrainConfig.model_fields, "preset", "about")]
    for key in unknown:
        found.leave(key, own.pop(key), "is not a section of ours")
    own.pop("about", None)
    found.own = own
    return found


# ---- kohya ------------------------------------------------------------------------------------------------------------------


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """sd-scripts reads a TOML's sections as if they were not there; of a dataset configuration the first subset counts."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            flat |= _flat(value)
        elif key in ("datasets", "subsets") and isinstance(value, list):
            for entry in [v for v in value if isinstance(v, dict)][:1]:
                flat |= _flat(entry)
            if len(value) > 1:
                flat[f"{key}[2...]"] = len(value) - 1
        else:
            flat[key] = value
    return flat


ALWAYS = "always done here"
NOT_THERE = "there is no such setting here"
IMAGES = "images are added in the images section; name this folder there"
MODEL = "read from the model's files"
KOHYA_REASONS = {
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "enable_bucket", "persistent_data_loader_workers", "highvram"), ALWAYS),
    **dict.fromkeys(("cache_text_encoder_outputs", "sdxl_cache_text_encoder_outputs", "sdxl_no_half_vae", "no_half_vae"), ALWAYS),
    **dict.fromkeys(("train_data_dir", "image_dir", "logging_dir", "output_dir", "dataset_config", "in_json"), IMAGES),
    "flux1_checkbox": "Flux is not there",
    **dict.fromkeys(("logging_dir", "output_dir"), "each training has a folder of its own here"),
    **dict.fromkeys(("max_bucket_reso", "min_bucket_reso", "bucket_no_upscale"), "sizes are chosen from the images here; see Widest shape"),
    **dict.fromkeys(("xformers", "mem_eff_attn", "sdpa"), "PyTorch's own attention is used, which is as fast on current GPUs"),
    **dict.fromkeys(("reg_data_dir", "prior_loss_weight"), "class images: import them as a data set, then add it as another set of images"),
    **dict.fromkeys(("stop_text_encoder_training", "stop_text_encoder_training_pct"), "has no effect there for a LoRA; here it is Text encoder stops after"),
    **dict.fromkeys(("full_fp16", "full_bf16"), "the LoRA itself is always trained in 32 bits here"),
    "clip_skip": "only SD 1.5 has a choice of layers (1 to 4)",
    "max_token_length": "a caption takes as many windows of 75 tokens as it needs here, up to three",
    "t5xxl_max_token_length": "T5 reads as many windows of 77 tokens as a caption needs here",
    "train_t5xxl": "T5 is never trained here",
    "t5xxl_lr": "T5 is never trained here",
    "caption_extension": "captions in .txt and .caption are both read",
    "caption_dropout_every_n_epochs": "only a share of visits can go without caption here",
    "color_aug": "colours are left as they are here",
    "random_crop": "crops are fixed here and shown on each image",
    "debiased_estimation_loss": "only min-SNR weighting is there",
    "multires_noise_iterations": "only noise offset is there",
    "scale_weight_norms": "weights are not clamped here; lower the rate or the visits instead",
    "rank_dropout": "only LoRA dropout is there",
    "module_dropout": "only LoRA dropout is there",
    **dict.fromkeys(("conv_block_dims", "conv_block_alphas"), "a block has one rank for all of its layers here"),
    **dict.fromkeys(("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_dims", "block_alphas"), "is no list of as many numbers as this model has blocks"),
    "save_model_as": "files are always .safetensors here",
    "save_state": "a resumable state is always kept here",
    "datasets[2...]": "one data set with one size here",
    "subsets[2...]": "one folder of images here; its repeats were taken",
    "noise_offset_type": "only noise offset is there",
    "additional_parameters": "their meaning is not known here",
}  # fmt: skip
# What a GUI's file always says, without a meaning of its own.
KOHYA_SILENT = {
    "LoRA_type", "network_module", "network_args", "optimizer", "optimizer_type", "optimizer_args", "lr_scheduler_type", "caption_separator",
    "max_data_loader_n_workers", "num_cpu_threads_per_process", "vae_batch_size", "max_timestep", "min_timestep", "unit", "factor", "train_on_input",
    "lr_scheduler_power", "sample_sampler", "num_processes", "num_machines", "main_process_port", "model_list", "save_last_n_steps", "dynamo_backend",
    "save_last_n_steps_state", "loss_type", "huber_schedule", "huber_c", "multires_noise_discount", "adaptive_noise_scale", "lowram", "wandb_run_name",
    "log_with", "no_metadata", "constrain", "block_lr_zero_threshold", "text_encoder_lr", "conv_dim", "conv_alpha", "gpu_ids", "extra_accelerate_launch_args", "max_train_steps", "epoch",
    "max_train_epochs", "num_repeats", "gradient_accumulation_steps", "sample_every_n_epochs", "save_every_n_epochs", "learning_rate",
    "class_tokens", "LyCORIS_preset", "dim_from_weights", "caption_metadata_filename", "latent_metadata_filename", "log_tracker_name",
}  # fmt: skip


def _kohya(raw: dict[str, Any], images: int) -> Import:
    found = Import("kohya_ss" if "LoRA_type" in raw or "epoch" in raw else "sd-scripts")
    used: set[str] = set()

    def take(*keys: str) -> tuple[str, Any]:
        """The first of `keys` that says something; all count as read."""
        used.update(k for k in keys if k in raw)
        return next(((k, raw[k]) for k in keys if raw.get(k) not in (None, "")), ("", None))

    def number(ours: str, *keys: str, whole: bool = False, off: str | None = None) -> float | None:
        key, value = take(*keys)
        if not key:
            return None
        parsed = _number(value)
        if parsed is None:
            found.leave(key, value, "is no number")
            return None
        if off is not None and parsed == 0:
            found.put(ours, off, key, value)
            return None
        found.put(ours, int(parsed) if whole else parsed, key, value)
        return parsed

    # The network
    kind = str(raw.get("LoRA_type") or raw.get("network_module") or "Standard")
    arguments = _arguments(raw.get("network_args"))
    if raw.get("algo"):
        arguments.setdefault("algo", str(raw["algo"]))
    used |= {"LoRA_type", "network_module", "algo", "network_args"}
    plain = kind in ("Standard", "networks.lora", "networks.lora_sd3", "Kohya LoCon", "LyCORIS/LoCon") or (
        kind == "lycoris.kohya" and arguments.get("algo", "lora") in ("lora", "locon")
    )
    name = next((k for k in ("LoRA_type", "network_module") if raw.get(k)), "LoRA_type")
    large = _kohya_family(found, raw, used, kind)
    convolutions = False
    if plain and raw.keys() & {"LoRA_type", "network_module", "network_dim"}:  # a dataset's TOML says nothing of the network
        conv = _number(arguments.get("conv_dim", raw.get("conv_dim")))
        convolutions = kind in ("Kohya LoCon", "LyCORIS/LoCon") or (_number(arguments.get("conv_dim")) or 0) > 0
        found.put("adapter.targets", [*LORA, "convolutions"] if convolutions else LORA, name, kind)
        if convolutions and conv:
            alpha = _number(arguments.get("conv_alpha", raw.get("conv_alpha")))
            found.put("adapter.conv_rank", int(conv), "conv_dim", conv)
            found.put(
                "adapter.conv_alpha",
                conv if alpha == 0 else 1.0 if alpha is None else alpha,
                "conv_alpha",
                "1 (its default)" if alpha is None else alpha,
            )
    elif not plain:
        found.leave(name, kind, "only plain LoRA is there: rank and learning rates mean something else for it, so look at them")
    for key in ("conv_dim", "conv_alpha"):
        arguments.pop(key, None)
    if plain:
        _kohya_blocks(found, {**raw, **arguments}, used, large, convolutions)
        for key in BLOCKS:
            arguments.pop(key, None)
    for key in ("algo", "preset"):
        arguments.pop(key, None)
    for key, value in arguments.items():
        found.leave(f"network_args {key}", value, NOT_THERE)
    rank = number("adapter.rank", "network_dim", whole=True)
    alpha = number("adapter.alpha", "network_alpha")
    if alpha == 0 and rank:
        found.put("adapter.alpha", rank, "network_alpha", 0)
    number("adapter.dropout", "network_dropout")
    key, weights = take("network_weights", "lora_network_weights")
    if key:
        found.put("adapter.start", str(weights), key, weights)

    # Learning rates: 0 leaves a part out there
    base_key, base = take("learning_rate")
    rates = {}
    both = ("text_encoder_lr", "learning_rate_te")
    encoders = {"text_1": ("learning_rate_te1", *both)} | ({"text_2": ("learning_rate_te2", *both)} if large else {})
    for part, theirs in ({"unet": ("unet_lr",)} | encoders).items():
        key, value = take(*theirs)
        if isinstance(value, list):  # one for each encoder; for SDXL sd-scripts takes the first for both
            at = 1 if part == "text_2" and large == "sd3" and len(value) > 1 else 0
            value = value[at] if value else None
        rates[part] = (key, _number(value)) if key else (base_key, _number(base))
    both_off = all(v == 0 for _, v in rates.values())
    for part, (key, value) in rates.items():
        if both_off and _number(base):
            key, value = base_key, _number(base)
        if value == 0:
            found.put(f"part.{part}.train", False, key, value)
        elif value is not None:
            found.put(f"part.{part}.learning_rate", value, key, value)
            if part in encoders:  # a preset may leave it alone
                found.put(f"part.{part}.train", True, key, value)
    only = [("network_train_unet_only", f"part.{part}.train") for part in encoders] + [
        ("network_train_text_encoder_only", "part.unet.train")
    ]
    for theirs, ours in only:
        key, value = take(theirs)
        if _true(value):
            found.put(ours, False, key, value)
            found.changes.pop(ours.replace(".train", ".learning_rate"), None)
            found.carried.pop(ours.replace(".train", ".learning_rate"), None)

    # Optimizer
    key, value = take("optimizer", "optimizer_type")
    kinds = {"adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "prodigy": "prodigy"}
    if key and str(value).lower() in kinds:
        found.put("optimizer.kind", kinds[str(value).lower()], key, value)
    elif key:
        found.leave(key, value, "is not there; AdamW, AdamW 8-bit and Prodigy are. Look at the learning rates")
    options = _arguments(raw.get("optimizer_args"))
    used.add("optimizer_args")
    ours = {"weight_decay": "optimizer.weight_decay", "eps": "optimizer.eps", "d_coef": "optimizer.d_coef"}
    for option, value in options.items():
        if option == "betas" and len(pair := [_number(b) for b in re.split(r"[,\s]+", value.strip("()[] ")) if b]) == 2:
            found.put("optimizer.beta1", pair[0], "optimizer_args betas", value)
            found.put("optimizer.beta2", pair[1], "optimizer_args betas", value)
        elif option in ours and _number(value) is not None:
            found.put(ours[option], _number(value), f"optimizer_args {option}", value)
        else:
            found.leave(f"optimizer_args {option}", value, NOT_THERE)

    # Batch and length
    key, value = take("train_batch_size", "batch_size")
    batch = int(_number(value) or 1)
    parts_key, parts_value = take("gradient_accumulation_steps")
    parts = int(_number(parts_value) or 1)
    if key or parts > 1:
        note = f"{key} = {value}" + (f", {parts_key} = {parts}" if parts > 1 else "")
        found.changes["train.batch_size"], found.carried["train.batch_size"] = batch * parts, note
        if parts > 1:
            found.put("train.accumulation", parts, parts_key, parts)
    steps = _kohya_length(found, raw, images, batch * parts)

    # Schedule
    key, value = take("lr_scheduler", "lr_scheduler_type")
    schedules = {
        "constant": "constant",
        "constant_with_warmup": "constant",
        "linear": "linear",
        "cosine": "cosine",
        "cosine_with_restarts": "cosine_restarts",
    }
    if str(value) in schedules:
        found.put("schedule.kind", schedules[str(value)], key, value)
        if str(value) in ("linear", "cosine", "cosine_with_restarts"):
            found.put("schedule.floor", 0.0, key, value)
    elif key:
        found.leave(key, value, "is not there; constant, linear, cosine and cosine with restarts are")
    if str(value) == "cosine_with_restarts":
        number("schedule.restarts", "lr_scheduler_num_cycles", whole=True)
    used.add("lr_scheduler_num_cycles")
    _kohya_warmup(found, take, steps, str(value))

    # Loss, captions, images
    number("loss.min_snr_gamma", "min_snr_gamma", off="")
    number("loss.noise_offset", "noise_offset")
    number("dataset.caption_dropout", "caption_dropout_rate")
    number("dataset.tag_dropout", "caption_tag_dropout_rate")
    number("dataset.keep_tags", "keep_tokens", whole=True)
    number("train.max_grad_norm", "max_grad_norm", off="")
    for theirs, our in (
        ("shuffle_caption", "dataset.shuffle_tags"),
        ("flip_aug", "dataset.flip"),
        ("weighted_captions", "dataset.prompt_weights"),
    ):
        key, value = take(theirs)
        if key:
            found.put(our, _true(value), key, value)
    key, value = take("gradient_checkpointing")
    if key:
        found.put("train.memory", "checkpointing" if _true(value) else "auto", key, value)
    if _number(raw.get("max_token_length")) in (75, 150, 225):
        key, value = take("max_token_length")
        found.put("dataset.text_windows", int(_number(value) or 75) // 75, key, value)
    if not large and not _true(raw.get("v2")) and _number(raw.get("clip_skip")) in (1, 2, 3, 4):
        key, value = take("clip_skip")
        found.put("model.clip_skip", int(_number(value) or 1), key, value)
    key, value = take("max_resolution", "resolution")
    if side := _side(value):
        found.put("dataset.resolution", side, key, value)
    key, value = take("bucket_reso_steps")
    if (step := _number(value)) and not step % 8 and 8 <= step <= 256:
        found.put("dataset.bucket_step", int(step), key, value)
    key, value = take("seed")
    if (seed := _number(value)) and 0 < seed < 2**32:
        found.put("train.seed", int(seed), key, value)
    key, value = take("mixed_precision")
    if str(value) in ("fp16", "bf16", "no"):
        found.put("train.dtype", {"no": "fp32"}.get(str(value), str(value)), key, value)
    key, value = take("v_parameterization")
    if _true(value):
        found.put("model.prediction", "v_prediction", key, value)
    key, value = take("zero_terminal_snr")
    if _true(value):
        found.put("model.zero_terminal_snr", True, key, value)
    _kohya_sd3(found, take, large)

    # Files and previews
    key, value = take("save_precision")
    if str(value) in ("fp16", "bf16", "float"):
        found.put("output.dtype", {"float": "fp32"}.get(str(value), str(value)), key, value)
    key, value = take("save_every_n_steps")
    if _number(value):
        found.put("output.save_every", int(_number(value) or 0), key, value)
    key, value = take("sample_every_n_steps")
    if _number(value):
        found.put("preview.every", int(_number(value) or 0), key, value)
    key, value = take("sample_prompts")
    if isinstance(value, str) and not value.lower().endswith((".txt", ".json", ".toml")):
        prompts = [line.split(" --")[0].strip() for line in value.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if prompts:
            found.put("preview.prompts", prompts, key, value)
    elif key:
        found.leave(key, value, "is a file; copy its prompts into Prompts")
    for theirs, our in (
        ("metadata_title", "title"),
        ("metadata_author", "author"),
        ("metadata_description", "description"),
        ("metadata_license", "license"),
    ):
        key, value = take(theirs)
        if key:
            found.put(f"output.{our}", str(value), key, value)
    key, value = take("output_name")
    if key:
        found.put("name", str(value), key, value)
    key, value = take("pretrained_model_name_or_path")
    if key and str(value) != "custom":
        found.put("model", str(value), key, value)
    key, value = take("class_tokens")
    if key:
        found.put("class_word", str(value), key, value)
    _rest(found, raw, used, KOHYA_REASONS, KOHYA_SILENT)
    return found


def _kohya_family(found: Import, raw: Mapping[str, Any], used: set[str], kind: str) -> str:
    """Carry the family over where the file says it; returns it if it has two text encoders, else ""."""
    for key, family in (("sdxl", "sdxl"), ("sd3_checkbox", "sd3"), ("v2", "sd2")):
        used.add(key)
        if _true(raw.get(key)):
            found.put("model.family", family, key, raw[key])
            return family if family in TWO_ENCODERS else ""
    if kind == "networks.lora_sd3":
        found.put("model.family", "sd3", "network_module", kind)
        return "sd3"
    return "sdxl" if raw.get("learning_rate_te2") else ""


def _kohya_sd3(found: Import, take: Any, large: str) -> None:
    """How SD3's noise levels are drawn, and where its text encoders lie."""
    key, value = take("weighting_scheme")
    if key and large == "sd3":
        if str(value) in ("logit_normal", "uniform"):
            found.put("loss.timesteps", str(value), key, value)
        else:
            found.leave(key, value, "is not there; logit_normal and uniform are")
    for theirs, ours in (("logit_mean", "loss.logit_mean"), ("logit_std", "loss.logit_std"), ("training_shift", "loss.shift")):
        key, value = take(theirs)
        number = _number(value)
        if large == "sd3" and number is not None and (number or ours == "loss.logit_mean"):
            found.put(ours, number, key, value)
    folders = {key: Path(str(path)).parent for theirs in ("clip_l", "clip_g", "t5xxl") for key, path in [take(theirs)] if key}
    if len(set(folders.values())) == 1:
        key = ", ".join(folders)
        found.put("model.text_encoders", str(next(iter(folders.values()))), key, "their folder")
    elif folders:
        found.leave(", ".join(folders), "", "lie in several folders; one holds all of them here")


BLOCKS = ("block_dims", "block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")


def _layout(large: bool) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each of sd-scripts' blocks: (modules with attention, modules with convolutions alone), by the UNet's own names.

    25 blocks for SD1 and SD2 (12 in, middle, 12 out), 23 for SDXL (embeddings, 9 in, 3 middle, 9 out, last).
    """
    depth, attention = (3, {"down": (1, 2), "up": (0, 1)}) if large else (4, {"down": (0, 1, 2), "up": (1, 2, 3)})

    def block(side: str, i: int, j: int, *more: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        name = f"{side}_blocks.{i}"
        return (f"{name}.attentions.{j}",) if i in attention[side] else (), (f"{name}.resnets.{j}", *more)

    first: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())] * (2 if large else 1)
    down = [b for i in range(depth) for b in (block("down", i, 0), block("down", i, 1), ((), (f"down_blocks.{i}.downsamplers",)))][:-1]
    middle = [((), ("mid_block.resnets.0",)), (("mid_block.attentions",), ()), ((), ("mid_block.resnets.1",))]
    if not large:
        middle = [(("mid_block.attentions",), ("mid_block.resnets",))]
    up = [block("up", i, j, *((f"up_blocks.{i}.upsamplers",) if j == 2 and i < depth - 1 else ())) for i in range(depth) for j in range(3)]
    return [*first, *down, *middle, *up, *([((), ())] if large else [])]


def _kohya_blocks(found: Import, raw: Mapping[str, Any], used: set[str], large: str, convolutions: bool) -> None:
    """Ranks, alphas and learning-rate weights of single blocks as adapter.blocks, for the blocks that carry a LoRA."""
    lists = {k: [_number(v) for v in str(raw[k]).strip("[]() ").split(",")] for k in BLOCKS[:5] if raw.get(k) not in OFF}
    used.update(BLOCKS)
    layout = _layout(large == "sdxl")
    parts = (9, 3, 9) if large else (12, 1, 12)
    sizes = dict(zip(BLOCKS[:5], (len(layout), len(layout), *parts), strict=True))
    good = {k: v for k, v in lists.items() if len(v) == sizes[k] and None not in v and large in ("", "sdxl")}
    start = 1 if large else 0
    rates: dict[int, float] = {}
    for key, at in (("down_lr_weight", start), ("mid_lr_weight", start + parts[0]), ("up_lr_weight", start + parts[0] + parts[1])):
        rates |= dict(enumerate(good.get(key, ()), at))
    least = _number(raw.get("block_lr_zero_threshold")) or 0.0
    blocks: dict[str, dict[str, float]] = {}
    for n, (attention, convolutional) in enumerate(layout):
        own: dict[str, float] = {}
        if "block_dims" in good:
            own["rank"] = int(good["block_dims"][n])
            if "block_alphas" in good:
                own["alpha"] = good["block_alphas"][n] or own["rank"]
            own = {"rank": 0} if not own["rank"] else own
        if n in rates:
            own |= {"rank": 0} if rates[n] <= least else {"rate": rates[n]} if rates[n] != 1 else {}
        for name in (*attention, *(convolutional if convolutions else ())):
            if own:
                blocks[f"unet.{name}"] = dict(own)
    if blocks:
        found.put("adapter.blocks", blocks, ", ".join(good), f"{len(blocks)} blocks")
    for key in lists.keys() - good.keys():
        found.leave(key, raw[key], KOHYA_REASONS[key])


def _kohya_length(found: Import, raw: Mapping[str, Any], images: int, batch: int) -> float | None:
    """Visits from epochs and repeats, or from steps; returns the steps where they were given."""
    epochs_key = next((k for k in ("max_train_epochs", "epoch") if _number(raw.get(k))), "")
    epochs, steps = _number(raw.get(epochs_key)), _number(raw.get("max_train_steps"))
    if steps and epochs_key != "max_train_epochs":  # the GUI's steps win over its Epoch; max_train_epochs wins over steps
        if images:
            found.put(
                "train.visits", max(1, round(steps * batch / images)), "max_train_steps", f"{steps:g} x batch {batch} / {images} images"
            )
        else:
            found.leave("max_train_steps", f"{steps:g}", f"there are no images yet: visits are {steps:g} x {batch} / number of images")
        return steps
    if epochs:
        repeats = _number(raw.get("num_repeats")) or _repeats(raw.get("train_data_dir"))
        found.put(
            "train.visits",
            max(1, round(epochs * (repeats or 1))),
            epochs_key,
            f"{epochs:g}" + (f" x {repeats:g} repeats" if repeats else ""),
        )
        if not repeats:
            found.leave("repeats", "", "stand in the folder's name there, like 10_cat: multiply Visits to each image by them")
    return None


def _repeats(folder: Any) -> float | None:
    """The repeats in the names of a training folder's folders (`10_cat`), if it is on this machine and they agree."""
    try:
        found = (
            {int(m.group(1)) for p in Path(str(folder)).iterdir() if p.is_dir() and (m := re.match(r"(\d+)_", p.name))} if folder else set()
        )
    except OSError:
        return None
    return found.pop() if len(found) == 1 else None


def _kohya_warmup(found: Import, take: Any, steps: float | None, schedule: str) -> None:
    key, value = take("lr_warmup_steps")
    number = _number(value)
    percent_key, percent = take("lr_warmup")
    if number:
        if number < 1:
            found.put("schedule.warmup", number, key, value)
        elif steps:
            found.put("schedule.warmup", round(min(0.9, number / steps), 4), key, value)
        else:
            found.leave(key, value, "is a number of steps; here Warm-up is a share of the run")
    elif percent_key and (share := _number(percent)) is not None:
        found.put("schedule.warmup", 0.0 if schedule == "constant" else min(0.9, share / 100), percent_key, f"{percent} %")


def _rest(found: Import, raw: Mapping[str, Any], used: set[str], reasons: Mapping[str, str], silent: set[str]) -> None:
    """Everything that is set, was not read and is not a value that every file has."""
    for key, value in raw.items():
        if key not in used and key not in silent and value not in OFF:
            found.leave(key, value, reasons.get(key, NOT_THERE))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _true(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "1", "on")


def _arguments(value: Any) -> dict[str, str]:
    """`a=1 b=2` or ["a=1", "b=2"] as a dict."""
    if isinstance(value, str):  # values such as betas=0.9, 0.99 may have spaces behind their commas
        value = re.sub(r",\s+", ",", value).split()
    pairs = (str(v).partition("=") for v in value) if isinstance(value, list) else ()
    return {k.strip(): v.strip().strip("\"'") for k, _, v in pairs if k.strip()}


def _side(value: Any) -> int | None:
    """The side of the square with the area of "512,650", [512, 650] or 512, as a multiple of 8."""
    sides = value if isinstance(value, list) else str(value or "").lower().replace("x", ",").split(",")
    numbers = [n for n in map(_number, sides) if n]
    if not numbers:
        return None
    return min(2048, max(64, round(math.sqrt(numbers[0] * numbers[-1]) / 8) * 8))


# ---- OneTrainer ---------------------------------------------------------------------------------------------------------------

ONE_TRAINER_REASONS = {
    **dict.fromkeys(("concepts", "concept_file_name", "samples", "sample_definition_file_name"), "stands in a file of its own; images are added in the images section"),
    **dict.fromkeys(("ema",), "there is no average of the weights here"),
    **dict.fromkeys(("masked_training", "normalize_masked_area_loss"), "masks beside the images are used by themselves; paint them, or add them with the images"),
    "layer_filter": "layers are chosen by kind here",
    "gradient_checkpointing": "set there for each part",
    "peft_type": "only plain LoRA is there",
    "timestep_distribution": "only uniform and logit-normal are there, the latter for SD 3",
    "loss_weight_fn": "only min-SNR weighting is there",
    "lora_decompose": "only plain LoRA is there",
    "attention_mechanism": "PyTorch's own attention is used",
}  # fmt: skip
ONE_TRAINER_PACKED = {"NFLOAT_4": "4bit", "INT_8": "8bit", "FLOAT_8": "8bit"}
ONE_TRAINER_SILENT = {
    "__version", "training_method", "debug_mode", "debug_dir", "workspace_dir", "cache_dir", "tensorboard", "tensorboard_expose",
    "tensorboard_port", "extra_model_name", "weight_dtype", "output_model_format", "aspect_ratio_bucketing", "latent_caching", "image_caching",
    "text_caching", "latent_caching_epochs", "clear_cache_before_training", "train_device", "temp_device", "only_cache", "sample_after", "sample_after_unit",
    "backup_after", "backup_after_unit", "backup_before_save", "rolling_backup", "rolling_backup_count", "token_count", "initial_embedding_text", "unmasked_probability",
    "unmasked_weight", "max_noising_strength", "min_noising_strength", "ema_decay", "ema_update_step_interval", "dataloader_threads", "caching_threads", "vae", "prior",
    "text_encoder_2", "text_encoder_3", "text_encoder_4", "transformer", "unconditional_transformer", "effnet_encoder", "decoder", "decoder_text_encoder", "decoder_vqgan",
    "additional_embeddings", "embedding", "embeddings", "cloud", "secrets", "optimizer_defaults", "mse_strength", "validate_after", "validate_after_unit",
    "save_skip_first", "sample_skip_first", "tensorboard_always_on", "frames", "multi_gpu", "device_indexes", "fused_gradient_reduce", "async_gradient_reduce",
    "async_gradient_reduce_buffer", "gradient_reduce_precision", "train_prior", "train_unet_epochs", "output_dtype_unit", "text_encoder_weight_dtype",
    "unet_weight_dtype", "vae_weight_dtype", "fallback_train_dtype", "lora_weight_dtype", "embedding_weight_dtype", "enable_autocast_cache", "noising_weight",
    "noising_bias", "timestep_shift", "loss_scaler", "learning_rate_scaler", "learning_rate_warmup_steps", "learning_rate_cycles", "loss_weight_strength",
    "save_every_unit", "save_filename_prefix", "learning_rate_min_factor", "vb_loss_strength", "seed", "async_offloading", "samples_to_tensorboard",
    "non_ema_sampling", "sample_image_format", "sample_video_format", "sample_audio_format", "continue_last_backup", "include_train_config", "weight_decay",
    "embedding_learning_rate", "preserve_embedding_norm", "custom_learning_rate_scheduler", "scheduler_params", "dynamic_timestep_shifting", "compile",
    "layer_filter_preset", "layer_filter_regex", "lora_layers", "lora_layer_preset", "lora_layers_regex", "train_text_encoder_epochs", "enable_async_offloading",
    "enable_activation_offloading", "layer_offload_fraction", "force_circular_padding", "huber_strength", "mae_strength", "log_cosh_strength",
}  # fmt: skip


BY_FLOW = ("sd3",)
ONE_TRAINER_FAMILIES = {
    "STABLE_DIFFUSION_15": "sd1", "STABLE_DIFFUSION_20": "sd2", "STABLE_DIFFUSION_20_BASE": "sd2", "STABLE_DIFFUSION_21": "sd2",
    "STABLE_DIFFUSION_21_BASE": "sd2", "STABLE_DIFFUSION_XL_10_BASE": "sdxl", "STABLE_DIFFUSION_3": "sd3", "STABLE_DIFFUSION_35": "sd3",
}  # fmt: skip


def _one_trainer(raw: dict[str, Any], images: int) -> Import:
    found, used = Import("OneTrainer"), set()

    def take(key: str) -> Any:
        used.add(key)
        return raw.get(key)

    def number(ours: str, key: str, whole: bool = False) -> float | None:
        value = _number(take(key))
        if value is not None:
            found.put(ours, int(value) if whole else value, key, raw[key])
        return value

    method = str(take("training_method") or "LORA")
    if method != "LORA" or str(take("peft_type") or "LORA") != "LORA":
        found.leave(
            "training_method",
            f"{method} {raw.get('peft_type', '')}".strip(),
            "only plain LoRA is there: rank and rates mean something else for it, so look at them",
        )
    number("adapter.rank", "lora_rank", whole=True)
    number("adapter.alpha", "lora_alpha")
    number("adapter.dropout", "dropout_probability")
    layers = str(take("layer_filter_preset") or take("lora_layer_preset") or "")
    targets = {"attn-only": ["attention"], "attn-mlp": ["attention", "feed_forward"], "full": [*LORA, "convolutions"]}
    if layers in targets:
        found.put("adapter.targets", targets[layers], "layer_filter_preset", layers)
    elif layers:
        found.leave("layer_filter_preset", layers, "layers are chosen by kind here")

    kind, family = str(take("model_type") or ""), ""
    if kind:
        family = ONE_TRAINER_FAMILIES.get(kind, "")
        if family:
            found.put("model.family", family, "model_type", kind)
        else:
            found.leave("model_type", kind, "is not there; ordinary models of SD 1.5, 2, XL, 3 and 3.5 are")
    base = _number(take("learning_rate"))
    denoiser = "transformer" if family in BY_FLOW else "unet"
    encoders = [("text_1", "text_encoder")] + ([("text_2", "text_encoder_2")] if family in TWO_ENCODERS else [])
    for part, theirs in (("unet", denoiser), *encoders):
        table = take(theirs) if isinstance(raw.get(theirs), dict) else {}
        train = table.get("train", take(f"train_{theirs}"))
        rate = _number(table.get("learning_rate")) or _number(take(f"{theirs}_learning_rate"))
        if train is not None:
            found.put(f"part.{part}.train", _true(train), f"{theirs}.train", train)
        if train is None or _true(train):
            if rate or base:
                found.put(f"part.{part}.learning_rate", rate or base, f"{theirs}.learning_rate" if rate else "learning_rate", rate or base)
            epochs, unit = (
                _number(table.get("stop_training_after", raw.get(f"train_{theirs}_epochs"))),
                str(table.get("stop_training_after_unit", "EPOCH")),
            )
            total = _number(raw.get("epochs"))
            if epochs and total and unit == "EPOCH" and epochs < total:
                found.put(f"part.{part}.stop", round(epochs / total, 3), f"{theirs}.stop_training_after", f"{epochs:g} of {total:g} epochs")
            elif epochs and unit not in ("EPOCH", "NEVER"):
                found.leave(f"{theirs}.stop_training_after", f"{epochs:g} {unit}", "is a share of the run here")

    optimizer = take("optimizer")
    table = optimizer if isinstance(optimizer, dict) else {"optimizer": optimizer, "weight_decay": take("weight_decay")}
    kind = str(table.get("optimizer") or "")
    kinds = {"ADAMW": "adamw", "ADAMW_8BIT": "adamw8bit", "PRODIGY": "prodigy"}
    if kind in kinds:
        found.put("optimizer.kind", kinds[kind], "optimizer", kind)
        for theirs, ours in (
            ("beta1", "beta1"),
            ("beta2", "beta2"),
            ("eps", "eps"),
            ("weight_decay", "weight_decay"),
            ("d_coef", "d_coef"),
        ):
            value = _number(table.get(theirs))
            if value is not None and not (theirs == "eps" and kind == "PRODIGY") and not (theirs == "d_coef" and kind != "PRODIGY"):
                found.put(f"optimizer.{ours}", value, f"optimizer.{theirs}", value)
    elif kind:
        found.leave("optimizer", kind, "is not there; AdamW, AdamW 8-bit and Prodigy are. Look at the learning rates")

    batch, parts = int(_number(take("batch_size")) or 1), int(_number(take("gradient_accumulation_steps")) or 1)
    if "batch_size" in raw or parts > 1:
        found.put(
            "train.batch_size", batch * parts, "batch_size", f"{batch}" + (f", gradient_accumulation_steps = {parts}" if parts > 1 else "")
        )
        if parts > 1:
            found.put("train.accumulation", parts, "gradient_accumulation_steps", parts)
    epochs = number("train.visits", "epochs", whole=True)
    schedule = str(take("learning_rate_scheduler") or "")
    schedules = {
        "CONSTANT": "constant",
        "LINEAR": "linear",
        "COSINE": "cosine",
        "COSINE_WITH_RESTARTS": "cosine_restarts",
        "COSINE_WITH_HARD_RESTARTS": "cosine_restarts",
    }
    if schedule in schedules:
        found.put("schedule.kind", schedules[schedule], "learning_rate_scheduler", schedule)
        if schedule != "CONSTANT":
            found.put(
                "schedule.floor",
                _number(raw.get("learning_rate_min_factor")) or 0.0,
                "learning_rate_min_factor",
                raw.get("learning_rate_min_factor", 0),
            )
        if schedules[schedule] == "cosine_restarts":
            number("schedule.restarts", "learning_rate_cycles", whole=True)
    elif schedule:
        found.leave("learning_rate_scheduler", schedule, "is not there; constant, linear, cosine and cosine with restarts are")
    warm = _number(take("learning_rate_warmup_steps"))
    if warm is not None:
        if warm < 1:
            found.put("schedule.warmup", warm, "learning_rate_warmup_steps", warm)
        elif epochs and images:
            steps = epochs * images / (batch * parts)
            found.put(
                "schedule.warmup", round(min(0.9, warm / steps), 4), "learning_rate_warmup_steps", f"{warm:g} of about {steps:.0f} steps"
            )
        else:
            found.leave("learning_rate_warmup_steps", f"{warm:g}", "is a number of steps; here Warm-up is a share of the run")

    if "loss_weight_fn" in raw or "min_snr_gamma" in raw:
        weigh, strength = str(take("loss_weight_fn") or ""), _number(take("loss_weight_strength")) or _number(take("min_snr_gamma"))
        if (weigh == "MIN_SNR_GAMMA" or "min_snr_gamma" in raw) and strength:
            found.put("loss.min_snr_gamma", strength, "loss_weight_strength" if weigh else "min_snr_gamma", strength)
        elif weigh in ("CONSTANT", ""):
            found.put("loss.min_snr_gamma", "", "loss_weight_fn", weigh or "CONSTANT")
        else:
            found.leave("loss_weight_fn", weigh, "only min-SNR weighting is there")
    number("loss.noise_offset", "offset_noise_weight")
    clip = _number(take("clip_grad_norm"))
    if clip is not None:
        found.put("train.max_grad_norm", clip or "", "clip_grad_norm", clip)
    side = _side(take("resolution"))
    if side:
        found.put("dataset.resolution", side, "resolution", raw["resolution"])
    checkpointing = take("gradient_checkpointing")
    if checkpointing is None and isinstance(raw.get(denoiser), dict):
        checkpointing = raw[denoiser].get("gradient_checkpointing")
    packed = raw[denoiser].get("weight_dtype") if isinstance(raw.get(denoiser), dict) else None
    if packed in ONE_TRAINER_PACKED:
        found.put("train.memory", ONE_TRAINER_PACKED[packed], f"{denoiser}.weight_dtype", packed)
    elif checkpointing is not None:
        saves = _true(checkpointing) or checkpointing == "CPU_OFFLOADED"
        found.put("train.memory", "checkpointing" if saves else "auto", "gradient_checkpointing", checkpointing)
    dtypes = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16", "FLOAT_32": "fp32"}
    for ours, theirs in (("train.dtype", "train_dtype"), ("output.dtype", "output_dtype")):
        value = str(take(theirs) or "")
        if value in dtypes:
            found.put(ours, dtypes[value], theirs, value)
        elif value:
            found.leave(theirs, value, "is not there; fp32, bf16 and fp16 are")
    if _true(take("force_v_prediction")):
        found.put("model.prediction", "v_prediction", "force_v_prediction", True)
    if _true(take("force_epsilon_prediction")):
        found.put("model.prediction", "epsilon", "force_epsilon_prediction", True)
    if _true(take("rescale_noise_scheduler_to_zero_terminal_snr")):
        found.put("model.zero_terminal_snr", True, "rescale_noise_scheduler_to_zero_terminal_snr", True)
    skip = _number(take("text_encoder_layer_skip"))
    if skip and family == ONE_TRAINER_FAMILIES["STABLE_DIFFUSION_15"] and skip < 4:
        found.put("model.clip_skip", int(skip) + 1, "text_encoder_layer_skip", skip)
    if family in BY_FLOW:
        _one_trainer_flow(found, raw, used)
    every, unit = (
        _number(take("save_every")) or _number(take("save_after")),
        str(raw.get("save_every_unit", raw.get("save_after_unit", ""))),
    )
    if every and unit == "STEP":
        found.put("output.save_every", int(every), "save_every", f"{every:g} steps")
    elif every and unit not in ("NEVER", ""):
        found.leave("save_every", f"{every:g} {unit}", "is a number of steps here")
    used.add("save_after_unit")
    if model := take("base_model_name"):
        found.put("model", str(model), "base_model_name", model)
    if target := take("output_model_destination"):
        found.put("name", Path(str(target).replace("\\", "/")).stem, "output_model_destination", target)
    if start := take("lora_model_name"):
        found.put("adapter.start", str(start), "lora_model_name", start)
    _rest(found, raw, used, ONE_TRAINER_REASONS, ONE_TRAINER_SILENT)
    return found


def _one_trainer_flow(found: Import, raw: Mapping[str, Any], used: set[str]) -> None:
    """How noise levels are drawn: there, logit-normal has the mean `noising_bias` and the spread `noising_weight` + 1."""
    used |= {"timestep_distribution", "noising_bias", "noising_weight", "timestep_shift"}
    kinds = {"LOGIT_NORMAL": "logit_normal", "UNIFORM": "uniform"}
    kind = str(raw.get("timestep_distribution") or "")
    if kind in kinds:
        found.put("loss.timesteps", kinds[kind], "timestep_distribution", kind)
    elif kind:
        found.leave("timestep_distribution", kind, ONE_TRAINER_REASONS["timestep_distribution"])
    mean, spread, shift = (_number(raw.get(k)) for k in ("noising_bias", "noising_weight", "timestep_shift"))
    if kind == "LOGIT_NORMAL":
        found.put("loss.logit_mean", mean or 0.0, "noising_bias", mean or 0)
        found.put("loss.logit_std", (spread or 0.0) + 1, "noising_weight", f"{spread or 0:g} + 1")
    if shift:
        found.put("loss.shift", shift, "timestep_shift", shift)
