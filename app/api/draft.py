"""Routes on the draft: what the next training will be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from app import context, datasets, draft, foreign, models, preflight, run_reader, settings

router = APIRouter()


class Changes(BaseModel):
    """What PATCH may name; draft.update says what is allowed, so that every field gets a sentence."""

    model_config = ConfigDict(extra="allow")


class Text(BaseModel):
    text: str


class File(BaseModel):
    name: str
    text: str


class FromRun(BaseModel):
    run: str
    start: bool = False


def view(request: Request, now: dict[str, Any] | None = None) -> dict[str, Any]:
    """The draft view; other routes that change the draft or its images answer with it too."""
    here = context.of(request)
    now = now or draft.load(here.home)
    return draft.view(here.home, now, datasets.open(here.home, now["dataset"]).caption_job(here.runner))


@router.get("/draft")
def get_draft(request: Request) -> dict[str, Any]:
    return view(request)


@router.patch("/draft")
def patch_draft(request: Request, body: Changes) -> dict[str, Any]:
    return view(request, draft.update(context.of(request).home, **(body.model_extra or {})))


@router.post("/draft/new")
def new_draft(request: Request) -> dict[str, Any]:
    return view(request, draft.new(context.of(request).home))


@router.post("/draft/example")
def example(request: Request) -> dict[str, Any]:
    return view(request, draft.example(context.of(request).home))


@router.get("/draft/plan")
def get_plan(request: Request) -> dict[str, Any]:
    here = context.of(request)
    return preflight.make(here.home, here.runner)


@router.post("/draft/measure")
def measure(request: Request) -> dict[str, Any]:
    here = context.of(request)
    preflight.measure(here.home, here.runner)
    return preflight.make(here.home, here.runner)


@router.get("/draft/toml")
def get_toml(request: Request) -> dict[str, str]:
    home = context.of(request).home
    return {"text": draft.to_toml(home, draft.load(home))}


@router.put("/draft/toml")
def put_toml(request: Request, body: Text) -> dict[str, Any]:
    return view(request, draft.from_toml(context.of(request).home, body.text))


@router.post("/draft/import")
def import_file(request: Request, body: File) -> dict[str, Any]:
    home = context.of(request).home
    now = draft.load(home)
    found = foreign.read(Path(body.name).name[:200], body.text, len(draft.captions(home, now)))
    if found.own is not None:
        now = draft.take(home, found.own)
        found.carried = {k: f"{k} = {v}" for k, v in now["changes"].items()}
    else:
        source = found.fields.get("model", "")
        if source and models.glance(home, source, now["example"])[1]:
            del found.fields["model"], found.carried["model"]
            found.leave("model", source, "cannot be used here: choose the model under Which model?")
        if now["name"] and found.fields.pop("name", ""):
            found.carried.pop("name")
        now = draft.adopt(home, found.changes, found.fields)
    imported = {"from": found.origin, "carried": found.carried, "left_out": found.left_out}
    return view(request, now) | {"imported": imported}


@router.post("/draft/from-run")
def from_run(request: Request, body: FromRun) -> dict[str, Any]:
    home = context.of(request).home
    return view(request, draft.from_run(home, run_reader.find(home, settings.load(home), body.run), body.start))
