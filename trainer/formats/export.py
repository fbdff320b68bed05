"""Write a trained LoRA as the file that people use, whole or not at all, and check it by reading it back."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save

from trainer import run_dir
from trainer.adapters import Delta
from trainer.formats import FormatError, kohya, metadata, peft_names, self_check

NAMINGS = {"kohya": kohya.to_kohya, "peft": peft_names.to_peft}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FP16_MOST = 6e4  # leaves a little below fp16's 65504
FP16_LEAST = 2.0**-16  # root mean square below which fp16's rounding shows in the product
SMALL = 2.0**-12  # an `up` smaller than this takes a power of two from its `down`, which leaves the product as it is


class ExportError(FormatError):
    """The file was not written; nothing of it was left behind, and an older file of that name still stands."""


@dataclass(frozen=True)
class Exported:
    """`modules`: layers for each part; `sha256`: of the whole file, hex; `notes`: sentences on what was done differently."""

    path: Path
    bytes: int
    modules: dict[str, int]
    sha256: str
    notes: tuple[str, ...]

    @property
    def autov2(self) -> str:
        """The short hash by which model sites find the file."""
        return self.sha256[:10]


def export(
    path: Path,
    deltas: Iterable[Delta],
    *,
    family: str,
    naming: str,
    dtype: str,
    facts: metadata.Facts,
    layers: self_check.Layers,
) -> Exported:
    """Write `deltas` to `path` (ending in .safetensors), checked; with trigger words also the sidecar NAME.json.

    `naming` is a key of NAMINGS, `dtype` one of DTYPES; fp16 becomes bf16 where it cannot hold the weights (a note says so).
    `layers` is `kohya.layers` of the whole base. Layers of zeros are added where readers need them: see `complete`.
    Raises ExportError when the disk is full, the file cannot be written, or the written file fails the self-check.
    """
    path = Path(path)
    deltas = list(deltas)
    if not deltas:
        raise ExportError(f"{path.name} would be empty: no layer was trained. Choose at least one part and target.")
    deltas, notes = complete(deltas, family, layers)
    state = tensors(deltas, family, naming, dtype, notes)

    def verify(part: Path) -> None:
        problems = self_check.check(part, family, deltas, layers)
        if problems:
            more = f" ({len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ExportError(
                f"{path.name} failed its check and was not saved: {' '.join(problems[:3])}{more} Resume from an earlier checkpoint."
            )
        if self_check.is_empty(part):
            notes.append("The LoRA changes nothing yet: all its up matrices are zero.")

    blob = serialise(state, metadata.build(family, facts, path.stem))
    write(path, blob, verify)
    if facts.trigger_words:
        write(path.with_suffix(".json"), metadata.sidecar(family, facts.trigger_words, facts.description).encode())
    modules = dict(Counter(d.part for d in deltas))
    return Exported(path, len(blob), modules, hashlib.sha256(blob).hexdigest(), tuple(notes))


def tensors(deltas: list[Delta], family: str, naming: str, dtype: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """What the file holds. Where fp16 cannot hold it, it is bf16 and `notes` gets a sentence on that."""
    state = NAMINGS[naming](family, [_balanced(d) for d in deltas])
    if dtype == "fp16" and (reason := _beyond_fp16(state)):
        dtype = "bf16"
        notes.append(f"The weights are saved as bf16 instead of fp16: {reason}.")
    return {k: t.to(DTYPES[dtype]) for k, t in state.items()}


def complete(deltas: list[Delta], family: str, layers: self_check.Layers) -> tuple[list[Delta], list[str]]:
    """`deltas` with rank-1 layers of zeros, which change nothing, where readers would refuse the file or lose a part of it:

    q, k, v and out_proj of a text layer when only some were trained (diffusers, A1111), and one cross-attention layer when
    none was trained by which InvokeAI tells the family. The second value says so in sentences.
    """
    added = []
    for (part, parent), group in self_check.incomplete_attention(deltas).items():
        there = {d.path.rpartition(".")[2] for d in group}
        added += [_zeros(part, f"{parent}.{n}", layers, group[0]) for n in self_check.TEXT_ATTENTION if n not in there]
    keys = sorted(f"{kohya.stem(family, d.part, d.path)}.{self_check.DOWN}" for d in [*deltas, *added])
    cross = next((p for p in layers.get("unet", {}) if p.endswith("attn2.to_k")), None)
    if cross and not self_check.shows_family(keys):
        added.append(_zeros("unet", cross, layers, next((d for d in deltas if d.part == "unet"), deltas[0])))
    notes = [f"{len(added)} layers of zeros were added, which some readers need to take the file."] if added else []
    return deltas + added, notes


def _zeros(part: str, path: str, layers: self_check.Layers, like: Delta) -> Delta:
    """A layer without effect, with the same alpha as `like`."""
    shape = layers[part].get(path) or layers[part]["text_model." + path]
    down, up = torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *(1 for _ in shape[2:]))
    return Delta(part, path, "lora", {"down": down, "up": up}, like.scale * like.tensors["down"].shape[0])


def _rms(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) / tensor.numel() ** 0.5


def _balanced(delta: Delta) -> Delta:
    """The same change with a power of two moved from down to a small up, as in a LoRA that was trained for a few steps only.

    fp16 has steps of 6e-8 below 6e-5, so small values lose their digits there.
    """
    down, up = _rms(delta.tensors["down"]), _rms(delta.tensors["up"]) * abs(delta.scale)
    if not (0 < up < SMALL and up < down):
        return delta
    factor = 2.0 ** round(math.log2(down / up) / 2)
    return replace(delta, tensors={"down": delta.tensors["down"] / factor, "up": delta.tensors["up"] * factor})


def _beyond_fp16(state: Mapping[str, torch.Tensor]) -> str:
    most = max(float(torch.linalg.vector_norm(t, float("inf"))) for t in state.values())
    if most > FP16_MOST:
        return f"the largest is {most:.3g}, fp16 ends at 65504"
    small = [k for k, t in state.items() if 0 < _rms(t) < FP16_LEAST]
    return f"{len(small)} of its tensors are too small, fp16 has steps of 6e-8" if small else ""


def serialise(state: Mapping[str, torch.Tensor], entries: Mapping[str, str]) -> bytes:
    """A safetensors file of `state` with the metadata `entries` and the hashes that go with them."""
    plain = save(dict(state), {k: v for k, v in entries.items() if k.startswith("ss_")})
    return save(dict(state), dict(entries) | metadata.hashes(plain))


def write(path: Path, blob: bytes, verify=lambda part: None) -> None:
    """Put `blob` at `path` in one go: a file beside it, synced and passed to `verify`, takes the place of what stood there.

    Raises ExportError when that cannot be done; the file beside it is gone in any case.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        verify(part)
        run_dir.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise ExportError(
                f"{path} was not saved: the disk is full. It needs {len(blob) / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. "
                f"Make room in {path.parent}, then run again with --resume."
            ) from error
        raise ExportError(
            f"{path} was not saved: {error.strerror or error}. Choose a folder that can be written to, and close other users of it."
        ) from error
    finally:
        part.unlink(missing_ok=True)
