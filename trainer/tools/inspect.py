"""Say what a model file is and, for a LoRA, what is in it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.formats import FormatError, kohya, peft_names
from trainer.formats.metadata import SHOWN, read_header, tensor_hash
from trainer.formats.probe import identify


def inspect(path: Path) -> dict[str, Any]:
    """What stands at `path`, ready for JSON. For every file: path, kind, what, family, bytes.

    For a safetensors file also dtypes {name: tensors}; for a LoRA also trigger_words, metadata (the entries people ask for), hash
    (of the tensors), hash_matches (the file's own entry agrees; None without one), and where this project can read its layers
    naming, parts {part: {modules, ranks, alphas (rank * scale)}}, empty; else unread says why not.
    Raises FormatError for a pickle, a damaged file, or a folder that is no model.
    """
    path = Path(path)
    found = identify(path)
    out: dict[str, Any] = {"path": path.name, "kind": found.kind, "what": found.what, "family": found.family}
    if path.is_dir():
        return out | {"bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file())}
    metadata, tensors = read_header(path)
    out |= {"bytes": path.stat().st_size, "dtypes": dict(Counter(dtype for dtype, _ in tensors.values()))}
    if found.kind != "lora":
        return out
    digest, said = tensor_hash(path), metadata.get("sshs_model_hash")
    words = metadata.get("modelspec.trigger_phrase", "")
    out |= {
        "trigger_words": [w.strip() for w in words.split(",") if w.strip()],
        "metadata": {label: metadata[key] for label, key in SHOWN.items() if key in metadata},
        "hash": digest,
        "hash_matches": None if said is None else said == digest,
    }
    try:
        naming, deltas = read_lora(path)
    except FormatError as error:
        return out | {"unread": str(error)}
    parts: dict[str, Any] = {}
    for d in deltas:
        rank = d.tensors["down"].shape[0]
        row = parts.setdefault(d.part, {"modules": 0, "ranks": Counter(), "alphas": Counter()})
        row["modules"] += 1
        row["ranks"][rank] += 1
        row["alphas"][float(f"{d.scale * rank:.4g}")] += 1
    parts = {p: row | {"ranks": sorted(row["ranks"]), "alphas": sorted(row["alphas"])} for p, row in parts.items()}
    return out | {"naming": naming, "parts": parts, "empty": not any(d.tensors["up"].any() for d in deltas)}


def read_lora(path: Path) -> tuple[str, list]:
    """(naming, deltas) of a LoRA file. Raises FormatError when it is not a plain LoRA of a family that this project knows."""
    from trainer.formats.self_check import read

    found = identify(path)
    if found.kind != "lora":
        raise FormatError(f"{Path(path).name} is {found.what}. Needed here: a LoRA.")
    family = found.family or "sd1"  # the demo base's widths belong to no known family, its names to SD1.x
    if family not in kohya.PREFIXES:
        raise FormatError(f"{Path(path).name} is {found.what}. Read here: LoRAs of {', '.join(kohya.PREFIXES)}.")
    metadata, _ = read_header(path)
    state = read(path)
    if any(k.endswith(peft_names.ENDINGS) for k in state):
        return "peft", peft_names.from_peft(family, state, metadata)
    return "kohya", kohya.from_kohya(family, state)


def format_text(report: dict[str, Any]) -> str:
    """The report of `inspect` as lines for a terminal."""
    size = report["bytes"]
    unit = min(3, int(math.log(size, 1000))) if size else 0
    lines = [f"{report['path']}: {report['what']}", f"size: {size / 1000**unit:.4g} {('bytes', 'kB', 'MB', 'GB')[unit]}"]
    if "dtypes" in report:
        lines.append(f"dtype: {', '.join(f'{d} ({n})' for d, n in report['dtypes'].items())}")
    if report.get("unread"):
        lines.append(f"layers: {report['unread']}")
    if report.get("naming"):
        lines.append(f"naming: {report['naming']}")
    for part, row in report.get("parts", {}).items():
        ranks, alphas = (", ".join(f"{v:g}" for v in row[k]) for k in ("ranks", "alphas"))
        lines.append(f"{part}: {row['modules']} layers, rank {ranks}, alpha {alphas}")
    if report.get("empty"):
        lines.append("This LoRA changes nothing: all its up matrices are zero.")
    if report.get("trigger_words"):
        lines.append(f"trigger words: {', '.join(report['trigger_words'])}")
    lines += [f"{label}: {value}" for label, value in report.get("metadata", {}).items()]
    if "hash" in report:
        remark = {True: "as the file says", False: "NOT what the file says: its tensors were changed", None: "the file states none"}
        lines.append(f"hash: {report['hash'][:12]} ({remark[report['hash_matches']]})")
    return "\n".join(lines)
