"""A process of the bench: `python -m trainer.bench.child machine|ours|reference JOB RESULT`, two JSON files.

A job has `begun`, time.time() just before the process was started, and what trainer.bench.machine, ours or reference asks of it. The
result is what that module finds, or `error`, a sentence.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from trainer.bench.meter import ImportClock, Meter

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def main(role: str, job_path: str, result_path: str) -> int:
    imports = ImportClock()
    sys.meta_path.insert(0, imports)
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    meter = Meter(job["begun"], imports, job["device"], job["warm"], job["steps"])
    try:
        result = importlib.import_module(f"trainer.bench.{role}").main(job, meter)
    except Exception as error:
        text = _explain(error)
        if text is None:
            raise
        result = {"error": text}
    if os.environ.get("RANK", "0") == "0":
        Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _explain(error: Exception) -> str | None:
    """A sentence for an error that the user can mend; None for any other."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "The device's memory is full. Lower --batch or --size, add --checkpointing, or time one side alone (--only)."
    if type(error) is ValueError or (isinstance(error, ValueError) and type(error).__module__.startswith("trainer")):
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
