"""What a run has come to, and the playground. assets/help/api.md says what each route takes and answers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import Field

from app import playground, results, run_reader, settings
from app.api.runs import Strict, allow, find, send_picture, told
from app.context import of
from app.errors import Problem
from app.runner import LIVE

router = APIRouter()


class Copy(Strict):
    file: str
    folder: str = ""


class Keep(Strict):
    file: str
    confirm: bool = False


class Picture(Strict):
    run: str
    file: str
    prompt: str = Field(max_length=4000)
    negative: str = Field("", max_length=4000)
    seed: int = Field(1, ge=0, lt=2**32)
    steps: int = Field(20, ge=1, le=200)
    guidance: float = Field(7.0, ge=1, le=30)
    width: int | None = Field(None, ge=64, le=2048, multiple_of=8)
    height: int | None = Field(None, ge=64, le=2048, multiple_of=8)
    strength: float = Field(results.STRENGTH, ge=-2, le=2)


@router.get("/runs/{id}/results")
def show(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    return results.view(run, context.runner.look(run.folder / "results"), settings.load(context.home))


@router.get("/runs/{id}/results/{file}")
def picture(request: Request, id: str, file: str, size: int | None = None) -> FileResponse:
    context = of(request)
    return send_picture(context, run_reader.inside(find(context, id).folder / "results", file, ".png"), size)


@router.post("/runs/{id}/compare")
def compare(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, "compare")
    context.runner.compare(run.folder)
    context.runner.tick()
    return told(context, run)


@router.post("/runs/{id}/copy")
def copy(request: Request, id: str, body: Copy) -> dict[str, Any]:
    context = of(request)
    paths = results.copy(find(context, id), body.file, body.folder, settings.load(context.home))
    return {"paths": [str(path) for path in paths]}


@router.post("/runs/{id}/keep")
def keep(request: Request, id: str, body: Keep) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    if body.confirm and any(context.runner.look(folder).state in LIVE for folder in (run.folder, run.folder / "results")):
        raise Problem(f"{run.name()} is at work, so its files stay for now. Wait until it ends, or stop it.", 409)
    return results.keep(run, body.file, body.confirm)


@router.post("/runs/{id}/open")
def open_folder(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    context.runner.open_folder(run.folder)
    return {"folder": str(run.folder)}


@router.post("/playground")
def ask(request: Request, body: Picture) -> dict[str, Any]:
    context = of(request)
    run = find(context, body.run)
    wanted = body.model_dump(exclude={"run", "file"})
    wanted |= {
        "base": run.setting("model.source", "demo"),
        "model": run.config.get("model", {}),
        "lora": str(run_reader.inside(run.folder, body.file, ".safetensors")),
    }
    return {"request": playground.ask(context.home, context.runner, wanted)}


@router.get("/playground")
def state(request: Request, request_id: Annotated[str, Query(alias="request")] = "") -> dict[str, Any]:
    context = of(request)
    return playground.view(context.home, context.runner, request_id)


@router.post("/playground/close")
def close(request: Request) -> dict[str, Any]:
    context = of(request)
    return playground.close(context.home, context.runner)


@router.get("/playground/pictures/{file}")
def drawn(request: Request, file: str, size: int | None = None) -> FileResponse:
    context = of(request)
    return send_picture(context, run_reader.inside(playground.folder(context.home) / "pictures", file, ".png"), size)
