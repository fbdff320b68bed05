"""`python -m trainer caption FOLDER`: write a caption beside each image of a folder, as a job of its own (trainer/job.py).

Events besides the frame's:

    stage        name: loading | downloading | captioning; text (of downloading: size and licence)
    started      name (the captioner), total (images to caption), device, dtype, reasons
    captioned    done, total, file (relative to the folder, with slashes), text, seconds (of its batch, shared out)
    warning      text: an image that was passed over
    finished     done, total, skipped

What stood in a caption file is copied to the job's `backup/`, at the same relative path, before it is written over.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from trainer.captioners import CAPTIONERS
from trainer.data.images import DAMAGED, open_rgb
from trainer.data.scan import listing
from trainer.job import Job, Show, work
from trainer.run_dir import write_atomic


def caption(
    folder: Path,
    root: Path,
    *,
    captioner: str = "blip",
    settings: dict[str, Any] | None = None,
    only_missing: bool = False,
    device: str = "auto",
    show: Show = lambda event: None,
) -> str:
    """Caption the images of `folder`, with the job's own files in `root`; returns "finished" or "stopped".

    Args:
        settings: what differs from the captioner's defaults (source, max_tokens, batch).
        only_missing: leave alone what has a caption. A job that was stopped goes on so.

    Raises ValueError with a sentence for what the user can mend.
    """
    kind = CAPTIONERS[captioner]
    config = kind.config.model_validate(settings or {})
    asked = {"job": "caption", "folder": str(folder.resolve()), "captioner": captioner, **config.model_dump()}
    asked |= {"only_missing": only_missing, "device": device}
    return work(root, asked, lambda job: _caption(job, folder.resolve(), kind, captioner, config, only_missing, device), show)


def _caption(job: Job, folder: Path, kind: Any, name: str, config: Any, only_missing: bool, device: str) -> dict[str, int]:
    from trainer.hardware import choose

    job.emit("stage", name="loading")
    targets = [(image, target) for image, target, text in place(listing(folder)) if not (only_missing and text)]
    hardware = choose(device)
    start = {"name": name, "total": len(targets), "device": hardware.name, "dtype": hardware.dtype, "reasons": list(hardware.reasons)}
    job.emit("started", **start)
    if hardware.warning:
        job.emit("warning", text=hardware.warning)
    done = skipped = 0
    if targets:

        def say(text: str) -> None:
            job.emit("stage", name="downloading" if text.startswith("Downloading") else "loading", text=text)

        source = job.wait(lambda: kind.resolve(config.source, say))
        job.emit("stage", name="loading")
        write = kind.build(config, source, hardware.device, hardware.dtype)
        job.emit("stage", name="captioning")
        for at in range(0, len(targets), config.batch):
            job.check()
            began, opened = time.time(), []
            for image, target in targets[at : at + config.batch]:
                try:
                    opened.append((image, target, open_rgb(image)))
                except (*DAMAGED, PIL.Image.DecompressionBombError) as error:
                    skipped += 1
                    job.emit("warning", text=f"{image.name} cannot be read and was passed over ({error}). Copy it again or remove it.")
            texts = write([rgb for *_, rgb in opened]) if opened else []
            seconds = round((time.time() - began) / max(1, len(texts)), 2)
            for (image, target, _), text in zip(opened, texts, strict=True):
                backup(target, folder, job.run.root / "backup")
                write_atomic(target, f"{text}\n", "a caption")
                done += 1
                file = image.relative_to(folder).as_posix()
                job.emit("captioned", done=done, total=len(targets), file=file, text=text, seconds=seconds)
    return {"done": done, "total": len(targets), "skipped": skipped}


def place(found: Sequence[tuple[Path, Path | None, str]]) -> list[tuple[Path, Path, str]]:
    """(image, the file that its caption goes to, the text it has now): the file that the trainer reads for this image alone.

    That is the one it has; `a.txt` for an image `a.png` without; `a.png.txt` where images share it, or would.
    """
    users = Counter(sidecar for _, sidecar, _ in found)
    stems = Counter(image.with_suffix("") for image, _, _ in found)
    out = []
    for image, sidecar, text in found:
        if sidecar is None:
            sidecar = image.with_suffix(".txt") if stems[image.with_suffix("")] == 1 else None
        elif users[sidecar] > 1:
            sidecar = None
        out.append((image, sidecar or image.with_name(f"{image.name}.txt"), text))
    return out


def backup(file: Path, folder: Path, into: Path) -> None:
    """Copy `file` of `folder` to the same relative path below `into`, beside what is there already (`a.txt`, `a.txt.2`, ...)."""
    if not file.exists():
        return
    kept = into / file.relative_to(folder)
    kept.parent.mkdir(parents=True, exist_ok=True)
    target, n = kept, 2
    while target.exists():
        target, n = kept.with_name(f"{kept.name}.{n}"), n + 1
    write_atomic(target, file.read_bytes(), "a backup of a caption")
