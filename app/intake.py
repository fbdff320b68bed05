"""Files on their way into a data set: what is taken of an upload or a zip, and how it is called.

Names that come from outside are labels only: nothing is ever read or written where they say.
"""

from __future__ import annotations

import errno
import itertools
import re
import shutil
import stat
import unicodedata
import uuid
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from app import caption_lists, caption_texts
from app.errors import Problem
from trainer.data.scan import CROPS, MASK, OTHER_SUFFIXES, SUFFIXES, decode, read_crops

MB = 2**20
FILE_LIMIT, TOTAL_LIMIT = 64 * MB, 2048 * MB  # of one file, and of one upload, also when unpacked
MEMBERS = 5000  # files of one upload, zip or folder
RATIO = 200  # a zip's member may unpack to so many times its size; images and texts stay far below
SPARE = 200 * MB  # disk space that an upload must leave
RENAMED = {".jfif": ".jpg"}  # the same thing under a name that the trainer does not read
IMAGES, TEXTS = (*SUFFIXES, *RENAMED), (".txt", ".caption")
PASSED_OVER = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True)
class Arrival:
    """A file that came in: `label` is its name with folders, with slashes; `path` an image (or its mask), staged; else `text` a caption,
    or `crops` points of the images of its folder."""

    label: str
    path: Path | None = None
    text: str = ""
    digest: str = ""
    origin: Path | None = None
    mask: bool = False
    crops: dict[str, tuple[float, float]] | None = None


@dataclass
class Stage:
    """One upload on its way: where its files lie until they are taken, what is to say, and how much more may come."""

    folder: Path
    problems: list[str]
    room: int = TOTAL_LIMIT  # bytes, unpacked
    files: int = MEMBERS


def key(name: str) -> str:
    """What two names have in common that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def to_label(name: str) -> str:
    """A name with folders, as plain text: with slashes, without a root, `..` and what no text file can hold."""
    text = name.replace("\\", "/").encode("utf-8", "replace").decode()
    text = re.sub(r"%(22|0D|0A)", "_", text)  # how browsers write quotes and line ends of a name in a form
    parts = [re.sub(r"[\x00-\x1f\x7f]", "_", p).strip() for p in text.split("/")]
    return "/".join(p for p in parts if p not in ("", ".", ".."))


def hidden(label: str) -> bool:
    return not label or any(p.startswith(".") or p.lower() in PASSED_OVER for p in label.split("/"))


class Taken:
    """The names that images have already, in any spelling."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: set[str] = set()
        self.stems: set[str] = set()
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        self.names.add(key(name))
        self.stems.add(key(Path(name).stem))


def free_name(name: str, taken: Taken) -> str:
    """A file name that every system takes and that no other image has, in any spelling, nor as the name of its caption."""
    path = Path(re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", name))
    stem, suffix = path.stem.rstrip(". ") or "image", image_suffix(path)
    while len(stem.encode()) > 180:
        stem = stem[:-1]
    if re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", stem, re.IGNORECASE) or stem.startswith("."):
        stem = f"_{stem}"
    for k in itertools.count(1):
        new = f"{stem}{f' ({k})' if k > 1 else ''}{suffix}"
        # The caption of `a.png` may stand in `a.png.txt`, which is also where that of `a.png.jpg` would.
        if key(new) not in taken.names and key(new) not in taken.stems and key(Path(new).stem) not in taken.names:
            return new
    raise AssertionError


def image_suffix(path: Path) -> str:
    """The ending that an image gets here: its own in lower case, or one that the trainer reads."""
    return RENAMED.get(path.suffix.lower(), path.suffix.lower())


def same_name(facts: dict[str, Any], name: str, label: str) -> bool:
    came = PurePosixPath(facts["files"].get(name, {}).get("from", name)).name
    return key(PurePosixPath(label).name) in (key(name), key(came))


def rank(label: str) -> int:
    """Of several captions of one image the trainer takes `a.png.txt` before `a.txt` before `a.caption`; the last one written stays."""
    path = PurePosixPath(label)
    return 2 if PurePosixPath(path.stem).suffix.lower() in IMAGES else 1 if path.suffix.lower() == ".txt" else 0


class Matcher:
    """Which images a caption file belongs to: of those that came with it (`fresh`), else of all (`names`); in the same folder, else in any."""

    def __init__(self, facts: dict[str, Any], fresh: Sequence[str], names: Sequence[str]) -> None:
        self.came = {n: PurePosixPath(facts["files"].get(n, {}).get("from", n)) for n in (*fresh, *names)}
        self.pools = [self._index(pool, exactly) for pool, exactly in itertools.product((fresh, names), (True, False))]

    def _index(self, pool: Sequence[str], exactly: bool) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in dict.fromkeys(pool):
            came = self.came[name]
            for option in {key(o) for o in ((came.name, name) if exactly else (came.stem, Path(name).stem))}:
                found[option].append(name)
        return found

    def match(self, label: str) -> tuple[list[str], str]:
        """(names, "") or ([], a sentence) where several in other folders would fit."""
        path = PurePosixPath(label)
        for pool in self.pools:
            found = pool.get(key(path.stem), [])
            near = [n for n in found if key(str(self.came[n].parent)) == key(str(path.parent))]
            if near or len(found) == 1:
                return near or list(found), ""
            if found:
                said = f"{label} could belong to {', '.join(found[:5])}. Rename it to NAME.txt of one image's full name, as {found[0]}.txt."
                return [], said
        return [], ""


def pasted(text: str) -> Path:
    """The folder that a pasted path means. Raises Problem where none can be meant."""
    plain = text.strip().strip("\ufeff\u202a\u202c\u200e")  # marks that Windows' own property page puts before a path
    while len(plain) > 1 and plain[0] + plain[-1] in ('""', "''", "“”", "‘’", "``", "<>"):
        plain = plain[1:-1].strip()
    if plain.lower().startswith("file:"):
        plain = url2pathname(urlsplit(plain).path)
    if not plain or "\0" in plain:
        said = "The path is empty; give the path of a folder with images, like /home/me/cats or C:\\cats."
        raise Problem(said, errors={"path": said})
    path = Path(plain).expanduser()
    if not path.exists() and "\\ " in plain:  # a terminal's way to write spaces
        path = Path(re.sub(r"\\(.)", r"\1", plain)).expanduser()
    if not path.is_absolute():
        said = f"The folder is {plain!r}; give its whole path, like /home/me/cats or C:\\cats."
        raise Problem(said, errors={"path": said})
    return path


def size_of(file: BinaryIO | Path) -> int:
    if isinstance(file, Path):
        return file.stat().st_size
    size = file.seek(0, 2)
    file.seek(0)
    return size


def too_large(name: str, size: int) -> str:
    return (
        f"{to_label(name)} has {size / 1e6:.0f} MB; a file may have {FILE_LIMIT / 1e6:.0f} MB at most. Save it smaller, then add it again."
    )


def disk_full(free: int, size: int) -> Problem:
    return Problem(
        f"The disk of the data folder has {free / 1e6:.0f} MB free; {(size + SPARE) / 1e6:.0f} MB are needed. Free some space, then try again.",
        409,
    )


def wrong_kind(label: str) -> str:
    if Path(label).suffix.lower() in OTHER_SUFFIXES:
        return f"{label} is an image of a kind that is not read. Convert it to .png or .jpg."
    return f"{label} is no image ({' '.join(SUFFIXES)}), caption (.txt) or .zip, and was left out."


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none (another disk, exFAT, a file of somebody else)."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def take(label: str, file: BinaryIO | Path, size: int, stage: Stage, inside: bool = False) -> list[Arrival]:
    """What one file holds, staged; a sentence is added to `problems` where it is not taken."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return take(label, opened, size, stage)
    suffix = Path(label).suffix.lower()
    if hidden(label):
        return []
    if suffix == ".zip":
        if inside:
            stage.problems.append(f"{label} is a zip inside a zip, which is not opened. Unpack it, then add what is in it.")
            return []
        return _unzip(label, file, stage)
    name = label.rpartition("/")[2]
    if name == CROPS and size <= MB:
        inner = stage.folder / uuid.uuid4().hex
        inner.mkdir()
        (inner / CROPS).write_bytes(file.read())
        wrong: list[str] = []
        crops = read_crops(inner, wrong)
        if wrong:
            stage.problems.append(f'{label} was left out: it must be like {{"image.png": [0.5, 0.2]}}, points in shares of the sides.')
        return [Arrival(label, crops=crops)]
    if suffix in caption_lists.SUFFIXES:
        if name in caption_lists.OURS:
            return []
        if size <= caption_lists.MOST_BYTES and (found := listed(label, file)):
            return found
        stage.problems.append(f"{label} is no list of captions that is understood: each needs the image's file name and its text.")
        return []
    if suffix not in (*IMAGES, *TEXTS):
        stage.problems.append(wrong_kind(label))
        return []
    if size > (FILE_LIMIT if suffix in IMAGES else 4 * caption_texts.LIMIT):
        stage.problems.append(
            too_large(label, size) if suffix in IMAGES else f"{label} has {size} bytes, which is no caption; it was left out."
        )
        return []
    if suffix in TEXTS:
        return [Arrival(label, text=caption_texts.cut(decode(file.read())[0]))]
    staged = stage.folder / f"{uuid.uuid4().hex}{image_suffix(Path(label))}"
    with staged.open("wb") as out:
        shutil.copyfileobj(file, out, MB)
    return [Arrival(label, staged, mask=label.lower().endswith(MASK))]


def listed(label: str, file: BinaryIO | Path) -> list[Arrival] | None:
    """The captions of a list of them (metadata.jsonl, .csv, kohya's .json); None where it is none."""
    if Path(label).suffix.lower() not in caption_lists.SUFFIXES or (
        isinstance(file, Path) and file.stat().st_size > caption_lists.MOST_BYTES
    ):
        return None
    found = caption_lists.read(label, file.read_bytes() if isinstance(file, Path) else file.read())
    return found and [Arrival(f"{to_label(name)}.txt", text=caption_texts.cut(text)) for name, text in found.items()]


def _unzip(label: str, file: BinaryIO, stage: Stage) -> list[Arrival]:
    """The images and captions of a zip. Names in it are labels only: nothing is ever written where they say."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if not m.is_dir() and not hidden(to_label(m.filename))]
            total = sum(m.file_size for m in members)
            if len(members) > stage.files or total > stage.room:
                stage.problems.append(
                    f"{label} holds {len(members)} files of {total / 1e9:.1f} GB unpacked; at most {MEMBERS} files and 2 GB are taken at once. "
                    "Make smaller zips, or unpack it and add the folder."
                )
                return []
            stage.room, stage.files = stage.room - total, stage.files - len(members)
            if (free := shutil.disk_usage(stage.folder).free) < total + SPARE:
                raise disk_full(free, total)
            arrivals = []
            for member in members:
                arrivals += _member(archive, member, label, stage)
            return arrivals
    except Problem:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError, UnicodeDecodeError) as error:
        stage.problems.append(f"{label} is no zip that can be opened ({error}). Make it again, or add the images without it.")
        return []


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, label: str, stage: Stage) -> list[Arrival]:
    name = to_label(member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        stage.problems.append(f"{name} in {label} is a link, which is not followed.")
    elif member.flag_bits & 1:
        stage.problems.append(f"{name} in {label} is encrypted. Make the zip without a password.")
    elif member.file_size > MB and member.file_size > RATIO * max(1, member.compress_size):
        stage.problems.append(
            f"{name} in {label} unpacks to {member.file_size / max(1, member.compress_size):.0f} times its size, as no image does."
        )
    else:
        try:
            with archive.open(member) as content:  # gives at most the bytes that the zip states, which were counted above
                return take(name, content, member.file_size, stage, inside=True)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            stage.problems.append(f"{name} in {label} cannot be unpacked ({error}). Make the zip again.")
    return []
