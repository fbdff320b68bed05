"""Read an exported LoRA back: will the tools that people use take all of it, and does it say what was trained?

The rules are those that the readers' own code showed; a reader is one row. Only plain LoRA and LoCon files are written, so the
endings a reader knows beyond those do not matter here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from trainer.adapters import Delta
from trainer.formats import FormatError, kohya, peft_names
from trainer.formats.metadata import read_header

# Largest relative error of a layer's change, for each dtype of the file.
TOLERANCES = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}
DOWN, UP, ALPHA = kohya.ENDINGS
Layers = Mapping[str, Mapping[str, tuple[int, ...]]]


class Reader(NamedTuple):
    """What a tool takes beyond the family's own stems (`aliases`: prefixes), and what of them it does not read (`unread`)."""

    aliases: tuple[str, ...] = ()
    unread: str = r"(?!)"


READERS = {
    "sd1": {
        "ComfyUI": Reader(("lora_te1_",)),
        "Forge": Reader(("lora_te1_",)),
        "AUTOMATIC1111": Reader(("lora_te1_",)),
        "SD.Next": Reader(),
        "InvokeAI": Reader(),
        "diffusers": Reader(("lora_te1_",)),
        "sd-scripts": Reader(unread=r"lora_unet_(conv_in|conv_out|time_embedding_linear_[12])$"),
        "LyCORIS": Reader(),
    }
}
# InvokeAI tells the family by the first of these keys; a time_emb_proj in front makes it take an SD1 file for SDXL.
FAMILY_KEYS = re.compile(r"(?P<shows>_attn2_to_[kv]\.lora_down|_self_attn_.*\.lora_down)|_time_emb_proj\.lora_down")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def check(path: Path, family: str, deltas: Iterable[Delta], layers: Layers) -> list[str]:
    """Sentences on all that is wrong with the file at `path`; empty when it is good.

    `deltas` is what the file must say (with the layers that export adds), `layers` is `kohya.layers` of the whole base.
    """
    problems = []
    try:
        problems += reader_problems(path, family, layers)
        problems += content_problems(path, family, deltas, layers)
    except FormatError as error:
        problems.append(str(error))
    return problems


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in file order, copied to memory: a mapped file could not be replaced on Windows. Raises FormatError."""
    _, tensors = read_header(path)  # has the better sentences on what is wrong
    try:
        state = load(Path(path).read_bytes())
    except SafetensorError as error:
        raise FormatError(f"{Path(path).name} is damaged: {error}. Download or copy it again.") from error
    return {key: state[key] for key in tensors}


def reader_problems(path: Path, family: str, layers: Layers) -> list[str]:
    """What the readers would leave unread, scale wrongly or refuse. A file in PEFT naming has one reader, diffusers."""
    state = read(path)
    if any(key.endswith(peft_names.ENDINGS) for key in state):
        known = {peft_names.stem(family, part, p) + e for part, paths in layers.items() for p in paths for e in peft_names.ENDINGS}
        return _left_over({"diffusers": [k for k in state if k not in known]})
    prefixes = kohya.PREFIXES[family]
    known = {kohya.stem(family, part, p) for part, paths in layers.items() for p in paths}

    def reads(reader: Reader, key: str) -> bool:
        name, _, ending = key.partition(".")
        for alias in reader.aliases:
            if name.startswith(alias):
                name = prefixes[kohya.ALIASES[family][alias]] + name.removeprefix(alias)
        return ending in kohya.ENDINGS and name in known and not re.search(reader.unread, name)

    problems = _left_over({n: [k for k in state if not reads(r, k)] for n, r in READERS[family].items()})
    for part, prefix in prefixes.items():
        names = {k.partition(".")[0] for k in state if k.startswith(prefix)}
        without = sorted(n for n in names if f"{n}.{ALPHA}" not in state)
        if without:
            problems.append(f"{len(without)} layers of {part} have no alpha, the first is {without[0]}; LyCORIS refuses the file.")
        alphas = sorted({float(state[f"{n}.{ALPHA}"]) for n in names if f"{n}.{ALPHA}" in state})
        if len(alphas) > 1:
            problems.append(f"{part} has alphas {', '.join(f'{a:g}' for a in alphas)}; diffusers takes one for all and scales wrongly.")
        if any(a <= 0 for a in alphas):
            problems.append(f"{part} has an alpha of {alphas[0]:g}, which readers take differently; it must be positive.")
    groups: dict[str, set[str]] = {}
    for name, end in re.findall(r"^(lora_te.*_self_attn_)(\w+_proj)\.", "\n".join(state), re.M):
        groups.setdefault(name, set()).add(end)
    problems += [
        f"{name}* has only {', '.join(sorted(ends))}; diffusers and AUTOMATIC1111 want q, k, v and out_proj or none of them."
        for name, ends in groups.items()
        if len(ends) < len(TEXT_ATTENTION)
    ]
    if not shows_family(state):
        problems.append("InvokeAI cannot tell the family: no cross-attention or text attention layer comes before the others.")
    return problems


def content_problems(path: Path, family: str, deltas: Iterable[Delta], layers: Layers) -> list[str]:
    """Where the file is not what was trained: values that are not finite, layers too many or too few, shapes, differences.

    Raises FormatError when the file cannot be read as a plain LoRA.
    """
    metadata, tensors = read_header(path)
    state = read(path)
    bad = [f"{key} holds a value that is not finite." for key, t in state.items() if not torch.isfinite(t).all()]
    if bad:
        return bad
    peft = any(key.endswith(peft_names.ENDINGS) for key in state)
    written = peft_names.from_peft(family, state, metadata) if peft else kohya.from_kohya(family, state)
    live = {(d.part, d.path.removeprefix("text_model.")): d for d in deltas}
    found = {(d.part, d.path): d for d in written}
    shapes = {(part, p.removeprefix("text_model.")): shape for part, paths in layers.items() for p, shape in paths.items()}
    problems = [f"{part} {path} was trained but is not in the file." for part, path in live if (part, path) not in found]
    problems += [f"{part} {path} is in the file but was not trained." for part, path in found if (part, path) not in live]
    tolerance = max(TOLERANCES[dtype] for dtype, _ in tensors.values())
    for key in sorted(live.keys() & found.keys() & shapes.keys()):
        down, up, shape = found[key].tensors["down"], found[key].tensors["up"], shapes[key]
        want = (down.shape[0], *shape[1:]), (shape[0], down.shape[0], *(1 for _ in shape[2:]))
        if (tuple(down.shape), tuple(up.shape)) != want:
            problems.append(f"{' '.join(key)} has down {tuple(down.shape)} and up {tuple(up.shape)}; they must be {want[0]} and {want[1]}.")
            continue
        error = relative_error(found[key], live[key])
        if not error <= tolerance:
            problems.append(f"{' '.join(key)} is off by {error:.2g} of what was trained; rounding explains {tolerance:g} at most.")
    return problems


def is_empty(path: Path) -> bool:
    """True when every `up` matrix of the file is zero, so that the LoRA changes nothing (it was not trained)."""
    return not any(t.any() for key, t in read(path).items() if key.endswith((UP, peft_names.ENDINGS[1])))


def incomplete_attention(deltas: Iterable[Delta]) -> dict[tuple[str, str], list[Delta]]:
    """{(part, path of a text layer's attention): its deltas} where only some of q, k, v and out_proj are there."""
    groups: dict[tuple[str, str], list[Delta]] = {}
    for d in deltas:
        parent, _, name = d.path.rpartition(".")
        if name in TEXT_ATTENTION and d.part != "unet":
            groups.setdefault((d.part, parent), []).append(d)
    return {k: v for k, v in groups.items() if len(v) < len(TEXT_ATTENTION)}


def shows_family(keys: Iterable[str]) -> bool:
    """True when InvokeAI can tell that kohya keys in this order belong to an SD1 or SD2 file."""
    first = next((m for key in keys if (m := FAMILY_KEYS.search(key))), None)
    return bool(first and first["shows"])


def _left_over(left: Mapping[str, list[str]]) -> list[str]:
    by_keys: dict[tuple[str, ...], list[str]] = {}
    for reader, keys in left.items():
        if keys:
            by_keys.setdefault(tuple(keys), []).append(reader)
    return [f"{', '.join(readers)} would leave {len(keys)} keys unread, the first is {keys[0]}." for keys, readers in by_keys.items()]


def relative_error(found: Delta, live: Delta) -> float:
    """||change found - change live|| / ||change live||, Frobenius; 0 when both are zero, infinite when only the live one is.

    Computed in float64 from the factors' Gram matrices (||up @ down||^2 = sum(up'up * down down')), never from whole weights.
    """

    def factors(d: Delta) -> tuple[torch.Tensor, torch.Tensor]:
        return d.tensors["down"].double().flatten(1), d.tensors["up"].double().flatten(1) * d.scale

    def norm(down: torch.Tensor, up: torch.Tensor) -> float:
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    (down_1, up_1), (down_2, up_2) = factors(found), factors(live)
    error, size = norm(torch.cat([down_1, down_2]), torch.cat([up_1, -up_2], 1)), norm(down_2, up_2)
    return error / size if size else (float("inf") if error else 0.0)
