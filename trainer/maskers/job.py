"""`python -m trainer mask FOLDER --prompt WORDS`: a mask beside each image of a folder, as a job of its own (trainer/job.py).

Events besides the frame's:

    stage        name: loading | downloading | masking; text (of downloading: size and licence)
    started      total (images to mask), device, dtype, reasons
    masked       done, total, found, file (relative to the folder, with slashes), area (share of the image that counts; 0: nothing was
                 found, and what stood there stays)
    warning      text: an image that was passed over
    finished     done, total, found, skipped

What stood in a mask's file is copied to the job's `backup/`, at the same relative path, before it is written over.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from trainer.captioners import files
from trainer.captioners.job import backup
from trainer.data.images import DAMAGED, open_rgb
from trainer.data.scan import MASK, listing
from trainer.job import Job, Show, work
from trainer.maskers import clipseg
from trainer.run_dir import write_atomic

LARGEST = 1024  # pixels of a mask's longer side


def mask(
    folder: Path,
    root: Path,
    prompt: str,
    *,
    settings: dict[str, Any] | None = None,
    only_missing: bool = False,
    device: str = "auto",
    show: Show = lambda event: None,
) -> str:
    """Mask in the images of `folder` what `prompt` says, with the job's own files in `root`; returns "finished" or "stopped".

    Args:
        settings: what differs from the defaults of clipseg.Config (source, batch).
        only_missing: leave alone what has a mask. A job that was stopped goes on so.

    Raises ValueError with a sentence for what the user can mend.
    """
    words = " ".join(prompt.split())
    if not words:
        raise ValueError("--prompt is empty; say what the masks shall show, like cat or a person.")
    config = clipseg.Config.model_validate(settings or {})
    asked = {"job": "mask", "folder": str(folder.resolve()), "prompt": words, **config.model_dump(), "only_missing": only_missing}
    return work(root, asked | {"device": device}, lambda job: _mask(job, folder.resolve(), words, config, only_missing, device), show)


def _mask(job: Job, folder: Path, words: str, config: clipseg.Config, only_missing: bool, device: str) -> dict[str, int]:
    from trainer.hardware import choose

    job.emit("stage", name="loading")
    images = [image for image, _, _ in listing(folder)]
    stems = Counter(image.with_suffix("") for image in images)
    shared = [image for image in images if stems[image.with_suffix("")] > 1]
    targets = [(i, t) for i in images if i not in shared and not ((t := _target(i)).exists() and only_missing)]
    hardware = choose(device)
    job.emit("started", total=len(targets), device=hardware.name, dtype=hardware.dtype, reasons=list(hardware.reasons))
    if hardware.warning:
        job.emit("warning", text=hardware.warning)
    for image in shared:
        text = (
            f"{image.name} would share its mask with an image of the same name and another ending, and was passed over. Rename one of them."
        )
        job.emit("warning", text=text)
    done = found = skipped = 0
    if targets:

        def say(text: str) -> None:
            job.emit("stage", name="downloading" if text.startswith("Downloading") else "loading", text=text)

        source = job.wait(lambda: files.resolve(clipseg.SHAPE, config.source, say))
        job.emit("stage", name="loading")
        find = clipseg.build(source, hardware.device, hardware.dtype)
        job.emit("stage", name="masking")
        for at in range(0, len(targets), config.batch):
            job.check()
            opened = []
            for image, target in targets[at : at + config.batch]:
                try:
                    opened.append((image, target, open_rgb(image)))
                except (*DAMAGED, PIL.Image.DecompressionBombError) as error:
                    skipped += 1
                    job.emit("warning", text=f"{image.name} cannot be read and was passed over ({error}). Copy it again or remove it.")
            maps = find([rgb for *_, rgb in opened], words) if opened else []
            for (image, target, rgb), likely in zip(opened, maps, strict=True):
                area = float(likely.mean()) if likely.max() >= 1 else 0.0
                if area:
                    backup(target, folder, job.run.root / "backup")
                    write_atomic(target, _png(likely, rgb.size), "a mask")
                    found += 1
                done += 1
                file = image.relative_to(folder).as_posix()
                job.emit("masked", done=done, total=len(targets), found=found, file=file, area=round(area, 3))
    return {"done": done, "total": len(targets), "found": found, "skipped": skipped + len(shared)}


def _target(image: Path) -> Path:
    """The file of an image's mask: the one that is there, in whatever case it is written."""
    name = f"{image.stem}{MASK}"
    return next((f for f in image.parent.iterdir() if f.name.lower() == name.lower()), image.with_name(name))


def _png(likely: np.ndarray, size: tuple[int, int]) -> bytes:
    """Values (h, w) in [0, 1] as a grey PNG of the shape of an image of `size` (width, height)."""
    scale = min(1.0, LARGEST / max(size))
    grey = PIL.Image.fromarray(np.rint(likely * 255).astype(np.uint8))
    out = io.BytesIO()
    grey.resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()
