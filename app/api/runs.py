"""Runs: start, watch, steer, queue, and what they leave behind. assets/help/api.md says what each route takes and answers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from app import datasets, draft, exchange, forms, models, pictures, preflight, run_reader, settings
from app.context import Context, of
from app.errors import Problem
from app.paths import Home
from app.run_reader import Run
from app.runner import LIVE, Look
from trainer.config import TrainConfig
from trainer.config.load import ConfigError, load, validate
from trainer.data.scan import DataError, listing, scan
from trainer.run_dir import RunDir, write_json

router = APIRouter()
NOT_NOW = {
    "stop": "stopped",
    "save": "saved",
    "preview": "asked for a preview",
    "prompts": "given other prompts",
    "length": "made longer or shorter",
    "resume": "resumed",
    "further": "trained further",
    "cancel": "taken out of the queue",
    "move": "moved in the queue",
    "edit": "edited",
    "compare": "compared",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class New(Strict):
    draft: bool = False
    config: dict[str, Any] | None = None
    queue: bool = False


class Confirm(Strict):
    confirm: bool = False


class Prompts(Strict):
    prompts: list[str]


class Length(Strict):
    visits: int


class Further(Strict):
    percent: Literal[25, 50, 100]


class Move(Strict):
    to: int = Field(ge=0)


class Changes(Strict):
    changes: dict[str, Any]


# ---- looking ----------------------------------------------------------------------------------------------------------------------------


def find(context: Context, id: str) -> Run:
    """A run, with its folder read up to now. Raises Problem (404)."""
    run = run_reader.run(id, run_reader.find(context.home, settings.load(context.home), id))
    with run.lock:
        run.refresh()
    return run


def queue(context: Context) -> list[Path]:
    """The folders of the waiting trainings in order."""
    return [job.folder for job in context.runner.jobs.list() if job.kind == "train"]


def place(folder: Path, waiting: list[Path]) -> int | None:
    return waiting.index(folder) if folder in waiting else None


def allow(context: Context, run: Run, action: str) -> Look:
    """The run's state, where that action is possible in it. Raises Problem (409)."""
    look = context.runner.look(run.folder)
    if action not in run.actions(look.state):
        state = "interrupted" if look.state == "none" else look.state
        why = " as it has run already" if action == "edit" and state == "waiting" else ""
        raise Problem(f"{run.name()} is {state}, so it cannot be {NOT_NOW[action]} now{why}.", 409)
    return look


def overview(context: Context) -> dict[str, Any]:
    """The answer of GET /api/runs."""
    found = run_reader.folders(context.home, settings.load(context.home))
    run_reader.forget(found.values())
    jobs = context.runner.jobs.list()
    waiting = [job.folder for job in jobs if job.kind == "train"]
    summaries = []
    for id, folder in found.items():
        run, look = run_reader.run(id, folder), context.runner.look(folder, jobs)
        with run.lock:
            run.refresh()
            summaries.append(run.summary(look, place(folder, waiting)))
    ids = {folder: id for id, folder in found.items()}
    return {
        "runs": sorted(summaries, key=lambda s: (s["created"], s["id"]), reverse=True),
        "queue": [ids[folder] for folder in waiting if folder in ids],
        "active": next((s["id"] for s in summaries if s["state"] in LIVE), None),
    }


def told(context: Context, run: Run) -> dict[str, Any]:
    """What an action answers: {"id", "state", "position"}."""
    return {"id": run.id, "state": context.runner.state(run.folder), "position": place(run.folder, queue(context))}


@router.get("/runs")
def list_runs(request: Request) -> Response:
    answer = JSONResponse(overview(of(request)))
    headers = {"etag": f'"{hashlib.sha256(answer.body).hexdigest()[:24]}"', "cache-control": "no-cache"}
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    answer.headers.update(headers)
    return answer


@router.get("/runs/{id}")
def show(request: Request, id: str, since: int | None = None) -> Response:
    context = of(request)
    run = run_reader.run(id, run_reader.find(context.home, settings.load(context.home), id))
    look, position = context.runner.look(run.folder), place(run.folder, queue(context))
    pending = context.runner.pending(run.folder) if look.state in LIVE else []
    with run.lock:
        run.refresh()
        headers = {"etag": f'"{run.tag(look, position, pending)}"', "cache-control": "no-cache"}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return JSONResponse(run.view(look, position, since, pending), headers=headers)


@router.get("/runs/{id}/log")
def log(request: Request, id: str, since: int = 0) -> dict[str, Any]:
    text, next = run_reader.log_text(find(of(request), id).folder, since)
    return {"text": text, "next": next}


@router.get("/runs/{id}/config")
def config(request: Request, id: str) -> PlainTextResponse:
    run = find(of(request), id)
    if not run.config:
        raise Problem(f"{run.id} has no settings that can be read: config.json is missing or damaged.", 404)
    return PlainTextResponse(tomlkit.dumps(_without_none(run.config)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


@router.get("/runs/{id}/previews/{file}")
def preview_file(request: Request, id: str, file: str, size: int | None = None) -> FileResponse:
    context = of(request)
    path = run_reader.inside(find(context, id).folder / "previews", file, ".png")
    return send_picture(context, path, size)


def send_picture(context: Context, path: Path, size: int | None) -> FileResponse:
    """A picture, which a later run of the same step may replace: the browser asks each time whether it is still the same."""
    return FileResponse(run_reader.picture(context.home, path, size), headers={"cache-control": "no-cache"})


@router.get("/runs/{id}/files/{file}")
def download(request: Request, id: str, file: str) -> FileResponse:
    path = run_reader.inside(find(of(request), id).folder, file, ".safetensors")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


# ---- starting ---------------------------------------------------------------------------------------------------------------------------


@router.post("/runs")
def create(request: Request, body: New) -> dict[str, Any]:
    context = of(request)
    if body.draft == (body.config is not None):
        raise Problem('Say either {"draft": true} or {"config": {...}}.')
    run = _from_draft(context) if body.draft else _from_config(context, body.config)
    context.runner.submit("train", run.folder, ["train", "--run-dir", str(run.folder)], first=not body.queue)
    if not body.queue:
        context.runner.tick()
    return told(context, run)


def _from_draft(context: Context) -> Run:
    home = context.home
    wanted = draft.load(home)
    plan = preflight.make(home, context.runner, wanted)
    config, errors = draft.check(home, wanted)
    for said in plan["preflight"]:
        if said["level"] == "error":
            errors.setdefault(said["field"], said["text"])
    if errors or config is None:
        raise Problem(" ".join(dict.fromkeys(errors.values())), errors=errors)
    model, _ = models.glance(home, wanted["model"], wanted["example"])
    about = {"purpose": wanted["purpose"], "preset": wanted["preset"], "model_title": model["name"] if model else "", "from": "draft"}
    about["family"] = draft.family(home, wanted)
    about |= {"steps": plan["steps"], "data": []}
    sets = [wanted["dataset"], *(each["dataset"] for each in wanted["sets"])]
    return make(context, config, about, lambda config, folder: _snapshot(home, sets, config, folder, about["data"]))


def _snapshot(home: Home, sets: list[str], config: TrainConfig, folder: Path, stamps: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings with folders of the run's own, which get the images of the data sets; `stamps` is told what exactly they hold."""
    values, known = config.model_dump(mode="json"), {}
    for k, (id, entry) in enumerate(zip(sets, values["data"], strict=True), 1):
        data, target = datasets.open(home, id), folder / ("data" if k == 1 else f"data-{k}")
        data.snapshot(target)
        entry["folder"] = str(target)
        stamps.append(exchange.stamp(data, target) | {"kind": entry["kind"]})
        for path, _, _ in listing(target):
            if not isinstance(found := pictures.inspect(path, home.cache), str):
                known[found[0]] = found[1:]
    write_json(RunDir(folder).images, known)
    return values


def _from_config(context: Context, given: dict[str, Any]) -> Run:
    values = dict(given)
    preset = values.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise Problem(f"preset is {preset!r}; it must be a name like sd1/balanced.", errors={"preset": "not a name"})
    try:
        checked = load(preset=preset, values=values)
        scan(checked.data)
    except ConfigError as error:
        raise Problem(str(error), errors=error.errors) from None
    except DataError as error:
        raise Problem(str(error), errors={"data": str(error)}) from None
    return make(context, checked, {"from": "config"}, lambda config, folder: config.model_dump(mode="json"))


def make(context: Context, config: TrainConfig, about: dict[str, Any], settle: Callable[[TrainConfig, Path], dict[str, Any]]) -> Run:
    """A new run folder; `settle` fills it and gives the settings as they stand in its config.json."""
    name = unicodedata.normalize("NFKD", config.output.name).encode("ascii", "ignore").decode()
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40] or 'run'}"
    known = run_reader.folders(context.home, settings.load(context.home))
    k = 1
    while True:
        id = stem if k == 1 else f"{stem}-{k}"
        folder, k = context.home.runs / id, k + 1
        if id in known:
            continue
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    try:
        values = settle(config, folder)
        if start := values["adapter"].get("start"):  # the run it came from may be discarded
            copy = folder / "start" / Path(start).name
            copy.parent.mkdir(exist_ok=True)
            shutil.copy2(start, copy)
            values["adapter"]["start"] = str(copy)
        write_json(folder / "atelier.json", about | {"created": time.time()})
        write_json(folder / "config.json", values)  # last: it makes the folder a run
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run_reader.run(id, folder)


@router.post("/runs/{id}/duplicate")
def duplicate(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    old = find(context, id)
    try:
        config = validate(old.config)
    except ConfigError as error:
        raise Problem(f"The settings of {old.name()} do not fit this version: {error}", 409, error.errors) from None
    about = {k: v for k, v in old.atelier.items() if k != "created"} | {"from": old.id}

    def settle(config: TrainConfig, folder: Path) -> dict[str, Any]:
        values = config.model_dump(mode="json")
        for entry in values["data"]:
            source = Path(entry["folder"])
            if source.is_relative_to(old.folder):
                target = folder / source.relative_to(old.folder)
                shutil.copytree(source, target, copy_function=_link)
                entry["folder"] = str(target)
        if RunDir(old.folder).images.is_file():
            shutil.copy2(RunDir(old.folder).images, RunDir(folder).images)
        return values

    new = make(context, config, about, settle)
    context.runner.submit("train", new.folder, ["train", "--run-dir", str(new.folder)])
    return told(context, new)


def _link(source: str, target: str) -> None:
    """A second name for a file of a snapshot, which nobody changes; a copy where the disk knows no such thing."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


# ---- steering ---------------------------------------------------------------------------------------------------------------------------


def _ask(request: Request, id: str, action: str, kind: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, action)
    context.runner.request(run.folder, kind, payload)
    return told(context, run)


@router.post("/runs/{id}/stop")
def stop(request: Request, id: str) -> dict[str, Any]:
    return _ask(request, id, "stop", "stop")


@router.post("/runs/{id}/preview")
def preview(request: Request, id: str) -> dict[str, Any]:
    return _ask(request, id, "preview", "preview")


@router.post("/runs/{id}/save")
def save(request: Request, id: str) -> dict[str, Any]:
    return _ask(request, id, "save", "save")


@router.post("/runs/{id}/prompts")
def prompts(request: Request, id: str, body: Prompts) -> dict[str, Any]:
    return _ask(request, id, "prompts", "prompts", {"prompts": [text.strip() for text in body.prompts]})


@router.post("/runs/{id}/length")
def length(request: Request, id: str, body: Length) -> dict[str, Any]:
    return _ask(request, id, "length", "visits", {"visits": body.visits})


@router.post("/runs/{id}/resume")
def resume(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, "resume")
    return _go_on(context, run, [])


@router.post("/runs/{id}/further")
def further(request: Request, id: str, body: Further) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, "further")
    original = run.setting("train.visits", 1)
    visits = (run.length() or original) + max(1, round(original * body.percent / 100))
    return _go_on(context, run, ["--visits", str(visits)])


def _go_on(context: Context, run: Run, more: list[str]) -> dict[str, Any]:
    if not run.config:
        raise Problem(f"{run.id} has no settings that can be read, so it cannot go on: config.json is missing or damaged.", 409)
    again = ["--resume"] if run.ran() else []
    context.runner.submit("train", run.folder, ["train", "--run-dir", str(run.folder), *again, *more])
    context.runner.tick()
    return told(context, run)


@router.post("/runs/{id}/discard")
def discard(request: Request, id: str, body: Annotated[Confirm, Body()] = Confirm()) -> dict[str, Any]:  # noqa: B008 (never changed)
    context = of(request)
    run = find(context, id)
    if not body.confirm:
        raise Problem(f'This deletes {run.folder} with everything in it. Send {{"confirm": true}} to do so.')
    for folder in (run.folder / "results", run.folder):
        context.runner.kill(folder)
    return _delete(run)


def _delete(run: Run) -> dict[str, Any]:
    gone = run.folder.with_name(f".{run.folder.name}.deleted")
    try:
        run.folder.rename(gone)  # at once: a run that is half deleted would still be listed
        shutil.rmtree(gone)
    except OSError as error:
        raise Problem(
            f"{error.filename} could not be deleted: {error.strerror}. Close what uses it, then delete it by hand.", 409
        ) from None
    return {"id": run.id, "deleted": True}


# ---- the queue --------------------------------------------------------------------------------------------------------------------------


@router.post("/runs/{id}/cancel")
def cancel(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, "cancel")
    if not context.runner.unqueue(run.folder):
        raise Problem(f"{run.name()} has just been started, so it waits no more. Stop it instead.", 409)
    return told(context, run) if run.ran() else _delete(run)


@router.post("/runs/{id}/move")
def move(request: Request, id: str, body: Move) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, "move")
    # The page counts trainings; other jobs may stand between them.
    order = [job.folder for job in context.runner.jobs.list() if job.folder != run.folder]
    trainings = [folder for folder in queue(context) if folder != run.folder]
    context.runner.jobs.move(run.folder, order.index(trainings[body.to]) if body.to < len(trainings) else len(order))
    return told(context, run)


@router.patch("/runs/{id}")
def edit(request: Request, id: str, body: Changes) -> dict[str, Any]:
    context = of(request)
    run = find(context, id)
    allow(context, run, "edit")
    refused = {k: f"{k} cannot be changed while a run waits; cancel it and start anew." for k in body.changes if re.match(r"data(\.|$)", k)}
    if refused:
        raise Problem(" ".join(refused.values()), errors=refused)
    values = json.loads(json.dumps(run.config))
    if body.changes.get("optimizer.kind", run.setting("optimizer.kind")) != run.setting("optimizer.kind"):
        values["optimizer"] = {}  # another kind has other fields
    for key, value in body.changes.items():
        *tables, last = key.split(".")
        node = values
        for table in tables:
            node = node.setdefault(table, {})
            if not isinstance(node, dict):
                raise Problem(f"{key} is not a known setting.", errors={key: "not a known setting"})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    try:
        checked = validate(values)
    except ConfigError as error:
        raise Problem(str(error), errors={key: forms.in_words(text) for key, text in error.errors.items()}) from None
    if not context.runner.jobs.holds(run.folder, lambda: write_json(run.folder / "config.json", checked.model_dump(mode="json"))):
        raise Problem(f"{run.name()} has just been started, so it cannot be edited any more.", 409)
    return find(context, id).view(context.runner.look(run.folder), place(run.folder, queue(context)), None)
