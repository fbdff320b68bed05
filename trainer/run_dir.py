"""A run's folder: the name of every file in it, atomic writing, and the lock that says "this run is alive".

config.json      the fully resolved configuration
versions.json    package versions, platform
process.json     pid, host, start of the process that holds (or last held) the lock
lock             held by an OS lock while a trainer works here; freed by the OS however that process ends
events.jsonl     what happened, one JSON object a line; written by the trainer alone (trainer/events.py)
log.txt          stdout and stderr, where the app started the run
control/         requests to the run, one file each (trainer/control.py)
previews/        step-000000-1.png, ...
checkpoints/     step-000100.safetensors: everything needed to resume
NAME.safetensors the exported LoRA; NAME-000100.safetensors those of earlier steps
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunError(ValueError):
    """A run's folder cannot be used as asked; the text says why and what to do."""


class RunDir:
    """Paths inside a run's folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().resolve()
        self.config = self.root / "config.json"
        self.versions = self.root / "versions.json"
        self.process = self.root / "process.json"
        self.lock = self.root / "lock"
        self.events = self.root / "events.jsonl"
        self.log = self.root / "log.txt"
        self.control = self.root / "control"
        self.images = self.root / "images.json"  # {SHA-256: [width, height]} of images that the app has seen to decode
        self.previews = self.root / "previews"
        self.checkpoints = self.root / "checkpoints"

    def create(self) -> None:
        """Make the folder and those inside it. Raises RunError where that is not possible."""
        try:
            for folder in (self.root, self.control, self.previews, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"The run folder {self.root} cannot be made: {error.strerror}. Choose another with --run-dir.") from None

    def preview(self, step: int, index: int) -> Path:
        return self.previews / f"step-{step:06d}-{index + 1}.png"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def lora(self, name: str, step: int | None = None) -> Path:
        return self.root / (f"{name}.safetensors" if step is None else f"{name}-{step:06d}.safetensors")

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """The newest checkpoint as (step, path), or None."""
        found = sorted(self.checkpoints.glob("step-*.safetensors"))
        return (int(found[-1].stem.removeprefix("step-")), found[-1]) if found else None


def default_run_dir(name: str) -> Path:
    """`runs/<date>-<time>-<name>` below the current folder, with a number where that is taken."""
    stem = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    candidate, k = stem, 2
    while candidate.exists():
        candidate, k = stem.with_name(f"{stem.name}-{k}"), k + 1
    return candidate


def disk_full(path: Path, what: str, size: int | None = None) -> RunError:
    """The sentence for a disk that is full while `what` is written to `path` (`size` in bytes)."""
    free = shutil.disk_usage(path.parent).free / 2**20
    need = f", {size / 2**20:.0f} MB are needed" if size else ""
    return RunError(
        f"The disk is full: {what} could not be written to {path} ({free:.0f} MB free{need}). Free some space, then run again with --resume."
    )


def write_atomic(path: Path, data: bytes | str, what: str = "a file", verify: Callable[[Path], None] | None = None) -> None:
    """Write `data` so that `path` holds either all of it or what stood there before. Raises RunError when the disk is full.

    `verify` is given the new file while it still lies beside `path`; where it raises, nothing is changed.
    """
    raw = data.encode() if isinstance(data, str) else data
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        if verify:
            verify(temp)
        replace(temp, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path, what, len(raw)) from None
        raise
    finally:
        temp.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """os.replace, tried again for a second on Windows, where a file that is being read cannot be replaced."""
    for attempt in range(20):
        try:
            source.replace(target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == 19:
                raise
            time.sleep(0.05)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", path.name)


class Lock:
    """An exclusive OS lock on a run's folder, freed when the process ends, however it ends."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.file = run, None

    def acquire(self) -> None:
        """Take the lock and write process.json. Raises RunError when another process holds it."""
        self.file = self.run.lock.open("a+b")
        deadline = time.monotonic() + 1  # someone who looks whether the run is alive shares it for a moment
        while not (taken := _try_lock(self.file)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not taken:
            self.file.close()
            self.file = None
            raise RunError(f"Another process is training in {self.run.root}. Wait until it ends, stop it, or choose another --run-dir.")
        write_json(self.run.process, {"pid": os.getpid(), "host": platform.node(), "start": time.time()})

    def release(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


def restart(*arguments: str) -> int:
    """Go on as a fresh Python process with these arguments, in this one's place. On Windows, which has no such thing, this one waits for it;
    returns its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, *arguments]
    if os.name == "nt":
        return os.spawnv(os.P_WAIT, sys.executable, [f'"{a}"' if " " in a else a for a in command])
    os.execv(sys.executable, command)


def is_alive(run: RunDir) -> bool:
    """Whether a trainer holds the run's lock now. Any number may look at once; the file is neither made nor changed."""
    try:
        file = run.lock.open("rb")
    except FileNotFoundError:
        return False
    with file:
        return not _try_lock(file, shared=True)


if os.name == "nt":
    import msvcrt

    def _try_lock(file: Any, shared: bool = False) -> bool:  # Windows' C library knows no shared lock
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: Any, shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
