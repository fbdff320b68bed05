"""Several processes against one: images a second, and whether they learn the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.bench.case import BenchError, Case, check, describe, draw_images, settings
from trainer.bench.meter import PROFILED
from trainer.bench.report import table
from trainer.bench.sides import child, rounded, workplace
from trainer.config.load import merge

WARM = 2  # ticks before the timed ones: of several processes, the meter ticks when they ask whether to stop (trainer.loop.EVENTS_EVERY)


def scaling(case: Case, processes: int, work: Path | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Time our run in `processes` processes, each with `case.batch` images a step, and in one with as many as each of them has.

    A third run, one process with all those images in a step, one process's share after the other, learns what they should. Returns what goes
    into the JSON: `one`, `all` and `same` (the third), each {step_ms, images_per_s, gpu_busy_ms, losses, trained_norm}; `scaling`, the images
    a second of all over those of one; `losses_apart` and `norms_apart`, relative differences of `all` and `same`.
    Raises ValueError with a sentence for options that make no run, and when a run fails.
    """
    from trainer.loop import EVENTS_EVERY

    check(case)
    if processes < 2:
        raise BenchError(f"--processes is {processes}; it must be at least 2.")
    whole = replace(case, batch=case.batch * processes)
    with workplace(work) as (models, temp):
        say(f"Preparing {case.model} ...")
        wish = {"device": case.device, "dtype": case.dtype, "model": case.model, "work": str(models), "warm": 0, "steps": 0}
        machine = child("machine", wish, temp)
        device = machine["device"].partition(":")[0]
        if device != "cpu" and processes > machine["devices"]:
            raise BenchError(f"--processes is {processes}, which need a GPU each; PyTorch can use {machine['devices']} here.")
        ticks = max(2, -(-case.on(device)[1] // EVENTS_EVERY))
        draw_images(temp / "images", whole)

        def timed(name: str, case: Case, more: dict[str, Any], count: int) -> dict[str, Any]:
            say(f"Timing {count} process{'es' if count > 1 else ''} with {case.batch} image{'s' if case.batch > 1 else ''} a step ...")
            steps = (WARM + ticks + PROFILED + 1) * EVENTS_EVERY
            config = settings(replace(case, steps=steps), Path(machine["folder"]), temp / "images", device, machine["dtype"])
            config = config.model_validate(merge(config.model_dump(mode="json"), more))
            warm, length = (WARM, ticks) if count > 1 else (WARM * EVENTS_EVERY, ticks * EVENTS_EVERY)
            job = {"config": config.model_dump(mode="json"), "run": str(temp / name), "previews": False, "device": device}
            found = child("ours", job | {"warm": warm, "steps": length}, temp, count)
            each = EVENTS_EVERY if count > 1 else 1  # steps of a tick
            step_ms = found["mean_step_ms"] / each
            return {
                "step_ms": step_ms,
                "images_per_s": case.batch * 1e3 / step_ms,
                "gpu_busy_ms": found["gpu_busy_ms"] and found["gpu_busy_ms"] / each,
                "losses": [loss for step, loss in found["losses"] if step <= (WARM + ticks) * EVENTS_EVERY],
                "trained_norm": found["trained_norm"],
            }

        one = timed("one", case, {}, 1)
        same = timed("same", whole, {"train": {"accumulation": processes}}, 1)
        together = timed("all", whole, {}, processes)
    apart = [abs(a - b) / abs(b) for a, b in zip(together["losses"], same["losses"], strict=True)]
    return rounded({
        "processes": processes,
        "one": one,
        "all": together,
        "same": same,
        "scaling": together["images_per_s"] / one["images_per_s"],
        "losses_apart": max(apart),
        "norms_apart": abs(together["trained_norm"] - same["trained_norm"]) / same["trained_norm"],
        "versions": machine["versions"],
        "device": machine["name"],
        "case": asdict(case) | {"size": case.side, "steps": ticks * EVENTS_EVERY, "dtype": machine["dtype"], "device": device},
    })  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The findings as a table and two sentences."""
    count, each = found["processes"], found["case"]["batch"]
    rows = [("", "a step", "images a second", "GPU busy a step")]
    for name, words in (("one", f"1 process, {each} a step"), ("all", f"{count} processes, {each} each a step")):
        side = found[name]
        busy = "-" if side["gpu_busy_ms"] is None else f"{side['gpu_busy_ms']:.4g} ms"
        rows.append((words, f"{side['step_ms']:.4g} ms", f"{side['images_per_s']:.4g}", busy))
    return "\n".join([
        f"{describe(found['case'])} in each process, {found['case']['steps']} steps on {found['device']}",
        "",
        *table(rows),
        "",
        f"{count} processes make {found['scaling']:.3f} times the images of one, {found['scaling'] / count:.1%} of {count}.",
        f"Against one process with as many images a step the losses differ by at most {found['losses_apart']:.2g} of their value, "
        f"what was learnt by {found['norms_apart']:.2g}.",
    ])  # fmt: skip
