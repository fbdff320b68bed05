"""Rewrite a LoRA in another naming: kohya's (A1111, Forge, ComfyUI and others), PEFT's (diffusers) or ComfyUI's own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trainer.formats import FormatError, metadata, peft_names
from trainer.formats.probe import identify
from trainer.tools.inspect import read_lora

NAMINGS = {"kohya": "kohya", "diffusers": "peft", "comfy": "comfy"}  # what people say -> naming


def target_of(src: Path, to: str) -> Path:
    """Where `src` goes unless told otherwise: NAME_kohya.safetensors and the like, beside it."""
    return Path(src).with_name(f"{Path(src).stem}_{to}.safetensors")


def convert(src: Path, dst: Path, to: str) -> list[str]:
    """Write the LoRA at `src` to `dst` with the naming `to` (kohya, diffusers or peft, comfy), in its own dtype, with its metadata.

    The change of every layer stays what it was, up to the dtype's rounding, which is checked by reading back. SD3's q, k and v are
    fused or split. Returns notes on what the tools that the naming is for may miss. Layers of zeros may be added: see `export.complete`.
    Raises FormatError when `dst` exists, when `src` is no plain LoRA of a known family, or when it is that file already.
    """
    import torch

    from trainer.formats import export, readers, sd3_names, self_check

    src, dst = Path(src), Path(dst)
    naming = NAMINGS.get(to, to)
    if naming not in NAMINGS.values():
        raise FormatError(f"The naming is {to!r}; it must be one of {', '.join(NAMINGS)}.")
    if dst.exists():
        raise FormatError(f"{dst} exists already and is not overwritten. Choose another name or move it away.")
    if not dst.parent.is_dir():
        raise FormatError(f"{dst.parent} is no folder. Make it first, or choose another.")
    _, deltas = read_lora(src)
    if not deltas:
        raise FormatError(f"{src.name} has no layers, so there is nothing to convert.")
    entries, header = metadata.read_header(src)
    family = identify(src).family or "sd1"
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for d in deltas:  # a file shows the layers that it changes; those of the rest of the model are not known here
        layers.setdefault(d.part, {})[d.path] = (d.tensors["up"].shape[0], *d.tensors["down"].shape[1:])
    for part, parent in self_check.incomplete_attention(deltas):
        square = next(shape for path, shape in layers[part].items() if path.startswith(parent + "."))
        layers[part] |= {f"{parent}.{n}": square for n in readers.TEXT_ATTENTION}
    deltas, notes = export.complete(deltas, family, layers)
    dtype = Counter(dtype for dtype, shape in header.values() if shape).most_common(1)[0][0]
    state = export.tensors(deltas, family, naming, {"F16": "fp16", "BF16": "bf16"}.get(dtype, "fp32"), notes)
    if state.keys() == header.keys():
        before = self_check.read(src)
        if all(before[k].shape == t.shape and torch.equal(before[k].to(t.dtype), t) for k, t in state.items()):
            raise FormatError(f"{src.name} has {to} naming already, and nothing in it needs a change. Choose another naming.")
    prediction = {"v": "v_prediction"}.get(entries.get("modelspec.prediction_type", ""), "epsilon")
    version = metadata.version_of(family, prediction, sd3_names.variant(layers.get("unet", {})))
    entries = {k: v for k, v in metadata.with_family(entries, version).items() if k != peft_names.CONFIGS}

    def verify(part: Path) -> None:
        if wrong := self_check.content_problems(part, family, deltas, layers):
            raise FormatError(f"{src.name} could not be converted without loss: {wrong[0]} Convert from a file of higher precision.")
        notes.extend(self_check.judge(part, family, layers).sentences(self_check.meant_for(family, naming)))

    export.write(dst, export.serialise(state, entries), verify)
    return notes
