"""Where a base comes from: `demo`, a diffusers folder, a single `.safetensors` file, or a hub id.

Nothing is downloaded but a hub id that the user named, and its size and licence are said first.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.config.load import ROOT
from trainer.formats import FormatError
from trainer.formats.metadata import read_header
from trainer.formats.probe import identify, weight_files

DEMO = ROOT / "assets" / "demo" / "base"
UNET_PARTS = ("unet", "vae", "text_encoder")
# What a diffusers folder of each family holds: what the loaders open, and all that is fetched. SD3's T5 may be missing.
FAMILIES = {
    "sd1": UNET_PARTS,
    "sd2": UNET_PARTS,
    "sdxl": (*UNET_PARTS, "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2"),
}
T5 = "text_encoder_3"
CHOOSE = "Choose a base model of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5."


class SourceError(ValueError):
    """The named base cannot be used; the text says why and what to do."""


def resolve(source: str, say: Callable[[str], None]) -> Path:
    """The local folder or file of a base. Raises SourceError; `say` gets a sentence before a download begins."""
    text = source.strip().strip("\"'")
    if text == "demo":
        return DEMO
    path = Path(text).expanduser()
    if text and _exists(path):
        return path.resolve()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and path.suffix not in (".safetensors", ".ckpt") and not text.startswith("."):
        return _download(text, say)
    raise SourceError(
        f"model.source is {_short(source)}, and there is no such file or folder. Give a diffusers folder, a .safetensors checkpoint, "
        "a hub id like owner/name, or demo."
    )


def family_of(path: Path, wanted: str) -> str:
    """The family's name, read from the files. Raises SourceError for what is no base, not supported, or not complete."""
    try:
        found = identify(path)
        if found.kind not in FAMILIES:
            raise SourceError(f"model.source is {path}, which is {found.what}. {CHOOSE}")
        if wanted not in ("auto", found.kind):
            raise SourceError(f"model.family is {wanted!r}, but {path} is {found.kind}. Set model.family to auto.")
        if path.is_dir():
            _check_folder(path, found.kind)
    except OSError as error:
        raise SourceError(f"model.source is {path}, which cannot be read ({error.strerror or error}). Make it readable for you.") from None
    return found.kind


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for this system
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]} ...")


def _check_folder(path: Path, family: str) -> None:
    """Raise SourceError for the first file of a diffusers folder that is missing or damaged: the loaders' own words name no remedy."""
    again = "Download or copy the model again."
    parts = FAMILIES[family]
    for name in (*(f"{part}/config.json" for part in parts), "scheduler/scheduler_config.json"):
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise SourceError(f"model.source is {path}, where {name} is missing or cannot be read. {again}") from None
    for folder in (part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")):
        words = {p.name for p in (path / folder).glob("*")}
        if "tokenizer.json" not in words and not {"vocab.json", "merges.txt"} <= words:
            raise SourceError(f"model.source is {path}, where {folder}/ has neither tokenizer.json nor vocab.json and merges.txt. {again}")
    for part in (*parts, T5) if _has(path, T5) else parts:
        names = sorted(p.name for p in (path / part).iterdir())
        pieces = weight_files(names)
        if why := _incomplete(part, names, pieces):
            raise SourceError(f"model.source is {path}, where {why}")
        for name in pieces:
            try:
                read_header(path / part / name)
            except FormatError as error:
                raise SourceError(f"model.source is {path}, where {part}/{error}") from None


def _has(path: Path, part: str) -> bool:
    return (path / part).is_dir() and bool(weight_files(p.name for p in (path / part).iterdir()))


def _incomplete(part: str, names: Iterable[str], pieces: list[str]) -> str:
    """The rest of a sentence on a part of which the files `names` are there, `pieces` of them weights that are read; "" if complete."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    want = f"{part}/{stem}.safetensors"
    if pieces:
        numbered = re.search(r"-of-(\d+)", pieces[0])
        if not numbered or int(numbered[1]) == len(pieces):
            return ""
        return f"only {len(pieces)} of the {int(numbered[1])} pieces of {want} are there. Download or copy the model again."
    if other := [n for n in names if n.endswith(".safetensors")]:
        return f"{want} is missing; {other[0]} is not read. Choose a model that has it, or copy that file under this name."
    if pickles := [n for n in names if n.endswith((".bin", ".ckpt", ".pt"))]:
        return f"{want} is missing; {pickles[0]} is a pickle and is not opened. Choose a model with .safetensors files."
    return f"{want} is missing. Download or copy the model again."


def _download(repo: str, say: Callable[[str], None]) -> Path:
    return fetch(repo, say, field="model.source", anchor="model_index.json", wanted=_wanted, complete=_is_complete)


def fetch(
    repo: str,
    say: Callable[[str], None],
    *,
    field: str,
    anchor: str,
    wanted: Callable[[str, list[Any]], list[Any]],
    complete: Callable[[Path], bool],
) -> Path:
    """Fetch a model of the hub into its cache, with the hub's progress bars; files already there are not fetched again.

    Where the hub cannot be reached, the copy in the cache serves.

    Args:
        field: the setting that names the model, for the sentences; anchor: a file in the model's top folder.
        wanted: (repo, the hub's file entries) -> the entries to fetch; raises SourceError for a repository that cannot be loaded.
        complete: whether a folder holds all that the loaders open.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    nothing = f"{field} is {repo!r}: there is no such folder here"
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        files = wanted(repo, info.siblings or [])
        missing = [f for f in files if not _cached(repo, f.rfilename, info.sha)]
        if missing:
            licence = (info.card_data.get("license") if info.card_data else None) or "none stated"
            size = sum(f.size or 0 for f in missing)
            t5 = sum(f.size or 0 for f in missing if f.rfilename.startswith(f"{T5}/"))
            text = f"{_size(size)}, {_size(t5)} of it for the T5 text encoder" if t5 else _size(size)
            say(f"Downloading {repo} from huggingface.co: about {text}, licence: {licence}.")
            return Path(snapshot_download(repo, allow_patterns=[f.rfilename for f in files]))
        return _cached(repo, anchor, info.sha).parent
    except GatedRepoError:
        raise SourceError(f"{repo} asks you to accept its terms: open huggingface.co/{repo}, accept, then run `hf auth login`.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise SourceError(f"{nothing}, and no such model on the hub (or it is private).") from None
    except (HTTPError, OSError) as error:  # of httpx; not every one of its errors is an OSError
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise SourceError(
                f"The disk is full: {repo} could not be downloaded. Free some space, or set HF_HOME to another disk."
            ) from None
        offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(error).__name__})"
        if (index := _cached(repo, anchor, None)) and complete(index.parent):
            say(f"Using the copy of {repo} on this machine, since {why}.")
            return index.parent
        remedy = "Unset it" if offline else "Check the network"
        raise SourceError(f"{nothing}, and {why}. {remedy}, or give the path of a model on this machine.") from None


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"


def _wanted(repo: str, siblings: list[Any]) -> list[Any]:
    """The files of a hub repository that the loaders open. Raises SourceError for a repository that cannot be loaded.

    What it is, is read from two small files, which are fetched first.
    """
    from huggingface_hub import hf_hub_download

    names = [f.rfilename for f in siblings]
    if "model_index.json" not in names:
        raise SourceError(
            f"model.source is {repo!r}, a hub repository without model_index.json. Choose one in diffusers format, or download a "
            ".safetensors checkpoint and give its path."
        )
    for name in ("unet/config.json", "transformer/config.json", "model_index.json"):
        if name in names:
            index = Path(hf_hub_download(repo, name))
    try:
        found = identify(index.parent)
    except FormatError as error:
        raise SourceError(f"model.source is {repo!r}, a hub repository that cannot be read: {error}") from None
    if found.kind not in FAMILIES:
        raise SourceError(f"model.source is {repo!r}, which is {found.what}. {CHOOSE}")
    folders = {part: [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/")] for part in (*FAMILIES[found.kind], T5)}
    weights = {part: weight_files(there) for part, there in folders.items()}
    for part in FAMILIES[found.kind]:
        if why := _incomplete(part, folders[part], weights[part]):
            raise SourceError(f"model.source is {repo!r}, a hub repository where {why}")
    parts = [part for part, pieces in weights.items() if pieces]
    folders = [*parts, "scheduler", *(p.replace("text_encoder", "tokenizer") for p in parts if p.startswith("text_encoder"))]
    texts = re.compile(rf"model_index\.json|({'|'.join(folders)})/[^/]+\.(json|txt)|tokenizer_3/spiece\.model")
    chosen = {f"{part}/{piece}" for part in parts for piece in weights[part]}
    return [f for f in siblings if texts.fullmatch(f.rfilename) or f.rfilename in chosen]


def _cached(repo: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _is_complete(path: Path) -> bool:
    try:
        _check_folder(path, identify(path).kind)
    except (FormatError, SourceError, KeyError, OSError):
        return False
    return True
