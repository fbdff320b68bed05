"""Requests to a live run: one JSON file each in `control/`, put there by rename, taken and answered by the trainer.

    kind     payload
    stop                             end after this step with a resumable checkpoint and an exported LoRA
    save                             export the LoRA and write a checkpoint now
    preview                          make sample images now
    prompts  {"prompts": ["..."]}    what sample images show from the next ones on, 1 to 16 of them
    visits   {"visits": 120}         the run's new total length, at least one step past where it stands

An `answered` event names the request by its id; its detail is "done", or a sentence on why nothing was done.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from trainer.run_dir import RunDir

CHANGES = ("prompts", "visits")
REQUESTS = ("stop", "save", "preview", *CHANGES)
MOST_PROMPTS, MOST_VISITS = 16, 100_000


@dataclass(frozen=True)
class Request:
    id: str
    kind: str
    payload: dict[str, Any] = field(default_factory=dict)


def send(run: RunDir, kind: str, payload: dict[str, Any] | None = None) -> str:
    """Put a request before a run; returns its id, by which an `answered` event will name it.

    Raises ValueError with a sentence for an unknown kind or a payload that cannot be used.
    """
    if kind not in REQUESTS:
        raise ValueError(f"request is {kind!r}; it must be one of {', '.join(REQUESTS)}.")
    name = uuid.uuid4().hex
    if text := wrong(Request(name, kind, payload or {})):
        raise ValueError(text)
    run.control.mkdir(parents=True, exist_ok=True)
    temp = run.control / f".{name}.tmp"
    temp.write_text(json.dumps({"kind": kind, "payload": payload or {}}), encoding="utf-8")
    temp.rename(run.control / f"{name}.json")
    return name


def take(run: RunDir) -> list[Request]:
    """Take every waiting request, oldest first; each is handed out once. Unknown kinds and payloads are handed out as they are,
    a file that is no request as `unreadable`."""
    requests = []
    for path in sorted(run.control.glob("*.json"), key=lambda p: p.stat().st_mtime_ns):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            kind, payload = str(said["kind"]), dict(said.get("payload") or {})
        except (ValueError, KeyError, TypeError, AttributeError):
            kind, payload = "unreadable", {}
        requests.append(Request(path.stem, kind, payload))
        path.unlink()
    return requests


def wrong(request: Request) -> str:
    """What makes a request one that cannot be done, in words; "" when nothing does."""
    if request.kind not in REQUESTS:
        return "unknown request"
    if request.kind == "visits":
        value = request.payload.get("visits")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_VISITS:
            return f"visits is {value!r}; it must be a whole number from 1 to {MOST_VISITS}."
    if request.kind == "prompts":
        value = request.payload.get("prompts")
        if not isinstance(value, list) or not 1 <= len(value) <= MOST_PROMPTS or not all(isinstance(p, str) and p.strip() for p in value):
            return f"prompts must be a list of 1 to {MOST_PROMPTS} texts, none of them empty."
    return ""
