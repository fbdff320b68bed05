"""events.jsonl: what happened in a run, one JSON object a line, appended and flushed by the trainer alone.

Every event has `v` (this format's version, 1), `seq` (counts up by 1, also across resumes), `time` (epoch seconds) and
`type`. A reader may meet a torn last line and leaves it alone; points past the step of a `resumed` event are void.

    type         further fields
    started      name, total (steps), images, buckets [[w, h, images]], device, dtype, reasons, family, resolution (pixels), visits,
                 batch_size, schedule (the learning rates in words)
    stage        name: loading | encoding | training | exporting
    progress     what: images | captions, done, total, eta_s: of what is encoded, once a second at most
    warning      text
    memory       mode (of trainer.memory.MODES), accumulation: how the steps keep within the GPU's memory from here on
    step         step, loss (mean since the last such event), rate {part: learning rate}, images_per_s, eta_s (seconds that are left, null
                 in the first 20 steps of all but short runs), epoch (visits so far),
                 memory_gib (CUDA: most of the GPU's memory since the last such event; else the process's now)
    validation   step, train (loss), held_out (loss or null)
    preview      step, images [file names], prompts
    checkpoint   step, file
    exported     step, file, also [files written beside it], bytes, modules {part: count}, final, tools [that read all of it]
    resumed      step
    changed      step, and visits, total (steps) or prompts: what holds from that step on (trainer/control.py)
    answered     request, id, step, detail ("done", or why not)
    measured     seconds_per_step, images_per_s, memory_gib, device, start_seconds (trainer/measure.py alone)
    finished | stopped | failed   step, seconds; failed: text
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VERSION = 1
TERMINAL = ("finished", "stopped", "failed")


class Progress:
    """Tells `emit` of (what, done, total) as an event, with the seconds left, once a second at most: what is quick says nothing."""

    EVERY = 1.0  # seconds

    def __init__(self, emit: Callable[..., object]) -> None:
        self.emit, self.began, self.said = emit, 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.began = self.said = now
        elif now - self.said >= self.EVERY and done < total:
            self.said = now
            self.emit("progress", what=what, done=done, total=total, eta_s=round((now - self.began) / done * (total - done), 1))


class Writer:
    """The single writer of a run's events. Opening it cuts off a torn last line and goes on counting."""

    def __init__(self, path: Path) -> None:
        self.seq = 0
        if path.exists():
            raw = path.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            if whole != raw:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            for event in read(path):
                self.seq = event["seq"] + 1
        self.file = path.open("a", encoding="utf-8", newline="\n")

    def __call__(self, type: str, **fields: Any) -> dict[str, Any]:
        event = {"v": VERSION, "seq": self.seq, "time": round(time.time(), 3), "type": type, **fields}
        self.file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.file.flush()
        self.seq += 1
        return event

    def close(self) -> None:
        self.file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole event of a file, in order; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
