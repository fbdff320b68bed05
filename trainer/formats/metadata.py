"""What a LoRA file says about itself: `ss_*` and `modelspec.*` metadata, its hashes and its sidecar. Torch-free.

All metadata values are strings; what is unknown is left out (A1111 stumbles over "None" in some keys). Paths are cut to their
last name. Sources: kohya-ss/sd-scripts `library/train_util.py`, Stability-AI/ModelSpec 1.0.1, A1111's Lora extension.
"""

from __future__ import annotations

import hashlib
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
    "sd1": {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
    }
}
SIDECAR_VERSIONS = {"sd1": "SD1"}
RATE_KEYS = {"unet": "ss_unet_lr", "text_1": "ss_text_encoder_lr"}
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
        prediction: `epsilon` or `v_prediction`.
        learning_rates: peak rate for each trained part.
        buckets: {(width, height) in pixels: images}.
        resolution: side of the square of the trained area, in pixels.
        started_at, finished_at: seconds since 1970.
    """

    base: str
    rank: int
    alpha: float
    prediction: str = "epsilon"
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


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def build(family: str, facts: Facts, name: str) -> dict[str, str]:
    """The metadata of a file called `name` (without ending), but for its hashes.

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
    day = facts.finished_at or facts.started_at
    values = {
        "ss_output_name": name,
        "ss_sd_model_name": _last_name(facts.base),
        "ss_network_module": "networks.lora",
        "ss_network_dim": facts.rank,
        "ss_network_alpha": float(facts.alpha),
        "ss_learning_rate": unet_rate,
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
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[facts.prediction],
        "modelspec.date": datetime.fromtimestamp(day, UTC).isoformat(timespec="seconds") if day else None,
        "modelspec.author": facts.author,
        "modelspec.description": facts.description,
        "modelspec.license": facts.license,
        "modelspec.trigger_phrase": ", ".join(facts.trigger_words),
    }
    values |= {RATE_KEYS[part]: rate for part, rate in facts.learning_rates.items()}
    if folders:
        values["ss_dataset_dirs"] = _json({key: {"n_repeats": f.visits, "img_count": f.images} for key, f in folders.items()})
    if any(tags.values()):
        values["ss_tag_frequency"] = _json({key: dict(count.most_common(MOST_TAGS)) for key, count in tags.items()})
    if facts.buckets:
        buckets = {str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(facts.buckets.items())}
        values["ss_bucket_info"] = _json({"buckets": buckets})
    return VERSIONS[family] | {k: str(v) for k, v in values.items() if v is not None and v != ""}


def with_family(entries: Mapping[str, str], family: str) -> dict[str, str]:
    """`entries`, with those that tell the family where they lack them."""
    return dict(entries) if entries.get("ss_base_model_version") else VERSIONS[family] | dict(entries)


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
