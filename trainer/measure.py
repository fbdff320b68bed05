"""Measure a run before it is started: about ten real steps of it, for seconds and memory. A job of trainer/job.py.

Its folder gets config.json (the run's settings), the event `measured {seconds_per_step, images_per_s, memory_gib, device,
start_seconds}`, and `run/`, where the steps were made; their weights are deleted.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from trainer import job, run
from trainer.config import TrainConfig
from trainer.run_dir import RunDir, RunError

STEPS = 10  # the first of them is not timed: it warms up


def measure(config: TrainConfig, root: Path, show: job.Show = lambda event: None) -> str:
    """Measure `config` in the folder `root`; returns "finished" or "stopped". `show` sees every event of the measuring.

    The run is laid out as it would be, so that its parts, batches and captions are the real ones; it ends after ten steps.
    start_seconds is the time until the first step: loading and encoding. Raises ValueError as trainer.run.train does.
    """

    def body(now: job.Job) -> dict[str, Any]:
        began, seen = time.time(), []

        def watch(event: dict[str, Any]) -> None:
            seen.append(event)
            if event["type"] in ("stage", "warning"):
                now.emit(event["type"], **{k: event[k] for k in ("name", "text") if k in event})

        def stopping() -> bool:
            return now.stopping() or any(e["type"] == "step" and e["step"] >= STEPS for e in seen)

        folder = RunDir(now.run.root / "run")
        _clear(folder)
        try:
            run.train(_short(config), folder.root, show=watch, stopping=stopping)
        finally:
            _drop_weights(folder)
        now.check()
        found = {kind: [e for e in seen if e["type"] == kind] for kind in ("started", "step", "stage")}
        steps = found["step"]
        if not steps or steps[-1]["step"] < min(STEPS, found["started"][0]["total"]):
            raise job.Stopped
        training = next(e["time"] for e in found["stage"] if e["name"] == "training")
        first, last = (steps[0], steps[-1]) if len(steps) > 1 else ({"step": 0, "time": training}, steps[0])
        now.emit(
            "measured",
            seconds_per_step=round((last["time"] - first["time"]) / (last["step"] - first["step"]), 5),
            images_per_s=last["images_per_s"],
            memory_gib=max(e["memory_gib"] for e in steps),
            device=found["started"][0]["device"],
            start_seconds=round(training - began, 2),
        )
        return {}

    return job.work(root, config.model_dump(mode="json"), body, show)


def _short(config: TrainConfig) -> TrainConfig:
    """`config` with nothing beside its steps."""
    off = {"preview": {"enabled": False}, "validation": {"enabled": False}, "output": {"save_every": 0, "checkpoint_every": 0}}
    changed = {section: getattr(config, section).model_copy(update=values) for section, values in off.items()}
    return config.model_copy(update=changed)


def _clear(folder: RunDir) -> None:
    """Delete what an earlier measuring left. Raises RunError for a folder that none has made."""
    if folder.root.exists():
        if not folder.config.exists():
            raise RunError(f"{folder.root} holds something else than a measuring. Choose another --run-dir.")
        shutil.rmtree(folder.root)


def _drop_weights(folder: RunDir) -> None:
    for path in folder.root.rglob("*.safetensors"):
        path.unlink()
