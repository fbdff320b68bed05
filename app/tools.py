"""The tools page: say what a LoRA file is, and rewrite one for other programs.

Each asking is a folder of the cache, with the process' launch.json, answer.txt (what it printed) and log.txt beside

asked.json   {kind: inspect | convert, asked (how the file was named), source (its path), name, bytes, time; converting also to, beside, out}

so that it goes on, and its answer is found again, when the app is closed meanwhile. Files that were sent lie beside them. All of it
is deleted after a day.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from app import intake, results, run_reader, settings
from app.errors import Problem
from app.paths import Home
from app.runner import LIVE, Look, Runner, read_json
from trainer import run_dir
from trainer.formats.probe import TITLES

SUFFIX = ".safetensors"
KEPT_S = 24 * 3600
MOST = 2  # processes at a time: each imports torch, and reads a whole file into memory
MOST_EXPORTS = 300  # that are offered
TARGETS = {  # as `trainer convert --to` -> words for people
    "kohya": "the names of kohya's scripts",
    "diffusers": "the names of diffusers",
    "comfy": "the names of ComfyUI",
}
ADAPTERS = {  # what `trainer inspect` tells apart
    "lora": "A LoRA",
    "locon": "A LoRA with convolutions (LoCon)",
    "dora": "A DoRA",
    "loha": "A LoHa",
    "lokr": "A LoKr",
    "oft": "An OFT",
    "boft": "A BOFT",
    "glora": "A GLoRA",
    "ia3": "An IA3",
    "full": "A file of full differences",
    "norm": "A file of differences of norms",
}
ID = re.compile(r"[0-9a-f]{32}")
_one_at_a_time = threading.Lock()


# ---- files --------------------------------------------------------------------------------------------------------------------------


def _root(home: Home) -> Path:
    return home.cache / "tools"


def _folder(home: Home, id: str, what: str) -> Path:
    """The folder of an asking or of a sent file. Raises Problem (404)."""
    folder = _root(home) / id
    if not ID.fullmatch(id) or not folder.is_dir():
        raise Problem(f"There is no {what} {id[:80]!r}. What the tools keep is deleted after a day; begin again.", 404)
    return folder


def _tidy(home: Home, runner: Runner) -> None:
    """Delete what is older than a day."""
    with contextlib.suppress(FileNotFoundError), os.scandir(_root(home)) as entries:
        for entry in list(entries):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > KEPT_S and runner.look(Path(entry.path)).state not in LIVE:
                    shutil.rmtree(entry.path, ignore_errors=True)


def take(home: Home, runner: Runner, name: str, content: BinaryIO, size: int) -> dict[str, Any]:
    """Keep a file that was sent: {"upload": id, "name", "bytes"}. Raises Problem for one that is no .safetensors or finds no room."""
    label = intake.to_label(name).rpartition("/")[2]
    if not label.lower().endswith(SUFFIX):
        raise Problem(f"{label or 'The file'} is not a {SUFFIX} file. LoRAs come as {SUFFIX}; others are not opened here.")
    _tidy(home, runner)
    if shutil.disk_usage(home.cache).free < size + intake.SPARE:
        raise Problem(f"The disk has no room for {label} ({size / 1e6:.0f} MB). Free some space, or give the file's path instead.", 409)
    id = uuid.uuid4().hex
    folder = _root(home) / id
    folder.mkdir(parents=True)
    path = folder / intake.free_name(label[: -len(SUFFIX)] + SUFFIX, intake.Taken())
    with path.open("xb") as out:
        shutil.copyfileobj(content, out, 2**20)
    return {"upload": id, "name": path.name, "bytes": path.stat().st_size}


def _given(path: str) -> Path:
    """The file that a pasted path means. Raises Problem."""
    try:
        found = intake.pasted(path)
    except Problem:
        raise Problem("Give the file's whole path, like /home/me/loras/cat.safetensors or C:\\loras\\cat.safetensors.") from None
    if found.suffix.lower() != SUFFIX:
        raise Problem(f"{found.name} is not a {SUFFIX} file. LoRAs come as {SUFFIX}; others are not opened here.")
    try:
        there = found.is_file()
    except OSError as error:  # a name that cannot be
        raise Problem(f"{found} cannot be read: {error.strerror}. Check the path.") from None
    if not there:
        raise Problem(f"There is no file {found} on the computer on which this app runs. Check the path, or choose the file instead.")
    if not os.access(found, os.R_OK):
        raise Problem(f"{found} may not be read by the user who runs this app. Change its permissions, or choose another file.")
    return found.resolve()


def source(home: Home, asked: dict[str, str]) -> Path:
    """The file of {"path"}, {"upload"} or {"run", "file"}. Raises Problem."""
    ways = [name for name in ("path", "upload", "run") if asked.get(name)]
    if len(ways) != 1:
        raise Problem(
            "Name one file: give path, or upload (what POST /api/tools/files answered), or run and file.", errors={"path": "missing"}
        )
    try:
        if ways == ["path"]:
            return _given(asked["path"])
        if ways == ["run"]:
            return run_reader.inside(run_reader.find(home, settings.load(home), asked["run"]), asked.get("file", ""), SUFFIX)
    except Problem as problem:
        raise Problem(problem.text, problem.status, {ways[0]: problem.text}) from None
    folder = _folder(home, asked["upload"], "sent file")
    found = next((path for path in folder.iterdir() if path.suffix == SUFFIX), None)
    if found is None or (folder / "asked.json").exists():
        raise Problem(f"There is no sent file {asked['upload']!r}. Send it again.", 404)
    return found


def exports(home: Home) -> list[dict[str, Any]]:
    """The LoRAs of all runs, newest run first: [{run, name, file, step, bytes, final}]."""
    found = []
    for id, folder in run_reader.folders(home, settings.load(home)).items():
        if len(found) >= MOST_EXPORTS:
            break
        run = run_reader.run(id, folder)
        with run.lock:
            run.refresh()
            found += [{"run": id, "name": run.name(), **entry} for entry in reversed(results.files(run))]
    return found[:MOST_EXPORTS]


# ---- asking -------------------------------------------------------------------------------------------------------------------------


def inspect(home: Home, runner: Runner, asked: dict[str, str]) -> dict[str, Any]:
    """Begin to look into a file; its `view`. Raises Problem."""
    path = source(home, asked)
    return _begin(home, runner, {"kind": "inspect", "source": str(path), "asked": asked}, lambda facts: ["inspect", str(path), "--json"])


def convert(home: Home, runner: Runner, asked: dict[str, str], to: str, beside: bool) -> dict[str, Any]:
    """Begin to rewrite a file with other names: into a new file beside it, or into one to be downloaded. Raises Problem."""
    path = source(home, asked)
    if beside and not asked.get("path"):
        raise Problem(
            "Only a file that was named by its path has a place beside it. Choose to download the new file.", errors={"beside": "no"}
        )
    if beside and not os.access(path.parent, os.W_OK):
        text = f"Nothing may be written into {path.parent}. Choose to download the new file instead."
        raise Problem(text, 409, {"beside": text})

    def words(facts: dict[str, Any]) -> list[str]:
        stem = f"{path.stem}_{to}"
        folder = path.parent if beside else Path(facts["folder"])
        k, out = 1, folder / f"{stem}{SUFFIX}"
        while out.exists():  # the tool itself writes over nothing either
            k, out = k + 1, folder / f"{stem}_{k + 1}{SUFFIX}"
        facts |= {"out": str(out)}
        return ["convert", str(path), "--to", to, "--out", str(out)]

    return _begin(home, runner, {"kind": "convert", "source": str(path), "asked": asked, "to": to, "beside": beside}, words)


def _begin(home: Home, runner: Runner, facts: dict[str, Any], words: Any) -> dict[str, Any]:
    with _one_at_a_time:
        _tidy(home, runner)
        root = _root(home)
        root.mkdir(parents=True, exist_ok=True)
        live = [entry for entry in root.iterdir() if (entry / "asked.json").exists() and runner.look(entry).state in LIVE]
        if len(live) >= MOST:
            raise Problem(f"{MOST} files are being worked on now, and no more at a time. Try again in a moment.", 409)
        id = uuid.uuid4().hex
        folder = root / id
        folder.mkdir()
        path = Path(facts["source"])
        facts |= {"name": path.name, "bytes": path.stat().st_size, "time": time.time(), "folder": str(folder)}
        said = words(facts)
        run_dir.write_json(folder / "asked.json", facts)
        runner.tool(folder, said)
    return view(home, runner, id)


# ---- answers ------------------------------------------------------------------------------------------------------------------------


def view(home: Home, runner: Runner, id: str) -> dict[str, Any]:
    """The answer of GET /api/tools/{id}. Raises Problem (404)."""
    folder = _folder(home, id, "asking")
    facts = read_json(folder / "asked.json")
    if facts is None:
        raise Problem(f"There is no asking {id!r}; that is a sent file.", 404)
    look = runner.look(folder)
    shown: dict[str, Any] = {
        "id": id,
        "kind": facts["kind"],
        "name": facts["name"],
        "bytes": facts["bytes"],
        "seconds": round(time.time() - facts["time"], 1),
        "text": "",
    }
    shown |= {"source": {way: text for way, text in facts["asked"].items() if text}}
    shown |= {"to": facts["to"], "beside": facts["beside"]} if facts["kind"] == "convert" else {}
    if look.state in LIVE:
        return shown | {"state": "running"}
    done = _inspected(folder) if facts["kind"] == "inspect" else _converted(folder, facts)
    if done:
        return shown | {"state": "finished"} | done
    return shown | {"state": "failed", "text": _why(folder, look)}


def _why(folder: Path, look: Look) -> str:
    if (folder / "cancelled").exists():
        return "It was cancelled."
    log = folder / "log.txt"
    if log.is_file() and "Traceback (most recent call last)" in log.read_text(encoding="utf-8", errors="replace"):
        return f"The tool met an error of its own: {look.text or 'unknown'}. What happened is written in {log}."
    return look.text or "The tool ended without a word. Try again."


def _inspected(folder: Path) -> dict[str, Any] | None:
    try:  # a damaged file may have an alpha that is no number, which JSON for browsers has no word for
        report = json.loads((folder / "answer.txt").read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError):
        return None
    return {"verdict": verdict(report), "report": report}


def _converted(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    out = Path(facts["out"])
    try:
        lines = (folder / "answer.txt").read_text(encoding="utf-8").splitlines()
        size = out.stat().st_size
    except OSError:
        return None
    if not any(line.startswith("Saved ") for line in lines):  # it says so last, when the file is checked and whole
        return None
    notes = [line.removeprefix("Note: ") for line in lines if line.startswith("Note: ")]
    where = f"Saved as {out}." if facts["beside"] else f"{out.name} is ready to download."
    text = f"{where} It has {TARGETS[facts['to']]}; the file that you gave is unchanged."
    link = f"/api/tools/{folder.name}/file"
    return {"text": text, "path": str(out), "file": out.name, "file_bytes": size, "notes": notes, "download": link}


def converted_file(home: Home, runner: Runner, id: str) -> Path:
    """The file that a conversion has made. Raises Problem."""
    found = view(home, runner, id)
    if found["kind"] != "convert" or found["state"] != "finished":
        raise Problem(f"{found['name']} has no converted file: {found['text'] or 'it is not made yet.'}", 409)
    return Path(found["path"])


def cancel(home: Home, runner: Runner, id: str) -> dict[str, Any]:
    """End what works on a file; what it has written in part is no file yet. Its `view`."""
    folder = _folder(home, id, "asking")
    if runner.look(folder).state in LIVE:
        (folder / "cancelled").touch()
        runner.kill(folder, grace=0)
    return view(home, runner, id)


def verdict(report: dict[str, Any]) -> dict[str, str]:
    """{"level": good | warn | bad, "text": one line on what a file is and what it is good for} of what `trainer inspect` found."""
    problems, unread = report["problems"], report["unread"]
    if not report["adapter"]:
        return {"level": "warn" if report["parameters"] else "bad", "text": problems[0]}
    what = ADAPTERS.get(report["adapter"], f"An adapter of the kind {report['adapter']}")
    what += f" for {TITLES[report['family']]}" if report["family"] in TITLES else " for a base that cannot be told"
    if not report["finite"]:
        return {"level": "bad", "text": f"{what}, damaged: it holds values that are not numbers, so that pictures turn black."}
    if report["effect"] is False:
        return {"level": "bad", "text": f"{what} that can have no effect: the change of every layer is zero."}
    whole, partly = ([name for name, keys in unread.items() if bool(keys) is left] for left in (False, True))
    if partly and not whole:
        return {"level": "bad", "text": f"{what}, of which every program leaves keys unread."}
    if len(partly) > len(whole):
        return {"level": "warn", "text": f"{what} that {_join(whole)} alone {'read' if len(whole) > 1 else 'reads'} as a whole."}
    if partly:
        return {"level": "warn", "text": f"{what} that works, but {_join(partly)} {'leave' if len(partly) > 1 else 'leaves'} keys unread."}
    if problems:
        return {"level": "warn", "text": f"{what}. Read what stands below before you use it."}
    return {"level": "good", "text": f"{what} that works: every program here reads all of it."}


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""
