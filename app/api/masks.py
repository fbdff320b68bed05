"""The routes of crops and masks, and of what a step will see: assets/help/api.md."""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app import draft, masks, models, settings
from app.api.images import current, items, listing
from app.context import of
from app.errors import Problem
from trainer import plan
from trainer.data.images import DAMAGED
from trainer.data.scan import DataError
from trainer.formats.probe import FormatError

router = APIRouter()

MASKER = "CIDAS/clipseg-rd64-refined"  # as trainer.maskers.clipseg has it, which the app cannot import
MASKER_MB = 600
WHOLE = 0.995  # of a side: an image of which so much is kept has no crop to move, as app/parts/crop.js has it
_one_at_a_time = threading.Lock()


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FocusBody(Body):
    focus: tuple[float, float] | None


class FocusAllBody(Body):
    how: Literal["subject", "centre"]
    ids: list[str] | None = None


class IdsBody(Body):
    ids: list[str] | None = None


class WordsBody(Body):
    prompt: str = Field(max_length=200)
    which: Literal["all", "missing"] = "missing"


# ---- crops


@router.put("/images/{id}/focus")
def focus(request: Request, id: str, body: FocusBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    changed = data.set_focus({id: body.focus})
    return listing(home, data, changed=changed)


@router.post("/images/focus")
def focus_all(request: Request, body: FocusAllBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    active = {i["id"]: i for i in items(home, data) if not i["removed"] and (body.ids is None or i["id"] in body.ids)}
    if unknown := [i for i in body.ids or () if i not in active]:
        raise Problem(f"There is no image {unknown[0][:40]!r} in this data set. Reload the page.", 404)
    if body.how == "centre":
        return listing(home, data, changed=data.set_focus(dict.fromkeys(active)))
    kept = {id: tuple(i["crop"][2:]) for id, i in active.items() if i["crop"] and min(i["crop"][2:]) < WHOLE}
    try:
        points = data.subjects(kept, faces=draft.load(home)["purpose"] == "character")
    except DAMAGED as error:
        raise Problem(f"An image cannot be read ({error}). The notes on the images say which.") from None
    return listing(home, data, changed=data.set_focus(points))


# ---- masks


@router.get("/images/{id}/mask")
def mask(request: Request, id: str) -> Response:
    raw = current(of(request).home).mask(id)
    if raw is None:
        raise Problem("This image has no mask.", 404)
    return Response(raw, media_type="image/png", headers={"cache-control": "no-cache"})


@router.put("/images/{id}/mask")
async def set_mask(request: Request, id: str) -> dict[str, Any]:
    home, raw = of(request).home, await request.body()  # app/guard.py limits its size

    def work() -> dict[str, Any]:
        data = current(home)
        data.set_mask(id, raw)
        return listing(home, data)

    return await run_in_threadpool(work)


@router.delete("/images/{id}/mask")
def no_mask(request: Request, id: str) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    data.set_mask(id, None)
    return listing(home, data)


@router.post("/images/masks/alpha")
def masks_of_alpha(request: Request, body: IdsBody) -> dict[str, Any]:
    home = of(request).home
    data = current(home)
    return listing(home, data, changed=data.masks_of_alpha(body.ids))


@router.get("/images/masks/words")
def job(request: Request) -> dict[str, Any]:
    context = of(request)
    there, size, note = _there(settings.load(context.home).masker)
    now = current(context.home).mask_job(context.runner)
    return {"source": settings.load(context.home).masker, "there": there, "size_mb": size, "note": note, "job": now}


@router.post("/images/masks/words")
def mask_by_words(request: Request, body: WordsBody) -> dict[str, Any]:
    context = of(request)
    home, prompt = context.home, " ".join(body.prompt.split())
    if not prompt:
        said = "Say what the masks shall show, like cat or a person."
        raise Problem(said, errors={"prompt": said})
    with _one_at_a_time:
        data = current(home)
        if data.masking(context.runner):
            raise Problem("Masks are being made already. Wait until that ends, or cancel it.", 409)
        count = data.count() - (data.masked() if body.which == "missing" else 0)
        if not count:
            raise Problem("Every image has a mask already." if data.count() else "There are no images yet. Add some first.", 409)
        folder = home.jobs / f"{time.strftime('%Y%m%d-%H%M%S')}-mask-{secrets.token_hex(3)}"
        words = ["mask", str(data.images), f"--prompt={prompt}", "--source", settings.load(home).masker, "--run-dir", str(folder)]
        data.checkpoint_masks(f"{masks.BY_WORDS}{prompt}")
        try:
            context.runner.submit("mask", folder, words + (["--only-missing"] if body.which == "missing" else []))
        except Problem:
            data.undo()
            raise
        data.set_mask_job(folder, prompt)
    return job(request)


@router.post("/images/masks/words/cancel")
def cancel(request: Request) -> dict[str, Any]:
    context = of(request)
    data = current(context.home)
    if data.masking(context.runner):
        folder = Path(data.read()["mask_job"]["folder"])
        context.runner.cancel(folder)
        if context.runner.look(folder).state == "none":  # it had only waited: as if it had never been asked for
            data.set_mask_job(None)
            if data.undo_label().startswith(masks.BY_WORDS):
                data.undo()
    return job(request)


def _there(source: str) -> tuple[bool, int | None, str]:
    """(whether a model of masks is on this machine, MB of its first download or None, a sentence or "")."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(source).expanduser().is_dir():
        return True, 0, ""
    try:
        there = all(isinstance(try_to_load_from_cache(source, name), str) for name in ("config.json", "model.safetensors"))
    except HFValidationError:
        return False, None, f"{source} is neither a folder of this machine nor a hub id like owner/name. Change it under Settings."
    return there, 0 if there else MASKER_MB if source == MASKER else None, ""


# ---- what a step will see


@router.get("/draft/seen")
def seen(request: Request, step: int = 1) -> dict[str, Any]:
    """What step `step` of the training that Start would begin sees, by the plan that trains."""
    home = of(request).home
    now = draft.load(home)
    config, errors = draft.check(home, now)
    if config is None:
        raise Problem(" ".join(errors.values()), 409, errors)
    model, _ = models.glance(home, now["model"], now["example"])
    data = current(home)
    if not data.count():
        raise Problem("There are no images yet. Add some first.", 409)
    try:
        laid = plan.make(config, models.resolution(model, config.model.prediction), draft.family(home, now))
        rows = plan.seen(laid, config, step)
    except (DataError, FormatError, ValueError) as error:
        raise Problem(str(error), 409) from None
    ids = {data.images / i["name"]: i for i in data.items() if not i["removed"]}
    for row in rows:
        image = ids.get(row["file"])
        row |= {"file": row["file"].name, "full": image and image["full"], "mask": image["mask"] if image and row["masked"] else None}
    return {"step": step, "total": len(laid.steps), "rows": rows}
