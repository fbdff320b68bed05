"""Read a configuration: file, preset, then `--set` values; every error at once, before any model is loaded."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "presets"


class ConfigError(ValueError):
    """One or more things wrong with a configuration; `errors` maps a dotted field to a sentence."""

    def __init__(self, errors: dict[str, str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors.values()))


def presets() -> dict[str, Path]:
    """Every preset by its name `family/name`, for instance `sd1/balanced`."""
    return {p.relative_to(PRESETS).with_suffix("").as_posix(): p for p in sorted(PRESETS.glob("*/*.toml"))}


def overlays(family: str) -> dict[str, Path]:
    """What may be laid on a family's presets, by its name: `anime` in `sdxl/balanced+anime`."""
    return {p.stem: p for p in sorted((PRESETS / family / "with").glob("*.toml"))}


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset `family/name`, or of one with overlays, `family/name+overlay+overlay`; [about] is left out.

    An overlay has the table [all] for every preset of its family, and one for each preset that gets more. Raises ConfigError for an
    unknown name.
    """
    base, *over = name.split("+")
    known = presets()
    if base not in known:
        near = difflib.get_close_matches(base, known, 1)
        hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known)}."
        raise ConfigError({"preset": f"preset is {name!r}, which does not exist.{hint}"})
    values = tomllib.loads(known[base].read_text(encoding="utf-8"))
    values.pop("about", None)
    family, _, stem = base.partition("/")
    there = overlays(family)
    for one in over:
        if one not in there:
            hint = f"There are: {', '.join(there)}." if there else f"{family} has none."
            raise ConfigError({"preset": f"preset is {name!r}, where {one!r} cannot be added. {hint}"})
        own = tomllib.loads(there[one].read_text(encoding="utf-8"))
        values = merge(merge(values, own.get("all", {})), own.get(stem, {}))
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, table by table; lists and values are replaced whole."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def read_file(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as a dict. Raises ConfigError if it is missing or cannot be read as such."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError({"": f"There is no configuration file {path}. Give the path of a .toml or .json file."}) from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError({"": f"{path} is not valid {path.suffix.lstrip('.').upper() or 'TOML'}: {error}."}) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError({"": f"{path} cannot be read: {error}. It must be a UTF-8 text file."}) from None


def parse_set(assignments: Iterable[str]) -> dict[str, Any]:
    """`a.b=c` strings as a nested dict; the value is read as TOML where it is valid TOML, else as a plain string.

    Raises ConfigError for a string without `=`, and for one that goes into what another sets.
    """
    out: dict[str, Any] = {}
    for item in assignments:
        key, sign, raw = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError({"--set": f"--set {item!r} has no value; write it as section.name=value, like --set adapter.rank=8."})
        try:
            value = tomllib.loads(f"value = {raw.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = raw.strip()
        node = out
        *tables, last = key.strip().split(".")
        for table in tables:
            node = node.setdefault(table, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    {"--set": f"--set {item!r} sets a value inside {table}, to which another --set gives {node!r}. Drop one."}
                )
        node[last] = value
    return out


def load(
    path: Path | None = None,
    *,
    preset: str | None = None,
    assignments: Iterable[str] = (),
    values: dict[str, Any] | None = None,
) -> TrainConfig:
    """The configuration of one run. Later sources win: preset, file, `values`, `assignments`.

    A file may name its preset itself, as `preset = "sd1/balanced"`. Relative paths are relative to the file, and those in
    `values` and `assignments` to the current folder.
    Raises ConfigError with every error found.
    """
    raw = read_file(path) if path else {}
    if not isinstance(raw, dict):
        raise ConfigError(
            {"": f'{path} holds {type(raw).__name__} instead of an object with sections. Write it as {{"data": [...], ...}}.'}
        )
    named = raw.pop("preset", None)
    if not isinstance(named, str | None):
        raise ConfigError({"preset": f"preset is {named!r}; it must be a name in quotes. There are: {', '.join(presets())}."})
    preset = preset or named
    merged = merge(read_preset(preset) if preset else {}, _absolute(raw, path.resolve().parent) if path else raw)
    merged = merge(merged, values or {})
    merged = merge(merged, parse_set(assignments))
    return validate(_absolute(merged, Path.cwd()))


def _absolute(values: dict[str, Any], root: Path) -> dict[str, Any]:
    """`values` with every relative path taken from `root`, that of a base only where it exists (it may be a hub id): a run's
    config.json must mean the same wherever it is resumed."""

    def at_root(table: Any, key: str, may_be_empty: bool = False) -> Any:
        path = table.get(key) if isinstance(table, dict) else None
        given = isinstance(path, str) and (may_be_empty or path.strip())
        return table | {key: str(root / Path(path).expanduser())} if given else table

    out = dict(values)
    if isinstance(values.get("data"), list):
        out["data"] = [at_root(e, "folder", may_be_empty=True) for e in values["data"]]
    if "adapter" in values:
        out["adapter"] = at_root(values["adapter"], "start")
    if isinstance(model := values.get("model"), dict):
        model = at_root(model, "text_encoders")
        if isinstance(model.get("merge"), list):
            model = model | {"merge": [at_root(e, "file") for e in model["merge"]]}
        if isinstance(source := model.get("source"), str) and source not in ("", "demo"):
            local = root / Path(source).expanduser()
            if len(source) < 1000 and "\0" not in source and local.exists():
                model = model | {"source": str(local)}
        out["model"] = model
    return out


def validate(values: dict[str, Any]) -> TrainConfig:
    """`values` as a TrainConfig, or a ConfigError with a sentence for every field that is wrong."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError({_field(e): _sentence(e) for e in error.errors(include_url=False)}) from None


def _field(error: ErrorDetails) -> str:
    kinds = {"adamw", "adamw8bit", "prodigy"}  # the discriminator's own step in the path
    return ".".join(str(p + 1) if isinstance(p, int) else p for p in error["loc"] if p not in kinds)


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    """The keys allowed where the unknown key `loc[-1]` stood."""
    model: Any = TrainConfig
    for part in loc[:-1]:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        field = model.model_fields.get(part)
        if field is None:
            continue
        choices = (field.annotation, *getattr(field.annotation, "__args__", ()))
        found = [a for a in choices if isinstance(a, type) and issubclass(a, BaseModel)]
        if len(found) != 1:
            return []
        model = found[0]
    return list(model.model_fields)


def _sentence(error: ErrorDetails) -> str:
    field, kind, value, ctx = _field(error), error["type"], error.get("input"), error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        hint = f" Did you mean {near[0]}?" if near else (f" Known here: {', '.join(known)}." if known else "")
        return f"{field} is not a known setting.{hint}"
    if kind == "missing":
        return f"{field} is missing; " + ("name at least one folder of images in [[data]]." if field == "data" else "it must be given.")
    if kind == "value_error":
        text = str(ctx.get("error", error["msg"]))
        if text.startswith(("no ", "The ")):
            return text
        return f"{field} is {value!r}; it {text}."
    allowed = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be one of {expected}",
        "multiple_of": "must be a multiple of {multiple_of}",
        "union_tag_invalid": "must have kind = one of {expected_tags}",
    }.get(kind)
    must = allowed.format(**ctx) if allowed else error["msg"][0].lower() + error["msg"][1:]
    return f"{field} is {value!r}; it {must}." if allowed else f"{field} is {value!r}: {must}."
