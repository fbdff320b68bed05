"""The zip for bug reports: logs, configurations, events, versions and hardware; what is private in them is blotted out.

What is private is found twice: by what is known of this data folder (captions, prompts, names, paths are looked up and replaced
wherever they stand, also in logs), and by form (tokens, passwords, paths and file names of any kind). Where in doubt, it goes.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import io
import json
import os
import platform
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from app import settings
from app.paths import ROOT, Home

RUNS, JOBS, TAIL = 6, 4, 200_000  # how many of the newest run and job folders, and bytes of each file's end
MOST_FILES = 5000  # looked at for captions and names
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "gradio", "fastapi", "starlette", "uvicorn", "pydantic",
            "huggingface_hub", "pillow", "numpy", "psutil", "onnxruntime", "xformers", "bitsandbytes", "prodigyopt")  # fmt: skip
READ_ME = """A bug report of LoRA Atelier. Look through it before you send it: everything in it is plain text.
Left out or blotted out: {out}. It holds no images, no passwords and no tokens.
"""
PRIVATE = {  # keys of configurations and events, by what they hold
    "captions": ("caption", "captions", "trigger", "class_word", "tags", "blocked_tags", "blocked"),
    "prompts": ("prompt", "prompts", "negative", "negative_prompt"),
    "names": ("name", "title", "author", "description", "folder", "source", "file", "path", "images", "license", "words",
              "lora_folder", "model_folders", "run_folders", "captioners", "sentences", "only", "masker"),
}  # fmt: skip
KIND_OF = {key: kind for kind, keys in PRIVATE.items() for key in keys}
FILES = r"png|jpe?g|webp|gif|bmp|tiff?|heic|avif|txt|caption|safetensors|ckpt|pt|pth|bin|zip|toml|csv"
PLAIN = (
    "images",
    "data",
    "runs",
    "previews",
    "datasets",
    "jobs",
    "train",
    "caption",
    "compare",
    "lora",
    "demo",
    "home",
    "root",
    "user",
    "localhost",
)
OURS = re.compile(r"(step-\d+(-\d+)?|model|diffusion_pytorch_model|pytorch_model|log|requirements|constraints)\.\w+", re.I)
TOKENS = (
    (re.compile(r"\b(?:hf|api_org)_\w{4,}"), "(token)"),
    (re.compile(r"\b(?:sk|ghp|gho|github_pat|glpat|xox[bap])[-_][\w-]{8,}"), "(token)"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), r"\1 (token)"),
    (re.compile(r"(?i)\b([\w-]*(?:password|passwd|secret|api[_-]?key|auth|cookie|token))(\\?[\"']?\s*[:=]\s*)(\\?[\"'])?(?(3).*?\3|[^\s,;&]+)"), r"\1\2(token)"),
    (re.compile(r"(\w+://)[^/\s@:]+:[^/\s@]+@"), r"\1(token)@"),
)  # fmt: skip
SYSTEM = (
    r"(?:api|static|help|assets|usr|lib|lib64|proc|sys|dev|etc|bin|opt/rocm)(?:/|\b)"  # first folders of paths that say nothing private
)
FILE_PATH = re.compile(rf"(?<![\w<>/])(?:[A-Za-z]:[\\/]|\\\\|/|~[\\/]|<(?:home|data)>)(?!{SYSTEM})[^\n\"'<>|]*?\.(?:{FILES})\b", re.I)
PATH = re.compile(rf"(?<![\w<>/:.])(?:[A-Za-z]:[\\/]|\\\\|~[\\/]|/(?!{SYSTEM}))[^\s\"'<>|:;,()]*[^\s\"'<>|:;,().]")
HOME_PATH = re.compile(r"<home>[\\/][^\n\"'<>|:;,]*")
FILE_NAME = re.compile(rf"[^\s\"'/\\<>|:()]+\.(?:{FILES})\b", re.I)


class Blotter:
    """Replaces what is private. `kinds`: which of captions, prompts and names to blot out; tokens and the home folder always are."""

    def __init__(self, home: Home, kinds: set[str]) -> None:
        self.kinds = kinds
        known = Known(home)
        self.literals: list[tuple[str, re.Pattern[str], str]] = []
        for kind, texts in (("tokens", known.tokens), *((kind, known.texts[kind]) for kind in PRIVATE if kind in kinds)):
            self.literals += [entry for text in texts for entry in _patterns(text, f"({kind.removesuffix('s')})")]
        self.literals.sort(key=lambda entry: -len(entry[0]))
        places = {
            home.root: "<data>",
            ROOT: "<app>",
            Path.home(): "<home>",
            Path(sys.prefix): "<python>",
            Path(sys.base_prefix): "<python>",
        }
        self.places = []
        for place, word in sorted(places.items(), key=lambda entry: -len(str(entry[0]))):
            if len(place.parts) > 1:  # not for a home folder of "/"
                forms = {str(place), place.as_posix(), str(place).replace("\\", "\\\\"), place.as_uri().removeprefix("file://")}
                flags = re.I if os.name == "nt" else 0
                self.places += [(re.compile(rf"{re.escape(form)}(?![\w-])", flags), word) for form in sorted(forms, key=len, reverse=True)]

    def text(self, text: str) -> str:
        for pattern, word in TOKENS:
            text = pattern.sub(word, text)
        for pattern, word in self.places:
            text = pattern.sub(word, text)
        low = text.lower()
        for literal, pattern, word in self.literals:
            if literal in low:
                text = pattern.sub(word, text)
                low = text.lower()
        if "names" in self.kinds:
            text = FILE_PATH.sub(
                lambda m: m.group() if OURS.fullmatch(m.group().rpartition("/")[2]) and "<data>" in m.group() else "(name)", text
            )
            text = HOME_PATH.sub("<home>/(name)", text)
            text = PATH.sub("(name)", text)
            text = FILE_NAME.sub(lambda m: m.group() if OURS.fullmatch(m.group()) else "(name)", text)
        return text

    def value(self, value: Any, key: str = "") -> Any:
        """The same for what was read of JSON, where a key says what stands behind it."""
        if isinstance(value, dict):
            stage = value.get("type") == "stage"
            return {k if re.fullmatch(r"\w+", k) else self.text(k): self.value(v, "" if stage else k) for k, v in value.items()}
        if isinstance(value, list):
            return [self.value(v, key) for v in value]
        if not isinstance(value, str) or not value:
            return value
        kind = KIND_OF.get(key)
        if kind in self.kinds and not OURS.fullmatch(value):
            return f"({kind.removesuffix('s')})"
        return self.text(value)


def _patterns(text: str, word: str) -> Iterator[tuple[str, re.Pattern[str], str]]:
    """(what to look for in lower case, pattern, replacement) for a literal, also as JSON and Python write it."""
    for form in {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]}:
        yield form.lower(), re.compile(rf"(?<!\w){re.escape(form)}(?!\w)", re.I), word
    line = text.split("\n")[0]
    if len(line) > 30 and word != "(token)":  # messages may quote the beginning alone
        yield line[:24].lower(), re.compile(rf"{re.escape(line[:24])}[^\n\"]*", re.I), word


class Known:
    """What is private in this data folder: tokens, captions, prompts, names."""

    def __init__(self, home: Home) -> None:
        self.tokens = {text for text in _tokens() if len(text) >= 4}
        self.texts: dict[str, set[str]] = {kind: set() for kind in PRIVATE}
        chosen = settings.load(home)
        self._collect(chosen.model_dump(mode="json"), "")
        self._collect(_read(home.draft), "")
        folders = [home.datasets, home.runs, *(Path(f).expanduser() for f in chosen.run_folders)]
        runs = [p for folder in folders[1:] for p in _children(folder)]
        for run in runs:
            self.names([run.name, re.sub(r"^\d{8}-\d{6}-", "", run.name)])
            config = _read(run / "config.json")
            self._collect(config, "")
            folders += [Path(d["folder"]) for d in (config or {}).get("data", []) if isinstance(d, dict) and d.get("folder")]
            for event in _events(run / "events.jsonl"):
                self._collect(event, "")
        for job in _children(home.jobs):
            self._collect(_read(job / "config.json"), "")
        self._files(folders)
        self.names([getpass.getuser(), platform.node(), platform.node().partition(".")[0], Path.home().name])

    def names(self, texts: Iterable[str]) -> None:
        stripped = (text.strip() for text in texts)
        self.texts["names"] |= {t for t in stripped if len(t) > 1 and not t.isdecimal() and t.lower() not in PLAIN}

    def _collect(self, value: Any, key: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                self._collect(v, k if value.get("type") != "stage" else "")
        elif isinstance(value, list):
            for v in value:
                self._collect(v, key)
        elif isinstance(value, str) and key in KIND_OF:
            kind = KIND_OF[key]
            if kind != "names":
                self._text(kind, value)
            elif not OURS.fullmatch(value):
                parts = re.split(r"[\\/]", value)
                parts = [part for part in (*parts[-2:], parts[-1].rpartition(".")[0]) if len(part) > 4]  # not "out" or "my" of a path
                self.names([value, *parts])

    def _text(self, kind: str, text: str) -> None:
        pieces = [text.strip(), *(line.strip() for line in text.splitlines())]
        pieces += [piece.strip() for piece in text.split(",") if " " in piece.strip()]
        self.texts[kind] |= {piece for piece in pieces if len(piece) > 1}

    def _files(self, folders: Iterable[Path]) -> None:
        left = MOST_FILES
        for folder in folders:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                left -= 1
                if left < 0:
                    return
                if OURS.fullmatch(path.name) or path.name in ("config.json", "events.jsonl", "log.txt"):
                    continue
                if path.suffix.lower() in (".txt", ".caption"):
                    self._text("captions", _tail(path))
                if re.fullmatch(rf"\.(?:{FILES})", path.suffix, re.I):
                    self.names([path.name, path.stem, path.parent.name])


def _tokens() -> Iterator[str]:
    from huggingface_hub import get_token

    yield get_token() or ""
    for name, value in os.environ.items():
        if re.search(r"TOKEN|PASSWORD|SECRET|API_?KEY", name, re.I):
            yield value


def _children(folder: Path) -> list[Path]:
    """The folders in it, newest first."""
    try:
        return sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    except OSError:
        return []


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _events(path: Path) -> Iterator[dict[str, Any]]:
    for line in _tail(path).splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # torn, or cut at the tail's beginning
            continue
        if isinstance(event, dict):
            yield event


def make(home: Home, *, captions: bool = False, prompts: bool = False, names: bool = False) -> bytes:
    """The zip. Each of `captions`, `prompts` and `names` (of files, folders, runs and people) says whether these may stay."""
    kinds = {kind for kind, stays in (("captions", captions), ("prompts", prompts), ("names", names)) if not stays}
    blot = Blotter(home, kinds)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:

        def add(name: str, content: Any) -> None:
            text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
            if content:
                file.writestr(name, text)

        add("README.txt", READ_ME.format(out=", ".join(sorted(kinds)) or "nothing but your home folder"))
        add("versions.json", versions())
        add("hardware.json", _plain(blot, (_read(home.cache / "probe.json") or {}).get("found")))
        add("settings.json", blot.value(settings.load(home).model_dump(mode="json")))
        for log in (home.log, home.log.with_name(home.log.name + ".1")):
            add(log.name, blot.text(_tail(log)))
        run_folders = {Path(f).expanduser().resolve() for f in settings.load(home).run_folders} | {home.runs}
        runs = sorted((p for folder in run_folders for p in _children(folder)), key=lambda p: p.stat().st_mtime, reverse=True)
        for label, folders in (("run", runs[:RUNS]), ("job", _children(home.jobs)[:JOBS])):
            for k, folder in enumerate(folders):
                _add_folder(add, blot, f"{label}-{k + 1}", folder)
                if (folder / "results").is_dir():
                    _add_folder(add, blot, f"{label}-{k + 1}/results", folder / "results")
    return out.getvalue()


def _plain(blot: Blotter, value: Any) -> Any:
    """Strings blotted by their text alone: in the hardware's facts `name` is a GPU's."""
    if isinstance(value, dict):
        return {k: _plain(blot, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(blot, v) for v in value]
    return blot.text(value) if isinstance(value, str) else value


def _add_folder(add: Any, blot: Blotter, name: str, folder: Path) -> None:
    for file in ("config.json", "versions.json", "launch.json"):
        add(f"{name}/{file}", blot.value(_read(folder / file)))
    add(f"{name}/events.jsonl", "\n".join(json.dumps(blot.value(e), ensure_ascii=False) for e in _events(folder / "events.jsonl")))
    add(f"{name}/log.txt", blot.text(_tail(folder / "log.txt")))


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "packages": {}}
    for name in VERSIONS:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    return found
