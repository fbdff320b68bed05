"""Requests to a live run: one JSON file each in `control/`, put there by rename, taken and answered by the trainer.

stop      end after this step with a resumable checkpoint and an exported LoRA
save      export the LoRA and write a checkpoint now
preview   make sample images now
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

from trainer.run_dir import RunDir

REQUESTS = ("stop", "save", "preview")


@dataclass(frozen=True)
class Request:
    id: str
    kind: str


def send(run: RunDir, kind: str) -> str:
    """Put a request before a run; returns its id, by which an `answered` event will name it. Raises ValueError for an unknown kind."""
    if kind not in REQUESTS:
        raise ValueError(f"request is {kind!r}; it must be one of {', '.join(REQUESTS)}.")
    run.control.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    temp = run.control / f".{name}.tmp"
    temp.write_text(json.dumps({"kind": kind}), encoding="utf-8")
    temp.rename(run.control / f"{name}.json")
    return name


def take(run: RunDir) -> list[Request]:
    """Take every waiting request, oldest first; each is handed out once. An unknown kind is handed out as it is, a file
    that is no request as `unreadable`."""
    requests = []
    for path in sorted(run.control.glob("*.json"), key=lambda p: p.stat().st_mtime_ns):
        try:
            kind = str(json.loads(path.read_text(encoding="utf-8"))["kind"])
        except (ValueError, KeyError, TypeError):
            kind = "unreadable"
        requests.append(Request(path.stem, kind))
        path.unlink()
    return requests
