"""Our side: `trainer.run.train` on a folder, as the command line and the app call it, timed by what it tells and asks along the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.bench.meter import Meter

STAGES = {"loading": "load", "encoding": "encode"}


def main(job: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """Train until the meter has what it wants, then make previews, then stop.

    Of `job`: `config`, the run's settings; `run`, its folder; `previews`, whether they are timed. Returns, beside the meter's findings,
    `losses`: (step, mean loss since the last such step).
    """
    from trainer import adapters, control, run
    from trainer.config import TrainConfig
    from trainer.run_dir import RunDir

    folder = RunDir(Path(job["run"]))
    losses: list[tuple[int, float]] = []
    notes: list[str] = []
    built: list[Any] = []
    found: dict[str, Any] = {"preview_s": None, "pictures": None}
    shown = 0.0
    attach = adapters.build

    def build(*args: Any, **more: Any) -> Any:  # the one moment on the way that no event tells of
        meter.mark("attach")
        built.append(attach(*args, **more))
        meter.norm = lambda: sum(float(t.square().sum()) for name, t in built[0].state().items() if name.endswith(".up")) ** 0.5
        return built[0]

    def show(event: dict[str, Any]) -> None:
        nonlocal shown
        kind = event["type"]
        if kind == "stage" and event["name"] == "training":
            meter.ready()
        elif kind == "stage" and event["name"] in STAGES:
            meter.mark(STAGES[event["name"]])
        elif kind == "step":
            losses.append((event["step"], event["loss"]))
        elif kind == "preview":
            shown = time.perf_counter()
            found["pictures"] = len(event["images"])
        elif kind == "warning":
            notes.append(event["text"])

    def previews() -> Iterator[bool]:
        """Ask for one, have it made before the next step; on a GPU again, since the first one warms up. Yields whether to stop."""
        for _ in range((2 if meter.cuda else 1) * job["previews"]):
            control.send(folder, "preview")
            yield False
            meter.wait()
            asked = time.perf_counter()
            yield False
            found["preview_s"] = shown - asked
        yield True

    making = previews()
    adapters.build = build
    meter.mark("prepare")
    run.train(TrainConfig.model_validate(job["config"]), folder.root, show=show, stopping=lambda: meter.tick() and next(making))
    parameters = sum(t.numel() for t in built[0].state().values())
    return {**meter.result(), **found, "losses": losses, "notes": notes, "parameters": parameters}
