"""The user's settings: one JSON file in the data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import Problem
from app.paths import ROOT, Home
from trainer.run_dir import write_atomic

FOLDERS = ("model_folders", "lora_folder", "run_folders")


class Settings(BaseModel):
    """What the settings page edits. Folders may start with `~`; those that are gone since they were named are kept and passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_folders: tuple[str, ...] = ()  # looked through for base models, beside the usual places of other tools
    lora_folder: str = ""  # where "Copy to my LoRA folder" copies
    run_folders: tuple[str, ...] = (str(ROOT / "runs"),)  # also listed on the runs page; command-line runs stand there
    theme: Literal["system", "light", "dark"] = "system"
    memory: Literal["auto", "low"] = "auto"  # low: gradient checkpointing on, batches cut into single images
    sentences: str = ""  # hub id or folder of the captioner behind the button; empty: the first that is offered
    tags: str = ""
    prompts: dict[str, Annotated[str, Field(max_length=4000)]] = {}  # what a captioner is told, by purpose; what is missing is its own
    tag_probability: float = Field(0.35, ge=0.05, le=1)  # tags from this probability on are written
    blocked_tags: str = ""  # tags that are never written, with commas between
    captioners: dict[str, Literal["sentences", "tags"]] = {}  # the button last used for each model file
    notify: bool = False  # browser notification at a run's end
    masker: str = "CIDAS/clipseg-rd64-refined"  # hub id or folder of the model that makes masks from words


def load(home: Home) -> Settings:
    """The settings, or the defaults where the file is missing or damaged."""
    try:
        return Settings.model_validate_json(home.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Settings()


def check_folders(home: Home, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with each folder's path as it is meant, without quotes and blanks around it.

    Raises Problem for folders that are not there. One that was there when it was named may be gone now: a disk that is not plugged in
    must not stand in the way of another change.
    """
    now, cleaned, errors = load(home).model_dump(), dict(changes), {}
    for key in FOLDERS:
        named = changes.get(key)
        several = isinstance(named, (list, tuple))
        if not (isinstance(named, str) or (several and all(isinstance(path, str) for path in named))):
            continue  # not named, or of a wrong kind, for which `save` has a sentence
        paths = [path.strip().strip("\"'").strip() for path in (named if several else [named])]
        cleaned[key] = [path for path in paths if path] if several else paths[0]
        known = now[key] if several else [now[key]]
        if said := [text for path in paths if path and path not in known and (text := _not_there(path))]:
            errors[key] = " ".join(said)
    if errors:
        raise Problem(" ".join(errors.values()), errors=errors)
    return cleaned


def _not_there(path: str) -> str:
    """Why a path is no folder of this machine, as a sentence, or ""."""
    try:
        folder = Path(path).expanduser()
        if not folder.is_absolute():
            return f"{path} is not a full path. Give the folder's whole path, like /home/me/models or C:\\models."
        if folder.is_dir():
            return ""
        return (
            f"{path} is a file. Give the folder in which it lies."
            if folder.exists()
            else f"There is no folder {path}. Check its spelling, or make it first."
        )
    except (OSError, RuntimeError, ValueError) as error:  # a name that cannot be, or `~nobody`
        return f"{path[:200]} cannot be a folder: {error}. Give the folder's whole path."


def save(home: Home, changes: dict[str, Any]) -> Settings:
    """Change some settings. Raises Problem for a value that is not allowed."""
    try:
        new = Settings.model_validate(load(home).model_dump() | changes)
    except ValidationError as error:
        found = {".".join(map(str, e["loc"])): f"{e['loc'][0]} is {e['input']!r}: {e['msg']}." for e in error.errors()}
        raise Problem(" ".join(found.values()), errors=found) from None
    write_atomic(home.settings, new.model_dump_json(indent=1) + "\n", "the settings")
    return new
