"""`python -m trainer serve`: the playground's process. It keeps a base loaded and makes pictures on request (trainer/job.py).

A request is a file `requests/<id>.json` in the job's folder, put there by rename: {base, lora (path or null), prompt, negative, seed,
steps, guidance, width, height (null: the base's own), strength, model (its settings beside the source, as in a run's)}. It is taken away when its turn comes, oldest first.

Events besides the frame's:

    loading   base, text (where there is something to say, like the size of a download)
    ready     base, memory_gib (of GPU or computer that this process holds)
    working   id
    picture   id, without, with (file names relative to the job's folder; with is null where there is no LoRA), seconds
    problem   id, text (a sentence; the server goes on)
    finished  reason: idle

The picture without a LoRA is made once for the same base and settings. Without a request for `idle` seconds the process ends, and
with it goes the memory. A stop, also in the midst of a picture, is heeded after the denoising step.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config import ModelConfig
from trainer.job import Job, Show, Stopped, explain, work
from trainer.run_dir import replace

if TYPE_CHECKING:
    from trainer.generate import Studio

LOOK_EVERY = 0.2  # seconds between looks for a request


class Request(BaseModel):
    """One picture asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    model: ModelConfig = ModelConfig()
    lora: str | None = None
    prompt: str
    negative: str = ""
    seed: int = Field(1, ge=0, lt=2**32)
    steps: int = Field(20, ge=1, le=200)
    guidance: float = Field(7.0, ge=1, le=30)
    width: int | None = Field(None, ge=64, le=2048, multiple_of=8)
    height: int | None = Field(None, ge=64, le=2048, multiple_of=8)
    strength: float = Field(1.0, ge=-2, le=2)


def serve(root: Path, *, idle: float = 300, device: str = "auto", show: Show = lambda event: None) -> str:
    """Serve pictures in the folder `root` until nothing was asked for `idle` seconds; returns "finished" or "stopped".

    Raises ValueError with a sentence for a folder or device that cannot be used.
    """
    return work(root, {"job": "serve", "idle": idle, "device": device}, lambda job: _Server(job, idle, device).run(), show)


class _Server:
    def __init__(self, job: Job, idle: float, device: str) -> None:
        self.job, self.idle, self.device = job, idle, device
        self.requests, self.pictures = job.run.root / "requests", job.run.root / "pictures"
        self.studio: Studio | None = None
        self.loaded: tuple[str, ModelConfig] | None = None  # base and settings of the studio
        self.made: dict[tuple[Any, ...], Path] = {}  # pictures without a LoRA of the loaded base, by their settings

    def run(self) -> dict[str, Any]:
        for folder in (self.requests, self.pictures):
            folder.mkdir(exist_ok=True)
        last = time.monotonic()
        try:
            while True:
                self.job.check()
                waiting = sorted(self.requests.glob("[!.]*.json"), key=lambda p: p.stat().st_mtime_ns)
                if waiting:
                    self._serve(waiting[0])
                    last = time.monotonic()
                elif time.monotonic() - last >= self.idle:
                    return {"reason": "idle"}
                else:
                    time.sleep(LOOK_EVERY)
        except Stopped:
            for path in self.requests.glob("[!.]*.json"):
                path.unlink()
                self._problem(path.stem, "The playground was closed before this picture was made. Ask for it again.")
            raise

    def _serve(self, path: Path) -> None:
        raw = path.read_bytes()
        path.unlink()  # first: what brings this process down must not bring down the next one too
        try:
            asked = Request.model_validate(json.loads(raw))
            self.job.emit("working", id=path.stem)
            self._draw(path.stem, asked, self._load(asked.base, asked.model))
        except Stopped:
            self._problem(path.stem, "The playground was closed before this picture was made. Ask for it again.")
            raise
        except ValidationError as error:
            told = (f"{'.'.join(map(str, e['loc'])) or 'the request'} is {e['input']!r}: {e['msg']}." for e in error.errors())
            self._problem(path.stem, " ".join(told))
        except Exception as error:
            text = explain(error)
            if not text:
                traceback.print_exc(file=sys.stderr)
            if not isinstance(error, ValueError):  # memory ran out, or worse: what is loaded may be half moved
                self._drop()
            self._problem(path.stem, text or f"The picture could not be made ({type(error).__name__}: {error}). The log says more.")

    def _problem(self, id: str, text: str) -> None:
        self.job.emit("problem", id=id, text=text)

    def _load(self, base: str, model: ModelConfig) -> Studio:
        from trainer.generate import Studio

        if self.studio is None or (base, model) != self.loaded:
            self._drop()  # the old one's memory goes before the new one's comes
            self.job.emit("loading", base=base)

            def say(text: str) -> None:
                self.job.emit("loading", base=base, text=text)

            self.studio = self.job.wait(lambda: Studio(base, device=self.device, say=say, model=model))
            self.loaded = base, model
            self.job.emit("ready", base=base, memory_gib=round(memory_held(self.studio) / 2**30, 2))
        return self.studio

    def _drop(self) -> None:
        self.studio, self.loaded = None, None
        self.made.clear()
        gc.collect()

    def _draw(self, id: str, asked: Request, studio: Studio) -> None:
        began = time.time()
        size = asked.width, asked.height
        look = {"negative": asked.negative, "steps": asked.steps, "guidance": asked.guidance, "size": size, "tick": self.job.check}
        if asked.lora is not None:
            studio.wear(Path(asked.lora), asked.strength, field="The LoRA")  # a wrong file is told before a picture is made in vain
        settings = (asked.prompt, asked.negative, asked.seed, asked.steps, asked.guidance, size)
        without, known = self.pictures / f"{id}-without.png", self.made.get(settings)
        if known and known.exists():
            _save(without, lambda temp: shutil.copyfile(known, temp))
        else:
            studio.wear(None)
            (image,) = studio.sample([asked.prompt], [asked.seed], **look)
            _save(without, lambda temp: image.save(temp, "PNG"))
            self.made[settings] = without
        with_it = None
        if asked.lora is not None:
            studio.wear(Path(asked.lora), asked.strength, field="The LoRA")
            (drawn,) = studio.sample([asked.prompt], [asked.seed], **look)
            with_it = self.pictures / f"{id}-with.png"
            _save(with_it, lambda temp: drawn.save(temp, "PNG"))
        names = [p and p.relative_to(self.job.run.root).as_posix() for p in (without, with_it)]
        self.job.emit("picture", id=id, **{"without": names[0], "with": names[1]}, seconds=round(time.time() - began, 2))


def memory_held(studio: Studio) -> int:
    """Bytes of GPU memory that torch holds, or on a CPU of the computer's memory that this process holds."""
    import psutil
    import torch

    kind = studio.models.device.type
    if kind in ("cuda", "xpu"):
        return getattr(torch, kind).memory_reserved(studio.models.device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def _save(path: Path, write: Callable[[Path], Any]) -> None:
    temp = path.with_name(f".{path.name}.tmp")
    write(temp)
    replace(temp, path)
