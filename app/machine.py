"""What this machine is, as `python -m trainer probe` says it: asked once a day in a process of its own, since it imports torch (4 s)."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from app.errors import Problem
from app.paths import Home
from app.runner import Runner, memory, read_json
from trainer.run_dir import write_json

PACKAGES = ("torch", "xformers", "bitsandbytes")  # a new version of one may see the hardware otherwise
LONGEST_S = 180  # a cold disk and an antivirus can make the import of torch take minutes
log = logging.getLogger("app")


class Probe:
    """The probe of one data folder."""

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None
        self.problem = ""
        self.thread: threading.Thread | None = None


_probes: dict[Path, Probe] = {}
_lock = threading.Lock()


def _probe(home: Home) -> Probe:
    with _lock:
        return _probes.setdefault(home.root, Probe())


def stamp() -> str:
    """What an answer is good for: today, with these versions."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([time.strftime("%Y-%m-%d"), *versions])


def info(home: Home) -> dict[str, Any] | None:
    """trainer.hardware.probe()'s answer, or None while it is not there yet. Never waits."""
    probe = _probe(home)
    if probe.found is None:
        kept = read_json(home.cache / "probe.json")
        if kept and kept.get("stamp") == stamp():
            probe.found = kept["found"]
    return probe.found


def probing(home: Home) -> bool:
    thread = _probe(home).thread
    return thread is not None and thread.is_alive()


def problem(home: Home) -> str:
    """Why the last probe failed, or ""."""
    return _probe(home).problem


def refresh(home: Home, runner: Runner) -> threading.Thread:
    """Ask again, in a thread of its own; while it runs, the old answer stands."""
    probe = _probe(home)

    def ask() -> None:
        try:
            found = json.loads(runner.run_tool(["probe"], LONGEST_S))
        except Problem as error:
            probe.problem = error.text
        except ValueError:
            probe.problem = "`python -m trainer probe` printed something that is not JSON. `python launch.py doctor` says more."
        else:
            probe.found, probe.problem = found, ""
            write_json(home.cache / "probe.json", {"stamp": stamp(), "found": found})
            return
        log.warning("%s", probe.problem)

    with _lock:
        if probe.thread is None or not probe.thread.is_alive():
            probe.thread = threading.Thread(target=ask, name="probe", daemon=True)
            probe.thread.start()
        return probe.thread


def live(home: Home) -> dict[str, float]:
    """{memory_gib, free_memory_gib, disk_free_gb} at this moment; the disk is the data folder's, in 10^9 bytes."""
    total, free = memory()
    return {
        "memory_gib": round(total, 1),
        "free_memory_gib": round(free, 1),
        "disk_free_gb": round(shutil.disk_usage(home.root).free / 1e9, 1),
    }
