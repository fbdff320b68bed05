"""Captions of many images in one file, as other programs write them: JSON lines, CSV, and kohya's metadata. Pure text, no files of a data set.

metadata.jsonl and metadata.csv of a Hugging Face image folder: an object or row for each image, with its path and its text under any of
the names below. JSON: a list of such objects, or one object of {path: text} or {path: {"caption", "tags"}} (kohya's finetune metadata, whose
paths may lack the ending).
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import PurePosixPath
from typing import Any

from trainer.data.scan import CROPS, OTHER_SUFFIXES
from trainer.data.scan import SUFFIXES as READ

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")
OURS = (CROPS, "dataset.json")  # which lie in an exported data set and are no list of captions
IMAGES = {*READ, *OTHER_SUFFIXES}
MOST_BYTES = 64 * 2**20
FILES = ("file_name", "filename", "image", "file", "path", "image_path", "image_file", "img")
TEXTS = ("text", "caption", "prompt", "captions", "description", "tags")


def read(label: str, raw: bytes) -> dict[str, str] | None:
    """{label of an image: its caption} of a list whose own name with folders is `label`; None where it is no such list."""
    path = PurePosixPath(label)
    if path.suffix.lower() not in SUFFIXES or path.name.lower() in OURS:
        return None
    try:
        rows = _rows(path.suffix.lower(), raw)
    except (ValueError, csv.Error, RecursionError):
        return None
    found = {}
    for row in rows:
        file, text = _first(row, FILES), _text(row)
        if file and text is not None:
            found[str(path.parent / file.replace("\\", "/").lstrip("/"))] = text
    return found or None


def _rows(suffix: str, raw: bytes) -> list[dict[str, Any]]:
    if suffix in (".csv", ".tsv"):
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", errors="replace")
        table = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","))
        head = [cell.strip().casefold() for cell in table[0]] if table else []
        if not set(head) & set(FILES):  # without a line of names: the image, then its caption
            head = ["file", "text"]
        else:
            table = table[1:]
        return [dict(zip(head, row, strict=False)) for row in table]
    if suffix == ".json":
        found = json.loads(raw.decode("utf-8-sig"))
        if isinstance(found, dict):
            found = [
                {"file": k} | (v if isinstance(v, dict) else {"text": v}) for k, v in found.items() if isinstance(v, dict) or _is_image(k)
            ]
    else:
        found = [json.loads(line) for line in raw.decode("utf-8-sig").splitlines() if line.strip()]
    return [{str(k).casefold(): v for k, v in row.items()} for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((v.strip() for n in names if isinstance(v := row.get(n), str) and v.strip()), "")


def _text(row: dict[str, Any]) -> str | None:
    """The caption of a row, with kohya's tags behind it; the first of several; None where the row has no such field."""
    held = [n for n in TEXTS if n in row]
    if not held:
        return None
    value = row[held[0]]
    text = (value[0] if value else "") if isinstance(value, list) and held[0] != "tags" else value
    if not isinstance(text, str | list):
        return None
    tags = row.get("tags") if held[0] == "caption" else None
    parts = [", ".join(map(str, p)) if isinstance(p, list) else str(p) for p in (text, tags) if p]
    return ", ".join(" ".join(p.split()) for p in parts)
