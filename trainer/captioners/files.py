"""A captioner's or masker's model on disk: found by hub id or folder, fetched where it is missing, checked before anything is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.families.sources import SourceError, fetch
from trainer.formats import FormatError
from trainer.formats.metadata import read_header

FIELD = "The captioner's source"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
TEXTS = frozenset(  # small files that transformers reads where they are
    f"{name}.json"
    for name in (
        *("config", "preprocessor_config", "processor_config", "generation_config", "model.safetensors.index"),
        *("tokenizer_config", "special_tokens_map", "added_tokens", "chat_template"),
    )
) | {"chat_template.jinja"}


@dataclass(frozen=True)
class Shape:
    """The files of one kind of captioner or masker.

    Attributes:
        what: for sentences, as in "a BLIP captioning model"; example: a hub id.
        needed: what must be there: of each group the first that is there whole ("a+b" are two files) is fetched.
        types: what config.json may name as model_type; then .safetensors are needed too. Empty for what is no model of transformers.
        problem: (config.json) -> the rest of a sentence on why it cannot be used, or "".
        field: the setting that names the model, for sentences.
    """

    what: str
    example: str
    needed: tuple[tuple[str, ...], ...]
    types: tuple[str, ...] = ()
    problem: Callable[[dict[str, Any]], str] = lambda config: ""
    field: str = FIELD


def resolve(shape: Shape, source: str, say: Callable[[str], None]) -> Path:
    """The local folder of a model, fetched from the hub where `source` is an id. Raises SourceError with a sentence."""
    text = source.strip().strip("\"'")
    path = Path(text).expanduser()
    if text and path.exists():
        check(shape, path)
        return path.resolve()
    if HUB_ID.fullmatch(text):
        anchor = "config.json" if shape.types else shape.needed[0][0]
        found = fetch(
            text,
            say,
            field=shape.field,
            anchor=anchor,
            wanted=lambda repo, entries: _checked(shape, repo, wanted(shape, repo, entries)),
            complete=lambda folder: _is_complete(shape, folder),
        )
        check(shape, found)
        return found
    raise SourceError(
        f"{shape.field} is {source!r}, and there is no such folder. Give the folder of {shape.what}, or a hub id like {shape.example}."
    )


def wanted(shape: Shape, repo: str, entries: list[Any]) -> list[Any]:
    """The files of a hub repository that are opened. Raises SourceError for one that cannot be loaded."""
    names = {f.rfilename for f in entries}
    if problem := _missing(shape, names):
        raise SourceError(f"{shape.field} is {repo!r}, a hub repository where {problem}")
    chosen = {name for group in shape.needed for name in _first(group, names)}
    return [f for f in entries if f.rfilename in chosen or (shape.types and (f.rfilename in TEXTS or WEIGHTS.fullmatch(f.rfilename)))]


def _checked(shape: Shape, repo: str, entries: list[Any]) -> list[Any]:
    """The entries, once config.json, which is small, has shown that gigabytes of another kind are not fetched in vain."""
    from huggingface_hub import hf_hub_download

    if shape.types and (problem := _other(shape, read_json(Path(hf_hub_download(repo, "config.json")), shape.field))):
        raise SourceError(f"{shape.field} is {repo!r}, {problem}")
    return entries


def check(shape: Shape, folder: Path) -> None:
    """Raise SourceError for the first file of a local folder that is missing or damaged, or that is of another kind of model."""
    if not folder.is_dir():
        raise SourceError(f"{shape.field} is {folder}, which is a file. Give the folder of {shape.what}, or a hub id like {shape.example}.")
    names = {p.name for p in folder.iterdir()}
    if problem := _missing(shape, names):
        raise SourceError(f"{shape.field} is {folder}, where {problem}")
    if not shape.types:
        return
    if problem := _other(shape, read_json(folder / "config.json", shape.field)):
        raise SourceError(f"{shape.field} is {folder}, {problem}")
    for name in sorted(n for n in names if WEIGHTS.fullmatch(n)):
        try:
            read_header(folder / name)
        except FormatError as error:
            raise SourceError(f"{shape.field} is {folder}, where {error}") from None


def _other(shape: Shape, config: dict[str, Any]) -> str:
    """The rest of a sentence on a model that is of another kind, by its config.json; empty where it is not."""
    if config.get("model_type") in shape.types:
        return shape.problem(config)
    kind = f"{config.get('model_type')} ({', '.join(config.get('architectures') or ['no architecture named'])})"
    return f"a model of the kind {kind}. Give {shape.what}, like {shape.example}."


def read_json(path: Path, field: str = FIELD) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises SourceError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise SourceError(f"{field} is {path.parent}, where {path.name} cannot be read. Download or copy the model again.") from None


def peek(source: str) -> tuple[set[str], str]:
    """(names of files, config.json's model_type or "") of a folder or hub id, to know which captioner it is for; nothing where it can't
    be told, for which `resolve` has a sentence."""
    text = source.strip().strip("\"'")
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return {p.name for p in folder.iterdir()}, _type(folder / "config.json")
    if not HUB_ID.fullmatch(text):
        return set(), ""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    found: dict[str, Path] = {}
    for name in ("selected_tags.csv", "config.json"):
        try:
            found[name] = Path(hf_hub_download(text, name))  # from the cache where the hub cannot be reached
        except (HTTPError, OSError, ValueError):
            continue
    return set(found), _type(found["config.json"]) if "config.json" in found else ""


def _type(path: Path) -> str:
    try:
        return str(read_json(path).get("model_type", ""))
    except SourceError:
        return ""


def gib(folder: Path, width: Callable[[str, tuple[int, ...]], float]) -> float:
    """GiB of a folder's weights where the numbers of a tensor, by its name and shape, take `width` bytes each."""
    tensors = [item for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) for item in read_header(path)[1].items()]
    return sum(math.prod(shape) * width(name, shape) for name, (_, shape) in tensors) / 2**30


def _first(group: tuple[str, ...], names: set[str]) -> list[str]:
    """The files of the first alternative of a group that is there whole; empty where none is."""
    return next((alternative.split("+") for alternative in group if set(alternative.split("+")) <= names), [])


def _missing(shape: Shape, names: set[str]) -> str:
    """The rest of a sentence on what a folder with these files lacks; empty where nothing does."""
    again = "Download or copy the model again"
    for group in shape.needed:
        if not _first(group, names):
            first, *others = (alternative.replace("+", " and ") for alternative in group)
            if others:
                return f"{first} is missing, and there is no {' or '.join(others)} either. {again}, or give another, like {shape.example}."
            return f"{first} is missing. Give {shape.what}, like {shape.example}."
    if shape.types and not any(WEIGHTS.fullmatch(n) for n in names):
        if pickles := sorted(n for n in names if n.endswith(PICKLES)):
            return (
                f"model.safetensors is missing; {pickles[0]} is a pickle and is not opened. Give one with .safetensors files, "
                f"like {shape.example}."
            )
        return f"model.safetensors is missing. {again}, or give another, like {shape.example}."
    return ""


def _is_complete(shape: Shape, folder: Path) -> bool:
    try:
        check(shape, folder)
    except (SourceError, OSError):
        return False
    return True
