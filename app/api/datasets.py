"""The routes of data sets as things: the list, names and notes, copies, the trash, zips. assets/help/api.md documents them."""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from app import datasets, draft, exchange, pictures
from app.api.draft import view
from app.api.images import uploaded
from app.context import of
from app.datasets import Dataset
from app.errors import Problem
from app.paths import Home

router = APIRouter()


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str | None = None
    notes: str | None = None
    trigger: str | None = None
    class_word: str | None = None


class FolderBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: str


def shown(home: Home, data: Dataset) -> dict[str, Any]:
    """A SET with its version, which costs a look at each of its images."""
    current = data.id == draft.load(home)["dataset"]
    return exchange.view(data) | {"current": current, "version": exchange.version(data.images, home.cache)}


def listing(home: Home, **more: Any) -> dict[str, Any]:
    return {"datasets": exchange.every(home, draft.load(home)["dataset"]), "trash": str(home.trash), **more}


@router.get("/datasets")
def every(request: Request) -> dict[str, Any]:
    return listing(of(request).home)


@router.post("/datasets/import")
async def bring(request: Request) -> Any:
    home = of(request).home
    return await uploaded(request, lambda files: _brought(home, *exchange.bring_files(home, files)))


@router.post("/datasets/import-folder")
def bring_folder(request: Request, body: FolderBody) -> dict[str, Any]:
    home = of(request).home
    return _brought(home, *exchange.bring_folder(home, body.path))


def _brought(home: Home, made: list[Dataset], problems: list[str]) -> dict[str, Any]:
    """The first new set becomes the draft's; where there are several, the others are trained with it, as often as their folders repeat."""
    first, *others = made
    draft.open_dataset(home, first.id)
    if others:
        visits = draft.values(home, draft.load(home))[0]["train.visits"]
        draft.update(home, sets=[_further(data, first, visits) for data in others])
    return listing(home, added=[data.id for data in made], problems=problems)


def _further(data: Dataset, first: Dataset, visits: int) -> dict[str, Any]:
    facts, base = data.read(), first.read()["repeats"]
    own = max(1, round(visits * facts["repeats"] / base)) if facts["repeats"] != base else None
    words = {"trigger": "" if facts["class_images"] else facts["trigger"], "class_word": facts["class_word"]}
    return {"dataset": data.id, "kind": "prior" if facts["class_images"] else "train", "visits": own, **words}


@router.get("/datasets/{id}")
def show(request: Request, id: str) -> dict[str, Any]:
    home = of(request).home
    return shown(home, datasets.open(home, id))


@router.patch("/datasets/{id}")
def change(request: Request, id: str, body: Fields) -> dict[str, Any]:
    home = of(request).home
    exchange.describe(datasets.open(home, id), **body.model_dump(exclude_none=True))
    return listing(home)


@router.post("/datasets/{id}/open")
def take(request: Request, id: str) -> dict[str, Any]:
    return view(request, draft.open_dataset(of(request).home, id))


@router.post("/datasets/{id}/duplicate")
def duplicate(request: Request, id: str) -> dict[str, Any]:
    home = of(request).home
    data = datasets.open(home, id)
    if id == draft.load(home)["dataset"]:
        draft.leave(home, draft.load(home))  # so that the copy is called and triggered as this one
    return listing(home, added=[exchange.duplicate(data).id])


@router.post("/datasets/{id}/trash")
def trash(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    home, kept = context.home, draft.load(context.home)
    data = datasets.open(home, id)
    if data.captioning(context.runner) or data.masking(context.runner):
        raise Problem("Captions or masks of this data set are being written. Cancel that, or wait until it ends.", 409)
    if any(each["dataset"] == id for each in kept["sets"]):
        raise Problem("This data set is a further set of the training above. Take it out there first.", 409)
    if id == kept["dataset"]:
        draft.leave(home, kept)
        draft.open_dataset(home, datasets.create(home).id)
    exchange.trash(data)
    return listing(home)


@router.post("/datasets/{id}/restore")
def restore(request: Request, id: str) -> dict[str, Any]:
    home = of(request).home
    exchange.restore(home, id)
    return listing(home)


@router.get("/datasets/{id}/export")
def export(request: Request, id: str) -> StreamingResponse:
    home = of(request).home
    data, kept = datasets.open(home, id), draft.load(home)
    if id == kept["dataset"]:
        draft.leave(home, kept)
    stem = re.sub(r"[^\w -]+", "", data.read()["name"]).strip() or f"images-{time.strftime('%Y%m%d')}"
    name = f"filename=\"dataset.zip\"; filename*=UTF-8''{quote(stem)}.zip"
    return StreamingResponse(exchange.export(data), media_type="application/zip", headers={"content-disposition": f"attachment; {name}"})


@router.get("/datasets/{id}/thumb")
def thumb(request: Request, id: str) -> FileResponse:
    """Its first image, small."""
    home = of(request).home
    data = datasets.open(home, id)
    for name in data.names():
        found = pictures.inspect(data.images / name, home.cache)
        if not isinstance(found, str):
            path = pictures.version(data.images / name, found[0], pictures.THUMB, home.cache)
            return FileResponse(path, media_type="image/webp", headers={"cache-control": "no-cache"})
    raise Problem("This data set has no image that can be shown.", 404)
