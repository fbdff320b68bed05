"""What the VAE and the frozen text encoders made of images and captions, kept on disk: a second run need not encode them again.

An entry is a batch as it went through the encoder. Its file's name is the hash of all that it follows from: the images or tokens, the
encoder's weights and settings, and what computed it (device, library versions). So an entry is what encoding again would give, to the
last bit, whatever else is or is not kept, and none goes stale. A file is a checksum and then a safetensors file; one that is torn or
damaged counts as absent. Any number of processes may read and write at once, and the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from trainer import imports
from trainer.run_dir import replace

VERSION = 2  # of how entries are made and named
LIMIT = 5 * 2**30  # bytes that `prune` leaves
SPARE = 2**30  # bytes of the disk that are never taken: a run has more important things to write
ENVIRONMENT = "LORA_ATELIER_CACHE"
OFF = "off"
SUFFIX, HALF_WRITTEN = ".encoded", ".encoded-part"
HASHED_AT_ONCE = 2**20  # words of a weight
CHECKSUM = 16  # bytes

Tensors = dict[str, torch.Tensor]


def default_folder() -> Path | None:
    """Where entries are kept: LORA_ATELIER_CACHE, or the system's place for caches; None where that is "off".

    Raises ValueError where that names a home folder that is not known.
    """
    place = os.environ.get(ENVIRONMENT)
    if place:
        return None if place.lower() == OFF else _in_home(place)
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        place = "~/Library/Caches"
    else:
        place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _in_home(place) / "lora-atelier" / "encoded"


def _in_home(place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise ValueError(f"There is no home folder for {place}. Set {ENVIRONMENT} to a folder for encoded images, or to {OFF}.") from None


def entries(folder: Path | None, suffix: str = SUFFIX) -> list[tuple[float, int, Path]]:
    """(when it was used last, in epoch seconds, bytes, path) of each entry, the one that was not used for the longest time first."""
    found = []
    for path in folder.glob(f"*{suffix}") if folder else ():
        with contextlib.suppress(OSError):  # another process deletes too
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    return sorted(found)


def clear(folder: Path) -> None:
    """Delete all entries of `folder`, and nothing else that may lie there. Raises ValueError where that is not allowed."""
    for *_, path in entries(folder) + entries(folder, HALF_WRITTEN):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"{path} cannot be deleted: {error.strerror}.") from None


class Cache:
    """Tensors by key, on disk. It never fails a run: what cannot be read is absent, and the first failed write is the last one tried.

    Args:
        folder: None keeps nothing.
        warn: told a sentence, once, when the folder cannot be written to.
        progress: told (what, done, total) while something is encoded: ("images", 0, 12) first.
    """

    def __init__(
        self,
        folder: Path | None = None,
        warn: Callable[[str], object] = lambda text: None,
        progress: Callable[[str, int, int], object] = lambda what, done, total: None,
    ) -> None:
        self.folder, self.warn, self.progress = folder, warn, progress
        self.writing = folder is not None
        self.identities: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()

    @classmethod
    def of_the_user(cls, warn: Callable[[str], object], progress: Callable[[str, int, int], object]) -> Cache:
        """The one that all runs share."""
        try:
            return cls(default_folder(), warn, progress)
        except ValueError as error:
            warn(str(error))
            return cls(None, warn, progress)

    def recall(
        self,
        what: str,
        sizes: Sequence[int],
        told: Callable[[int], Any],
        module: torch.nn.Module,
        device: torch.device,
        make: Callable[[list[int]], Iterator[Tensors]],
    ) -> list[Tensors]:
        """What `module` makes of some batches on `device`: kept ones on the CPU, new ones where they were made.

        Args:
            what: "images" or "captions", for the progress; sizes: how many of them are in each batch.
            told: plain values that say what batch k is.
            make: yields the batches of these numbers, in order; not called when there are none.
        """
        keys = []
        if self.folder:
            if module not in self.identities:
                self.identities[module] = identity(module)
            by = [computed_by(device), self.identities[module]]
            keys = [key(what, *by, told(k)) for k in range(len(sizes))]
        found = [self.read(name) for name in keys] or [None] * len(sizes)
        missing = [k for k, tensors in enumerate(found) if tensors is None]
        done, total = 0, sum(sizes[k] for k in missing)
        if missing:
            self.progress(what, done, total)
            with ThreadPoolExecutor(1) as pool:  # writes while the next batch is made
                written = []
                for k, tensors in zip(missing, make(missing), strict=True):
                    found[k] = {name: t.detach().contiguous() for name, t in tensors.items()}
                    if keys:
                        written.append(pool.submit(self.write, keys[k], found[k]))
                    done += sizes[k]
                    self.progress(what, done, total)
            for text in filter(None, (w.result() for w in written)):
                self.warn(text)
        return found

    def read(self, key: str) -> Tensors | None:
        """The entry of `key`, on the CPU; None unless it is there and whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            if data[:CHECKSUM] != _checksum(data[CHECKSUM:]):
                return None
            tensors = load(data[CHECKSUM:])
        except (OSError, SafetensorError):
            return None
        with contextlib.suppress(OSError):  # a folder that can only be read
            os.utime(path)  # `prune` takes what was not used for the longest time
        return tensors

    def write(self, key: str, tensors: Tensors) -> str:
        """Keep `tensors`, of any device and type, exactly; not those that hold something else than numbers. Returns "", or why it failed."""
        if not self.writing or not all(bool(t.isfinite().all()) for t in tensors.values()):
            return ""
        path = self._path(key)
        temp = path.with_name(f"{key}-{uuid.uuid4().hex}{HALF_WRITTEN}")
        data = save({name: t.to("cpu") for name, t in tensors.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < SPARE + len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                with contextlib.suppress(FileNotFoundError):  # somebody empties the folder at this moment
                    temp.write_bytes(_checksum(data) + data)  # not flushed to the disk: what a power cut tears is encoded again
                    replace(temp, path)
            finally:
                temp.unlink(missing_ok=True)
        except OSError as error:
            self.writing = False
            return (
                f"Encoded images and captions cannot be kept in {self.folder} ({error.strerror}), so the next run encodes them again. "
                f"Free some space there, or set {ENVIRONMENT} to another folder, or to {OFF}."
            )
        return ""

    def prune(self) -> None:
        """Delete what was not used for the longest time, down to the limit or until enough of the disk is free, and what killed
        processes left half-written.
        """
        with contextlib.suppress(OSError):  # no folder, or a disk that is gone
            kept = entries(self.folder)
            total = sum(size for _, size, _ in kept)
            over = total - min(LIMIT, total + shutil.disk_usage(self.folder).free - SPARE) if kept else 0
            for _, size, path in kept:
                if over <= 0:
                    break
                path.unlink(missing_ok=True)
                over -= size
            for used, _, path in entries(self.folder, HALF_WRITTEN):
                if used < time.time() - 3600:
                    path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def key(*parts: Any) -> str:
    """The name of what follows from `parts` (plain values): 40 hex digits."""
    return hashlib.blake2b(json.dumps([VERSION, *parts]).encode(), digest_size=20).hexdigest()


def computed_by(device: torch.device) -> list[Any]:
    """What else decides the last bits of a result: the device, the libraries and torch's switches."""
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        where = [torch.cuda.get_device_name(device), torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark]
    else:
        where = [device.type, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    versions = [imports.version(name) for name in ("torch", "diffusers", "transformers", "pillow")]
    return [*where, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, *versions]


def identity(module: torch.nn.Module) -> str:
    """A hash of a model's class, configuration (of diffusers or transformers) and weights, 32 hex digits.

    Weights are hashed where they are, in chunks: the sum of each 32-bit word times an odd 64-bit number of its own, modulo 2**64
    (multilinear hashing, arXiv:1202.4961). It takes less than reading them once more; that two models meet by chance is out of the
    question.
    """
    config = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    ways = [getattr(module, name, False) for name in ("use_slicing", "use_tiling")]  # a VAE's
    told = [type(module).__name__, ways, {k: v for k, v in config.items() if not k.startswith("_")}]  # _name_or_path and the like
    drawn = torch.randint(-(2**63), 2**63 - 1, (HASHED_AT_ONCE,), generator=torch.Generator().manual_seed(0)) | 1
    numbers: dict[torch.device, torch.Tensor] = {}
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in sorted(module.state_dict().items()):
        told.append([name, str(tensor.dtype), list(tensor.shape), list(tensor.stride())])
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        if raw.numel() % 4 or raw.storage_offset() % 4:
            raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 4)).clone()
        if tensor.device not in numbers:
            numbers[tensor.device] = drawn.to(tensor.device)
        pieces = raw.view(torch.int32).split(HASHED_AT_ONCE)
        sums.setdefault(tensor.device, []).extend((piece * numbers[tensor.device][: len(piece)]).sum() for piece in pieces)
    found = [torch.stack(s).tolist() for s in sums.values()]
    return hashlib.blake2b(json.dumps([told, found], sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM).digest()
