"""fit(): the training loop, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch

from trainer import control
from trainer.course import Course
from trainer.data.store import Store
from trainer.events import Writer
from trainer.pace import Pace
from trainer.plan import TooShort, factor
from trainer.processes import Processes
from trainer.run_dir import RunDir
from trainer.step import Step

EVENTS_EVERY = 10  # steps between `step` events and between looks at the requests of several processes


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Hooks:
    """What the loop does beside stepping; each takes the number of completed steps.

    `preview` makes sample images that were asked for; `look` is for those of the schedule, which it may leave out. `change` also takes
    {"visits" or "prompts": what a request asks for}; it raises plan.TooShort for a length that leaves nothing to do.
    """

    validate: Callable[[int], None]
    preview: Callable[[int], None]
    look: Callable[[int], None]
    checkpoint: Callable[[int], None]
    export: Callable[[int], None]
    change: Callable[[int, dict[str, Any]], None]


def fit(
    course: Course,
    store: Store,
    step: Step,
    run_step: Callable[..., None],
    processes: Processes,
    run: RunDir,
    emit: Writer | Callable[..., object],
    hooks: Hooks,
    pace: Pace,
    start: int,
    interrupted: Callable[[], bool],
) -> tuple[str, int]:
    """Train from step `start` to the course's end, which a request may move. Returns ("finished" or "stopped", completed steps).

    `run_step` does a step as Step.run does, or is that.
    Raises Diverged when a loss that is read is not finite.
    """
    done_images = sum(len(rows) for rows in course.plan.steps[:start])
    since_images, since_step = 0, start
    memory = _memory_reader(step.models.device)

    @cache
    def micro_rows(batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = processes.rows(batch, course.config.train.accumulation)
        return [(torch.tensor(index, device=step.models.device), torch.tensor(valid, device=step.models.device)) for index, valid in rows]

    step.done = n = start
    while n < course.total:
        # 1. what somebody asked for
        if processes.size == 1 or n % EVENTS_EVERY == 0:
            pause = time.perf_counter()
            requests, stop = processes.agree((control.take(run) if processes.main else [], interrupted()))
            for request, detail in _heed(requests, n, hooks):
                emit("answered", request=request.kind, id=request.id, step=n, detail=detail)
            pace.pause(time.perf_counter() - pause)
            if stop or any(r.kind == "stop" for r in requests):
                return "stopped", n

        # 2. the step
        config, total, rows = course.config, course.total, course.plan.steps[n]
        run_step(n, store.batch(n), micro_rows(len(rows)), store.total_weight[n], factor(config, n, total), str(processes.rank))
        done_images += len(rows)
        since_images += len(rows)
        step.done = done = n + 1

        # 3. what is due
        due = (
            ("validation", course.due.validation, hooks.validate),
            ("preview", course.due.preview, hooks.look),
            ("save", course.due.save, hooks.export),
            ("checkpoint", course.due.checkpoint, hooks.checkpoint),
        )
        if done % EVENTS_EVERY == 0 or done == total or n == start:
            loss = step.read_loss(done - since_step)
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise Diverged(f"The loss is not a number any more after step {done}.")
            seconds = pace.lap(done)
            rates = {part: step.peak[part] * factor(config, n, total) for part in step.active(n)}
            left = pace.left(done, total, {name: times for name, times, _ in due})
            emit(
                "step",
                step=done,
                loss=round(loss, 6),
                rate={k: float(f"{v:.4g}") for k, v in rates.items()},
                images_per_s=round(since_images / seconds, 3),
                eta_s=left and round(left, 1),
                epoch=round(done_images / len(course.plan.images), 2),
                memory_gib=round(memory() / 2**30, 3),
            )
            since_images, since_step = 0, done
            if text := pace.spilled(done):
                emit("warning", text=text)
        if done < total and any(done in times for _, times, _ in due):
            step.wait()  # so that a hook's time is its own
            for name, times, hook in due:
                if done in times:
                    begun = time.perf_counter()
                    hook(done)
                    pace.hooks[name] = time.perf_counter() - begun
                    pace.pause(pace.hooks[name])
        n = done
    return "finished", n


def _heed(requests: Sequence[control.Request], n: int, hooks: Hooks) -> list[tuple[control.Request, str]]:
    """Do what was asked for, changes first and the same thing once; returns each request with what came of it."""
    answers = {r.id: control.wrong(r) or "done" for r in requests}
    for r in requests:
        if r.kind in control.CHANGES and answers[r.id] == "done":
            try:
                hooks.change(n, {r.kind: r.payload[r.kind]})
            except TooShort as error:
                answers[r.id] = str(error)
    kinds = {r.kind for r in requests}
    for kind, todo in (("save", (hooks.checkpoint, hooks.export)), ("preview", (hooks.preview,))):
        for hook in todo if kind in kinds else ():
            hook(n)
    return [(r, answers[r.id]) for r in requests]


def _memory_reader(device: torch.device) -> Callable[[], int]:
    """What reads the memory in bytes without waiting for the device: CUDA's most since now (a graph's replays allocate nothing), else this
    process's own.
    """
    if device.type != "cuda":
        return lambda: psutil.Process().memory_info().rss
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device)
