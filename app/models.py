"""Base models on this machine: found in the usual places of other tools, told by their headers alone, used in place.

A background thread looks through the places once after start and on request; what was read of a file is kept in the data
folder's cache by path, date and size. Nothing is opened but headers and small JSON files, and nothing is asked of the
network but a hub id that the user typed.
"""

from __future__ import annotations

import json
import os
import re
import string
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import forms, settings
from app.errors import Problem
from app.paths import ROOT, Home
from trainer.formats.metadata import read_header
from trainer.formats.probe import (
    PIPELINES,
    TITLES,
    FormatError,
    identify,
    native_resolution,
    prediction,
    text_encoders,
    weight_files,
)
from trainer.formats.probe import (
    RESOLUTIONS as NATIVE,
)
from trainer.run_dir import write_atomic

DEMO = ROOT / "assets" / "demo" / "base"
SECONDS = 30.0  # a scan ends after this, with what it found
DEPTH = 4  # folders below a models folder that are looked into
ENTRIES = 20_000  # files and folders looked at in one place, at most
MODEL_FOLDERS = ("models/Stable-diffusion", "models/Stable-Diffusion", "Models/Stable-Diffusion", "models/checkpoints", "models/Diffusers",
                 "models/diffusers", "Models/StableDiffusion", "Data/Models/StableDiffusion")  # fmt: skip
BELOW = ("", "webui", "ComfyUI", "app", "resources/ComfyUI")  # where a packaged install keeps the program itself
PARENTS = ("", "AI", "ai", "sd", "SD", "apps", "git", "repos", "src", "code", "projects", "Documents", "Desktop", "Downloads", "Programs",
           "pinokio/api", "stable-diffusion", "StabilityMatrix/Data/Packages", "StabilityMatrix/Packages")  # fmt: skip
DISTILLED = re.compile(r"(?<![a-z])(lightning|turbo|lcm|tcd|pcm|hyper(?![\s_.-]*real)(-?sd)?|dmd2?|schnell)(?![a-z])", re.I)
HUB_TEXTS = re.compile(r"model_index\.json|[\w-]+/[^/]+\.(json|txt)|tokenizer_3/spiece\.model")
HUB_PARTS = re.compile(r"(unet|transformer|vae|text_encoder(?:_[23])?)/([^/]+)")
CHOOSE = "Choose a base model of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5."
SIDES = {("sd2", "epsilon"): 512}  # what a single file was made for, where its family alone does not say it
# Models of one family that have words of their own for quality: a preset is laid on for them. By the family, told by the name.
VARIANTS = {
    "sdxl": {
        "pony": re.compile(r"(?<![a-z])(pony|autismmix|pdxl)", re.I),
        "anime": re.compile(r"illustrious|noob-?ai|(?<![a-z])(noob|animagine|wai(?![a-z])|wai-?(nsfw|ill)|ilxl|nai-?xl)", re.I),
    }
}
PREDICTIONS = {"epsilon": "predicts noise (epsilon)", "v_prediction": "v prediction", "flow": "flow matching"}
T5 = "text_encoder_3"
DENOISERS = ("unet", "transformer")
BY_FLOW = ("sd3",)  # families that are trained by flow matching


def unquote(text: str) -> str:
    """A pasted path without the quotes and spaces around it."""
    return text.strip().strip("\"'").strip()


def absolute(source: str) -> str:
    """A path of this machine as a whole path; anything else as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source not in ("", "demo") and _exists(path) else source


# ---- one model -----------------------------------------------------------------------------------------------------------


def distilled(name: str) -> str:
    """A sentence for a model whose name says that it is distilled, or ""."""
    spaced = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name))
    found = DISTILLED.search(spaced)
    return (
        f"a distilled model ({found.group(1).capitalize() if found.group(1).islower() else found.group(1)}): train on its undistilled parent"
        if found
        else ""
    )


def describe(path: Path, where: str, name: str = "") -> dict[str, Any]:
    """What stands at a path, as MODEL of assets/help/api.md. Never raises for what is no model: `what` then says why."""
    name = name or (path.stem if path.is_file() else path.name)
    variant, more = None, dict(BLANK)
    try:
        if path.suffix.lower() == ".ckpt":
            identify(path)  # raises the sentence on pickles
        found = identify(path)
        kind, what, family, variant = found.kind, found.what, found.family, found.variant
        if kind in forms.families():
            more = _details(path, kind, name)
    except FormatError as error:
        kind, what, family = ("pickle" if "pickle" in str(error) else "damaged"), str(error), None
    except OSError as error:
        kind, what, family = "damaged", f"{path} cannot be read ({error.strerror})", None
    toy = path == DEMO
    return {
        "source": str(path),
        "name": "Built-in example" if toy else name,
        "where": where,
        "kind": kind,
        "family": family,
        "variant": variant,
        "title": TITLES.get(variant or kind, TITLES.get(family or "", "")),
        "what": what,
        "size_gb": round(_size(path) / 1e9, 2),
        "trainable": kind in forms.families(),
        "warning": "a toy for trying things out: it knows drawn shapes only"
        if toy
        else distilled(path.name if path.is_dir() else path.stem),
        "toy": toy,
        **more,
    }


BLANK: dict[str, Any] = {"prediction": None, "zero_snr": None, "words": "", "text_encoders": None, "tokenizer_3": False, "facts": []}


def _details(path: Path, family: str, name: str) -> dict[str, Any]:
    """What a base's own files say of it beyond its family; `facts` are the same in words for the page."""
    found = dict(BLANK)
    if family in BY_FLOW:
        found |= {"prediction": "flow", "text_encoders": list(text_encoders(path)), "tokenizer_3": has_t5_words(path / "tokenizer_3")}
    else:
        found["prediction"], found["zero_snr"] = prediction(path)
    titles = []
    if path.is_file():
        titles = [v for k, v in read_header(path)[0].items() if k.endswith((".title", "_model_name", ".merged_from"))]
    found["words"] = words_of(family, " ".join([name, *titles]))
    return found | {"facts": _facts(found)}


def words_of(family: str | None, name: str) -> str:
    """Which of VARIANTS a model is by its name or title, or ""."""
    return next((variant for variant, sign in VARIANTS.get(family or "", {}).items() if sign.search(name)), "")


def has_t5_words(folder: Path) -> bool:
    """Whether a folder has a tokenizer for T5, of which none comes with this program."""
    return any((folder / n).is_file() for n in ("tokenizer.json", "spiece.model"))


def _facts(found: dict[str, Any]) -> list[str]:
    facts = [PREDICTIONS.get(found["prediction"], "whether it predicts noise or v is measured when training starts")]
    if found["zero_snr"]:
        facts.append("ends in pure noise (zero terminal SNR)")
    held = found["text_encoders"]
    if held is not None and not {"text_encoder", "text_encoder_2"} <= set(held):
        facts.append("without its text encoders")
    elif held is not None:
        facts.append("with T5" if T5 in held else "without T5")
    return facts


def uses_t5(model: dict[str, Any], folder: Path | None, t5: str) -> bool:
    """Whether SD3's T5 will be loaded: it must be wanted and there, in the base or in `folder`, and so must its tokenizer."""
    if model["text_encoders"] is None or t5 == "skip":
        return False
    if folder is None:
        return T5 in model["text_encoders"] and model["tokenizer_3"]
    there = T5 in model["text_encoders"] or any("t5xxl" in n for n in _names(folder)) or bool(weight_files(_names(folder / T5)))
    return there and (model["tokenizer_3"] or has_t5_words(folder) or has_t5_words(folder / "tokenizer_3"))


def _names(folder: Path) -> list[str]:
    try:
        return [f.name.lower() for f in folder.iterdir() if f.suffix.lower() == ".safetensors"]
    except OSError:
        return []


def resolution(model: dict[str, Any] | None, wanted: str = "auto") -> int:
    """Side in pixels of the square that a model was made for, 512 where none is chosen; `wanted` is model.prediction.

    Raises FormatError for a folder that cannot be read.
    """
    if model is None:
        return 512
    said = model["prediction"] if wanted == "auto" else wanted
    if model["kind"] == "hub":
        return NATIVE.get(model["family"] or "", 512)
    source = DEMO if model["source"] == "demo" else Path(model["source"]).expanduser()
    return native_resolution(source, SIDES.get((model["kind"], said)))


def _size(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    try:
        return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*/*.safetensors"))
    except OSError:
        return 0


def check(home: Home, source: str, example: bool = False) -> dict[str, Any]:
    """What a path or hub id is. Asks the hub only for an id that no folder here has. Raises Problem with a sentence."""
    text = unquote(source)
    model, error = glance(home, text, example)
    if error:
        raise Problem(error, errors={"model": error})
    if model is None:
        raise Problem("No model is named. Give the path of a .safetensors file or a diffusers folder, or a hub id like owner/name.")
    if model["kind"] == "hub":
        model = _ask_hub(home, text)
    return model


def glance(home: Home, source: str, example: bool) -> tuple[dict[str, Any] | None, str]:
    """(MODEL or None, a sentence where it cannot be used), from this machine alone."""
    text = unquote(source)
    if not text:
        return None, ""
    if text == "demo":
        if not example:
            return None, "demo is the toy of the built-in example. Choose the model that you make pictures with."
        return describe(DEMO, "built in") | {"source": "demo"}, ""
    path = Path(text).expanduser()
    if _exists(path):
        path = path.resolve()
        model = scanner(home).known(path) or scanner(home).read(path, "")
        return (model, "") if model["trainable"] else (model, _refusal(model))
    if is_hub_id(text):
        if cached := _in_hub_cache(text):
            return scanner(home).read(cached, "hub cache", text), ""
        return _hub_model(text, None) | _hub_memory(home).get(text, {}), ""
    return (
        None,
        f"There is no file or folder {text!r}. Give the path of a .safetensors file or a diffusers folder, or a hub id like owner/name.",
    )


def _refusal(model: dict[str, Any]) -> str:
    what = model["what"]
    if model["kind"] in ("pickle", "damaged"):
        return what
    return f"{model['name']} is {what}. {CHOOSE}"


def is_hub_id(text: str) -> bool:
    return bool(re.fullmatch(r"[\w][\w.-]*/[\w.-]+", text)) and Path(text).suffix.lower() not in (".safetensors", ".ckpt", ".pt", ".bin")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


# ---- the hub -------------------------------------------------------------------------------------------------------------


def _hub_model(repo: str, info: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "source": repo, "name": repo, "where": "hub", "kind": "hub", "family": None, "variant": None, "title": "",
        "what": "a model of the hub, not downloaded yet", "size_gb": 0.0, "trainable": True, "warning": distilled(repo), "toy": False,
        "download_gb": None, "license": "", **BLANK,
    }  # fmt: skip
    if info is not None:
        size = sum(f.size or 0 for f in _hub_files(info.siblings or [])) / 1e9
        licence = info.card_data.get("license") if info.card_data else None
        model |= {"download_gb": round(size, 2), "size_gb": round(size, 2), "license": str(licence or "none stated")}
        pipeline = str(((info.config or {}).get("diffusers") or {}).get("_class_name", ""))
        family = next((f for start, f in PIPELINES.items() if pipeline.startswith(start)), None)
        if family == "sd1" and re.search(r"stable-diffusion-2|sd-?2[.-]", repo, re.I):
            family = "sd2"  # both have the same pipeline class
        model |= {"family": family, "title": TITLES.get(family or "", ""), "words": words_of(family, repo)}
        if family:
            model |= {"trainable": family in forms.families(), "what": f"a model of {TITLES[family]} on the hub, not downloaded yet"}
    return model


def _hub_files(siblings: list[Any]) -> list[Any]:
    """The files of a hub repository that will be fetched: small texts, and of each part's weights what is read."""
    parts: dict[str, list[str]] = {}
    for f in siblings:
        if part := HUB_PARTS.fullmatch(f.rfilename):
            parts.setdefault(part[1], []).append(part[2])
    weights = {f"{part}/{name}" for part, names in parts.items() for name in weight_files(names)}
    return [f for f in siblings if f.rfilename in weights or HUB_TEXTS.fullmatch(f.rfilename)]


def _ask_hub(home: Home, repo: str) -> dict[str, Any]:
    """Size and licence of a hub model. Raises Problem with a sentence where it cannot be used or the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=15)
    except GatedRepoError:
        raise Problem(
            f"{repo} asks you to accept its terms: open huggingface.co/{repo}, accept, then put your token into Settings."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise Problem(
            f"There is no folder {repo} here and no such model on the hub (or it is private: put your token into Settings)."
        ) from None
    except OfflineModeIsEnabled:
        raise Problem(f"There is no folder {repo} here, and HF_HUB_OFFLINE is set. Unset it, or give the path of a model.") from None
    except (HTTPError, OSError) as error:
        raise Problem(
            f"There is no folder {repo} here, and the hub cannot be reached ({type(error).__name__}). "
            "Check the network, or give the path of a model on this machine."
        ) from None
    if not any(f.rfilename == "model_index.json" for f in info.siblings or []):
        raise Problem(
            f"{repo} is a hub repository without model_index.json. Choose one in diffusers format, or download a .safetensors checkpoint."
        )
    model = _hub_model(repo, info)
    if not model["trainable"]:
        raise Problem(f"{repo} is {model['what']}. {CHOOSE}")
    memory = _hub_memory(home) | {repo: model}
    write_atomic(home.cache / "hub.json", json.dumps(memory), "what the hub said")
    return model


def _hub_memory(home: Home) -> dict[str, Any]:
    try:
        return dict(json.loads((home.cache / "hub.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _snapshots(repo: Path) -> Iterator[Path]:
    """Complete diffusers snapshots in a repository's folder of the hub cache, newest first."""
    try:
        found = sorted((repo / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    except OSError:
        return
    yield from (
        p for p in found if (p / "model_index.json").is_file() and any(f.parent.name in DENOISERS for f in p.glob("*/*.safetensors"))
    )


def _in_hub_cache(repo: str) -> Path | None:
    return next(_snapshots(hub_cache() / f"models--{repo.replace('/', '--')}"), None)


# ---- places --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where to look: the user's folder, further roots (drives, mounts), and the project's own folder."""

    user: Path
    roots: tuple[Path, ...]
    project: Path
    hub: Path

    @classmethod
    def here(cls) -> Machine:
        if sys.platform == "win32":
            roots = [Path(f"{d}:/") for d in string.ascii_uppercase if Path(f"{d}:/").exists()]
        else:
            roots = [Path("/opt"), Path("/workspace"), *_folders(Path("/mnt")), *_folders(Path("/media")), *_folders(Path("/Volumes"))]
        return cls(Path.home(), tuple(roots), ROOT, hub_cache())


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir())
    except OSError:
        return []


def _tool(install: Path) -> str:
    """The program that an install folder holds, by its files and then by its name."""
    name = (
        install.name.lower() if install.name.lower() not in ("webui", "app", "comfyui") else f"{install.parent.name} {install.name}".lower()
    )
    for sign, tool in (("modules_forge", "Forge"), ("sdnext.py", "SD.Next"), ("comfy", "ComfyUI"), ("webui.py", "A1111")):
        if (install / sign).exists():
            return tool
    words = {"comfy": "ComfyUI", "forge": "Forge", "sdnext": "SD.Next", "sd.next": "SD.Next", "automatic": "SD.Next", "fooocus": "Fooocus",
             "swarm": "SwarmUI", "invoke": "InvokeAI", "stabilitymatrix": "StabilityMatrix", "kohya": "kohya_ss", "webui": "A1111"}  # fmt: skip
    return next((tool for word, tool in words.items() if word in name), install.name)


def places(machine: Machine, own: Iterable[str] = ()) -> Iterator[tuple[Path, str]]:
    """(folder, name of the tool it belongs to) of every place with models that exists, each once. `own`: the user's folders."""
    seen: set[Path] = set()

    def fresh(path: Path, where: str) -> Iterator[tuple[Path, str]]:
        try:
            real = path.expanduser().resolve()
            if real not in seen and real.is_dir():
                seen.add(real)
                yield real, where
        except (OSError, RuntimeError):
            return

    for text in own:
        yield from fresh(Path(unquote(text)), "your folder")
    if machine.hub.is_dir():
        seen.add(machine.hub.resolve())
        yield machine.hub.resolve(), "hub cache"
    data = [Path(os.environ[k]) for k in ("APPDATA", "LOCALAPPDATA", "XDG_DATA_HOME") if os.environ.get(k)]
    config = [machine.user / p for p in (".config", "Library/Application Support", "AppData/Roaming", ".local/share")]
    for base in dict.fromkeys([machine.user, *data, *config]):
        yield from fresh(base / "StabilityMatrix" / "Models" / "StableDiffusion", "StabilityMatrix")
        yield from fresh(base / "StabilityMatrix" / "Data" / "Models" / "StableDiffusion", "StabilityMatrix")
        for desktop in ("ComfyUI/extra_models_config.yaml", "ComfyUI/extra_model_paths.yaml"):
            for path in _comfy_paths(base / desktop):
                yield from fresh(path, "ComfyUI")
    for name in ("invokeai", "InvokeAI"):
        yield from fresh(machine.user / name / "models", "InvokeAI")
    parents = [machine.project.parent, *(root / p for root in (machine.user, *machine.roots) for p in PARENTS)]
    for parent in dict.fromkeys(parents):
        for install in _folders(parent):
            for below in BELOW:
                program = install / below if below else install
                for models in MODEL_FOLDERS:
                    yield from fresh(program / models, _tool(program))
                for path in _comfy_paths(program / "extra_model_paths.yaml"):
                    yield from fresh(path, "ComfyUI")
    yield from fresh(machine.user / "Downloads", "Downloads")


def _comfy_paths(file: Path) -> list[Path]:
    """The folders of checkpoints and diffusers models that ComfyUI's list of extra folders names."""
    import yaml

    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = []
    for entry in raw.values() if isinstance(raw, dict) else ():
        if not isinstance(entry, dict):
            continue
        base = file.parent / os.path.expandvars(str(entry.get("base_path") or ""))
        for key in ("checkpoints", "diffusers"):
            lines = str(entry.get(key) or "").splitlines()
            found += [base.expanduser() / line.strip() for line in lines if line.strip()]
    return found


def walk(folder: Path, depth: int, until: float) -> Iterator[Path]:
    """.safetensors and .ckpt files and diffusers folders below a folder; each folder once, also through links."""
    stack, seen, left = [(folder, depth)], set(), ENTRIES
    while stack and time.monotonic() < until:
        here, level = stack.pop()
        try:
            real = here.resolve()
            if real in seen:
                continue
            seen.add(real)
            entries = sorted(os.scandir(here), key=lambda e: e.name.lower())
        except OSError:
            continue
        if any(e.name == "model_index.json" for e in entries):
            yield here
            continue
        for entry in entries:
            left -= 1
            if left < 0:
                return
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    if level > 0:
                        stack.append((here / entry.name, level - 1))
                elif entry.name.lower().endswith((".safetensors", ".ckpt")):
                    yield here / entry.name
            except OSError:
                continue


# ---- the list ------------------------------------------------------------------------------------------------------------


@dataclass
class Scanner:
    """The models found so far, by path; filled by a thread."""

    home: Home
    machine: Machine
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None
    looked: tuple[str, ...] | None = None  # the user's own folders of the last scan
    cache: dict[str, list[Any]] | None = None

    def scan(self, again: bool = False) -> None:
        """Begin to look, unless a scan is going on or was made with the same folders."""
        own = settings.load(self.home).model_folders
        with self.lock:
            if (self.thread and self.thread.is_alive()) or (self.looked == own and not again):
                return
            self.looked = own
            self.thread = threading.Thread(target=self._scan, args=(own,), name="models", daemon=True)
            self.thread.start()

    @property
    def scanning(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _scan(self, own: tuple[str, ...]) -> None:
        until = time.monotonic() + SECONDS
        fresh: dict[str, dict[str, Any]] = {}
        folders: list[dict[str, Any]] = []
        for place, where in places(self.machine, own):
            count = 0
            for path, name in self._models(place, where, until):
                model = self.read(path, where, name)
                if str(path) not in fresh:
                    fresh[str(path)] = model
                    count += model["trainable"]
                with self.lock:
                    self.found.setdefault(str(path), model)
            if count or where == "your folder":
                folders.append({"path": str(place), "where": where, "count": count})
            with self.lock:
                self.folders = list(folders)
        with self.lock:
            self.found = fresh
        self._save()

    def _models(self, place: Path, where: str, until: float) -> Iterator[tuple[Path, str]]:
        if where == "hub cache":
            for repo in _folders(place):
                if repo.name.startswith("models--") and (path := next(_snapshots(repo), None)):
                    yield path, repo.name.removeprefix("models--").replace("--", "/", 1)
            return
        for path in walk(place, 0 if where == "Downloads" else DEPTH, until):
            yield path, ""

    def known(self, path: Path) -> dict[str, Any] | None:
        """A model of the list if its file has not changed since."""
        with self.lock:
            model = self.found.get(str(path))
        return self.read(path, model["where"], model["name"]) if model else None

    def read(self, path: Path, where: str, name: str = "") -> dict[str, Any]:
        """What a path is, from the cache where the file is as it was."""
        if self.cache is None:
            self.cache = self._load()
        stamp = _stamp(path)
        kept = self.cache.get(str(path))
        if kept and kept[0] == stamp and BLANK.keys() <= kept[1].keys():  # else an earlier version wrote it
            model = dict(kept[1])
        else:
            model = describe(path, where, name)
            self.cache[str(path)] = [stamp, model]
        return model | {"where": where or model["where"], "name": name or model["name"]}

    def _load(self) -> dict[str, list[Any]]:
        try:
            raw = json.loads((self.home.cache / "models.json").read_text(encoding="utf-8"))
            return {k: v for k, v in raw.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[1], dict)}
        except (OSError, ValueError, AttributeError):
            return {}

    def _save(self) -> None:
        kept = {k: v for k, v in (self.cache or {}).items() if k in self.found}
        try:
            write_atomic(self.home.cache / "models.json", json.dumps(kept, ensure_ascii=False), "the list of models")
        except (OSError, ValueError):  # the cache is a convenience: a full disk is said where something is lost
            return


def _stamp(path: Path) -> list[int]:
    try:
        at = path / "model_index.json" if path.is_dir() else path
        stat = at.stat()
        return [stat.st_mtime_ns, stat.st_size]
    except OSError:
        return []


_scanners: dict[Path, Scanner] = {}


def scanner(home: Home, machine: Machine | None = None) -> Scanner:
    """The one scanner of a data folder."""
    if home.root not in _scanners:
        _scanners[home.root] = Scanner(home, machine or Machine.here())
    return _scanners[home.root]


def listing(home: Home, query: str = "", everything: bool = False) -> dict[str, Any]:
    """The answer of GET /api/models. `query` words must all stand in the name, folder or title, in any case."""
    looking = scanner(home)
    looking.scan()
    with looking.lock:
        found, folders = list(looking.found.values()), list(looking.folders)
    words = query.lower().split()
    match = [m for m in found if all(w in f"{m['name']} {m['source']} {m['where']} {m['title']}".lower() for w in words)]
    shown = [m for m in match if m["trainable"] or everything]
    shown.sort(key=lambda m: (not m["trainable"], bool(m["warning"]), m["name"].lower(), m["source"]))
    return {"models": shown, "hidden": len(match) - len(shown), "scanning": looking.scanning, "folders": folders}
