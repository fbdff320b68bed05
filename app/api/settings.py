"""This machine, the user's settings, the hub token, and the bug report."""

from __future__ import annotations

import os
import time
import tomllib
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from app import machine, report, run_reader, settings
from app.context import Context, of
from app.errors import Problem
from app.paths import ROOT, Home
from app.runner import LIVE

router = APIRouter()
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # huggingface_hub takes these before the token that it keeps


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@router.get("/system")
def system(request: Request) -> dict[str, Any]:
    context = of(request)
    home, found = context.home, machine.info(context.home)
    if found is None and not machine.probing(home) and not machine.problem(home):
        machine.refresh(home, context.runner)
    choice = found["choice"] if found else None
    return {
        "app": "lora-atelier",
        "version": version(),
        "cpu_s": round(time.process_time(), 2),
        "data_dir": str(home.root),
        "password": request.app.state.asks_password,
        "device": None if not choice else "CPU" if choice["device"] == "cpu" else choice["name"],
        "gpu_unusable": found["gpu_unusable"] if found else None,
        "gpus": found["gpus"] if found else [],
        **machine.live(home),
        "probing": machine.probing(home),
        "probe_error": machine.problem(home),
        **_runs(context),
    }


def _runs(context: Context) -> dict[str, Any]:
    """{active: SUMMARY or None, waiting: count}, for the line at the head of every page."""
    found = run_reader.folders(context.home, settings.load(context.home))
    queue = context.runner.jobs.list()
    waiting = sum(job.kind == "train" for job in queue)
    for id, folder in found.items():
        look = context.runner.look(folder, queue)
        if look.state in LIVE:
            run = run_reader.run(id, folder)
            with run.lock:
                run.refresh()
                return {"active": run.summary(look, None), "waiting": waiting}
    return {"active": None, "waiting": waiting}


@router.post("/system/probe")
def probe(request: Request) -> dict[str, Any]:
    """Look at the hardware again; `GET /api/system` says when it is done."""
    context = of(request)
    machine.refresh(context.home, context.runner)
    return system(request)


@router.get("/settings")
def read(request: Request) -> dict[str, Any]:
    return view(of(request).home)


@router.patch("/settings")
def change(request: Request, changes: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    home = of(request).home
    known = {*settings.Settings.model_fields, "token"}
    unknown = sorted(changes.keys() - known)
    if unknown:
        raise Problem(f"There is no setting {unknown[0]!r}. There are: {', '.join(sorted(known))}.", errors={unknown[0]: "not a setting"})
    token = changes.pop("token", None)
    if token is not None and not isinstance(token, str):
        raise Problem("token must be text.", errors={"token": "must be text"})
    if changes:
        settings.save(home, settings.check_folders(home, changes))
    if token is not None:
        set_token(token.strip())
    return view(home)


def view(home: Home) -> dict[str, Any]:
    from huggingface_hub import get_token

    return settings.load(home).model_dump(mode="json") | {"token": get_token() is not None}


def set_token(token: str) -> None:
    """Have huggingface_hub keep a token that the hub accepts, or forget the one it keeps (""). Raises Problem."""
    from huggingface_hub import constants, get_token, login, logout
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_stored_tokens

    set_by = next((name for name in TOKEN_VARIABLES if os.environ.get(name)), None)
    if set_by:
        text = f"The token comes from the environment variable {set_by}, which goes before one that is set here. Unset it and start again."
        raise Problem(text, 409, {"token": text})
    if not token:
        kept = get_token()
        logout(next((name for name, value in get_stored_tokens().items() if value == kept), None))  # others stay as they are
        return
    try:
        login(token=token, add_to_git_credential=False)
        return
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        text = f"The hub answered with status {status}. Try again later."
        if status in (401, 403):
            text = "The hub does not accept this token. Copy it again from huggingface.co/settings/tokens; it begins with hf_."
    except ValueError:
        text = "This is an organisation's token; a token of your own account is needed."
    except (OSError, *HfHubHTTPError.__bases__):  # no network, a proxy that refuses, or offline mode
        text = (
            f"{constants.ENDPOINT} cannot be reached, so the token could not be checked and is not kept. Check the network, then try again."
        )
    raise Problem(text, errors={"token": text})  # outside of the handlers: what the hub said may hold the token


@router.get("/report")
def bug_report(request: Request, captions: bool = False, prompts: bool = False, names: bool = False) -> Response:
    content = report.make(of(request).home, captions=captions, prompts=prompts, names=names)
    name = f"lora-atelier-report-{time.strftime('%Y%m%d-%H%M')}.zip"
    return Response(content, media_type="application/zip", headers={"content-disposition": f'attachment; filename="{name}"'})
