"""The routes of images and captions: assets/help/api.md."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from app import advice, datasets, draft, intake, masks, models, pictures, settings
from app.api.draft import view
from app.context import Context, of
from app.datasets import Dataset
from app.errors import Problem
from app.paths import Home
from trainer.captioners import CAPTIONERS, KNOWN, Known, kind_of, qwen
from trainer.captioners.files import HUB_ID, SourceError
from trainer.data.scan import inspect
from trainer.formats.probe import FormatError

router = APIRouter()

CAPTIONING = "Caption "  # how the label of a captioning begins, which cannot be taken back while it writes
NEW = "Start a new training"
STYLES = ("sentences", "tags")
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


class IdsBody(Body):
    ids: list[str]


class CaptionBody(Body):
    style: Literal["sentences", "tags"]
    which: Literal["all", "missing", "add"] = "missing"
    ids: Annotated[list[str], Field(min_length=1, max_length=200)] | None = None  # these alone, anew


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


@router.get("/images/advice")
def get_advice(request: Request) -> dict[str, Any]:
    home = of(request).home
    data, kept = current(home), draft.load(home)
    windows = draft.values(home, kept)[0]["dataset.text_windows"]
    about = advice.About(
        purpose=kept["purpose"],
        trigger=kept["trigger"],
        class_word=kept["class_word"],
        style=_trained_on(home, kept),
        windows=windows if windows in (1, 2, 3) else 3,
        others=tuple(_other(home, each) for each in kept["sets"] if (home.datasets / each["dataset"]).is_dir()),
        alike=data.told_alike(),
    )
    return {"advice": advice.advise(items(home, data), data.looks(), about)}


def _other(home: Home, each: dict[str, Any]) -> advice.Other:
    data = Dataset(home, each["dataset"])
    return advice.Other(data.read()["name"] or "another set", each["trigger"], tuple(data.texts().values()))


@router.get("/images/looking")
def looking(request: Request) -> dict[str, Any]:
    return {"looking": datasets.looking(of(request).home)}


@router.post("/images/looking/cancel")
def stop_looking(request: Request) -> dict[str, Any]:
    home = of(request).home
    datasets.stop_looking(home)
    return {"looking": datasets.looking(home)}


@router.post("/images/remove")
def remove(request: Request, body: IdsBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    data.remove(body.ids)
    return listing(home, data)


async def uploaded(request: Request, work: Callable[[list[tuple[str, BinaryIO]]], dict[str, Any]]) -> Any:
    """The answer of `work` on the (name, file) of a request's `files`."""
    try:
        # The parts of a request lie on disk until they are taken; its size is limited by app/guard.py, and again by the data set.
        async with request.form(max_files=intake.MEMBERS, max_fields=10) as form:
            files = [(part.filename or "", part.file) for part in form.getlist("files") if isinstance(part, UploadFile)]
            if not files:
                raise Problem("There is no file in the request. Send them as multipart/form-data, each in a field called files.")
            return await run_in_threadpool(work, files)
    except ClientDisconnect:  # cancelled: nobody hears the answer
        return Response(status_code=400)


@router.post("/images")
async def add(request: Request) -> Any:
    def work(files: list[tuple[str, BinaryIO]]) -> dict[str, Any]:
        home = of(request).home
        data = current(home)
        added, problems = data.add_files(files)
        return listing(home, data, added=added, problems=problems)

    return await uploaded(request, work)


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
    if data.undo_label().startswith(masks.BY_WORDS) and data.masking(context.runner):
        raise Problem("The masks are being made now. Cancel that, or wait until it ends, then undo it.", 409)
    undone = data.undo()
    if not undone and draft.undo_new(home):
        undone, data = NEW, current(home)
    return listing(home, data, undone=undone)


# ---- captioning. Before /images/{id}, which would take "caption" for an id.


def _captioning(context: Context, data: Dataset) -> Path | None:
    """The folder of the captioning that is under way, or None."""
    return Path(data.read()["caption_job"]["folder"]) if data.captioning(context.runner) else None


@router.get("/captioners")
def captioners(request: Request) -> dict[str, Any]:
    home = of(request).home
    kept, now = settings.load(home), draft.load(home)
    return {style: _about(home, kept, now, style) for style in STYLES} | {
        "suits": suits(home, kept),
        "known": {style: [_offer(k) for k in KNOWN if CAPTIONERS[k.kind].style == style] for style in STYLES},
    }


def source_of(home: Home, kept: settings.Settings, now: dict[str, Any], style: str) -> str:
    """Hub id or folder of the captioner behind a button. The built-in example has one of its own, which knows drawn pictures alone."""
    if style == "sentences" and draft.is_example(home, now):
        return str(draft.EXAMPLE_CAPTIONER)
    chosen = {"sentences": kept.sentences, "tags": kept.tags}[style].strip()
    return chosen or next(k.source for k in KNOWN if CAPTIONERS[k.kind].style == style)


def _about(home: Home, kept: settings.Settings, now: dict[str, Any], style: str) -> dict[str, Any]:
    source = source_of(home, kept, now, style)
    there, size, note = _there(source)
    known = next((k for k in KNOWN if k.source == source), None)
    about = {"source": source, "size_mb": size, "there": there, "note": note, "built_in": source == str(draft.EXAMPLE_CAPTIONER)}
    named = Path(source).name if Path(source).expanduser().is_dir() else source
    about["usable"] = there or HUB_ID.fullmatch(source) is not None
    about |= {"title": known.title if known else named, "licence": known.licence if known else "", "prompt": None, "own_prompt": ""}
    if _kind(source) == "qwen":
        own = qwen.Config(purpose=now["purpose"], class_word=now["class_word"])
        about |= {"prompt": qwen.prompt_of(own), "own_prompt": kept.prompts.get(now["purpose"], "")}
    return about


def _offer(known: Known) -> dict[str, Any]:
    return {
        "source": known.source,
        "title": known.title,
        "why": known.why,
        "licence": known.licence,
        "size_mb": known.mb,
        "there": _there(known.source)[0],
    }


def suits(home: Home, kept: settings.Settings) -> str:
    """The style of captions for the chosen model: the one last used with it, else tags for those that were trained on tags."""
    model = draft.load(home)["model"]
    return kept.captioners.get(model) or ("tags" if TAGGED.search(Path(model).name) else "sentences")


def _trained_on(home: Home, kept: dict[str, Any]) -> str:
    """The style of captions that the chosen model knows, "" where it is not known or both are fine, as with the children of SD 1 and 2."""
    if not kept["model"] or kept["example"]:
        return ""
    style = suits(home, settings.load(home))
    return style if style == "tags" or (draft.family(home, kept) in ("sdxl", "sd3") and not draft.variant(home, kept)) else ""


def _cached(source: str, name: str) -> Path | None:
    """A file of a hub id in the hub's cache. Raises HFValidationError for what is no hub id."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name)
    return Path(found) if isinstance(found, str) else None


def _kind(source: str) -> str:
    """Which captioner a source is for, as far as can be told without the network; "" where it can't."""
    from huggingface_hub.errors import HFValidationError

    folder = Path(source).expanduser()
    try:
        if not folder.is_dir() and not any(k.source == source for k in KNOWN):
            file = _cached(source, "config.json")
            return kind_of(str(file.parent), "") if file else ""
        return kind_of(source, "")
    except (HFValidationError, SourceError):  # it is said when captions are asked for
        return ""


def _there(source: str) -> tuple[bool, int | None, str]:
    """(whether a captioner is on this machine, MB of its first download or None, a sentence or "")."""
    from huggingface_hub.errors import HFValidationError

    if Path(source).expanduser().is_dir():
        return True, 0, ""
    try:
        names = ("model.safetensors", "model.safetensors.index.json", "model.onnx")
        there = any(_cached(source, name) for name in names)
    except HFValidationError:
        return False, None, f"{source} is neither a folder of this machine nor a hub id like owner/name. Change it under Settings."
    if there:
        return True, 0, ""
    size = next((k.mb for k in KNOWN if k.source == source), None)
    return False, size, "" if size else "The size of its first download is not known; it is said before it begins."


@router.post("/images/caption")
def caption(request: Request, body: CaptionBody) -> dict[str, Any]:
    context = of(request)
    home = context.home
    with _one_at_a_time:
        data = current(home)
        if _captioning(context, data):
            raise Problem("The captions are being written already. Wait until that ends, or cancel it.", 409)
        only = [data.find(id).name for id in dict.fromkeys(body.ids or ())]
        count = len(only) or (data.missing() if body.which == "missing" else data.count())
        if not count:
            raise Problem("Every image has a caption already." if data.count() else "There are no images yet. Add some first.", 409)
        kept, now = settings.load(home), draft.load(home)
        about = _about(home, kept, now, body.style)
        if not about["usable"]:
            raise Problem(about["note"], 409)
        folder = home.jobs / f"{time.strftime('%Y%m%d-%H%M%S')}-caption-{secrets.token_hex(3)}"
        words = ["caption", str(data.images), *_words(home, kept, now, body.style), "--run-dir", str(folder)]
        words += {"missing": [] if only else ["--only-missing"], "add": ["--add"], "all": []}[body.which]
        words += [f"--only={name}" for name in only]
        data.checkpoint(f"{CAPTIONING}{only[0] if count == len(only) == 1 else f'{count} image' if count == 1 else f'{count} images'}")
        try:
            context.runner.submit("caption", folder, words)
        except Problem:
            data.undo()
            raise
        data.set_caption_job(folder, body.style)
        if now["model"]:
            settings.save(home, {"captioners": kept.captioners | {now["model"]: body.style}})
        return view(request)


def _words(home: Home, kept: settings.Settings, now: dict[str, Any], style: str) -> list[str]:
    """What the trainer is told of a captioner, from the settings and the draft."""
    source = source_of(home, kept, now, style)
    words = ["--captioner", "wd" if style == "tags" else "auto", "--source", source]
    words += [f"--{name.replace('_', '-')}={now[name]}" for name in ("purpose", "class_word", "trigger") if now[name]]
    if style == "tags":
        words += [f"--set=general={kept.tag_probability:g}", f"--set=blocked={kept.blocked_tags}"]
        if draft.values(home, now)[0].get("dataset.prompt_weights") is True:  # brackets would be read as weights
            words.append("--set=escape=true")
    elif (prompt := kept.prompts.get(now["purpose"], "").strip()) and _kind(source) == "qwen":
        words.append(f"--set=prompt={prompt}")
    return words


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
