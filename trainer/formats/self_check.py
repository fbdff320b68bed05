"""Read an exported LoRA back: will the tools that people use take all of it, and does it say what was trained?

What the tools read is in `readers`. Only plain LoRA and LoCon files are written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from trainer.adapters import Delta
from trainer.formats import FormatError, comfy_names, kohya, peft_names, readers
from trainer.formats.factors import relative_error
from trainer.formats.metadata import read_header
from trainer.formats.readers import TEXT_ATTENTION, Layers, Verdict

# Largest relative error of a layer's change, for each dtype of the file.
TOLERANCES = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}
UPS = (kohya.ENDINGS[1], peft_names.ENDINGS[1])
# the tools that a naming is for, where these are not all
MEANT = {
    ("kohya", "sd3"): ("ComfyUI", "Forge", "sd-scripts"),
    ("peft", "sd3"): ("ComfyUI", "diffusers"),
    "peft": ("diffusers",),
    "comfy": ("ComfyUI",),
}


def meant_for(family: str, naming: str) -> tuple[str, ...]:
    """The tools that a file of this naming should be read by."""
    return MEANT.get((naming, family)) or MEANT.get(naming) or tuple(readers.READERS)


def check(path: Path, family: str, deltas: Iterable[Delta], layers: Layers) -> list[str]:
    """Sentences on all that makes the file at `path` useless; empty when it is good.

    `deltas` is what the file must say (with the layers that export adds), `layers` is `kohya.layers` of the whole base.
    """
    problems = []
    try:
        found = judge(path, family, layers)
        tools = meant_for(family, readers.naming(read_header(path)[1]))
        if lost := set.intersection(*(set(found.unread[tool]) for tool in tools)):
            problems.append(f"No tool would read {len(lost)} of its keys, the first is {min(lost)}.")
        problems += content_problems(path, family, deltas, layers)
    except FormatError as error:
        problems.append(str(error))
    return problems


def judge(path: Path, family: str, layers: Layers) -> Verdict:
    """What each tool makes of the file at `path`."""
    state = read(path)
    return readers.judge(family, state, layers, readers.alphas_of(state))


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in file order, copied to memory: a mapped file could not be replaced on Windows. Raises FormatError."""
    _, tensors = read_header(path)  # has the better sentences on what is wrong
    try:
        state = load(Path(path).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{Path(path).name} is damaged: {error}. Download or copy it again.") from error
    return {key: state[key] for key in tensors}


def deltas_of(family: str, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, list[Delta]]:
    """(naming, layers) of a file's tensors. Raises FormatError where they are no plain LoRA of `family`."""
    naming = readers.naming(state)
    if naming == "peft":
        return naming, peft_names.from_peft(family, state, metadata)
    if naming == "comfy":
        return naming, comfy_names.from_comfy(family, state)
    return "kohya", kohya.from_kohya(family, state)


def content_problems(path: Path, family: str, deltas: Iterable[Delta], layers: Layers) -> list[str]:
    """Where the file is not what was trained: values that are not finite, layers too many or too few, shapes, differences.

    Raises FormatError when the file cannot be read as a plain LoRA.
    """
    metadata, tensors = read_header(path)
    state = read(path)
    bad = [f"{key} holds a value that is not finite." for key, t in state.items() if not torch.isfinite(t).all()]
    if bad:
        return bad
    live = {(d.part, kohya.canonical(d.part, d.path)): d for d in deltas}
    found = {(d.part, kohya.canonical(d.part, d.path)): d for d in deltas_of(family, state, metadata)[1]}
    shapes = {(part, kohya.canonical(part, p)): shape for part, paths in layers.items() for p, shape in paths.items()}
    problems = [f"{part} {path} was trained but is not in the file." for part, path in live if (part, path) not in found]
    for key in found.keys() - live.keys():  # q, k or v that came with the others in SD3's fused layer is zero
        if found[key].tensors["up"].any():
            problems.append(f"{' '.join(key)} is in the file but was not trained.")
    tolerance = max(TOLERANCES[dtype] for dtype, _ in tensors.values())
    for key in sorted(live.keys() & found.keys()):
        if key not in shapes:
            problems.append(f"{' '.join(key)} is no layer of the base.")
            continue
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
    return not any(t.any() for key, t in read(path).items() if key.endswith(UPS))


def incomplete_attention(deltas: Iterable[Delta]) -> dict[tuple[str, str], list[Delta]]:
    """{(part, path of a text layer's attention): its deltas} where only some of q, k, v and out_proj are there."""
    groups: dict[tuple[str, str], list[Delta]] = {}
    for d in deltas:
        parent, _, name = d.path.rpartition(".")
        if name in TEXT_ATTENTION and d.part != "unet":
            groups.setdefault((d.part, parent), []).append(d)
    return {k: v for k, v in groups.items() if len(v) < len(TEXT_ATTENTION)}
