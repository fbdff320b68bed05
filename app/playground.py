"""The playground: a trainer process (`serve`, trainer/serve.py) that keeps a base loaded and draws what is asked, with and without a LoRA."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import uuid
from pathlib import Path
from typing import Any

from app.errors import Problem
from app.paths import Home
from app.run_reader import Tail, quote
from app.runner import LIVE, SERVE, Runner, read_json
from trainer.run_dir import write_atomic

IDLE_S = 300
KEPT = 100  # pictures, and answers in memory


class Said:
    """What the playground's process has said so far."""

    def __init__(self, folder: Path) -> None:
        self.lock = threading.Lock()
        self.tail = Tail(folder / "events.jsonl", self._take, self._forget)
        self._forget()

    def _forget(self) -> None:
        self.seq, self.last, self.memory, self.text = -1, "", None, ""
        self.answers: dict[str, dict[str, Any]] = {}

    def _take(self, event: dict[str, Any]) -> None:
        self.seq, self.last = event["seq"], event["type"]
        if event["type"] == "loading":
            self.text = event.get("text", "")
        elif event["type"] == "ready":
            self.memory = event["memory_gib"]
        elif event["type"] in ("picture", "problem"):
            self.answers[event["id"]] = event
            for old in list(self.answers)[:-KEPT]:
                del self.answers[old]


@functools.lru_cache(maxsize=8)
def _said(folder: Path) -> Said:
    return Said(folder)


def folder(home: Home) -> Path:
    return home.jobs / "playground"


def ask(home: Home, runner: Runner, wanted: dict[str, Any]) -> str:
    """Ask for a picture; returns the request's id. `wanted` is trainer/serve.py's request. Raises Problem when the device is taken."""
    _check_free(home, runner)
    root = folder(home)
    (root / "requests").mkdir(parents=True, exist_ok=True)
    _tidy(root / "pictures")
    request = uuid.uuid4().hex
    write_atomic(root / "requests" / f"{request}.json", json.dumps(wanted))
    _serve(home, runner)
    return request


def _check_free(home: Home, runner: Runner) -> None:
    others = [(path, kind) for path, kind in runner.busy() if kind != SERVE]
    if others or runner.jobs.list():
        what = {
            "train": "A training",
            "compare": "A comparison",
            "caption": "Captioning",
            "mask": "Masking",
            "batch": "A look at a batch",
            "measure": "A measurement",
        }
        kind = what.get(others[0][1] if others else runner.jobs.list()[0].kind, "Another job")
        raise Problem(f"{kind} is using this machine now, so the playground has to wait. Try again when it has ended.", 409)


def _serve(home: Home, runner: Runner) -> None:
    root = folder(home)
    with _said(root).lock:  # two requests at once start one process
        if runner.look(root).state not in LIVE:
            runner.launch(SERVE, root, ["serve", "--run-dir", str(root), "--idle", str(IDLE_S)])


def _tidy(pictures: Path) -> None:
    with contextlib.suppress(OSError):
        for old in sorted(pictures.glob("[!.]*.png"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()


def view(home: Home, runner: Runner, request: str = "") -> dict[str, Any]:
    """The answer of GET /api/playground."""
    root, said = folder(home), _said(folder(home))
    waiting = {path.stem for path in (root / "requests").glob("[!.]*.json")}
    if request in waiting and runner.look(root).state not in LIVE:  # it went idle just as the request came
        with contextlib.suppress(Problem):
            _check_free(home, runner)
            _serve(home, runner)
    look = runner.look(root)
    with said.lock:
        said.tail.read()
        launch = read_json(root / "launch.json") or {}
        here = said.seq > (launch.get("last") or [-1])[0]  # it has spoken since it was started
        answer = said.answers.get(request)
        last, memory, text = said.last if here else "", said.memory, said.text
    if look.state not in LIVE:
        state = "yielded" if launch.get("yielded") and look.state == "stopped" else "idle"
        text = "It was closed, since another job needs this machine." if state == "yielded" else ""
    elif look.state == "starting":
        state, text = "starting", ""
    elif waiting or last == "working":
        state, text = ("working" if last in ("working", "picture", "problem", "ready") else "loading"), ""
    elif last in ("ready", "picture", "problem") and memory is not None:
        state, text = "ready", f"keeps {memory:.1f} GiB of memory; freed after {IDLE_S // 60} idle minutes"
    else:
        state = "loading"
    pictures = None
    if answer and answer["type"] == "picture":
        url = lambda name: name and f"/api/playground/pictures/{quote(Path(name).name)}"  # noqa: E731
        pictures = {"without": url(answer["without"]), "with": url(answer["with"])}
    error = answer["text"] if answer and answer["type"] == "problem" else ""
    if request and not answer and request not in waiting and look.state not in LIVE:
        error = look.text or "The playground ended before this picture was made. Ask for it again."
    return {"state": state, "text": text, "pictures": pictures, "error": error}


def close(home: Home, runner: Runner) -> dict[str, Any]:
    """Have the process end, with its memory."""
    if runner.look(folder(home)).state in LIVE:
        runner.request(folder(home), "stop")
    return view(home, runner)
