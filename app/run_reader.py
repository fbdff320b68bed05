"""A run's folder as the page sees it: summary, curves, previews, exports. Each folder is read once; later looks read what was added.

Pure reading: nothing here starts, asks or writes but thumbnails in the cache. atelier.json, which the app puts into the folders that
it makes, holds {purpose, preset, model_title, family, from, created, steps}; command-line runs have none.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from app import pictures
from app.errors import Problem
from app.paths import Home
from app.settings import Settings
from trainer import events
from trainer.run_dir import write_atomic

MOST_POINTS = 400
TAIL = 64 * 1024
SIZES = range(32, 1025)  # pixels of a thumbnail's longer side


# ---- finding --------------------------------------------------------------------------------------------------------------------------


def folders(home: Home, settings: Settings) -> dict[str, Path]:
    """Every run folder by its id, the folder's name; of two of one name, in two places, the second has `~2` at its end."""
    found: dict[str, Path] = {}
    for parent in dict.fromkeys([home.runs, *(Path(p).expanduser().resolve() for p in settings.run_folders)]):
        for folder in _listing(parent):
            key, k = folder.name, 2
            while key in found:
                key, k = f"{folder.name}~{k}", k + 1
            found[key] = folder
    return found


_listings: dict[Path, tuple[int, list[Path]]] = {}


def _listing(parent: Path) -> list[Path]:
    """The run folders in a folder, sorted by name. Listed anew when the folder has changed, or holds some that may become runs."""
    try:
        changed = parent.stat().st_mtime_ns
        kept = _listings.get(parent)
        if kept and kept[0] == changed:
            return kept[1]
        with os.scandir(parent) as entries:
            names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
    except OSError:
        return []
    runs = [f for f in (parent / name for name in names) if (f / "config.json").exists() or (f / "events.jsonl").exists()]
    if len(runs) == len(names) and time.time_ns() - changed > 2e9:  # a folder's time is coarse: one made just now might be missed
        _listings[parent] = changed, runs
    return runs


def find(home: Home, settings: Settings, id: str) -> Path:
    """The folder of a run. The id is looked up in a listing, never made part of a path. Raises Problem (404)."""
    folder = folders(home, settings).get(id)
    if folder is None:
        raise Problem(f"There is no run {id[:80]!r}. It may have been deleted.", 404)
    return folder


def inside(folder: Path, name: str, *endings: str) -> Path:
    """The file `name` of a folder, looked up in its listing. Raises Problem (404)."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == name and entry.name.endswith(endings) and not name.startswith(".") and entry.is_file(follow_symlinks=False):
                return folder / entry.name
    raise Problem(f"There is no file {name[:80]!r} in this run.", 404)


# ---- files ----------------------------------------------------------------------------------------------------------------------------


def last_event(path: Path) -> dict[str, Any] | None:
    """The last whole event of a file, or None."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            reach = TAIL
            while True:
                file.seek(max(0, size - reach))
                raw = file.read(min(reach, size))
                whole = raw[: raw.rfind(b"\n") + 1]
                start = whole.rfind(b"\n", 0, -1) + 1
                if start or reach >= size:  # else the line is longer than what was read
                    return _event(whole[start:]) if whole else None
                reach *= 8
    except (FileNotFoundError, NotADirectoryError):
        return None


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"seq", "time", "type"} <= event.keys() else None


class Tail:
    """The events of one file, each handed to `take` once; `forget` is called where another file took its place."""

    def __init__(self, path: Path, take: Callable[[dict[str, Any]], None], forget: Callable[[], None]) -> None:
        self.path, self.take, self.forget = path, take, forget
        self.offset, self.head, self.seen = 0, b"", None

    def read(self) -> None:
        """Read what was added since; a torn last line is left for later."""
        try:
            now = self.path.stat()
        except OSError:
            now = None
        seen = now and (now.st_ino, now.st_size, now.st_mtime_ns)
        if seen == self.seen:
            return
        self.seen = seen
        if now is None:
            self._restart()
            return
        with self.path.open("rb") as file:
            if now.st_size < self.offset or file.read(len(self.head)) != self.head:
                self._restart()
            file.seek(self.offset)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if not self.head:
            self.head = whole[:200]  # the first event's time tells this file from any other
        self.offset += len(whole)
        for line in whole.splitlines():
            if event := _event(line):  # else written by something else than a trainer
                self.take(event)

    def _restart(self) -> None:
        if self.offset:
            self.forget()
        self.offset, self.head = 0, b""


class Json:
    """A JSON object in a file, read again when the file changes; {} where there is none."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen, self.value = path, None, {}

    def read(self) -> dict[str, Any]:
        try:
            now = self.path.stat()
        except OSError:
            self.seen, self.value = None, {}
            return self.value
        seen = (now.st_ino, now.st_size, now.st_mtime_ns)
        if seen != self.seen:
            try:
                value = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                value = {}
            self.seen, self.value = seen, value if isinstance(value, dict) else {}
        return self.value


def log_text(folder: Path, since: int, most: int = 256 * 1024) -> tuple[str, int]:
    """(text, next): log.txt from byte `since`, at most `most` bytes; a `since` past the end begins anew, a negative one at the last `most`."""
    try:
        with (folder / "log.txt").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - most) if since < 0 else 0 if since > size else since
            file.seek(start)
            raw = file.read(most)
    except OSError:
        return "", 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(raw)
    return text, start + len(raw) - len(decoder.getstate()[0])  # a letter of which half is written is left for later


def log_tail(folder: Path, lines: int = 40) -> str:
    text, _ = log_text(folder, -1, 16_000)
    return "\n".join(text.splitlines()[-lines:])


def picture(home: Home, path: Path, size: int | None) -> Path:
    """The picture itself, or with `size` a WebP whose longer side is at most so many pixels, made once. Raises Problem."""
    if size is None:
        return path
    if size not in SIZES:
        raise Problem(f"size is {size}; it must be from {SIZES[0]} to {SIZES[-1]} pixels.")
    now = path.stat()
    key = hashlib.sha256(f"{path}\n{now.st_mtime_ns}\n{now.st_size}\n{size}".encode()).hexdigest()[:32]
    thumb = home.cache / "previews" / f"{key}.webp"
    if not pictures.used(thumb):
        thumb.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
        except OSError:
            raise Problem(f"{path.name} cannot be read as a picture; it may still be being written.", 404) from None
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        raw = io.BytesIO()
        small.save(raw, "WEBP", quality=85)
        write_atomic(thumb.with_name(f"{threading.get_ident()}-{thumb.name}"), raw.getvalue())
        thumb.with_name(f"{threading.get_ident()}-{thumb.name}").replace(thumb)
    return thumb


def thin(points: Sequence[Sequence[Any]], most: int = MOST_POINTS) -> list[list[Any]]:
    """At most `most` of the points [step, value, ...], among them the first and the last and in each stretch the lowest and highest."""
    if len(points) <= most:
        return [list(p) for p in points]
    inner, stretches = range(1, len(points) - 1), (most - 2) // 2
    keep = {0, len(points) - 1}
    for k in range(stretches):
        stretch = inner[k * len(inner) // stretches : (k + 1) * len(inner) // stretches]
        keep |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [list(points[i]) for i in sorted(keep)]


# ---- one run --------------------------------------------------------------------------------------------------------------------------


class Run:
    """What one folder has told so far. Hold `lock` around `refresh` and what is read after it."""

    def __init__(self, id: str, folder: Path) -> None:
        self.id, self.folder, self.lock = id, folder, threading.Lock()
        self.config_file, self.atelier_file = Json(folder / "config.json"), Json(folder / "atelier.json")
        self.tail = Tail(folder / "events.jsonl", self._take, self._forget)
        self._forget()

    def refresh(self) -> None:
        self.tail.read()
        self.config, self.atelier = self.config_file.read(), self.atelier_file.read()

    def _forget(self) -> None:
        self.config, self.atelier = {}, {}
        self.seq, self.void = -1, -1  # void: seq of the last event that took points back
        self.first = self.last = None
        self.started: dict[str, Any] = {}
        self.stage, self.step, self.total, self.visits, self.prompts = "", 0, 0, None, None
        self.encoded: dict[str, Any] | None = None  # the last `progress` event
        self.now: dict[str, Any] = {}  # the last `step` event
        self.loss: list[tuple] = []  # (step, loss, seq); so below: what came when
        self.validation: list[tuple] = []  # (step, train, held out, seq)
        self.rate: dict[str, list[tuple]] = {}
        self.previews: list[tuple[dict[str, Any], int]] = []
        self.exports: dict[str, tuple[dict[str, Any], int]] = {}
        self.warnings: dict[str, int] = {}
        self.seconds, self.began = 0.0, None

    def _take(self, event: dict[str, Any]) -> None:
        kind, seq, step = event["type"], event["seq"], event.get("step")
        before, self.seq, self.last = self.last, seq, event
        self.first = self.first or event
        if kind == "started":
            if self.began is not None:  # the process before was killed
                self.seconds += before["time"] - self.began
            self.started, self.total, self.began = event, event["total"], event["time"]
            self.visits = event.get("visits")
        elif kind == "stage":
            self.stage, self.encoded = event["name"], None
        elif kind == "progress":
            self.encoded = {k: event[k] for k in ("what", "done", "total", "eta_s")}
        elif kind == "warning":
            self.warnings[event["text"]] = seq
        elif kind == "step":
            self.step, self.now = step, event
            self.loss.append((step, event["loss"], seq))
            for part, rate in event["rate"].items():
                self.rate.setdefault(part, []).append((step, rate, seq))
        elif kind == "validation":
            self.validation.append((step, event["train"], event["held_out"], seq))
        elif kind == "preview":
            # A preview at one step made again (asked for twice, or after a resume) replaces the pictures, which have the same names.
            self.previews = [p for p in self.previews if p[0]["step"] != step]
            self.previews.append(({"step": step, "images": event["images"], "prompts": event["prompts"]}, seq))
        elif kind == "exported":
            self.exports[event["file"]] = ({k: event[k] for k in ("step", "file", "bytes", "final")}, seq)
        elif kind == "changed":
            self.total = event.get("total", self.total)
            self.visits = event.get("visits", self.visits)
            self.prompts = event.get("prompts", self.prompts)
        elif kind == "resumed":
            self._void(step, seq)
        elif kind in events.TERMINAL:
            self.stage, self.step = "", event.get("step", self.step)  # `step` events come every so many steps
            if self.began is not None:
                self.seconds += event["time"] - self.began
                self.began = None

    def _void(self, step: int, seq: int) -> None:
        """Drop what came after `step`: the run goes on from there."""
        before = sum(map(len, (self.loss, self.validation, self.previews, self.exports)))
        self.loss = [p for p in self.loss if p[0] <= step]
        self.validation = [p for p in self.validation if p[0] <= step]
        self.rate = {part: [p for p in points if p[0] <= step] for part, points in self.rate.items()}
        self.previews = [p for p in self.previews if p[0]["step"] <= step]
        self.exports = {name: e for name, e in self.exports.items() if e[0]["step"] <= step}
        if sum(map(len, (self.loss, self.validation, self.previews, self.exports))) != before:
            self.void = seq
        self.step, self.now = step, {k: v for k, v in self.now.items() if k != "eta_s"}

    # What the routes answer

    def tag(self, look: Any, position: int | None, pending: Sequence[str] = ()) -> str:
        """Changes whenever the answer would."""
        try:
            mark = self.folder.stat().st_mtime_ns
        except OSError:
            mark = 0
        parts = (self.id, self.seq, self.tail.offset, look, position, mark, self.config_file.seen, self.atelier_file.seen, pending)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    def setting(self, key: str, otherwise: Any = None) -> Any:
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return otherwise
            node = node[part]
        return node

    def name(self) -> str:
        return self.setting("output.name") or self.started.get("name") or self.id

    def summary(self, look: Any, position: int | None) -> dict[str, Any]:
        """SUMMARY of assets/help/api.md; `look` is the runner's, `position` the place in the queue."""
        total = self.total or self.atelier.get("steps", 0)
        percent = 100 if look.state == "finished" else min(99, 100 * self.step // total) if total else 0
        pictures = [
            f"/api/runs/{quote(self.id)}/previews/{quote(n)}?size=128" for n in (self.previews[-1][0]["images"] if self.previews else ())
        ]
        created = self.atelier.get("created") or (self.first or {}).get("time") or _created(self.folder)
        live = look.state == "running"
        return {
            "id": self.id,
            "name": self.name(),
            "state": "interrupted" if look.state == "none" else look.state,
            "stage": self.stage if live else "",
            "encoded": self.encoded if live and self.stage == "encoding" else None,
            "step": self.step,
            "total": total,
            "percent": percent,
            "eta_s": self.now.get("eta_s") if live and self.stage == "training" else None,
            "created": created,
            "model": self.atelier.get("model_title") or re.split(r"[/\\]", self.setting("model.source", "demo").rstrip("/\\"))[-1],
            "purpose": self.atelier.get("purpose", ""),
            "family": self.started.get("family") or self.atelier.get("family", ""),
            "thumb": pictures[0] if pictures else None,
            "position": position,
            "text": look.text,
            "folder": str(self.folder),
        }

    def view(self, look: Any, position: int | None, since: int | None, pending: Sequence[str] = ()) -> dict[str, Any]:
        """The run view of assets/help/api.md; `pending`: the requests that were not answered yet."""
        reset = since is None or since < self.void or since > self.seq
        after = -1 if reset else since
        new = lambda points: thin([p[:-1] for p in points if p[-1] > after])  # noqa: E731
        held = self.summary(look, position) | {
            "device": self.started.get("device", ""),
            "dtype": self.started.get("dtype", ""),
            "reasons": self.started.get("reasons", []),
            "buckets": self.started.get("buckets", []),
            "images": self.started.get("images", 0),
            "data": self.atelier.get("data", []),
            "epoch": self.now.get("epoch", 0),
            "visits": self.length(),
            "visits_at_first": self.setting("train.visits"),
            "loss": self.now.get("loss"),
            "rate": self.now.get("rate", {}),
            "images_per_s": self.now.get("images_per_s"),
            "memory_gib": self.now.get("memory_gib"),
            "seconds": round(self.seconds + (self.last["time"] - self.began if self.began is not None and self.last else 0), 1),
            "warnings": list(self.warnings),
            "prompts": self.shown_prompts(),
            "log_tail": log_tail(self.folder) if look.state in ("failed", "interrupted", "none") else "",
            "actions": self.actions(look.state),
            "pending": list(pending),
            "values": dict(flatten(self.config)) if look.state == "waiting" else None,
            "schedule": self.started.get("schedule") or schedule(self.config),
            "learning_rate_note": rate_note(self.config),
        }
        there = _names(self.folder)
        return {
            "run": held,
            "points": {"loss": new(self.loss), "validation": new(self.validation), "rate": {part: new(p) for part, p in self.rate.items()}},
            "previews": [p for p, seq in self.previews if seq > after],
            "exports": [e for name, (e, seq) in self.exports.items() if seq > after and name in there],
            "seq": self.seq,
            "reset": reset,
        }

    def length(self) -> int | None:
        """Visits of each image, as last changed."""
        return self.visits or self.setting("train.visits")

    def shown_prompts(self) -> list[str]:
        if self.prompts is not None:
            return list(self.prompts)
        return list(self.previews[-1][0]["prompts"]) if self.previews else list(self.setting("preview.prompts") or ())

    def ran(self) -> bool:
        """Whether it was ever under way: then it is resumed, and its settings stand."""
        return self.first is not None

    def actions(self, state: str) -> list[str]:
        """The routes that are possible now."""
        live = ["stop", "save", "preview", "prompts", "length", "discard", "duplicate"]
        done = ["discard", "duplicate", "compare"] if self.exports else ["discard", "duplicate"]
        return {
            "waiting": ["cancel", "move", "duplicate", "discard"] + ([] if self.ran() else ["edit"]),
            "starting": live,
            "running": live,
            "finished": ["further", *done],
            "stopped": ["resume", "further", *done],
        }.get(state, ["resume", *done])


def schedule(config: dict[str, Any]) -> str:
    """The learning rate's course in words."""
    asked = config.get("schedule") or {}
    kind, floor = asked.get("kind", "cosine"), asked.get("floor", 0.1)
    course = {
        "constant": "constant",
        "linear": f"linear to {floor:.0%}",
        "cosine": f"cosine to {floor:.0%}",
        "cosine_restarts": f"cosine with {asked.get('restarts', 3)} restarts",
    }.get(kind, kind)
    warmup = asked.get("warmup", 0.02)
    return course.replace("%", " %") + (f", after a warm-up over {warmup:.0%}".replace("%", " %") if warmup else "")


def rate_note(config: dict[str, Any]) -> str:
    """What becomes of the learning rate when the run is made longer."""
    kind = (config.get("schedule") or {}).get("kind", "cosine")
    if kind == "constant":
        return "The learning rate is constant, so going on further keeps it."
    return "The schedule is stretched over the new length: going on further, the learning rate starts higher than it ended, and comes down again."


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf; lists are values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def quote(name: str) -> str:
    """A file name or id as a part of a URL."""
    return urllib.parse.quote(name, safe="")


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (names alone)
    except OSError:
        return set()


def _created(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


# ---- the runs that were looked at, kept in memory ----------------------------------------------------------------------------------------

_runs: dict[Path, Run] = {}
_lock = threading.Lock()


def run(id: str, folder: Path) -> Run:
    """The run in a folder, as far as it was read before; `refresh` reads the rest."""
    with _lock:
        kept = _runs.get(folder)
        if kept is None or kept.id != id:
            kept = _runs[folder] = Run(id, folder)
        return kept


def forget(known: Iterable[Path]) -> None:
    """Drop what is kept of folders that are gone."""
    with _lock:
        for folder in _runs.keys() - set(known):
            del _runs[folder]
