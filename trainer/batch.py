"""`python -m trainer batch RUN_OR_CONFIG --step N`: what a step is trained on, as a picture: its latents decoded, masks laid over them.

The latents are those that the training has on the device (out of the same cache, where they are kept): what is cut off, mirrored or
masked the wrong way shows here, whatever the page says.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import PIL.Image

from trainer import course, events, imports, plan, run
from trainer.config.load import load
from trainer.job import Show, work
from trainer.run_dir import RunDir, write_atomic

ACROSS, GAP = 4, 8  # pictures in a row, and pixels between them
LEFT = 0.25  # brightness of what counts nothing


def batch(source: Path, step: int, out: Path, device: str = "auto", say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Write the batch of `step` of a run's folder, or of a configuration file, as a picture to `out`; returns the rows of plan.seen.

    The VAE alone is loaded. Raises ValueError with a sentence for what the user can mend.
    """
    folder = RunDir(source)
    config = load(folder.config if source.is_dir() else source)
    ready = run.prepare(config, say)
    laid, config = _as_it_went(ready.plan, config, folder)
    rows = plan.seen(laid, config, step)
    imports.light()
    import torch

    from trainer import families
    from trainer.data import store
    from trainer.data.cache import Cache
    from trainer.formats import single_file
    from trainer.hardware import choose
    from trainer.sampler import Sampler

    hardware = choose(device, config.train.dtype, config.train.attention)
    where, family = torch.device(hardware.device), families.get(ready.family)
    models = families.Models({}, single_file.load_vae(ready.source, where), {}, {}, "unknown", None, where)
    cache = Cache.of_the_user(say, lambda what, done, total: None)
    found = store.encode_images(family, models, laid.images, laid.placements, config.dataset.background, config.dataset.flip, cache)
    drawn = laid.steps[step - 1]
    with torch.no_grad():
        pictures = Sampler(family, models).decode([found[row.image, row.flip][0] for row in drawn])
    for k, row in enumerate(drawn):
        counts = store.mask(laid.images[row.image], laid.placements[row.image], config.dataset.masks)
        if counts is not None:
            shown = LEFT + (1 - LEFT) * (counts.flip(-1) if row.flip else counts)
            grey = PIL.Image.fromarray((255 * shown).round().byte().numpy()).resize(pictures[k].size, PIL.Image.Resampling.NEAREST)
            pictures[k] = PIL.Image.composite(pictures[k], PIL.Image.new("RGB", pictures[k].size), grey)
    raw = io.BytesIO()
    _sheet(pictures).save(raw, "PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, raw.getvalue(), "the picture of a batch")
    return rows


def job(source: Path, step: int, root: Path, device: str = "auto", show: Show = lambda event: None) -> str:
    """The same as a job (trainer/job.py) in the folder `root`, for the app; the picture is batch.png there.

    The `finished` event has step and rows: file, caption, mirrored, masked.
    """

    def body(job: Any) -> dict[str, Any]:
        rows = batch(source, step, root / "batch.png", device, lambda text: job.emit("warning", text=text))
        told = ("caption", "mirrored", "masked")
        return {"step": step, "rows": [{"file": row["file"].name, **{k: row[k] for k in told}} for row in rows]}

    return work(root, {"job": "batch", "run": str(source), "step": step, "device": device}, body, show)


def free(path: Path) -> Path:
    """A path beside `path` where nothing is yet: that itself, or with a number behind."""
    return next(p for k in count(1) if not (p := path if k == 1 else path.with_stem(f"{path.stem}-{k}")).exists())


def _as_it_went(laid: plan.Plan, config: Any, folder: RunDir) -> tuple[plan.Plan, Any]:
    """The plan and configuration of a run with the changes of its length that were made along the way."""
    now = course.Course(config, laid)
    for change in course.changes(events.read(folder.events)):
        now.change(**change)
    return now.plan, now.config


def _sheet(pictures: list[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures of one size side by side, ACROSS in a row."""
    width, height = pictures[0].size
    across, down = min(ACROSS, len(pictures)), -(-len(pictures) // ACROSS)
    sheet = PIL.Image.new("RGB", (across * (width + GAP) - GAP, down * (height + GAP) - GAP), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % ACROSS * (width + GAP), k // ACROSS * (height + GAP)))
    return sheet
