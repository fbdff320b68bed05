"""Write a trained LoRA as the file that people use, whole or not at all, and check it by reading it back."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from trainer.adapters import Delta
from trainer.formats import FormatError, comfy_names, factors, kohya, metadata, peft_names, readers, sd3_names, self_check
from trainer.run_dir import RunError, write_atomic

NAMINGS = {"kohya": kohya.to_kohya, "peft": peft_names.to_peft, "comfy": comfy_names.to_comfy}
SECOND = {("sd3", "kohya"): "peft"}  # no single file of SD3 reaches the tools of both camps: a second one, NAME_diffusers, does
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FP16_MOST = 6e4  # leaves a little below fp16's 65504
FP16_LEAST = 2.0**-16  # root mean square below which fp16's rounding shows in the product


class ExportError(FormatError):
    """The file was not written; nothing of it was left behind, and an older file of that name still stands."""


@dataclass(frozen=True)
class Exported:
    """`modules`: layers for each part; `sha256`: of the whole file, hex; `notes`: sentences on what was done differently.

    `also`: what was written beside it: SD3's second file, NAME.json, NAME.png. `unread`: {tool: keys that it would leave out}, of SD3's
    two files the better one; `vouched`: the tools that take a file whole and right.
    """

    path: Path
    bytes: int
    modules: dict[str, int]
    sha256: str
    notes: tuple[str, ...]
    also: tuple[Path, ...] = ()
    unread: dict[str, list[str]] = field(default_factory=dict)
    vouched: tuple[str, ...] = ()

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
    picture: Path | None = None,
    thumbnail: bool = False,
    sidecars: Iterable[str] = ("json",),
) -> Exported:
    """Write `deltas` to `path` (ending in .safetensors), checked, for SD3 with kohya names also NAME_diffusers.safetensors.

    `naming` is a key of NAMINGS, `dtype` one of DTYPES; fp16 becomes bf16 where it cannot hold the weights (a note says so).
    `layers` is `kohya.layers` of the whole base. Layers of zeros are added where readers need them: see `complete`.
    `picture` shows what the LoRA does: with `thumbnail` it goes into the metadata, with "png" in `sidecars` beside the file as NAME.png;
    "json" there writes NAME.json where there are trigger words. An older NAME.json of this name is then written over.
    Raises ExportError when the disk is full, the file cannot be written, or a written file fails the self-check.
    """
    path = Path(path)
    deltas = list(deltas)
    if not deltas:
        raise ExportError(f"{path.name} would be empty: no layer was trained. Choose at least one part and target.")
    deltas, notes = complete(deltas, family, layers)
    version = metadata.version_of(family, facts.prediction, sd3_names.variant(layers.get("unet", {})))
    small = metadata.thumbnail(picture) if picture and thumbnail else ""
    verdicts: list[readers.Verdict] = []

    def make(target: Path, names: str) -> tuple[bytes, Callable[[Path], None]]:
        state = tensors(deltas, family, names, dtype, notes)

        def verify(part: Path) -> None:
            problems = self_check.check(part, family, deltas, layers)
            if problems:
                more = f" ({len(problems) - 3} more)" if len(problems) > 3 else ""
                raise ExportError(
                    f"{target.name} failed its check and was not saved: {' '.join(problems[:3])}{more} Resume from an earlier checkpoint."
                )
            verdicts.append(self_check.judge(part, family, layers))
            notes.extend(verdicts[-1].sentences(self_check.meant_for(family, names)))

        return serialise(state, metadata.build(version, facts, target.stem, small)), verify

    blob, verify = make(path, naming)
    also = []

    def verify_both(part: Path) -> None:
        """The first file takes its place only when the second one has taken its own."""
        verify(part)
        if second := SECOND.get((family, naming)):
            also.append(path.with_name(f"{path.stem}_diffusers{path.suffix}"))
            write(also[0], *make(also[0], second))

    write(path, blob, verify_both)
    if not any(d.scale and d.tensors["up"].any() for d in deltas):
        notes.append("The LoRA changes nothing yet: all its up matrices are zero.")
    if "json" in sidecars and facts.trigger_words:
        also.append(path.with_suffix(".json"))
        write(also[-1], metadata.sidecar(family, facts.trigger_words, facts.description).encode())
    if "png" in sidecars and picture:
        also.append(path.with_suffix(".png"))
        write(also[-1], _png(picture))
    modules = dict(Counter(d.part for d in deltas))
    vouched = dict.fromkeys(tool for v in verdicts for tool in v.vouched)
    unread = {tool: min((v.unread[tool] for v in verdicts), key=len) for tool in verdicts[0].unread}
    digest = hashlib.sha256(blob).hexdigest()
    return Exported(path, len(blob), modules, digest, tuple(dict.fromkeys(notes)), tuple(also), unread, tuple(vouched))


def _png(picture: Path) -> bytes:
    from PIL import Image

    raw = io.BytesIO()
    with Image.open(picture) as image:
        image.save(raw, "PNG")
    return raw.getvalue()


def tensors(deltas: list[Delta], family: str, naming: str, dtype: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """What the file holds. Where fp16 cannot hold it, it is bf16 and `notes` gets a sentence on that."""
    state = NAMINGS[naming](family, deltas)
    if dtype == "fp16" and (reason := _beyond_fp16(state)):
        dtype = "bf16"
        notes.append(f"The weights are saved as bf16 instead of fp16: {reason}.")
    return {k: t.to(DTYPES[dtype], copy=True) for k, t in state.items()}  # safetensors takes no tensors that share memory


def complete(deltas: list[Delta], family: str, layers: self_check.Layers) -> tuple[list[Delta], list[str]]:
    """`deltas` with rank-1 layers of zeros, which change nothing, where readers would refuse the file or lose a part of it:

    q, k, v and out_proj of a text layer when only some were trained (diffusers, A1111), and one cross-attention layer when
    none was trained by which InvokeAI tells the family. The second value says so in sentences.
    """
    added = []
    for (part, parent), group in self_check.incomplete_attention(deltas).items():
        there = {d.path.rpartition(".")[2] for d in group}
        added += [_zeros(part, f"{parent}.{n}", layers, group[0]) for n in readers.TEXT_ATTENTION if n not in there]
    keys = sorted(f"{kohya.stem(family, d.part, d.path)}.{kohya.ENDINGS[0]}" for d in [*deltas, *added])
    cross = next((p for p in layers.get("unet", {}) if p.endswith("attn2.to_k")), None)
    if cross and not readers.shows_family(family, keys):
        added.append(_zeros("unet", cross, layers, next((d for d in deltas if d.part == "unet"), deltas[0])))
    notes = [f"{len(added)} layers of zeros were added, which some readers need to take the file."] if added else []
    return deltas + added, notes


def _zeros(part: str, path: str, layers: self_check.Layers, like: Delta) -> Delta:
    """A layer without effect, with the same alpha as `like`."""
    known = {kohya.canonical(part, p): shape for p, shape in layers[part].items()}
    shape = known[kohya.canonical(part, path)]
    down, up = torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *(1 for _ in shape[2:]))
    return Delta(part, path, "lora", {"down": down, "up": up}, like.scale * like.tensors["down"].shape[0])


def _beyond_fp16(state: Mapping[str, torch.Tensor]) -> str:
    most = max(float(torch.linalg.vector_norm(t, float("inf"))) for t in state.values())
    if most > FP16_MOST:
        return f"the largest is {most:.3g}, fp16 ends at 65504"
    small = [k for k, t in state.items() if 0 < factors.rms(t) < FP16_LEAST]
    return f"{len(small)} of its tensors are too small, fp16 has steps of 6e-8" if small else ""


def serialise(state: Mapping[str, torch.Tensor], entries: Mapping[str, str]) -> bytes:
    """A safetensors file of `state` with the metadata `entries` and the hashes that go with them."""
    plain = save(dict(state), {k: v for k, v in entries.items() if k.startswith("ss_")})
    return save(dict(state), dict(entries) | metadata.hashes(plain))


def write(path: Path, blob: bytes, verify: Callable[[Path], None] | None = None) -> None:
    """Put `blob` at `path` in one go, after `verify` has seen it; see `run_dir.write_atomic`. Raises ExportError where that fails."""
    try:
        write_atomic(path, blob, path.name, verify)
    except RunError as error:
        raise ExportError(str(error)) from error
    except OSError as error:
        raise ExportError(
            f"{path} was not saved: {error.strerror or error}. Choose a folder that can be written to, and close other users of it."
        ) from error
