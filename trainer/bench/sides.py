"""Both sides, one after the other, each in a fresh process: what a user waits for begins with the process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer import plan
from trainer.bench.case import MODELS, BenchError, Case, check, draw_images, order, settings

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("reference", "ours")
USUAL_STEPS = 1500  # of a run: 15 pictures seen 100 times


def bench(case: Case, work: Path | None = None, only: str | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Time both sides, or the one named `only`; returns what goes into the JSON (see trainer.bench), the other side as None.

    `work`: where the model goes and stays for the next time; None: a temporary folder. Raises ValueError with a sentence for options
    that make no run, and when a side fails.
    """
    check(case)
    with workplace(work) as (models, temp):
        say(f"Preparing {case.model} ...")
        wish = {"device": case.device, "dtype": case.dtype, "model": case.model, "work": str(models), "warm": 0, "steps": 0}
        machine = child("machine", wish, temp)
        warm, steps = case.on(machine["device"])
        draw_images(temp / "images", case)
        config = settings(case, Path(machine["folder"]), temp / "images", machine["device"], machine["dtype"])
        common = {"device": machine["device"], "warm": warm, "steps": steps}
        jobs = {
            "reference": {
                "folder": machine["folder"], "order": order(case, config), "size": case.side, "batch": case.batch, "rank": case.rank,
                "targets": list(case.targets), "te": case.te, "checkpointing": case.checkpointing, "seed": config.train.seed,
                "dtype": machine["dtype"],
            },
            "ours": {"config": config.model_dump(mode="json"), "run": str(temp / "run"), "previews": case.previews},
        }  # fmt: skip
        found: dict[str, Any] = {}
        for side in SIDES:
            if only in (None, side):
                say(f"Timing {'the reference' if side == 'reference' else 'this trainer'} ...")
                found[side] = child(side, jobs[side] | common, temp)
    return _together(case, machine, found, warm + steps)


@contextlib.contextmanager
def workplace(work: Path | None) -> Iterator[tuple[Path, Path]]:
    """(folder of models, folder of this time alone, which is deleted at the end)."""
    try:
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix="bench-", dir=work)).resolve()
    except OSError as error:
        raise BenchError(f"{work or tempfile.gettempdir()} cannot be written to: {error.strerror}. Choose another --work.") from None
    try:
        yield (work.resolve() if work else temp), temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def child(role: str, job: dict[str, Any], temp: Path, processes: int = 1) -> dict[str, Any]:
    """What a process with this role finds, the first of several. Raises BenchError with its sentence, or with the end of what it said."""
    job_path, result, log = (temp / f"{role}{end}" for end in (".job.json", ".json", ".log"))
    cache = temp / "cache"  # empty, so that ours encodes as at a first run
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LORA_ATELIER_CACHE": str(cache)}
    job_path.write_text(json.dumps(job | {"begun": time.time()}), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "trainer.bench.child", role, str(job_path), str(result)]
    result.unlink(missing_ok=True)
    with log.open("wb") as out:
        code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    if code or not result.exists():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-30:]
        raise BenchError(f"The process {role!r} ended with {code}. The end of what it said:\n" + "\n".join(said))
    found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise BenchError(found["error"] if role == "machine" else f"{role.capitalize()} failed. {found['error']}")
    return found


def _together(case: Case, machine: dict[str, Any], found: dict[str, Any], steps: int) -> dict[str, Any]:
    ours, reference = found.get("ours"), found.get("reference")
    first, last = _last_losses(ours["losses"] if ours else [], steps)
    flop = reference and reference["flops"]
    blocks: dict[str, Any] = {}
    for side, one in found.items():
        losses = one["losses"]
        limit_ms = flop and flop / machine["matmul_tflops"] / 1e9
        blocks[side] = {
            "first_step_s": one["first_step_s"],
            "step_ms": one["step_ms"],
            "images_per_s": case.batch * 1e3 / one["mean_step_ms"],
            "gpu_busy_ms": one["gpu_busy_ms"],
            "peak_device_gib": one["peak_device_gib"],
            "peak_host_gib": one["peak_host_gib"],
            "final_loss": dict(losses)[last] if side == "ours" else fmean(losses[first:last]),
            "share_of_limit": limit_ms and limit_ms / one["step_ms"],
            "mean_step_ms": one["mean_step_ms"],
            "step_ms_least": one["step_ms_least"],
            "kernels": one["kernels"],
            "device": one["device"],
            "start": one["start"],
            "parameters": one["parameters"],
            "trained_norm": one["trained_norm"],
        }
    preview = None
    if ours and ours["preview_s"]:
        worth = ours["preview_s"] * 1e3 / ours["mean_step_ms"]
        times = _previews(worth)
        share = times * worth / (times * worth + USUAL_STEPS)
        preview = {"seconds": ours["preview_s"], "pictures": ours["pictures"], "worth_steps": worth, "times": times, "share_of_run": share}
    return rounded({
        "ours": blocks.get("ours"),
        "reference": blocks.get("reference"),
        "speedup": reference["step_ms"] / ours["step_ms"] if ours and reference else None,
        "share_of_limit": blocks["ours"]["share_of_limit"] if ours else None,
        "limit": {"matmul_tflops": machine["matmul_tflops"], "step_tflop": flop and flop / 1e12},
        "preview": preview,
        "notes": ours["notes"] if ours else [],
        "versions": machine["versions"],
        "device": machine["name"],
        "case": asdict(case) | {"size": case.side, "steps": steps - case.on(machine["device"])[0], "dtype": machine["dtype"],
                                "device": machine["device"], "family": MODELS[case.model].family},
    })  # fmt: skip


def _previews(worth: float) -> int:
    """How often a run of USUAL_STEPS makes previews by itself, each of which takes as long as `worth` steps."""
    made = 0
    for k in range(1, plan.TIMES):
        made += plan.spares(made * worth, worth, 1.0, round(k * USUAL_STEPS / plan.TIMES), USUAL_STEPS)
    return 2 + made


def _last_losses(told: list[list[float]], steps: int) -> tuple[int, int]:
    """Steps (first, last] whose mean loss our run told last, up to step `steps`; the last ten where it did not run."""
    ends = [0, *(int(step) for step, _ in told if step <= steps)]
    return (ends[-2], ends[-1]) if told else (max(0, steps - 10), steps)


def rounded(value: Any) -> Any:
    """Floats to six digits that count."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
