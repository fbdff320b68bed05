"""What a LoRA file says about itself: `ss_*` and `modelspec.*` metadata, its hashes and its sidecar. Torch-free.

All metadata values are strings; what is unknown is left out (A1111 stumbles over "None" in some keys). Paths are cut to their
last name. Sources: kohya-ss/sd-scripts `library/train_util.py`, Stability-AI/ModelSpec 1.0.1, A1111's Lora extension.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from trainer.formats import FormatError

# What tells the readers which family a file is for: all of these together, some readers look at one key only.
VERSIONS = {
    version: {
        "ss_base_model_version": base,
        "ss_v2": str(version.startswith("sd2")),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if version == "sdxl" else "diffusers",
        "ss_network_module": "networks.lora_sd3" if version.startswith("sd3") else "networks.lora",
    }
    for version, base, architecture in (
        ("sd1", "sd_v1", "stable-diffusion-v1"),
        ("sd2", "sd_v2", "stable-diffusion-v2-512"),
        ("sd2_v", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        ("sd3_medium", "sd3_medium", "stable-diffusion-3-medium"),
        ("sd3.5_medium", "sd3.5_medium", "stable-diffusion-3-5-medium"),
        ("sd3.5_large", "sd3.5_large", "stable-diffusion-3-5-large"),
    )
}
SIDECAR_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", "sd3": "Unknown"}  # the web UIs' list has no SD3
THUMBNAIL = 384  # pixels of the longer side; SD.Next shows 512, and ComfyUI serves no header over 1 MiB
# What people ask of a file: label -> key
SHOWN = {
    "title": "modelspec.title",
    "author": "modelspec.author",
    "description": "modelspec.description",
    "license": "modelspec.license",
    "date": "modelspec.date",
    "base": "ss_sd_model_name",
    "resolution": "ss_resolution",
    "images": "ss_num_train_images",
    "steps": "ss_steps",
    "seed": "ss_seed",
    "optimizer": "ss_optimizer",
    "unet learning rate": "ss_unet_lr",
    "text learning rate": "ss_text_encoder_lr",
}
MOST_TAGS = 500  # of a folder; ComfyUI serves no metadata of files whose header is over 1 MiB
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

ZIP = b"PK\x03\x04"  # torch.save since 1.6
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save before, plain pickles


@dataclass(frozen=True)
class Folder:
    """One training folder: `name` (a path is cut to its last name), images, visits of each, and all captions drawn from."""

    name: str
    images: int
    visits: int
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What is known of a run; empty values are left out of the file.

    Attributes:
        base: name or path of the base model.
        prediction: `epsilon`, `v_prediction` or `flow`.
        zero_terminal_snr: whether the noise schedule ended in pure noise; None where there is no such schedule.
        conv_rank, conv_alpha: those of convolutions, where they have their own.
        learning_rates: peak rate for each trained part.
        buckets: {(width, height) in pixels: images}.
        resolution: side of the square of the trained area, in pixels.
        started_at, finished_at: seconds since 1970.
    """

    base: str
    rank: int
    alpha: float
    prediction: str = "epsilon"
    zero_terminal_snr: bool | None = None
    clip_skip: int | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    optimizer: str = ""
    scheduler: str = ""
    resolution: int | None = None
    folders: tuple[Folder, ...] = ()
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    trigger_words: tuple[str, ...] = ()
    title: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    started_at: float | None = None
    finished_at: float | None = None


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _base_name(path: str) -> str:
    """The base's name: the last of its path, but the repository's for a snapshot in the hub's cache, which is named by a hash."""
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", path)
    return cached[1].partition("--")[2] if cached else _last_name(path)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def version_of(family: str, prediction: str = "", variant: str = "sd3.5_medium") -> str:
    """The key of VERSIONS for a file of `family`; `variant`: which SD3 it is."""
    return {"sd2": "sd2_v" if prediction == "v_prediction" else "sd2", "sd3": variant}.get(family, family)


def build(version: str, facts: Facts, name: str, thumbnail: str = "") -> dict[str, str]:
    """The metadata of a file called `name` (without ending) for a base of `version`, a key of VERSIONS, but for its hashes.

    kohya's folder names are `REPEATS_name`; here the repeats are the visits of the whole run, which is one epoch.
    """
    folders: dict[str, Folder] = {}
    for f in facts.folders:
        key = f"{f.visits}_{_last_name(f.name)}"
        while key in folders:
            key += "_"
        folders[key] = f
    tags = {key: Counter(t.strip() for c in f.captions for t in c.split(",") if t.strip()) for key, f in folders.items()}
    unet_rate = facts.learning_rates.get("unet", next(iter(facts.learning_rates.values()), None))
    text_rates = [rate for part, rate in facts.learning_rates.items() if part != "unet"]
    convolutions = {k: str(v) for k, v in (("conv_dim", facts.conv_rank), ("conv_alpha", facts.conv_alpha)) if v}
    day = facts.finished_at or facts.started_at
    values = {
        "ss_output_name": name,
        "ss_sd_model_name": _base_name(facts.base),
        "ss_network_dim": facts.rank,
        "ss_network_alpha": float(facts.alpha),
        "ss_network_args": _json(convolutions) if convolutions else None,
        "ss_learning_rate": unet_rate,
        "ss_unet_lr": facts.learning_rates.get("unet"),
        "ss_text_encoder_lr": text_rates if len(set(text_rates)) > 1 else next(iter(text_rates), None),
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_clip_skip": facts.clip_skip,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.scheduler,
        "ss_seed": facts.seed,
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.steps,
        "ss_num_epochs": 1 if folders else None,
        "ss_epoch": 1 if folders else None,
        "ss_batch_size_per_device": facts.batch_size,
        "ss_total_batch_size": facts.batch_size,
        "ss_resolution": f"({facts.resolution}, {facts.resolution})" if facts.resolution else None,
        "ss_num_train_images": sum(f.images * f.visits for f in folders.values()) or None,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": facts.title or name,
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}" if facts.resolution else None,
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v", "flow": None}[facts.prediction],
        "modelspec.date": datetime.fromtimestamp(day, UTC).isoformat(timespec="seconds") if day else None,
        "modelspec.author": facts.author,
        "modelspec.description": facts.description,
        "modelspec.license": facts.license,
        "modelspec.trigger_phrase": ", ".join(facts.trigger_words),
        "modelspec.thumbnail": thumbnail,
    }
    if folders:
        values["ss_dataset_dirs"] = _json({key: {"n_repeats": f.visits, "img_count": f.images} for key, f in folders.items()})
    if any(tags.values()):
        values["ss_tag_frequency"] = _json({key: dict(count.most_common(MOST_TAGS)) for key, count in tags.items()})
    if facts.buckets:
        buckets = {str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(facts.buckets.items())}
        values["ss_bucket_info"] = _json({"buckets": buckets})
    return VERSIONS[version] | {k: str(v) for k, v in values.items() if v is not None and v != ""}


def with_family(entries: Mapping[str, str], version: str) -> dict[str, str]:
    """`entries`, with those that tell the family (`version`: a key of VERSIONS) where they lack them."""
    return dict(entries) if entries.get("ss_base_model_version") else VERSIONS[version] | dict(entries)


def shown_as(entries: Mapping[str, str]) -> dict[str, str]:
    """{web UI: the family that it takes a file with this metadata for}; the UIs' own rules. A1111 lists only those of the loaded one."""
    base, architecture = entries.get("ss_base_model_version", ""), entries.get("modelspec.architecture", "")
    second = entries.get("ss_v2") == "True"
    forge = {"stable-diffusion-xl-v1-base/lora": "sdxl", "stable-diffusion-v1/lora": "sd1"}.get(architecture)
    large = base.startswith("sdxl_")
    return {
        "AUTOMATIC1111": ("sdxl" if large else "sd2" if second else "sd1") if entries else "unknown",
        "Forge": "sdxl" if large else "sd2" if second else forge or "unknown",
    }


def thumbnail(picture: Path) -> str:
    """The picture, made small, as the data URL of a JPEG."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    raw = io.BytesIO()
    small.save(raw, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(raw.getvalue()).decode()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """(metadata, {key: (dtype such as "F16", shape)}) of a safetensors file, in file order, from its header alone.

    Raises FormatError for a missing file, a pickle, a cut-off file, and anything else that is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist or is no file. Give the path of a .safetensors file.")
    bad = f"{path.name} is not a .safetensors file"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        pickled = start.startswith(PICKLES) or path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin")
        if start.startswith(ZIP) or (pickled and not _is_length(start, size)):  # a header of 640 bytes starts with b"\x80\x02" too
            raise FormatError(
                f"{path.name} is a pickle, which can run any program when it is opened, so it is not opened here. Get the "
                ".safetensors version of the model, or convert it with a tool that you trust, such as AUTOMATIC1111's Checkpoint Merger."
            )
        if not _is_length(start, size):
            raise FormatError(f"{bad}, or was cut off ({size} bytes, the header does not fit). Download or copy it again.")
        length = struct.unpack("<Q", start)[0]
        try:
            header = json.loads(file.read(length).decode("utf-8"))
            metadata = dict(header.pop("__metadata__", {}))
            tensors = {k: (str(v["dtype"]), tuple(map(int, v["shape"]))) for k, v in header.items()}
            end = max((int(v["data_offsets"][1]) for v in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise FormatError(f"{bad}: its header cannot be read. Download or copy it again.") from None
    if size != 8 + length + end:
        raise FormatError(
            f"{path.name} has {size} bytes; its header says {8 + length + end}. It was cut off or damaged: download or copy it again."
        )
    return metadata, tensors


def _is_length(start: bytes, size: int) -> bool:
    return len(start) == 8 and 2 <= struct.unpack("<Q", start)[0] <= min(size - 8, MAX_HEADER)


def hashes(blob: bytes) -> dict[str, str]:
    """The hash entries for a serialisation whose metadata are the `ss_*` entries alone (sd-scripts `precalculate_safetensors_hashes`).

    `sshs_model_hash` covers the tensor bytes alone, so it holds under any metadata.
    """
    tensors = hashlib.sha256(blob[8 + struct.unpack("<Q", blob[:8])[0] :]).hexdigest()
    return {
        "sshs_model_hash": tensors,
        "sshs_legacy_hash": hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{tensors}",
    }


def tensor_hash(path: Path) -> str:
    """`sshs_model_hash` of a written file: sha256 of every byte after the header (A1111's and Forge's own rule)."""
    with Path(path).open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar(family: str, trigger_words: Sequence[str], description: str = "", notes: str = "") -> str:
    """The text of NAME.json beside NAME.safetensors, for A1111's and Forge's card and InvokeAI's trigger phrases.

    "preferred weight" 0 means the reader's own default.
    """
    card = {
        "description": description,
        "sd version": SIDECAR_VERSIONS[family],
        "activation text": ", ".join(trigger_words),
        "preferred weight": 0,
        "negative text": "",
        "notes": notes,
    }
    return json.dumps(card, indent=4, ensure_ascii=False)
