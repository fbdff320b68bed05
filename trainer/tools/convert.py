"""Rewrite a LoRA between kohya naming (A1111, Forge, ComfyUI and others) and PEFT naming (diffusers)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trainer.formats import FormatError, metadata, peft_names
from trainer.formats.probe import identify
from trainer.tools.inspect import read_lora


def convert(src: Path, dst: Path, naming: str) -> list[str]:
    """Write the LoRA at `src` to `dst` with `naming` (`kohya` or `peft`), in its own dtype, with its metadata and new hashes.

    Returns notes on what the readers may miss (see `self_check.check`). Layers of zeros may be added: see `export.complete`.
    Raises FormatError when `dst` exists, when `src` is no plain LoRA of a known family, or when it has that naming already.
    """
    from trainer.formats import export, self_check

    src, dst = Path(src), Path(dst)
    if naming not in export.NAMINGS:
        raise FormatError(f"naming is {naming!r}; it must be one of {', '.join(export.NAMINGS)}.")
    if dst.exists():
        raise FormatError(f"{dst} exists already and is not overwritten. Choose another name or move it away.")
    before, deltas = read_lora(src)
    if before == naming:
        raise FormatError(f"{src.name} has {naming} naming already. Choose the other one.")
    entries, header = metadata.read_header(src)
    family = identify(src).family or "sd1"
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for d in deltas:  # a file shows the layers that it changes; those of the rest of the model are not known here
        layers.setdefault(d.part, {})[d.path] = (d.tensors["up"].shape[0], *d.tensors["down"].shape[1:])
    for part, parent in self_check.incomplete_attention(deltas):
        square = next(shape for path, shape in layers[part].items() if path.startswith(parent + "."))
        layers[part] |= {f"{parent}.{n}": square for n in self_check.TEXT_ATTENTION}
    deltas, notes = export.complete(deltas, family, layers)
    dtype = Counter(dtype for dtype, shape in header.values() if shape).most_common(1)[0][0]
    state = export.tensors(deltas, family, naming, {"F16": "fp16", "BF16": "bf16"}.get(dtype, "fp32"), notes)
    entries = {k: v for k, v in metadata.with_family(entries, family).items() if k != peft_names.CONFIGS}

    def verify(part: Path) -> None:
        if wrong := self_check.content_problems(part, family, deltas, layers):
            raise FormatError(f"{src.name} could not be converted without loss: {wrong[0]} Convert from a file of higher precision.")
        notes.extend(self_check.reader_problems(part, family, layers))

    export.write(dst, export.serialise(state, entries), verify)
    return notes
