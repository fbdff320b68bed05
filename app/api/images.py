"""The routes of images and captions: assets/help/api.md."""

from __future__ import annotations

import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from app import draft, intake, models, pictures, settings
from app.api.draft import view
from app.context import Context, of
from app.datasets import Dataset
from app.errors import Problem
from app.paths import Home
from trainer.data.scan import inspect
from trainer.formats.probe import FormatError

router = APIRouter()

BUSY = ("waiting", "starting", "running")
CAPTIONING = "Caption "  # how the label of a captioning begins, which cannot be taken back while it writes
NEW = "Start a new training"
DOWNLOADS = {  # MB of what `trainer caption` fetches of a hub id
    "Salesforce/blip-image-captioning-large": 1880,
    "Salesforce/blip-image-captioning-base": 990,
}
TAGGED = re.compile(r"illustrious|noob|pony|animagine|anything|anime|hassaku|wai[-_ ]?(nsfw|ill)|counterfeit|meina|abyssorange|nai", re.I)
_one_at_a_time = threading.Lock()  # two tabs must not both start a captioning


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FolderBody(Body):
    path: str


class ImageBody(Body):
    caption: str | None = None
    removed: bool | None = None


class CaptionsBody(Body):
    action: str
    find: str = ""
    text: str = ""
    ids: list[str] | None = None


class CaptionBody(Body):
    style: Literal["sentences", "tags"]
    which: Literal["all", "missing"] = "missing"


def current(home: Home) -> Dataset:
    """The draft's data set; its folder is made again where somebody deleted it."""
    data = Dataset(home, draft.load(home)["dataset"])
    data.images.mkdir(parents=True, exist_ok=True)
    return data


def items(home: Home, data: Dataset) -> list[dict[str, Any]]:
    """The IMAGEs of a data set, placed by the draft's settings."""
    kept = draft.load(home)
    values, preset = draft.values(home, kept)

    def number(key: str, kind: type, low: float, high: float) -> Any:
        """A value that is not allowed stays in the draft and is named at its field; pictures are placed by the preset's then."""
        for value in (values.get(key), preset.get(key)):
            if isinstance(value, (int, kind)) and not isinstance(value, bool) and low <= value <= high:
                return value
        return None

    chosen = {
        "resolution": number("dataset.resolution", int, 64, 2048) or _native(home, kept),
        "bucket_step": number("dataset.bucket_step", int, 8, 256),
        "max_aspect": number("dataset.max_aspect", float, 1, 8),
        "batch_size": number("train.batch_size", int, 1, 1024),
        "max_upscale": number("dataset.max_upscale", float, 1, 8),
    }
    return data.items(**{k: v for k, v in chosen.items() if v is not None})


def _native(home: Home, kept: dict[str, Any]) -> int:
    """Side in pixels of the square that the chosen model was made for; 512 where none is chosen or it does not say."""
    model, _ = models.glance(home, kept["model"], kept["example"])
    try:
        return models.resolution(model, str(kept["changes"].get("model.prediction", "auto")))
    except FormatError:  # the model's own section says so
        return 512


def listing(home: Home, data: Dataset, **more: Any) -> dict[str, Any]:
    undo = data.undo_label() or (NEW if draft.can_undo_new(home) else "")
    return {"images": items(home, data), "tags": data.tags(), "undo": undo, "folder": str(data.images), **more}


@router.get("/images")
def images(request: Request) -> dict[str, Any]:
    home = of(request).home
    return listing(home, current(home))


@router.post("/images")
async def add(request: Request) -> Any:
    home = of(request).home
    try:
        # The parts of a request lie on disk until they are taken; its size is limited by app/guard.py, and again by the data set.
        async with request.form(max_files=intake.MEMBERS, max_fields=10) as form:
            files = [(part.filename or "", part.file) for part in form.getlist("files") if isinstance(part, UploadFile)]
            if not files:
                raise Problem("There is no file in the request. Send them as multipart/form-data, each in a field called files.")

            def work() -> dict[str, Any]:
                data = current(home)
                added, problems = data.add_files(files)
                return listing(home, data, added=added, problems=problems)

            return await run_in_threadpool(work)
    except ClientDisconnect:  # cancelled: nobody hears the answer
        return Response(status_code=400)


@router.post("/images/folder")
def add_folder(request: Request, body: FolderBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    added, problems = data.add_folder(body.path)
    return listing(home, data, added=added, problems=problems)


@router.post("/images/captions")
def edit_captions(request: Request, body: CaptionsBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    trigger = draft.load(home)["trigger"]
    changed = data.edit_captions(body.action, find=body.find, text=body.text, ids=body.ids, trigger=trigger)
    return listing(home, data, changed=changed)


@router.post("/images/write-back")
def write_back(request: Request) -> dict[str, Any]:
    return current(of(request).home).write_back()


@router.post("/draft/undo")
def undo(request: Request) -> dict[str, Any]:
    context = of(request)
    home = context.home
    data = current(home)
    if data.undo_label().startswith(CAPTIONING) and _captioning(context, data):
        raise Problem("The captions are being written now. Cancel the captioning, or wait until it ends, then undo it.", 409)
    undone = data.undo()
    if not undone and draft.undo_new(home):
        undone, data = NEW, current(home)
    return listing(home, data, undone=undone)


# ---- captioning. Before /images/{id}, which would take "caption" for an id.


def _captioning(context: Context, data: Dataset) -> Path | None:
    """The folder of the captioning that is under way, or None."""
    job = data.caption_job(context.runner)
    return Path(data.read()["caption_job"]["folder"]) if job and job["state"] in BUSY else None


@router.get("/captioners")
def captioners(request: Request) -> dict[str, Any]:
    home = of(request).home
    kept = settings.load(home)
    source, built_in = _sentences(home, kept)
    there, size, note = _there(source)
    sentences = {"source": source, "size_mb": size, "there": there, "ready": bool(source), "note": note, "built_in": built_in}
    later = {"source": kept.tags, "size_mb": None, "there": False, "ready": False, "note": "comes in a later version"}
    return {"sentences": sentences, "tags": later, "suits": suits(home, kept)}


def _sentences(home: Home, kept: settings.Settings) -> tuple[str, bool]:
    """(source of the captioner for sentences, whether it is the built-in example's own). That one knows drawn pictures alone."""
    if draft.is_example(home, draft.load(home)):
        return str(draft.EXAMPLE_CAPTIONER), True
    return kept.sentences.strip(), False


def suits(home: Home, kept: settings.Settings) -> str:
    """The style of captions for the chosen model: the one last used with it, else tags for those that were trained on tags."""
    model = draft.load(home)["model"]
    return kept.captioners.get(model) or ("tags" if TAGGED.search(Path(model).name) else "sentences")


def _there(source: str) -> tuple[bool, int | None, str]:
    """(whether a captioner is on this machine, MB of its first download or None, a sentence or "")."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not source:
        return False, None, "No captioner is set; name one under Settings."
    if Path(source).expanduser().is_dir():
        return True, 0, ""
    try:
        names = ("model.safetensors", "pytorch_model.bin")
        there = isinstance(try_to_load_from_cache(source, "config.json"), str) and any(
            isinstance(try_to_load_from_cache(source, name), str) for name in names
        )
    except HFValidationError:
        return False, None, f"{source} is neither a folder of this machine nor a hub id like owner/name. Change it under Settings."
    if there:
        return True, 0, ""
    size = DOWNLOADS.get(source)
    return False, size, "" if size else "The size of its first download is not known; it is said before it begins."


@router.post("/images/caption")
def caption(request: Request, body: CaptionBody) -> dict[str, Any]:
    context = of(request)
    home = context.home
    if body.style == "tags":
        raise Problem("Captions of tags come in a later version. Use Sentences, or write them by hand.", 409)
    with _one_at_a_time:
        data = current(home)
        if _captioning(context, data):
            raise Problem("The captions are being written already. Wait until that ends, or cancel it.", 409)
        count = data.missing() if body.which == "missing" else data.count()
        if not count:
            raise Problem("Every image has a caption already." if data.count() else "There are no images yet. Add some first.", 409)
        kept = settings.load(home)
        source, _ = _sentences(home, kept)
        if not source:
            raise Problem("No captioner is set for sentences. Name one under Settings.", 409)
        folder = home.jobs / f"{time.strftime('%Y%m%d-%H%M%S')}-caption-{secrets.token_hex(3)}"
        words = ["caption", str(data.images), "--captioner", "blip", "--source", source, "--run-dir", str(folder)]
        data.checkpoint(f"{CAPTIONING}{count} image{'' if count == 1 else 's'}")
        try:
            context.runner.submit("caption", folder, words + (["--only-missing"] if body.which == "missing" else []))
        except Problem:
            data.undo()
            raise
        data.set_caption_job(folder, body.style)
        if model := draft.load(home)["model"]:
            settings.save(home, {"captioners": kept.captioners | {model: body.style}})
        return view(request)


@router.post("/images/caption/cancel")
def cancel(request: Request) -> dict[str, Any]:
    context = of(request)
    data = current(context.home)
    if folder := _captioning(context, data):
        context.runner.cancel(folder)
        if context.runner.look(folder).state == "none":  # it had only waited: as if it had never been asked for
            data.set_caption_job(None)
            if data.undo_label().startswith(CAPTIONING):
                data.undo()
    return view(request)


# ---- one image


@router.patch("/images/{id}")
def change(request: Request, id: str, body: ImageBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    data.find(id)
    if body.caption is not None:
        data.set_caption(id, body.caption)
    if body.removed is not None:
        (data.remove if body.removed else data.restore)([id])
    return next(image for image in items(home, data) if image["id"] == id)


@router.get("/images/{id}/thumb")
def thumb(request: Request, id: str) -> Response:
    return _picture(request, id, pictures.THUMB)


@router.get("/images/{id}/full")
def full(request: Request, id: str) -> Response:
    return _picture(request, id, pictures.FULL)


def _picture(request: Request, id: str, side: int) -> Response:
    """A picture by its id alone. Its address names the content (`v`), so that a browser may keep it for ever."""
    home = of(request).home
    path = current(home).find(id)
    found = inspect(path)
    if isinstance(found, str):
        raise Problem(f"{path.name} {found}", 404)
    digest, tag = found[0], f'"{found[0][:24]}-{side}"'
    same = request.query_params.get("v") == digest[:16]
    headers = {"etag": tag, "cache-control": "private, max-age=31536000, immutable" if same else "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return FileResponse(pictures.version(path, digest, side, home.cache), media_type="image/webp", headers=headers)
