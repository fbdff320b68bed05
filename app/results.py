"""What a run has come to: the comparison that `python -m trainer compare` left in RUN/results, the exported files, and copies of them."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from app import run_reader
from app.errors import Problem
from app.run_reader import Json, Run, Tail, quote
from app.runner import Look
from app.settings import Settings
from trainer import events
from trainer.formats import metadata, probe

OWN = ("config.json", "versions.json", "process.json", "launch.json", "waiting.json", "atelier.json")  # no card of a LoRA
STRENGTH = 0.8  # of the line to copy: what the web UIs' users begin with


class Comparison:
    """The job folder of one comparison: how far it is, and what it found."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.found = Json(folder / "results.json")
        self.tail = Tail(folder / "events.jsonl", self._take, self._forget)
        self._forget()

    def _forget(self) -> None:
        self.done, self.total, self.text = 0, 0, ""

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] in events.TERMINAL or (event["type"] == "stage" and event["name"] == "loading"):
            self._forget()
        self.done, self.total = event.get("done", self.done), event.get("total", self.total)
        if event["type"] in ("stage", "warning"):
            self.text = event.get("text", "")

    def read(self) -> tuple[dict[str, Any], int, str]:
        """(results.json or {}, percent of the comparison under way, what it says)."""
        with self.lock:
            self.tail.read()
            return self.found.read(), 100 * self.done // self.total if self.total else 0, self.text


@functools.lru_cache(maxsize=500)
def comparison(folder: Path) -> Comparison:
    return Comparison(folder)


def second(path: Path) -> Path | None:
    """The second file of a LoRA for SD3, which other tools read than the first: NAME_diffusers beside NAME."""
    other = path.with_name(f"{path.stem}_diffusers{path.suffix}")
    return other if other.is_file() else None


def files(run: Run) -> list[dict[str, Any]]:
    """Every exported LoRA of a run that is there now, by step: {file, second (or None), step, bytes, final}."""
    name = run.name()
    known = {file: event["step"] for file, (event, _) in run.exports.items()}
    found = []
    with contextlib.suppress(OSError):
        there = set(run.folder.glob("[!.]*.safetensors"))
        for path in there - {second(path) for path in there}:
            final = path.stem == name
            told = re.fullmatch(r"-(\d+)", path.stem.removeprefix(name)) if path.stem.startswith(name) else None
            step = known.get(path.name, int(told[1]) if told else run.step)
            other = second(path)
            size = path.stat().st_size + (other.stat().st_size if other else 0)
            found.append({"file": path.name, "second": other and other.name, "step": step, "bytes": size, "final": final})
    return sorted(found, key=lambda entry: (entry["step"], entry["final"]))


def trigger(run: Run) -> str:
    data = run.config.get("data") or [{}]
    return data[0].get("trigger", "")


def trigger_line(stem: str, word: str) -> str:
    return f"<lora:{stem}:{STRENGTH}> {word}".strip()


def view(run: Run, look: Look, settings: Settings) -> dict[str, Any]:
    """The answer of GET /api/runs/{id}/results; `look` is the comparison's."""
    found, percent, text = comparison(run.folder / "results").read()
    there = files(run)
    names = {entry["file"] for entry in there}
    recommended = found.get("recommended") if (found.get("recommended") or {}).get("file") in names else None
    for entry in there:
        entry["recommended"] = bool(recommended) and entry["file"] == recommended["file"]
    url = lambda name: f"/api/runs/{quote(run.id)}/results/{quote(name)}"  # noqa: E731
    pair, matrix = found.get("pair"), found.get("matrix")
    if pair:
        pair = pair | {"without": url(pair["without"]), "with": url(pair["with"])}
    if matrix:
        matrix = matrix | {"rows": [row | {"cells": [[url(n) for n in cells] for cells in row["cells"]]} for row in matrix["rows"]]}
    best = recommended["file"] if recommended else there[-1]["file"] if there else ""
    return {
        "state": look.state,
        "percent": 100 if look.state == "finished" else percent if look.state == "running" else 0,
        "text": look.text or (text if look.state == "running" else ""),
        "pair": pair,
        "matrix": matrix,
        "scores": found.get("scores", []),
        "recommended": recommended,
        "hints": found.get("hints", []),
        "files": there,
        "trigger_line": trigger_line(Path(best).stem, trigger(run)) if best else "",
        "lora_folder": settings.lora_folder,
        "preview": {key: value for key in ("negative", "steps", "guidance") if (value := run.setting(f"preview.{key}")) is not None},
        "metadata": {name: _metadata(run.folder / name, (run.folder / name).stat().st_mtime_ns) for name in names},
    }


@functools.lru_cache(maxsize=500)
def _metadata(path: Path, changed: int) -> dict[str, str]:
    """What the file says of itself; `changed` only tells versions apart. Long texts (all captions' tags) are cut."""
    try:
        values, _ = metadata.read_header(path)
    except ValueError as error:
        return {"error": str(error)}
    return {k: v if len(v) <= 2000 else f"{v[:2000]} ..." for k, v in values.items()}


def copy(run: Run, file: str, folder: str, settings: Settings) -> list[Path]:
    """Copy an exported LoRA into a folder of LoRAs, with its card and picture; nothing there is written over. Raises Problem."""
    source = run_reader.inside(run.folder, file, ".safetensors")
    wanted = folder.strip().strip("\"'").strip() or settings.lora_folder
    if not wanted:
        text = "No LoRA folder is set. Give one here or in the settings, like the folder models/Lora of your web UI."
        raise Problem(text, errors={"folder": text})
    target = Path(wanted).expanduser()
    if not target.is_absolute() or not target.is_dir():
        text = f"{wanted} is no folder on this machine. Give the full path of one that is there."
        raise Problem(text, errors={"folder": text})
    kind = probe.identify(source)
    if kind.family not in metadata.SIDECAR_VERSIONS:
        raise Problem(f"{file} is {kind.what}, for which no card can be written. Download it instead.", 409)
    other = second(source)
    stem, k = source.stem, 1
    while True:
        name = stem if k == 1 else f"{stem}-{k}"
        made = [target / f"{name}{ending}" for ending in (".safetensors", ".json", ".png", "_diffusers.safetensors")]
        k += 1
        if any(path.exists() for path in made):
            continue
        try:
            with made[0].open("xb") as out, source.open("rb") as raw:
                shutil.copyfileobj(raw, out)
            break
        except FileExistsError:
            continue
        except OSError as error:
            if made[0].exists() and made[0].stat().st_size < source.stat().st_size:
                made[0].unlink()
            raise Problem(f"{made[0]} could not be written: {error.strerror}. Choose another folder, or make room there.", 409) from None
    words = [word] if (word := trigger(run)) else []
    step = next((entry["step"] for entry in files(run) if entry["file"] == file), run.step)
    notes = f"{trigger_line(name, trigger(run))}\nTrained with LoRA Atelier, {step} steps."
    card = metadata.sidecar(kind.family, words, description=run.setting("output.description", ""), notes=notes)
    paths = made[:2]
    try:
        if other:
            shutil.copyfile(other, made[3])
            paths.append(made[3])
        made[1].write_text(card, encoding="utf-8")
        if (picture := _picture(run, file, step)) is not None:
            shutil.copyfile(picture, made[2])
            paths.append(made[2])
    except OSError as error:
        raise Problem(f"{made[0]} is there, but not all of its card: {error.filename}: {error.strerror}.", 409) from None
    return paths


def _picture(run: Run, file: str, step: int) -> Path | None:
    """The picture that shows best what a file does: of the comparison, or the preview made nearest to its step."""
    found, _, _ = comparison(run.folder / "results").read()
    named = []
    if (pair := found.get("pair")) and pair["file"] == file:
        named.append(run.folder / "results" / Path(pair["with"]).name)
    for row in (found.get("matrix") or {"rows": []})["rows"]:
        if row["file"] == file:
            cells = row["cells"][min(1, len(row["cells"]) - 1)]  # the trigger in a new place, where there are prompts enough
            named.append(run.folder / "results" / Path(cells[-1]).name)
    if run.previews:
        nearest = min((p for p, _ in run.previews), key=lambda p: abs(p["step"] - step))
        named += [run.folder / "previews" / Path(name).name for name in nearest["images"][:1]]
    return next((path for path in named if path.is_file()), None)


def keep(run: Run, file: str, confirm: bool) -> dict[str, Any]:
    """Delete every exported LoRA but one; without `confirm`, only say which and how much. Raises Problem."""
    run_reader.inside(run.folder, file, ".safetensors")
    others = [entry for entry in files(run) if entry["file"] != file]
    if confirm:
        for entry in others:
            path = run.folder / entry["file"]
            try:
                path.unlink()
                if entry["second"]:
                    (run.folder / entry["second"]).unlink()
                if (card := path.with_suffix(".json")).name not in OWN:
                    card.unlink(missing_ok=True)
            except OSError as error:
                raise Problem(f"{path} could not be deleted: {error.strerror}. Close what uses it, then try again.", 409) from None
    return {"delete": [entry["file"] for entry in others], "mb": round(sum(entry["bytes"] for entry in others) / 1e6, 1)}
