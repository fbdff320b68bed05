"""Data sets: the images and captions of a training, each in a folder of its own in the data folder.

    images/        every active image, with its caption in a .txt and its mask in a -masklabel.png beside it: what the trainer reads;
                   crops.json: {image name: [x, y]}, the point round which an image is cropped, kept for removed images too
    removed/       images that were removed, with their captions and masks; nothing is ever deleted
    backup/        what `write_back` wrote over; masks/: masks that were painted over or taken away
    incoming/      an upload under way
    dataset.json   {"name", "notes", "trigger", "class_word", "repeats", "class_images" (as app/exchange.py read them), "created", "files": {image name: {"from", "origin"}}, "waiting": {name: caption without an image yet},
                   "caption_job": {"folder", "style"} or null, "mask_job": {"folder", "prompt"} or null}
    history.json   what `undo` takes back, oldest first: {"label", "active": {image: whether it was}, "captions": {image: text or null},
                   "masks": {image: file in backup/masks or null}, "crops": {image: [x, y] or null}}

Images are never changed: a folder of this machine is used in place, by hard links where the file system allows it, else copies.
The folders are the truth, so a file that somebody else changes (a captioner) shows at the next look. Any number of threads may
work on a data set at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import secrets
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from app import caption_texts, intake, masks, pictures, subject
from app.errors import Problem
from app.paths import ROOT, Home
from trainer import events
from trainer.data.buckets import Placement, place
from trainer.data.captions import parts_of, trigger_first, without
from trainer.data.images import DAMAGED
from trainer.data.scan import CENTRE, CROPS, OTHER_SUFFIXES, SUFFIXES, decode, inspect, list_files, read_crops, sidecars_of
from trainer.run_dir import replace, write_atomic

BUSY = ("waiting", "starting", "running")  # states of a job
UNDO = 200  # changes that can be taken back
ACTIONS = ("trigger_first", "replace", "prepend", "append", "remove_tag", "clear")


class _Looking:
    """Pictures being looked at: how many are done, and whether somebody wants it to end."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.stopped = total, 0, False

    def tick(self) -> None:
        self.done += 1
        if self.stopped:
            raise Problem("Cancelled; nothing was added.", 409)


_looking: list[tuple[Path, _Looking]] = []  # what comes into each data set
_locks: dict[Path, threading.RLock] = {}
_locks_guard = threading.Lock()


def looking(home: Home) -> dict[str, int] | None:
    """{"done", "total"} of the pictures that are being looked at as they come into a data set, None where none are."""
    work = max(_coming(home), key=lambda w: w.total - w.done, default=None)
    return {"done": work.done, "total": work.total} if work else None


def stop_looking(home: Home) -> None:
    """End what `looking` tells of; what was coming in is not added."""
    for work in _coming(home):
        work.stopped = True


def _coming(home: Home) -> list[_Looking]:
    return [work for root, work in [*_looking] if root.parent == home.datasets]


def create(home: Home, name: str = "") -> Dataset:
    """A new, empty data set."""
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    data = Dataset(home, id)
    data.images.mkdir(parents=True)
    data.removed.mkdir()
    data.save(data.read() | {"name": name, "created": time.time()})
    return data


def open(home: Home, id: str) -> Dataset:
    """An existing data set. Raises Problem (404) where there is none."""
    data = Dataset(home, id)
    if not re.fullmatch(r"[\w-]+", id) or not data.images.is_dir():
        raise Problem(f"There is no data set {id!r}. Reload the page; if it stays, start a new training.", 404)
    return data


class Dataset:
    """One data set. Nothing is held in memory: any number of objects of the same data set work side by side."""

    def __init__(self, home: Home, id: str) -> None:
        self.home, self.id, self.root = home, id, home.datasets / id
        self.images, self.removed, self.backup = self.root / "images", self.root / "removed", self.root / "backup"
        with _locks_guard:
            self.lock = _locks.setdefault(self.root, threading.RLock())

    # ---- files of its own

    def read(self) -> dict[str, Any]:
        """What dataset.json says; it is made again, without the origins, where it is missing or damaged."""
        blank = {"name": "", "notes": "", "trigger": "", "class_word": "", "repeats": 1, "class_images": False, "created": 0.0}
        blank |= {"files": {}, "waiting": {}, "caption_job": None, "mask_job": None}
        try:
            return blank | json.loads((self.root / "dataset.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return blank

    def save(self, facts: dict[str, Any]) -> None:
        write_atomic(self.root / "dataset.json", json.dumps(facts, indent=1), "the data set")

    def _history(self) -> list[dict[str, Any]]:
        try:
            return json.loads((self.root / "history.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return []

    def _save_history(self, history: list[dict[str, Any]]) -> None:
        write_atomic(self.root / "history.json", json.dumps(history[-UNDO:]), "the history of changes")

    def _remember(
        self,
        label: str,
        *,
        active: dict[str, bool] | None = None,
        captions: dict[str, str | None] | None = None,
        **more: dict[str, Any],
    ) -> None:
        """`more`: masks and crops, where they changed."""
        self._save_history([*self._history(), {"label": label, "active": active or {}, "captions": captions or {}, **more}])

    # ---- what is there

    def _names(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            return []
        return sorted(
            f.name for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and not masks.is_mask(f.name)
        )

    def _texts(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """(caption file, its text) of each image in a folder that has one: the file that the trainer would read."""
        found = sidecars_of([folder / n for n in self._names(folder)], list(folder.iterdir()) if folder.is_dir() else [])
        texts = {}
        for image, sidecar in found.items():
            try:
                texts[image.name] = (sidecar, decode(sidecar.read_bytes())[0])
            except FileNotFoundError:  # moved meanwhile by a captioner's atomic write
                continue
        return texts

    def image_id(self, name: str) -> str:
        """The id of an image: the same as long as it is called so, and another in every data set, so that an old tab cannot hit a new one."""
        return hashlib.sha256(f"{self.id}/{name}".encode()).hexdigest()[:12]

    def find(self, id: str) -> Path:
        """The file of an image, active or removed. Raises Problem (404) for an unknown id."""
        for folder in (self.images, self.removed):
            for name in self._names(folder):
                if self.image_id(name) == id:
                    return folder / name
        raise Problem(f"There is no image {id[:40]!r} in this data set. Reload the page.", 404)

    def _chosen(self, ids: Sequence[str] | None) -> list[str]:
        """The names of the active images with these ids; None means all. Raises Problem for an unknown id."""
        names = {self.image_id(n): n for n in self._names(self.images)}
        if ids is None:
            return list(names.values())
        if unknown := [i for i in ids if i not in names]:
            raise Problem(f"There is no image {unknown[0][:40]!r} in this data set. Reload the page.", 404)
        return [names[i] for i in dict.fromkeys(ids)]

    def names(self) -> list[str]:
        """The file names of the active images, in the order of training."""
        return self._names(self.images)

    def texts(self) -> dict[str, str]:
        """The captions of the active images that have a caption file, by the images' names."""
        return {name: text for name, (_, text) in self._texts(self.images).items()}

    def count(self) -> int:
        """Number of active images."""
        return len(self._names(self.images))

    def missing(self) -> int:
        """Number of active images without a caption."""
        texts = self._texts(self.images)
        return sum(not texts.get(name, (None, ""))[1] for name in self._names(self.images))

    def items(
        self,
        resolution: int = 512,
        bucket_step: int | None = None,
        max_aspect: float = 3.0,
        batch_size: int = 1,
        max_upscale: float = 1.5,
    ) -> list[dict[str, Any]]:
        """Every image as the IMAGE of assets/help/api.md, active ones first, placed as the trainer would with these settings.

        A picture that was not seen before is decoded (in threads), the others cost nothing.
        """
        with self.lock:
            facts = self.read()
            rows, mask_of, crops = [], {}, self._crops()
            for folder in (self.images, self.removed):
                texts = self._texts(folder)
                rows += [(folder / name, texts.get(name, (None, ""))[1]) for name in self._names(folder)]
                mask_of |= self._masks(folder)
        facts_of = self._inspect([path for path, _ in rows])
        good = {path: found for (path, _), found in zip(rows, facts_of, strict=True) if not isinstance(found, str)}
        looks = dict(zip(good, pictures.look_all([(p, found[0]) for p, found in good.items()], self.home.cache), strict=True))
        active = [path for path in good if path.parent == self.images]
        focus = [crops.get(p.name, CENTRE) for p in active]
        placed = self._place([good[p][1:] for p in active], resolution, bucket_step, max_aspect, batch_size, focus)
        placements = dict(zip(active, placed, strict=True))
        seen = [p for p in active if looks[p]]
        twins = {seen[k]: seen[g[1] if k == g[0] else g[0]].name for g in pictures.twins([looks[p] for p in seen]) for k in g}
        images = []
        for (path, text), found in zip(rows, facts_of, strict=True):
            id, name = self.image_id(path.name), path.name
            image = {"id": id, "name": name, "width": 0, "height": 0, "caption": text, "has_caption": bool(text)}
            image |= {"removed": path.parent == self.removed, "crop": None, "bucket": None, "upscale": 1.0}
            image |= {"linked": bool(facts["files"].get(name, {}).get("origin")), "badges": [], "tokens": caption_texts.tokens(text)}
            image |= {"thumb": f"/api/images/{id}/thumb", "full": f"/api/images/{id}/full"}
            image |= {"focus": list(crops.get(name, CENTRE)), "mask": None, "transparent": False}
            if mask := mask_of.get(name):
                image["mask"] = f"/api/images/{id}/mask?v={masks.stamp(mask)}"
            if isinstance(found, str):
                image["badges"] = [{"kind": "odd", "text": f"{name} {found}"}]
            else:
                digest, width, height = found
                image |= {"width": width, "height": height}
                for kind in ("thumb", "full"):  # the content in the address: a browser may keep the picture for ever
                    image[kind] += f"?v={digest[:16]}"
                image["transparent"] = bool(looks[path] and looks[path].transparent)
                spot = placements.get(path)
                if spot:
                    left, top, right, bottom = spot.box
                    crop = left / width, top / height, (right - left) / width, (bottom - top) / height
                    image |= {"crop": [round(c, 5) for c in crop], "bucket": [spot.width, spot.height], "upscale": round(spot.scale, 3)}
                if not image["removed"]:
                    image["badges"] = pictures.badges((width, height), looks[path], spot, twins.get(path), max_aspect, max_upscale)
            images.append(image)
        return images

    def looks(self) -> dict[str, pictures.Look]:
        """What was seen of each active image that decodes, by its id."""
        paths = [self.images / name for name in self._names(self.images)]
        good = [(p, found[0]) for p, found in zip(paths, self._inspect(paths), strict=True) if not isinstance(found, str)]
        seen = zip(good, pictures.look_all(good, self.home.cache), strict=True)
        return {self.image_id(path.name): look for (path, _), look in seen if look}

    @staticmethod
    def _place(
        sizes: list[tuple[int, int]],
        resolution: int,
        step: int | None,
        max_aspect: float,
        batch_size: int,
        focus: list[tuple[float, float]],
    ) -> list[Placement] | list[None]:
        try:
            step = step or (64 if resolution >= 256 else 8)
            return place(sizes, resolution=resolution, step=step, max_aspect=max_aspect, batch_size=batch_size, focus=focus)
        except ValueError:  # a step above the resolution: the form says so at its field
            return [None] * len(sizes)

    def tags(self) -> list[list[Any]]:
        """[part, number of captions with it] of the comma-separated parts of the active images' captions, the most frequent first.

        Whole sentences are left out.
        """
        counts: Counter[str] = Counter()
        spelled: dict[str, str] = {}
        for _, text in self._texts(self.images).values():
            own = {part.casefold(): part for part in parts_of(text) if len(part.split()) <= 4}
            counts.update(own.keys())
            for key, part in own.items():
                spelled.setdefault(key, part)
        return [[spelled[key], n] for key, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:300]]

    def caption_of(self, id: str) -> str:
        path = self.find(id)
        return self._texts(path.parent).get(path.name, (None, ""))[1]

    # ---- looking at the pictures

    def _inspect(self, paths: Sequence[Path]) -> list[tuple[str, int, int] | str]:
        """trainer.data.scan.inspect of each path, told by `looking`. Raises Problem (409) where `stop_looking` was called meanwhile."""
        work = self.root, _Looking(len(paths))
        _looking.append(work)
        try:
            return pictures.inspect_all(paths, self.home.cache, work[1].tick)
        finally:
            _looking.remove(work)

    # ---- captions

    def set_caption(self, id: str, text: str) -> None:
        """Write an image's caption, at once. Raises Problem for an unknown id or a text that is too long."""
        with self.lock:
            path = self.find(id)
            self._change_captions(f"Edit the caption of {path.name}", {path.name: caption_texts.clean(text)})

    def edit_captions(self, action: str, *, find: str = "", text: str = "", ids: Sequence[str] | None = None, trigger: str = "") -> int:
        """Change the captions of some active images, or of all (`ids` None); returns how many changed.

        trigger_first: `trigger` comes first in each caption that is not empty; a part that is the trigger moves there.
        replace: `find` (as it is written) becomes `text`. prepend, append: `text` before or behind, also in empty ones.
        remove_tag: the comma-separated parts that are `find`, in upper or lower case, go. clear: the caption goes.

        Raises Problem for an action that does not exist or lacks what it needs.
        """
        if action not in ACTIONS:
            raise Problem(f"action is {action!r}; it must be one of {', '.join(ACTIONS)}.")
        find, text = (find, text) if action == "replace" else (find.strip(), text.strip() if action not in ("prepend", "append") else text)
        needs = {"trigger_first": trigger.strip(), "replace": find, "remove_tag": find, "prepend": text.strip(), "append": text.strip()}
        if action in needs and not needs[action]:
            field = {"trigger_first": "trigger", "replace": "find", "remove_tag": "find"}.get(action, "text")
            what = "There is no trigger word yet; type one first." if field == "trigger" else f"{field} is empty; say which text."
            raise Problem(what, errors={field: what})
        edit: dict[str, Callable[[str], str]] = {
            "trigger_first": lambda old: trigger_first(old, " ".join(trigger.split())),
            "replace": lambda old: caption_texts.replaced(old, find, text),
            "prepend": lambda old: caption_texts.joined(text, old, behind=False),
            "append": lambda old: caption_texts.joined(old, text, behind=True),
            "remove_tag": lambda old: without(old, find),
            "clear": lambda old: "",
        }
        with self.lock:
            texts = self._texts(self.images)
            old = {name: texts.get(name, (None, ""))[1] for name in self._chosen(ids)}
            new = {name: caption_texts.clean(edit[action](was)) for name, was in old.items()}
            changed = {name: text for name, text in new.items() if text != old[name]}
            label = {
                "trigger_first": "Put the trigger first in {}",
                "replace": f"Replace “{_short(find)}” in {{}}",
                "prepend": "Put text before {}",
                "append": "Put text behind {}",
                "remove_tag": f"Remove the tag “{_short(find)}” from {{}}",
                "clear": "Clear {}",
            }[action]
            self._change_captions(label.replace("{}", _count(len(changed), "caption")), changed)
            return len(changed)

    def checkpoint(self, label: str) -> None:
        """Remember all captions of the active images, to be called before something else (a captioner) writes them: undo restores them."""
        with self.lock:
            texts = self._texts(self.images)
            self._remember(label, captions={n: texts[n][1] if n in texts else None for n in self._names(self.images)})

    def _change_captions(self, label: str, new: dict[str, str]) -> None:
        old = {**self._texts(self.removed), **self._texts(self.images)}
        new = {name: text for name, text in new.items() if text != (old[name][1] if name in old else "")}
        if new:
            self._remember(label, captions={name: old[name][1] if name in old else None for name in new})
            self._write_captions(new)

    def _write_captions(self, new: Mapping[str, str | None]) -> None:
        """Write images' captions, each into the file that the trainer reads for it alone; None removes that file."""
        texts = {folder: self._texts(folder) for folder in (self.images, self.removed)}
        users = {folder: Counter(file for file, _ in held.values()) for folder, held in texts.items()}
        stems = self._stems()
        for name, text in new.items():
            folder = self.images if (self.images / name).exists() else self.removed
            if not (folder / name).exists():
                continue
            file = texts[folder][name][0] if name in texts[folder] else None
            shared = users[folder][file] > 1
            if text is None and file and not shared:
                file.unlink()
            elif text is not None or shared:
                own = self._own_file(name, stems) if file is None or shared else file.name
                write_atomic(folder / own, f"{text}\n" if text else "", "a caption")
                users[folder][file] -= shared

    def _stems(self) -> Counter[str]:
        """How many images, active or removed, have each name without its ending."""
        return Counter(intake.key(Path(n).stem) for n in self._names(self.images) + self._names(self.removed))

    def _own_file(self, name: str, stems: Counter[str]) -> str:
        """`a.txt` for `a.png`; `a.png.txt` where there is another `a.*` too."""
        return f"{name}.txt" if stems[intake.key(Path(name).stem)] > 1 else f"{Path(name).stem}.txt"

    # ---- crops and masks

    def _crops(self) -> dict[str, tuple[float, float]]:
        return read_crops(self.images, [])  # what is wrong with the file, the plan says

    def _save_crops(self, points: dict[str, Sequence[float] | None]) -> None:
        """Change the points of some images in crops.json; None: its centre. A file that cannot be read is kept in backup/ first."""
        if not points:
            return
        path, wrong = self.images / CROPS, []
        kept = read_crops(self.images, wrong)
        if wrong:
            self.backup.mkdir(exist_ok=True)
            replace(path, self.backup / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}-{CROPS}")
        for name, point in points.items():
            kept.pop(name, None)
            if point is not None:
                kept[name] = tuple(point)
        write_atomic(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "the crops")

    def set_focus(self, points: dict[str, Sequence[float] | None]) -> int:
        """Crop images, by their ids, round a point in shares of their sides (None: the centre); returns how many that changes.

        Raises Problem for an unknown id or a point outside of the image.
        """
        for point in points.values():
            if point is not None and not all(0 <= v <= 1 for v in point):
                raise Problem(f"focus is {list(point)}; it must be two numbers from 0 to 1, shares of the image's width and height.")
        with self.lock:
            before = self._crops()
            named = {self.find(id).name: point and [round(v, 5) for v in point] for id, point in points.items()}
            changed = {n: p for n, p in named.items() if (tuple(p) if p else None) != before.get(n)}
            if changed:
                label = next(iter(changed)) if len(changed) == 1 else _count(len(changed), "image")
                self._remember(f"Move the crop of {label}", crops={n: before.get(n) for n in changed})
                self._save_crops(changed)
            return len(changed)

    def subjects(self, kept: dict[str, tuple[float, float]], faces: bool = False) -> dict[str, tuple[float, float]]:
        """Where the subject of images is, by their ids: the point for `set_focus` of each.

        `kept`: the shares that its crop has of its sides; `faces`: whether faces are looked for.
        """
        paths = {id: self.find(id) for id in kept}
        found = self._masks(self.images)
        with ThreadPoolExecutor(4) as pool:
            points = pool.map(lambda id: subject.point(paths[id], kept[id], found.get(paths[id].name), faces), kept)
            return dict(zip(kept, points, strict=True))

    def _masks(self, folder: Path) -> dict[str, Path]:
        return masks.there(folder, self._names(folder))

    def mask(self, id: str) -> bytes | None:
        """What an image's mask holds."""
        with self.lock:
            path = self.find(id)
            mask = self._masks(path.parent).get(path.name)
            return mask.read_bytes() if mask else None

    def set_mask(self, id: str, raw: bytes | None) -> None:
        """Give an image a mask (a picture of its shape, white counts), or none. Raises Problem for what is no such picture."""
        with self.lock:
            path = self.find(id)
            found = inspect(path)
            if isinstance(found, str):
                raise Problem(f"{path.name} {found}")
            new = masks.cleaned(raw, found[1:]) if raw else None
            old = self._masks(path.parent).get(path.name)
            if new != (old.read_bytes() if old else None):
                self._change_masks(f"{'Mask' if new else 'Take the mask from'} {path.name}", {path.name: new})

    def masks_of_alpha(self, ids: Sequence[str] | None) -> int:
        """Give active images (None: all that have no mask yet) their transparency as a mask; returns how many got one."""
        with self.lock:
            names = self._chosen(ids)
            if ids is None:
                names = [n for n in names if n not in self._masks(self.images)]
            new = {}
            for name in names:
                try:
                    new[name] = masks.of_alpha(self.images / name)
                except DAMAGED as error:
                    raise Problem(f"{name} cannot be read ({error}). Copy it again, or remove it.") from None
            new = {name: png for name, png in new.items() if png}
            self._change_masks(f"Mask {_count(len(new), 'image')} by transparency", new)
            return len(new)

    def masked(self) -> int:
        """Number of active images with a mask."""
        return len(self._masks(self.images))

    def set_mask_job(self, folder: Path | None, prompt: str = "") -> None:
        """Remember the folder of the masking that was asked for last; None forgets it."""
        with self.lock:
            self.save(self.read() | {"mask_job": {"folder": str(folder), "prompt": prompt} if folder else None})

    def checkpoint_masks(self, label: str) -> None:
        """Remember the masks of all active images before something else writes them, as `checkpoint` does captions."""
        with self.lock:
            self._remember(label, masks={n: self._keep_mask(n) for n in self._names(self.images)})

    def _change_masks(self, label: str, new: dict[str, bytes | None]) -> None:
        if new:
            self._remember(label, masks={name: self._keep_mask(name) for name in new})
            for name, png in new.items():
                self._write_mask(name, png)

    def _keep_mask(self, name: str) -> str | None:
        """Copy an image's mask to backup/masks; returns its name there, None where it has none."""
        folder = self.images if (self.images / name).exists() else self.removed
        mask = self._masks(folder).get(name)
        if mask is None:
            return None
        kept = self.backup / "masks" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}-{mask.name}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, mask.read_bytes(), "a backup of a mask")
        return kept.name

    def _write_mask(self, name: str, png: bytes | None) -> None:
        folder = self.images if (self.images / name).exists() else self.removed
        if not (folder / name).exists():
            return
        mask = self._masks(folder).get(name, folder / masks.name_of(name))
        if png is None:
            mask.unlink(missing_ok=True)
        else:
            write_atomic(mask, png, "a mask")

    # ---- images

    def remove(self, ids: Sequence[str]) -> None:
        """Take images out of the training; they and their captions stay in removed/."""
        self._set_active(ids, False)

    def restore(self, ids: Sequence[str]) -> None:
        """Bring removed images back."""
        self._set_active(ids, True)

    def _set_active(self, ids: Sequence[str], active: bool) -> None:
        with self.lock:
            there = {self.image_id(n): f / n for f in (self.removed, self.images) for n in self._names(f)}
            found = [there[id] if id in there else self.find(id) for id in dict.fromkeys(ids)]
            names = [p.name for p in found if (p.parent == self.images) != active]
            if not names:
                return
            label = names[0] if len(names) == 1 else _count(len(names), "image")
            self._remember(f"{'Restore' if active else 'Remove'} {label}", active=dict.fromkeys(names, not active))
            self._move(dict.fromkeys(names, active))

    def _move(self, moves: Mapping[str, bool]) -> None:
        """Make images active or not, with their captions and masks."""
        folders = (self.images, self.removed)
        texts, covers = {f: self._texts(f) for f in folders}, {f: self._masks(f) for f in folders}
        users, stems = {f: Counter(file for file, _ in texts[f].values()) for f in folders}, self._stems()
        for name, active in moves.items():
            source, target = (self.removed, self.images) if active else (self.images, self.removed)
            if not (source / name).exists():
                continue
            target.mkdir(exist_ok=True)
            file, text = texts[source].get(name, (None, ""))
            if file:
                write_atomic(target / self._own_file(name, stems), f"{text}\n" if text else "", "a caption")
            replace(source / name, target / name)
            if mask := covers[source].get(name):
                replace(mask, target / mask.name)
            if file:
                users[source][file] -= 1
                if not users[source][file]:
                    file.unlink(missing_ok=True)

    # ---- undo

    def undo_label(self) -> str:
        """What `undo` would take back, "" where there is nothing."""
        history = self._history()
        return history[-1]["label"] if history else ""

    def undo(self) -> str:
        """Take the last change back; returns its label, "" where there is nothing to take back."""
        with self.lock:
            history = self._history()
            if not history:
                return ""
            entry = history[-1]
            self._move(entry["active"])
            self._write_captions(entry["captions"])
            for name, kept in entry.get("masks", {}).items():
                self._keep_mask(name)
                self._write_mask(name, (self.backup / "masks" / kept).read_bytes() if kept else None)
            self._save_crops(entry.get("crops", {}))
            self._save_history(history[:-1])
            return entry["label"]

    def forget_changes(self) -> None:
        """Let the data set begin as it is now: nothing can be taken back."""
        with self.lock:
            self._save_history([])

    # ---- coming in

    def add_files(self, files: Iterable[tuple[str, BinaryIO | Path]]) -> tuple[int, list[str]]:
        """Take images, captions and zips; returns (number of images added, a sentence for each file that was not taken).

        Args:
            files: (name, which may carry folders, an open binary file or a path). They are copied.

        Raises Problem: 413 above 2 GB in all, or where files above 64 MB are all there is; 409 where the disk is too small.
        """
        files = list(files)
        if len(files) > intake.MEMBERS:
            raise Problem(f"These are {len(files)} files; at most {intake.MEMBERS} can be added at once. Add fewer.", 413)
        sizes = [intake.size_of(file) for _, file in files]
        if sum(sizes) > intake.TOTAL_LIMIT:
            raise Problem(f"These files have {sum(sizes) / 1e9:.1f} GB; at most 2 GB can be added at once. Add them in parts.", 413)
        if files and all(
            size > intake.FILE_LIMIT and not name.lower().endswith(".zip") for (name, _), size in zip(files, sizes, strict=True)
        ):
            raise Problem(" ".join(intake.too_large(name, size) for (name, _), size in zip(files, sizes, strict=True)), 413)
        with self._staging(sum(sizes)) as folder:
            stage = intake.Stage(folder, [])
            arrivals = []
            for (name, file), size in zip(files, sizes, strict=True):
                arrivals += intake.take(intake.to_label(name), file, size, stage)
            return self._add(arrivals, stage.problems), stage.problems

    def add_folder(self, text: str | Path, undoable: bool = True) -> tuple[int, list[str]]:
        """Use the images of a folder of this machine in place, with the folders in it; their captions are copied.

        Args:
            text: the path, also as pasted: in quotes, as file://, with spaces around.
            undoable: False where the data set was made for it, so that undoing it alone would make no sense.

        Returns as `add_files`. Raises Problem for a folder that cannot be used.
        """
        folder = intake.pasted(text) if isinstance(text, str) else text
        problems: list[str] = []
        files = list_files(folder, "The folder", problems, limit=20 * intake.MEMBERS)
        if files is None:
            raise Problem(" ".join(problems), errors={"path": " ".join(problems)})
        found = [f for f in files if f.suffix.lower() in intake.IMAGES and not masks.is_mask(f.name)]
        other = [f for f in files if f.suffix.lower() in OTHER_SUFFIXES - {*intake.RENAMED}]
        if len(found) > intake.MEMBERS or len(files) > 20 * intake.MEMBERS:
            said = f"{folder} holds more than {intake.MEMBERS if len(found) > intake.MEMBERS else 20 * intake.MEMBERS} files. Name the folder with the images alone."
            raise Problem(said, errors={"path": said})
        problems += [intake.wrong_kind(intake.to_label(f.relative_to(folder).as_posix())) for f in other]
        if not found:
            said = f"{folder} has no image ({' '.join(SUFFIXES)}) in it or in the folders inside it. {' '.join(problems[:5])}".strip()
            raise Problem(said, errors={"path": said})
        own = any(folder.resolve().is_relative_to(root) for root in (self.home.root, ROOT / "assets"))
        sidecars = sidecars_of(found, files)
        with self._staging(0) as stage:
            arrivals = [intake.Arrival(f.relative_to(folder).as_posix(), f, mask=True) for f in files if masks.is_mask(f.name)]
            arrivals += [intake.Arrival(CROPS, crops=read_crops(folder, problems))]
            for file in files:
                arrivals += intake.listed(file.relative_to(folder).as_posix(), file) or []
            for path in found:
                label = intake.to_label(path.relative_to(folder).as_posix())
                staged = stage / f"{uuid.uuid4().hex}{intake.image_suffix(path)}"
                try:
                    intake.link(path.resolve(), staged)
                    arrivals.append(intake.Arrival(label, staged, origin=None if own else path))
                    if sidecar := sidecars.get(path):
                        arrivals.append(intake.Arrival(f"{label}.txt", text=caption_texts.cut(decode(sidecar.read_bytes())[0])))
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    problems.append(f"{label} cannot be read ({error.strerror}); make it readable for you, then add the folder again.")
            return self._add(arrivals, problems, undoable), problems

    @contextmanager
    def _staging(self, size: int) -> Iterator[Path]:
        """A folder for files on their way in, on the same disk, of `size` bytes in all; gone afterwards."""
        stage = self.root / "incoming" / uuid.uuid4().hex
        free = shutil.disk_usage(self.root).free
        if free < size + intake.SPARE:
            raise intake.disk_full(free, size)
        stage.mkdir(parents=True)
        try:
            yield stage
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise intake.disk_full(shutil.disk_usage(self.root).free, size) from None
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _add(self, arrivals: list[intake.Arrival], problems: list[str], undoable: bool = True) -> int:
        staged = [a for a in arrivals if a.path and not a.mask]
        results = self._inspect([a.path for a in staged])
        good = []
        for arrival, result in zip(staged, results, strict=True):
            if isinstance(result, str):
                problems.append(f"{arrival.label} {result}")
            else:
                good.append(intake.Arrival(arrival.label, arrival.path, digest=result[0], origin=arrival.origin))
        with self.lock:
            facts = self.read()
            active, captions = {}, {}
            before = {name: text for name, (_, text) in {**self._texts(self.removed), **self._texts(self.images)}.items()}
            known = {n: pictures.inspect(f / n, self.home.cache) for f in (self.images, self.removed) for n in self._names(f)}
            fresh, taken = [], intake.Taken(known)
            for arrival in good:
                twin = next(
                    (n for n, found in known.items() if found[0] == arrival.digest and intake.same_name(facts, n, arrival.label)), None
                )
                if twin:
                    if (self.removed / twin).exists():
                        active[twin] = False
                        self._move({twin: True})
                    elif twin not in fresh:
                        problems.append(f"{arrival.label} is in the data set already, as {twin}.")
                    fresh.append(twin)
                    continue
                name = intake.free_name(PurePosixPath(arrival.label).name, taken)
                if intake.key(Path(name).stem) in taken.stems:
                    self._split_caption(name)
                taken.add(name)
                replace(arrival.path, self.images / name)
                facts["files"][name] = {"from": arrival.label, "origin": str(arrival.origin) if arrival.origin else None}
                known[name] = pictures.inspect(self.images / name, self.home.cache)
                active[name] = False
                fresh.append(name)
            waiting = [intake.Arrival(label, text=text) for label, text in facts["waiting"].items()]
            facts["waiting"] = {}
            texts = sorted([a for a in arrivals if not a.path and a.crops is None], key=lambda a: intake.rank(a.label))
            lost, matcher = [], intake.Matcher(facts, fresh, self._names(self.images))
            for arrival in [*waiting, *texts]:
                names, why = matcher.match(arrival.label)
                for name in names:
                    captions[name] = arrival.text
                if not names:
                    facts["waiting"][arrival.label] = arrival.text
                    if why:
                        problems.append(why)
                    elif arrival in texts:
                        lost.append(arrival.label)
            if lost:
                names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
                problems.append(f"No image has the name of {names}. The text is kept for an image of that name, added later.")
            self.save(facts)
            captions = {n: text for n, text in captions.items() if text != before.get(n, "")}
            covers = self._masks_among(arrivals, matcher, problems)
            points = self._points_among(arrivals, facts, fresh)
            if undoable and (active or captions or covers or points):
                counts = ((active, "image"), (captions, "caption"), (covers, "mask"), (points, "crop"))
                label = next(_count(len(found), what) for found, what in counts if found)
                cropped, kept = self._crops(), {n: self._keep_mask(n) for n in covers}
                self._remember(
                    f"Add {label}",
                    active=active,
                    captions={n: before.get(n) for n in captions if n in before or n not in active},
                    masks={n: was for n, was in kept.items() if was or n not in active},
                    crops={n: cropped.get(n) for n in points if n in cropped or n not in active},
                )
            self._write_captions(captions)
            for name, raw in covers.items():
                self._write_mask(name, raw)
            self._save_crops(points)
        return len(active)

    def _masks_among(self, arrivals: Iterable[intake.Arrival], matcher: intake.Matcher, problems: list[str]) -> dict[str, bytes]:
        """The masks that came in, by the images that they belong to; what belongs to none is told."""
        found, old = {}, self._masks(self.images)
        for arrival in (a for a in arrivals if a.mask and a.path):
            look = inspect(arrival.path)
            if isinstance(look, str):
                problems.append(f"{arrival.label} {look}")
                continue
            stem = arrival.label[: -len(intake.MASK)]
            names, why = matcher.match(f"{stem}.txt")
            if not names:
                problems.append(why or f"{arrival.label} is the mask of no image here. Add it together with its image, or after it.")
            for name in names:
                size, raw = inspect(self.images / name)[1:], arrival.path.read_bytes()
                if not masks.fits(look[1:], size):
                    shape = f"{look[1]} x {look[2]} pixels, of another shape than {name} ({size[0]} x {size[1]})"
                    problems.append(f"{arrival.label} has {shape}. Make it as wide and high as the image.")
                elif name not in old or old[name].read_bytes() != raw:
                    found[name] = raw
        return found

    def _points_among(self, arrivals: Iterable[intake.Arrival], facts: dict[str, Any], fresh: list[str]) -> dict[str, Sequence[float]]:
        """The points of crops.json files that came in, by the images of that folder that came with them."""
        came = {intake.key(facts["files"].get(name, {}).get("from", name)): name for name in fresh}
        found, old = {}, self._crops()
        for arrival in (a for a in arrivals if a.crops):
            for label, point in arrival.crops.items():
                name = came.get(intake.key(str(PurePosixPath(arrival.label).parent / label)))
                if name and old.get(name) != point:
                    found[name] = point
        return found

    def _split_caption(self, name: str) -> None:
        """Before an image `a.jpg` joins an `a.png` whose caption is `a.txt`: that one becomes `a.png.txt`, so that it is not shared."""
        stem = intake.key(Path(name).stem)
        for folder in (self.images, self.removed):
            for other, (file, _) in self._texts(folder).items():
                if intake.key(Path(other).stem) == stem and file.name != f"{other}.txt":
                    replace(file, folder / f"{other}.txt")

    # ---- going out

    def snapshot(self, target: Path) -> int:
        """Put the active images and their masks (links where possible), captions and crops (copies) into the folder `target`; returns how
        many images."""
        target.mkdir(parents=True, exist_ok=True)
        with self.lock:
            texts = self._texts(self.images)
            names = self._names(self.images)
            for name in names:
                intake.link(self.images / name, target / name)
            for file, text in texts.values():
                (target / file.name).write_text(f"{text}\n" if text else "", encoding="utf-8")
            for mask in self._masks(self.images).values():
                intake.link(mask, target / mask.name)
            if points := {name: point for name, point in self._crops().items() if name in names}:
                write_atomic(target / CROPS, json.dumps(points, indent=1, ensure_ascii=False) + "\n", "the crops")
        return len(names)

    def write_back(self) -> dict[str, Any]:
        """Write the captions of images that are used in place beside the originals; what stood there is copied to backup/ first.

        Returns {"written": captions written, "unchanged", "problems": sentences, "backup": folder or ""}.
        """
        with self.lock:
            facts, texts = self.read(), self._texts(self.images)
            linked = {n: Path(o) for n in self._names(self.images) if (o := facts["files"].get(n, {}).get("origin"))}
            if not linked:
                raise Problem("No image here is used in place: the captions of copies stand in the data set's own folder.", 409)
            into = self.backup / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            written, unchanged, problems = 0, 0, []
            for number, (name, origin) in enumerate(linked.items(), 1):
                new = texts.get(name, (None, ""))[1]
                try:
                    if not origin.is_file():
                        problems.append(f"{origin} is not there any more, so its caption was not written. Bring it back, then try again.")
                        continue
                    here = [f for f in origin.parent.iterdir() if not f.name.startswith(".")]
                    images = [f for f in here if f.suffix.lower() in intake.IMAGES]
                    own = sidecars_of(images, here)
                    file = own.get(origin)
                    if (decode(file.read_bytes())[0] if file else "") == new:
                        unchanged += 1
                        continue
                    alike = [f for f in images if intake.key(f.stem) == intake.key(origin.stem)]
                    if file:
                        into.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(file, into / f"{number:04}-{file.name}")
                        with (into / "index.txt").open("a", encoding="utf-8", errors="backslashreplace") as index:
                            index.write(f"{number:04}-{file.name}\t{file}\n")
                    if file is None or list(own.values()).count(file) > 1:
                        file = origin.with_name(f"{origin.name}.txt") if len(alike) > 1 else origin.with_suffix(".txt")
                    write_atomic(file, f"{new}\n" if new else "", "a caption")
                    written += 1
                except OSError as error:
                    problems.append(
                        f"The caption of {origin} could not be written ({error.strerror}). Make its folder writable, then try again."
                    )
        return {"written": written, "unchanged": unchanged, "problems": problems, "backup": str(into) if into.exists() else ""}

    # ---- captioning

    def set_caption_job(self, folder: Path | None, style: str = "") -> None:
        """Remember the folder of the captioning that was asked for last; None forgets it."""
        with self.lock:
            self.save(self.read() | {"caption_job": {"folder": str(folder), "style": style} if folder else None})

    def caption_job(self, runner: Any) -> dict[str, Any] | None:
        """The last captioning as the draft view's `caption_job`, None where there was none."""
        job = self.read()["caption_job"]
        if not job:
            return None
        folder = Path(job["folder"])
        return {"id": folder.name, "style": job["style"], **runner.progress(folder, "captioned", ("done", "total"))}

    def captioning(self, runner: Any) -> bool:
        """Whether captions are being written, or wait for it."""
        return (self.caption_job(runner) or {}).get("state") in BUSY

    def told_alike(self) -> frozenset[str]:
        """Names of the images that the last captioner could hardly tell apart."""
        job = self.read()["caption_job"]
        told = [e["alike"] for e in events.read(Path(job["folder"]) / "events.jsonl") if e["type"] == "variety"] if job else []
        return frozenset(told[-1] if told else ())

    def mask_job(self, runner: Any) -> dict[str, Any] | None:
        """The last `trainer mask`: {"prompt", "state", "done", "total", "found", "text"}; None where there was none."""
        job = self.read()["mask_job"]
        return job and {"prompt": job["prompt"], **runner.progress(Path(job["folder"]), "masked", ("done", "total", "found"))}

    def masking(self, runner: Any) -> bool:
        """Whether masks are being made, or wait for it."""
        return (self.mask_job(runner) or {}).get("state") in BUSY


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"
