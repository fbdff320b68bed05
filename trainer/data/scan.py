"""What the folders hold: every image, proven to decode, with its caption. Nothing is written.

Images of a folder and of the folders in it count, in the order of their names; hidden ones and masks
(`*-masklabel.png`) don't. The caption of `a.png` stands in `a.png.txt`, `a.txt` or `a.caption`, the first that exists, its mask in
`a-masklabel.png` (white counts, black does not). `crops.json` in the folder itself says which point of an image stays in sight where it is
cropped: {"a.png": [0.5, 0.2]}, from its left and its top in shares of its sides.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import PIL.Image

from trainer.config import DataConfig
from trainer.data.captions import with_trigger
from trainer.data.images import DAMAGED, FORMATS, PIXEL_LIMIT, SIDEWAYS, shrink, turn

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", *((".avif",) if "AVIF" in FORMATS else ()))
_OTHER = ".avif .gif .tif .tiff .heic .heif .jfif .jp2 .jxl .psd .tga .svg .dng .cr2 .cr3 .nef .arw"
OTHER_SUFFIXES = frozenset(_OTHER.split()) - {*SUFFIXES}  # images that are named in a warning, not read
LEAST_SIDE = 16
MASK = "-masklabel.png"
CROPS = "crops.json"
CENTRE = (0.5, 0.5)
MASK_ASPECT = 0.02  # by which a mask's aspect may differ from its image's


class DataError(ValueError):
    """The folders cannot be trained on; `problems` has a sentence for each thing wrong, over all folders."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Image:
    """One image that decodes, and its caption."""

    path: Path
    digest: str  # SHA-256 of the file, 64 hex digits
    width: int  # in pixels, upright (after EXIF rotation)
    height: int
    caption: str  # with the trigger in it; before dropout and shuffling; may be empty; several, one a line, where the folder has such
    source: int  # index of its folder in config.data
    has_caption: bool  # False if there is no text beside the image, so that trigger and class word stand in
    mask: Path | None = None
    mask_digest: str = ""  # as of the image
    focus: tuple[float, float] = CENTRE  # the point that stays in sight, in shares of width and height


@dataclass(frozen=True)
class Scan:
    images: tuple[Image, ...]
    warnings: tuple[str, ...]  # a sentence each


def scan(data: Sequence[DataConfig], *, kind: str | None = None, eyes: Eyes | None = None) -> Scan:
    """Every image of the folders in `data`, or of those whose kind is `kind`, folder by folder.

    Each image is decoded once, in threads, unless `eyes` know it. Raises DataError with all problems of all folders and files at once.
    """
    problems: list[str] = []
    warnings: list[str] = []
    found: list[tuple[int, Found]] = []
    for source, entry in enumerate(data):
        if kind in (None, entry.kind):
            found += [(source, each) for each in _read_folder(entry, f"data.{source + 1}.folder", problems, warnings)]
    images = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        inspected = pool.map(lambda path: inspect(path, eyes), [each.path for _, each in found])
        masks = pool.map(lambda mask: mask and inspect(mask), [each.mask for _, each in found])
        for (source, each), result, mask in zip(found, inspected, masks, strict=True):
            if isinstance(result, str):
                problems.append(f"{each.path} {result}")
            elif isinstance(mask, str):
                problems.append(f"{each.mask} {mask}")
            elif mask and abs(mask[1] * result[2] / (mask[2] * result[1]) - 1) > MASK_ASPECT:
                sides = f"{mask[1]} x {mask[2]} pixels, of another shape than {each.path.name} ({result[1]} x {result[2]})"
                problems.append(f"{each.mask} has {sides}. Make it as wide and high as the image, or remove it.")
            else:
                digest = mask[0] if mask else ""
                images.append(Image(each.path, *result, each.caption, source, each.has_caption, each.mask, digest, each.focus))
    if problems:
        raise DataError(problems)
    return Scan(tuple(images), tuple(warnings))


@dataclass(frozen=True)
class Found:
    """What a folder says of one image, which was not opened yet; the fields are those of Image."""

    path: Path
    caption: str
    has_caption: bool
    mask: Path | None
    focus: tuple[float, float]


def listing(folder: Path, field: str = "folder") -> list[tuple[Path, Path | None, str]]:
    """(image, its caption file or None, the text in it) of every image of a folder and of those inside it; no image is opened.

    Raises DataError for a folder that cannot be listed or has no image.
    """
    problems: list[str] = []
    files = list_files(folder, field, problems) or []
    paths = [f for f in files if f.suffix.lower() in SUFFIXES and not f.name.lower().endswith(MASK)]
    if not paths:
        raise DataError(problems or [f"{field} is {folder}, which has no image ({' '.join(SUFFIXES)}) in it or in the folders inside it."])
    sidecars = sidecars_of(paths, files)
    return [(p, s, decode(s.read_bytes())[0]) if (s := sidecars.get(p)) else (p, None, "") for p in paths]


def _read_folder(entry: DataConfig, field: str, problems: list[str], warnings: list[str]) -> list[Found]:
    """Each image of a folder; what is wrong or odd is added to the lists."""
    folder = entry.folder.expanduser()
    files = list_files(folder, field, problems)
    if files is None:
        return []
    where = f"{field} ({folder})"
    paths = [f for f in files if f.suffix.lower() in SUFFIXES and not f.name.lower().endswith(MASK)]
    other = [f for f in files if f.suffix.lower() in OTHER_SUFFIXES]
    convert = f"{len(other)} files are of a kind that is not read: {_names(other, folder)}. Convert them to .png or .jpg." if other else ""
    if paths and other:
        warnings.append(f"{where}: {convert}")
    if not paths:
        looked = f"{where} has no image ({' '.join(SUFFIXES)}) in it or in the folders inside it."
        problems.append(f"{looked} {convert or 'Put some there or name another folder.'}")

    sidecars = sidecars_of(paths, files)
    sharing: dict[Path, list[Path]] = defaultdict(list)
    for path, sidecar in sidecars.items():
        sharing[sidecar].append(path)
    texts: dict[Path, str] = {}
    not_utf8 = []
    for sidecar, images in sharing.items():
        if len(images) > 1:
            own = ", ".join(f"{image.name}.txt" for image in images)
            warnings.append(
                f"{where}: {_names(images, folder)} share the caption in {sidecar.name}. If that is wrong, give each its own: {own}."
            )
        try:
            texts[sidecar], utf8 = decode(sidecar.read_bytes(), lines=entry.several_captions)
        except OSError as error:
            problems.append(f"{sidecar} cannot be read ({error.strerror}); make the file readable for you.")
            continue
        if not utf8:
            not_utf8.append(sidecar)
    if not_utf8:
        warnings.append(
            f"{where}: captions that are not UTF-8 were read as Latin-1 (or UTF-16 where so marked): {_names(not_utf8, folder)}. "
            f"Save them as UTF-8 if letters are wrong."
        )

    trigger, class_word = " ".join(entry.trigger.split()), " ".join(entry.class_word.split())
    masks = {(f.parent, f.name.lower()): f for f in files if f.name.lower().endswith(MASK)}
    focus = read_crops(folder, problems)
    captioned = []
    for path in paths:
        text = texts.get(sidecars.get(path), "")
        caption = with_trigger(text, trigger if entry.kind != "prior" else "", class_word)
        mask = masks.get((path.parent, f"{path.stem}{MASK}".lower()))
        captioned.append(Found(path, caption, bool(text), mask, focus.get(path.relative_to(folder).as_posix(), CENTRE)))
    if empty := [found.path for found in captioned if not found.caption]:
        warnings.append(
            f"{where}: {len(empty)} of {len(paths)} images have an empty caption: {_names(empty, folder)}. "
            f"Write one into a .txt file of the same name, or set trigger or class_word of this folder."
        )
    return captioned


def read_crops(folder: Path, problems: list[str]) -> dict[str, tuple[float, float]]:
    """What `crops.json` of a folder says, by the images' paths relative to it; nothing where there is none."""
    path = folder / CROPS
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): (float(x), float(y)) for name, (x, y) in told.items()}
        if all(0 <= v <= 1 for point in found.values() for v in point):
            return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    problems.append(
        f'{path} must be like {{"image.png": [0.5, 0.2]}}, a point of each image in shares of its sides. Mend it, or delete it.'
    )
    return {}


def list_files(folder: Path, field: str, problems: list[str], limit: int | None = None) -> list[Path] | None:
    """Every file that isn't hidden, sorted; None if the folder itself cannot be listed. Linked folders are followed.

    `field` names the folder in the sentences added to `problems`. With `limit`, it looks no further once it has found more files.
    """

    def failed(error: OSError) -> None:
        if Path(error.filename) != folder:
            problems.append(
                f"{error.filename} cannot be opened ({error.strerror}); make the folder readable for you, or move it elsewhere."
            )
        elif isinstance(error, FileNotFoundError):
            problems.append(f"{field} is {folder}, which does not exist; give the path of a folder with images.")
        elif isinstance(error, NotADirectoryError):
            problems.append(f"{field} is {folder}, which is a file; give the folder that it is in.")
        else:
            problems.append(f"{field} is {folder}, which cannot be opened ({error.strerror}); make it readable for you, or give another.")

    if "\0" in str(folder):
        problems.append(f"{field} is {str(folder)!r}, which no folder can be called; give the path of a folder with images.")
        return None
    files: list[Path] = []
    visited: set[Path] = set()  # a link may lead back up
    for root, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        real = Path(root).resolve()
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            files += [Path(root, name) for name in names if not name.startswith(".")]
        visited.add(real)
        if limit is not None and len(files) > limit:
            break
    return sorted(files, key=lambda path: path.parts) if visited else None


def sidecars_of(paths: Sequence[Path], files: Sequence[Path]) -> dict[Path, Path]:
    """The caption file of each image that has one. Letters' case in endings and composed accents (macOS) don't matter."""

    def key(path: Path, name: str) -> tuple[Path, str]:
        return path.parent, unicodedata.normalize("NFC", name)

    texts = {key(f, f.stem + f.suffix.lower()): f for f in files if f.suffix.lower() in (".txt", ".caption")}
    found = {}
    for path in paths:
        for name in (f"{path.name}.txt", f"{path.stem}.txt", f"{path.stem}.caption"):
            if sidecar := texts.get(key(path, name)):
                found[path] = sidecar
                break
    return found


def decode(raw: bytes, lines: bool = False) -> tuple[str, bool]:
    """A caption's bytes as text on one line with single spaces (with `lines`, each line for itself), and whether they were UTF-8."""
    try:
        text, utf8 = raw.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text, utf8 = raw.decode("utf-16" if marked else "cp1252", errors="replace"), False
    if lines:
        return "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line), utf8
    return " ".join(text.split()), utf8


class Eyes(Protocol):
    """Who looks at each image while it is decoded to prove that it does, so that nobody has to decode it again."""

    least: int  # pixels that the shorter side of a JPEG must keep

    def knows(self, digest: str) -> tuple[int, int] | None:
        """Upright width and height of an image that was seen to decode before, by the SHA-256 of its file; it is not decoded again."""

    def see(self, digest: str, image: PIL.Image.Image, size: tuple[int, int]) -> None:
        """Look at a loaded image of upright `size`; it may have come smaller, and not upright."""


class Known:
    """Eyes that know images by a file, {SHA-256: [width, height]}, and look at no others. A file that is not there or damaged knows none."""

    least = 1

    def __init__(self, path: Path) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            self.sizes = {digest: (int(width), int(height)) for digest, (width, height) in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass

    def knows(self, digest: str) -> tuple[int, int] | None:
        return self.sizes.get(digest)

    def see(self, digest: str, image: PIL.Image.Image, size: tuple[int, int]) -> None:
        pass


def inspect(path: Path, eyes: Eyes | None = None) -> tuple[str, int, int] | str:
    """SHA-256, upright width and height of an image that decodes; else the rest of a sentence that begins with its path.

    A good file is not read again in this process while it stays the same by inode (path where there is none), size and time, also
    under another name: the app lays out a plan at each change of a setting.
    """
    try:
        now = path.stat()
    except (OSError, ValueError):
        return _read(path, eyes)
    seen = ((now.st_dev, now.st_ino) if now.st_ino else str(path), now.st_size, now.st_mtime_ns)
    found = _good.get(seen) or _read(path, eyes)
    if not isinstance(found, str):
        if len(_good) >= _GOOD_LIMIT:
            _good.clear()
        _good[seen] = found
    return found


def forget() -> None:
    """Read every file again at its next `inspect`."""
    _good.clear()


_GOOD_LIMIT = 20_000
_good: dict[tuple[str | tuple[int, int], int, int], tuple[str, int, int]] = {}


HUGE = 40_000_000  # pixels: such images are decoded one at a time, since each takes hundreds of MB
_huge = threading.Lock()


@contextlib.contextmanager
def alone_if(pixels: int) -> Iterator[None]:
    """One image at a time in there, where it is a huge one."""
    with _huge if pixels > HUGE else contextlib.nullcontext():
        yield


def _read(path: Path, eyes: Eyes | None) -> tuple[str, int, int] | str:
    try:
        if not path.is_file():
            return "is no file (a link to nothing?); remove it, or put the image there."
        with path.open("rb") as file:
            if not path.stat().st_size:
                return "is empty (0 bytes); copy it again or remove it."
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if eyes and (size := eyes.knows(digest)):
                return digest, *size
            file.seek(0)
            with PIL.Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > PIXEL_LIMIT:
                    return _too_large(f"{width} x {height} = {width * height:,}")
                if min(width, height) < LEAST_SIDE:
                    return f"is {width} x {height} pixels; each side must be at least {LEAST_SIDE}. Use a larger version or remove it."
                shrink(image, eyes.least if eyes else 1)  # a JPEG may decode to an eighth: every byte is read, in half the time
                with alone_if(width * height):
                    image.load()
                    if turn(image) in SIDEWAYS:
                        width, height = height, width
                    if eyes:
                        eyes.see(digest, image, (width, height))
            return digest, width, height
    except PIL.UnidentifiedImageError:
        return f"holds no image of a kind that is read ({', '.join(FORMATS)}), whatever its name says; save it as .png, or remove it."
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        return _too_large(f"{int(re.findall('[0-9]+', str(error))[0]):,}")  # Pillow names the count first
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            return f"cannot be read ({error.strerror}); check its permissions and the disk."
        return f"is damaged or cut off ({error}); copy it again, or remove it."


def _too_large(pixels: str) -> str:
    return f"has {pixels} pixels; at most {PIXEL_LIMIT:,} are allowed. Make it smaller; it is trained at far fewer."


def _names(paths: Sequence[Path], folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
