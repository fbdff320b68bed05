"""The user's settings: one JSON file in the data folder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from app.errors import Problem
from app.paths import ROOT, Home
from trainer.run_dir import write_atomic


class Settings(BaseModel):
    """What the settings page edits. Folders may start with `~`; those that do not exist are kept and passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_folders: tuple[str, ...] = ()  # looked through for base models, beside the usual places of other tools
    lora_folder: str = ""  # where "Copy to my LoRA folder" copies
    run_folders: tuple[str, ...] = (str(ROOT / "runs"),)  # also listed on the runs page; command-line runs stand there
    theme: Literal["system", "light", "dark"] = "system"
    memory: Literal["auto", "low"] = "auto"  # low: gradient checkpointing on, batches cut into single images
    sentences: str = "Salesforce/blip-image-captioning-large"  # hub id or folder of the captioner behind the button
    tags: str = ""
    captioners: dict[str, Literal["sentences", "tags"]] = {}  # the button last used for each model file
    notify: bool = False  # browser notification at a run's end


def load(home: Home) -> Settings:
    """The settings, or the defaults where the file is missing or damaged."""
    try:
        return Settings.model_validate_json(home.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Settings()


def save(home: Home, changes: dict[str, Any]) -> Settings:
    """Change some settings. Raises Problem for a value that is not allowed."""
    try:
        new = Settings.model_validate(load(home).model_dump() | changes)
    except ValidationError as error:
        found = {".".join(map(str, e["loc"])): f"{e['loc'][0]} is {e['input']!r}: {e['msg']}." for e in error.errors()}
        raise Problem(" ".join(found.values()), errors=found) from None
    write_atomic(home.settings, new.model_dump_json(indent=1) + "\n", "the settings")
    return new
