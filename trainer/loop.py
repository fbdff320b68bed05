"""fit(): the training loop, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer import control
from trainer.config import TrainConfig
from trainer.data.store import Store
from trainer.events import Writer
from trainer.plan import Plan, factor
from trainer.processes import Processes
from trainer.run_dir import RunDir
from trainer.step import Step

EVENTS_EVERY = 10  # steps between `step` events and between looks at the requests of several processes


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Hooks:
    """What the loop does beside stepping; each takes the number of completed steps."""

    validate: Callable[[int], None]
    preview: Callable[[int], None]
    checkpoint: Callable[[int], None]
    export: Callable[[int], None]


def fit(
    config: TrainConfig,
    plan: Plan,
    store: Store,
    step: Step,
    processes: Processes,
    run: RunDir,
    emit: Writer | Callable[..., object],
    hooks: Hooks,
    start: int,
    interrupted: Callable[[], bool],
) -> tuple[str, int]:
    """Train from step `start` to the plan's end. Returns ("finished" or "stopped", completed steps).

    Raises Diverged when a loss that is read is not finite.
    """
    total = len(plan.steps)
    done_images = sum(len(rows) for rows in plan.steps[:start])
    since_images, since_step, since_time = 0, start, time.perf_counter()
    micro_rows = {b: _on_device(processes.rows(b, config.train.accumulation), step) for b in {len(rows) for rows in plan.steps}}

    for n in range(start, total):
        # 1. what somebody asked for
        stop = False
        if processes.size == 1 or n % EVENTS_EVERY == 0:
            requests = control.take(run) if processes.main else []
            for kind in ("save", "preview"):
                if processes.agree(int(any(r.kind == kind for r in requests))):
                    for hook in (hooks.checkpoint, hooks.export) if kind == "save" else (hooks.preview,):
                        hook(n)
            stop = bool(processes.agree(int(interrupted() or any(r.kind == "stop" for r in requests))))
            for r in requests:
                emit("answered", request=r.kind, id=r.id, step=n, detail="done" if r.kind in control.REQUESTS else "unknown request")
        if stop:
            return "stopped", n

        # 2. the step
        batch = store.batch(n)
        draws = step.begin(n, batch)
        for k, (index, valid) in enumerate(micro_rows[len(plan.steps[n])]):
            step.grads(n, batch.rows(index, valid), draws.rows(index), store.total_weight[n], f"{processes.rank} {k}")
        step.update(n, factor(config, n, total))
        done_images += len(plan.steps[n])
        since_images += len(plan.steps[n])
        done = n + 1

        # 3. what is due
        if done % EVENTS_EVERY == 0 or done == total or n == start:
            loss = step.read_loss(done - since_step)
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise Diverged(f"The loss is not a number any more after step {done}.")
            seconds = time.perf_counter() - since_time
            rates = {part: step.peak[part] * factor(config, n, total) for part in step.active(n)}
            emit(
                "step",
                step=done,
                loss=round(loss, 6),
                rate={k: float(f"{v:.4g}") for k, v in rates.items()},
                images_per_s=round(since_images / seconds, 3),
                eta_s=round(seconds / (done - since_step) * (total - done), 1),
                epoch=round(done_images / len(plan.images), 2),
            )
            since_images, since_step, since_time = 0, done, time.perf_counter()
        if done < total:
            pause = time.perf_counter()
            for every, hook in (
                (config.validation.every, hooks.validate),
                (config.preview.every if config.preview.enabled else 0, hooks.preview),
                (config.output.save_every, hooks.export),
                (config.output.checkpoint_every, hooks.checkpoint),
            ):
                if every and done % every == 0:
                    hook(done)
            since_time += time.perf_counter() - pause
    return "finished", total


def _on_device(rows: list[tuple[list[int], list[float]]], step: Step) -> list[tuple[torch.Tensor, torch.Tensor]]:
    device = step.models.device
    return [(torch.tensor(index, device=device), torch.tensor(valid, device=device)) for index, valid in rows]
