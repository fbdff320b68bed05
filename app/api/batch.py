"""The routes of what a step of a run is trained on, decoded by `trainer batch`: assets/help/api.md."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from app import run_reader
from app.api.runs import find
from app.context import Context, of
from app.errors import Problem
from app.run_reader import Run

router = APIRouter()


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    step: int = Field(ge=1)


def _folder(context: Context, run: Run) -> Path:
    return context.home.jobs / f"batch-{hashlib.sha256(run.id.encode()).hexdigest()[:16]}"


def _view(context: Context, run: Run) -> dict[str, Any]:
    folder = _folder(context, run)
    look = context.runner.look(folder)
    found = {"state": look.state, "text": look.text, "step": None, "rows": [], "picture": None}
    last = run_reader.last_event(folder / "events.jsonl")
    if look.state == "finished" and last:
        found |= {k: last[k] for k in ("step", "rows")} | {"picture": f"/api/runs/{run.id}/batch/picture?v={last['seq']}"}
    return found


@router.post("/runs/{id}/batch")
def decode(request: Request, id: str, body: Step) -> dict[str, Any]:
    context = of(request)
    run, folder = find(context, id), _folder(context, find(context, id))
    if context.runner.look(folder).state in ("waiting", "starting", "running"):
        raise Problem("A step of this run is being decoded already. Wait until it is shown.", 409)
    context.runner.submit("batch", folder, ["batch", str(run.folder), f"--step={body.step}", "--run-dir", str(folder)])
    return _view(context, run)


@router.get("/runs/{id}/batch")
def decoded(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    return _view(context, find(context, id))


@router.get("/runs/{id}/batch/picture")
def picture(request: Request, id: str) -> FileResponse:
    context = of(request)
    path = _folder(context, find(context, id)) / "batch.png"
    if not path.is_file():
        raise Problem("There is no picture of a step yet. Ask for one first.", 404)
    return FileResponse(path, media_type="image/png", headers={"cache-control": "no-cache"})
