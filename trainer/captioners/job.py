"""`python -m trainer caption FOLDER`: write a caption beside each image of a folder, as a job of its own (trainer/job.py).

Events besides the frame's:

    stage        name: loading | downloading | captioning; text (of downloading: size and licence)
    started      name (the captioner), total (images to caption), device, dtype, reasons
    chosen       text: how the captioner is run and why (bits, processor)
    captioned    done, total, file (relative to the folder, with slashes), text, seconds (of its batch, shared out)
    variety      alike: files that the captioner can hardly tell apart, of: how many it saw (trainer.captioners.variety; not of every captioner)
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

import numpy as np
import PIL.Image
from pydantic import ValidationError

from trainer.captioners import CAPTIONERS, files, kind_of, variety
from trainer.captioners.texts import combined
from trainer.data.images import DAMAGED, open_rgb
from trainer.data.scan import listing
from trainer.job import Job, Show, work
from trainer.run_dir import write_atomic

Target = tuple[Path, Path, str]  # an image, the file of its caption, the text that is there


def caption(
    folder: Path,
    root: Path,
    *,
    captioner: str = "blip",
    settings: dict[str, Any] | None = None,
    only_missing: bool = False,
    add: bool = False,
    only: Sequence[str] = (),
    purpose: str = "",
    trigger: str = "",
    class_word: str = "",
    device: str = "auto",
    show: Show = lambda event: None,
) -> str:
    """Caption the images of `folder`, with the job's own files in `root`; returns "finished" or "stopped".

    Args:
        captioner: one of CAPTIONERS, or "auto": by the files of settings["source"].
        settings: what differs from the captioner's defaults (source, batch, ...).
        only_missing: leave alone what has a caption. A job that was stopped goes on so.
        add: write behind what is there what it lacks. A job that was stopped may be asked for again: nothing is added twice.
        only: names of images, relative to the folder, with slashes; empty means all.
        purpose, class_word: what the LoRA is for ("character", "style", "object") and what its subject is called, for captioners that
            take a prompt.
        trigger: the word that goes first in each caption.

    Raises ValueError with a sentence for what the user can mend.
    """
    if add and only_missing:
        raise ValueError("add and only_missing exclude each other: adding changes captions that are there. Give one of them.")
    source = (settings or {}).get("source", "")
    if captioner == "auto":
        captioner = kind_of(source) if source else "blip"
    kind = CAPTIONERS[captioner]
    given = {k: v for k, v in (("purpose", purpose), ("class_word", class_word)) if v and k in kind.config.model_fields}
    config = _config(captioner, given | (settings or {}))
    asked = {"job": "caption", "folder": str(folder.resolve()), "captioner": captioner, **config.model_dump(mode="json")}
    asked |= {"only_missing": only_missing, "add": add, "only": list(only), "trigger": trigger, "device": device}

    def body(job: Job) -> dict[str, int]:
        job.emit("stage", name="loading")
        found = place(listing(folder.resolve()))
        if only:
            found = _chosen(found, folder.resolve(), only)
        targets = [item for item in found if not (only_missing and item[2])]
        return _caption(job, folder.resolve(), captioner, config, targets, add, " ".join(trigger.split()), device)

    return work(root, asked, body, show)


def _config(captioner: str, settings: dict[str, Any]) -> Any:
    """The captioner's settings. Raises ValueError with a sentence for each that is not allowed."""
    kind = CAPTIONERS[captioner].config
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        said = []
        for e in error.errors():
            name = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                said.append(f"The captioner {captioner} has no setting {name}; it has {known}.")
            else:
                said.append(f"{name} is {e['input']!r}: {e['msg']}.")
        raise ValueError(" ".join(said)) from None


def _chosen(found: list[Target], folder: Path, only: Sequence[str]) -> list[Target]:
    named = {image.relative_to(folder).as_posix(): (image, file, text) for image, file, text in found}
    if unknown := [name for name in only if name not in named]:
        raise ValueError(f"{folder} has no image {unknown[0]!r}. Names are relative to the folder, like {next(iter(named), 'a.png')}.")
    return [named[name] for name in dict.fromkeys(only)]


def _caption(job: Job, folder: Path, name: str, config: Any, targets: list[Target], add: bool, trigger: str, device: str) -> dict[str, int]:
    from trainer.hardware import choose

    kind, hardware = CAPTIONERS[name], choose(device)
    start = {"name": name, "total": len(targets), "device": hardware.name, "dtype": hardware.dtype, "reasons": list(hardware.reasons)}
    job.emit("started", **start)
    if hardware.warning:
        job.emit("warning", text=hardware.warning)
    done = skipped = 0
    if targets:

        def say(text: str) -> None:
            job.emit("stage", name="downloading" if text.startswith("Downloading") else "loading", text=text)

        source = job.wait(lambda: files.resolve(kind.shape, config.source, say))
        job.emit("stage", name="loading")
        write = kind.build(config, source, hardware.device, hardware.dtype, lambda text: job.emit("chosen", text=text))
        job.emit("stage", name="captioning")
        looked = _Looked(write)
        for at in range(0, len(targets), config.batch):
            job.check()
            began, opened = time.time(), []
            for image, target, old in targets[at : at + config.batch]:
                try:
                    opened.append((image, target, old, open_rgb(image)))
                except (*DAMAGED, PIL.Image.DecompressionBombError) as error:
                    skipped += 1
                    job.emit("warning", text=f"{image.name} cannot be read and was passed over ({error}). Copy it again or remove it.")
            texts = write([rgb for *_, rgb in opened]) if opened else []
            looked.at([(image, rgb) for image, _, _, rgb in opened])
            seconds = round((time.time() - began) / max(1, len(texts)), 2)
            for (image, target, old, _), new in zip(opened, texts, strict=True):
                if not new:
                    skipped += 1
                    job.emit("warning", text=f"{image.name} was passed over: the captioner found nothing to say of it.")
                    continue
                text = combined(old, new, trigger, add)
                if text != old:
                    backup(target, folder, job.run.root / "backup")
                    write_atomic(target, f"{text}\n", "a caption")
                done += 1
                file = image.relative_to(folder).as_posix()
                job.emit("captioned", done=done, total=len(targets), file=file, text=text, seconds=seconds)
        if found := looked.alike():
            job.emit("variety", alike=[image.relative_to(folder).as_posix() for image in found], of=len(looked.images))
    return {"done": done, "total": len(targets), "skipped": skipped}


class _Looked:
    """What a captioner's vision encoder made of the images so far, where it has one that can be asked (`states`, `look`)."""

    def __init__(self, captioner: Any) -> None:
        self.captioner = captioner if hasattr(captioner, "look") else None
        self.images: list[Path] = []
        self.states: list[Any] = []
        self.middles: list[Any] = []

    def at(self, opened: Sequence[tuple[Path, PIL.Image.Image]]) -> None:
        """After these images were captioned together."""
        if not self.captioner or not opened or len(self.images) > variety.MOST:
            return
        self.images += [image for image, _ in opened]
        self.states += [*self.captioner.states]
        if more := [variety.middle(rgb) for _, rgb in opened][: variety.MIDDLES - len(self.middles)]:
            self.captioner.look(more)
            self.middles += [*self.captioner.states]

    def alike(self) -> list[Path]:
        """Those that are hardly told apart; none where too few or too many were seen."""
        if not variety.LEAST <= len(self.images) <= variety.MOST:
            return []
        return [self.images[k] for k in variety.alike(np.stack(self.states), np.stack(self.middles))]


def place(found: Sequence[tuple[Path, Path | None, str]]) -> list[Target]:
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
