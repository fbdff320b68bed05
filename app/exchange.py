"""Data sets as things: the list of them, out as a zip, in from zips, folders and other programs, and which version of one it is.

A zip that `export` makes holds the images, `NAME.txt` captions, `NAME-masklabel.png` masks, `crops.json`, and `dataset.json`: {"name",
"notes", "trigger", "class_word", "version"}. It is what the trainer reads as it is, and comes back in by `bring`.

Folders called `10_zorp creature`, as kohya's scripts want them, become a data set each, with its trigger and class word; what they
repeat says how often one is seen beside the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from app import datasets, intake, masks, pictures
from app.datasets import Dataset
from app.errors import Problem
from app.paths import Home
from trainer.data.scan import CROPS, listing, read_crops

ABOUT = "dataset.json"
FIELDS = ("name", "notes", "trigger", "class_word")
LONGEST = 4000  # letters of a field
KOHYA = re.compile(r"(\d{1,4})_([^/]+)")
REGULAR = re.compile(r"(?:^|[_\W])reg(?:ularization|ularisation|s)?(?:$|[_\W])", re.I)  # the name of a folder of class images


def version(folder: Path, cache: Path) -> str:
    """Twelve hex digits of what a folder of images holds: their names and contents, captions, masks and crops. "" for one without images."""
    try:
        rows = listing(folder)
    except ValueError:
        return ""
    points = read_crops(folder, [])
    covers = masks.there(folder, [path.name for path, _, _ in rows])
    digests = pictures.inspect_all([path for path, _, _ in rows], cache)
    whole = hashlib.sha256()
    for (path, _, text), found in zip(rows, digests, strict=True):
        mask = hashlib.sha256(covers[path.name].read_bytes()).hexdigest() if path.name in covers else ""
        whole.update(json.dumps([path.name, found[0], text, mask, points.get(path.name)]).encode())
    return whole.hexdigest()[:12]


# ---- the list ---------------------------------------------------------------------------------------------------------------


def view(data: Dataset) -> dict[str, Any]:
    """A data set as assets/help/api.md has it, without `current`."""
    facts = data.read()
    changed = max((f.stat().st_mtime for f in (data.root / ABOUT, data.images) if f.exists()), default=facts["created"])
    return {"id": data.id, **{k: facts[k] for k in FIELDS}, "images": data.count(), "created": facts["created"], "changed": changed}


def every(home: Home, current: str) -> list[dict[str, Any]]:
    """The data sets that have images or a name, and the `current` one; the newest first."""
    found = []
    for root in home.datasets.iterdir() if home.datasets.is_dir() else []:
        if (root / "images").is_dir():
            shown = view(Dataset(home, root.name)) | {"current": root.name == current}
            if shown["images"] or shown["name"] or shown["current"]:
                found.append(shown)
    return sorted(found, key=lambda s: (s["created"], s["id"]), reverse=True)


def describe(data: Dataset, **fields: str) -> None:
    """Set the name, notes, trigger or class word of a data set. Raises Problem for one that is too long."""
    wrong = {k: f"{k} has {len(v)} letters; at most {LONGEST} are kept. Shorten it." for k, v in fields.items() if len(v) > LONGEST}
    if wrong:
        raise Problem(" ".join(wrong.values()), errors=wrong)
    with data.lock:
        data.save(data.read() | {k: v.strip() if k == "notes" else " ".join(v.split()) for k, v in fields.items()})


def duplicate(data: Dataset) -> Dataset:
    """A copy with the same images (links where possible), captions, masks and crops. Its changes are its own, and begin anew."""
    facts = data.read()
    new = datasets.create(data.home, f"{facts['name'] or 'Untitled'} (copy)")
    _fill(new, data, data.names())
    describe(new, **{k: facts[k] for k in ("notes", "trigger", "class_word")})
    return new


def _fill(new: Dataset, old: Dataset, names: Sequence[str]) -> None:
    """Put some active images of `old`, with all that belongs to them, into the empty data set `new`."""
    with old.lock:
        facts, texts, covers = old.read(), old.texts(), masks.there(old.images, list(names))
        points = read_crops(old.images, [])
        for name in names:
            intake.link(old.images / name, new.images / name)
            if name in texts:  # of its own, where several shared one
                (new.images / f"{name}.txt").write_text(f"{texts[name]}\n" if texts[name] else "", encoding="utf-8")
            if name in covers:
                shutil.copy2(covers[name], new.images / covers[name].name)
        if kept := {n: p for n, p in points.items() if n in names}:
            (new.images / CROPS).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        files = {n: f for n, f in facts["files"].items() if n in names}
    with new.lock:
        new.save(new.read() | {"files": files})


def trash(data: Dataset) -> Path:
    """Move a data set to the data folder's trash, where it stays; returns where it is now."""
    data.home.trash.mkdir(parents=True, exist_ok=True)
    target = data.home.trash / data.id
    with data.lock:
        try:
            data.root.rename(target)
        except OSError as error:
            raise Problem(
                f"{data.root} cannot be moved to the trash ({error.strerror}). Close what uses it, then try again.", 409
            ) from None
    return target


def restore(home: Home, id: str) -> Dataset:
    """Bring a data set back from the trash. Raises Problem (404) where it is not there."""
    if not re.fullmatch(r"[\w-]+", id) or not (home.trash / id / "images").is_dir() or (home.datasets / id).exists():
        raise Problem(f"There is no data set {id!r} in the trash ({home.trash}).", 404)
    (home.trash / id).rename(home.datasets / id)
    return datasets.open(home, id)


# ---- out --------------------------------------------------------------------------------------------------------------------


class _Sink:
    """What a zip is written into, to be taken away piece by piece: a zip of any size needs no room."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self.pieces.append(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        taken, self.pieces = b"".join(self.pieces), []
        return taken


def export(data: Dataset) -> Iterator[bytes]:
    """The active images of a data set and what belongs to them as the bytes of a zip, in pieces of about a megabyte."""
    with data.lock:
        names, texts, facts = data.names(), data.texts(), data.read()
    covers, points = masks.there(data.images, names), read_crops(data.images, [])
    about = {k: facts[k] for k in FIELDS} | {"version": version(data.images, data.home.cache)}
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:  # stored: images do not get smaller
        archive.writestr(ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        if kept := {n: p for n, p in points.items() if n in names}:
            archive.writestr(CROPS, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        for name in names:
            if name in texts:
                alike = sum(Path(n).stem == Path(name).stem for n in names) > 1
                archive.writestr(f"{name}.txt" if alike else f"{Path(name).stem}.txt", f"{texts[name]}\n")
            for file in (data.images / name, covers.get(name)):
                if file and file.exists():  # else removed meanwhile
                    with file.open("rb") as source, archive.open(zipfile.ZipInfo.from_file(file, file.name), "w") as target:
                        while piece := source.read(intake.MB):
                            target.write(piece)
                            yield sink.take()
    yield sink.take()


# ---- in ---------------------------------------------------------------------------------------------------------------------


def bring_files(home: Home, files: Sequence[tuple[str, BinaryIO]]) -> tuple[list[Dataset], list[str]]:
    """New data sets of files that were sent: a zip, or images, captions and lists of captions. Returns as `_settle`."""
    about: dict[str, Any] = {}
    for label, file in files:
        about |= _about_in(label, file)
    title = PurePosixPath(intake.to_label(files[0][0])).parts[0] if files else ""
    return _bring(home, lambda data: data.add_files(files), about, title.removesuffix(".zip"))


def bring_folder(home: Home, text: str) -> tuple[list[Dataset], list[str]]:
    """New data sets of a folder of this machine, whose images are used in place. Returns as `_settle`."""
    folder = intake.pasted(text)
    about = _read_about((folder / ABOUT).read_bytes()) if (folder / ABOUT).is_file() else {}
    return _bring(home, lambda data: data.add_folder(folder, undoable=False), about, folder.name)


def _bring(home: Home, add: Any, about: dict[str, Any], title: str) -> tuple[list[Dataset], list[str]]:
    """(data sets, a sentence for each file that was not taken): one, or one for each folder of kohya's kind."""
    data = datasets.create(home, about.get("name") or title[:200])
    try:
        added, problems = add(data)
        if not added:
            raise Problem(f"There is no image in it that can be used. {' '.join(problems[:5])}".strip())
        data.forget_changes()
        describe(data, **{k: about[k] for k in FIELDS if about.get(k)})
        return _split(data, title), problems
    except BaseException:
        shutil.rmtree(data.root, ignore_errors=True)  # holds copies and links alone
        raise


def _about_in(label: str, file: BinaryIO) -> dict[str, str]:
    """What the dataset.json in a zip, or such a file itself, says of a data set."""
    if PurePosixPath(label).name == ABOUT:
        raw = file.read(intake.MB)
        file.seek(0)
        return _read_about(raw)
    if not label.lower().endswith(".zip"):
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            found = [m for m in archive.infolist() if PurePosixPath(m.filename).name == ABOUT and m.file_size < intake.MB]
            return _read_about(archive.read(found[0])) if found else {}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError, EOFError):  # told when its images are taken
        return {}
    finally:
        file.seek(0)


def _read_about(raw: bytes) -> dict[str, str]:
    try:
        told = json.loads(raw.decode("utf-8-sig"))
    except ValueError:
        return {}
    return {k: told[k][:LONGEST] for k in FIELDS if isinstance(told.get(k), str)} if isinstance(told, dict) else {}


def _split(data: Dataset, title: str) -> list[Dataset]:
    """The data set itself, or one for each folder called `10_zorp creature` that its images came from, and one for the rest."""
    groups: dict[str, list[str]] = defaultdict(list)
    facts = data.read()
    for name in data.names():
        came = PurePosixPath(facts["files"].get(name, {}).get("from", name))
        inner = next((p for p in (*came.parents, PurePosixPath(title)) if KOHYA.fullmatch(p.name)), "")
        groups[str(inner)].append(name)
    if set(groups) == {""}:
        return [data]
    made = []
    for path, names in sorted(groups.items()):
        match = KOHYA.fullmatch(PurePosixPath(path).name)
        words = match[2].split() if match else []
        new = datasets.create(data.home, " ".join(words) or facts["name"])
        _fill(new, data, names)
        above = (title, *PurePosixPath(path).parts[:-1])
        told = {"repeats": int(match[1]) if match else 1, "class_images": bool(match) and any(REGULAR.search(p) for p in above)}
        if told["class_images"]:
            told |= {"class_word": " ".join(words)}
        elif words:
            told |= {"trigger": words[0], "class_word": " ".join(words[1:])}
        with new.lock:
            new.save(new.read() | told)
        made.append(new)
    shutil.rmtree(data.root)  # all of it is in the new ones
    return sorted(made, key=lambda d: d.read()["class_images"])


def stamp(data: Dataset, folder: Path) -> dict[str, Any]:
    """What a run keeps of a data set whose images were put into `folder` for it: {"dataset", "name", "images", "version", "time"}."""
    images = len(listing(folder))
    return {
        "dataset": data.id,
        "name": data.read()["name"],
        "images": images,
        "version": version(folder, data.home.cache),
        "time": time.time(),
    }
