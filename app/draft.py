"""The one draft: what the next training will be. A JSON file in the data folder, written at each change.

The draft holds only what the user said; everything else comes from the preset. `compose` makes of it the values that
trainer.config validates, and `view` what the page shows. A value that is not allowed stays in `changes` and is named in the
view's `errors`: what was typed is never lost.
"""

from __future__ import annotations

import json
import math
import re
import threading
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from app import datasets, forms, models, settings
from app.errors import Problem
from app.paths import ROOT, Home
from trainer.config import DataConfig, TrainConfig
from trainer.config.load import ConfigError, merge, overlays, presets, read_preset, validate
from trainer.data.scan import DataError, inspect, listing
from trainer.run_dir import RunDir, write_atomic

PURPOSES = ("character", "style", "object")
FIELDS = ("purpose", "name", "class_word", "trigger", "model", "variant", "preset")  # what PATCH may set, beside `changes` and `sets`
KINDS = ("train", "prior", "validation")  # of a further set of images
EXAMPLE = ROOT / "assets" / "demo" / "data" / "zorp" / "train"
EXAMPLE_CAPTIONER = ROOT / "assets" / "demo" / "captioner"
WORDS = ROOT / "assets" / "models" / "sd1" / "tokenizer" / "vocab.json"
OURS = ("model.source", "data", "output.name", "adapter.kind")  # made from the draft itself, never by `changes`
_lock = threading.RLock()


# ---- the file -----------------------------------------------------------------------------------------------------------


def load(home: Home) -> dict[str, Any]:
    """The draft; a fresh one where there is none. A damaged file is kept beside it as draft.damaged.json."""
    with _lock:
        try:
            kept = _completed(json.loads(home.draft.read_text(encoding="utf-8")))
            if not _is_draft(kept):
                raise ValueError("not a draft")
        except FileNotFoundError:
            return _save(home, _fresh(home))
        except ValueError:
            home.draft.replace(home.draft.with_name("draft.damaged.json"))
            return _save(home, _fresh(home))
        if kept["preset"] not in _courses():
            kept["preset"] = "balanced"
        try:
            datasets.open(home, kept["dataset"])
        except Problem:  # somebody deleted or renamed it: what was typed stays
            return _save(home, kept | {"dataset": datasets.create(home).id, "revision": kept["revision"] + 1})
        return kept


def _completed(kept: Any) -> Any:
    """A draft of an earlier version with the fields that have come since."""
    return {"variant": "", "sets": []} | kept if isinstance(kept, dict) else kept


def _courses() -> set[str]:
    """The names of presets, of whatever family."""
    return {name.partition("/")[2] for name in presets()}


def _is_draft(kept: Any) -> bool:
    blank = _blank("")
    return isinstance(kept, dict) and kept.keys() == blank.keys() and all(type(kept[k]) is type(blank[k]) for k in blank)


def _blank(dataset: str) -> dict[str, Any]:
    return {
        "dataset": dataset, "purpose": "character", "name": "", "class_word": "", "trigger": "", "trigger_follows": True,
        "model": "", "variant": "", "preset": "balanced", "changes": {}, "sets": [], "example": False, "revision": 1,
    }  # fmt: skip


def _fresh(home: Home) -> dict[str, Any]:
    return _blank(datasets.create(home).id)


def _save(home: Home, draft: dict[str, Any]) -> dict[str, Any]:
    write_atomic(home.draft, json.dumps(draft, indent=1, ensure_ascii=False) + "\n", "the draft")
    return draft


def _previous(home: Home) -> Path:
    return home.draft.with_name("draft.previous.json")


def folder(home: Home, draft: Mapping[str, Any]) -> Path:
    """The folder of the images that the draft trains on."""
    return home.datasets / draft["dataset"] / "images"


def is_example(home: Home, draft: Mapping[str, Any]) -> bool:
    """Whether it is the built-in example still: the toy model, and no picture but its own, which its captioner knows."""
    if not draft["example"]:
        return False
    own = {inspect(path) for path in EXAMPLE.glob("*.png")}
    return all(inspect(path) in own for path, _, _ in listing(folder(home, draft)))


def update(home: Home, **changes: Any) -> dict[str, Any]:
    """Change what is named and save. `changes={field: value}` adds to what differs from the preset, None drops it, "" empties it.

    `trigger=None` lets the trigger follow the name again. Raises Problem for a field that does not exist or a value of another kind.
    """
    with _lock:
        draft = load(home)
        new = {**draft, "changes": dict(draft["changes"]), "revision": draft["revision"] + 1}
        errors = {
            k: f"{k} is not a field of the draft. There are: {', '.join(FIELDS)}, changes, sets."
            for k in changes
            if k not in (*FIELDS, "changes", "sets")
        }
        for key in FIELDS:
            if key not in changes:
                continue
            value = changes[key]
            if key == "trigger" and value is None:
                new["trigger_follows"] = True
            elif not isinstance(value, str) or len(value) > 4000:
                errors[key] = f"{key} is {str(value)[:80]!r}; it must be a text of at most 4000 characters."
            elif key == "purpose" and value not in PURPOSES:
                errors[key] = f"purpose is {value!r}; it must be one of {', '.join(PURPOSES)}."
            elif key == "preset" and value not in _courses():
                errors[key] = f"preset is {value!r}, which does not exist. There are: {', '.join(sorted(_courses()))}."
            elif key == "variant" and value not in ("", "none", *variants(family(home, draft))):
                there = ", ".join(("none", *variants(family(home, draft))))
                errors[key] = f"variant is {value!r}; for this model it must be empty (by its name) or one of {there}."
            elif key == "model":
                new[key] = models.unquote(value)
            elif key in ("preset", "variant"):
                new[key] = value
            else:
                new[key] = " ".join(value.split()) if key != "purpose" else value
                if key == "trigger" and (value != draft["trigger"] or "name" in changes):  # a field that was only left is not typed
                    new["trigger_follows"] = False
        own = changes.get("changes", {})
        if not isinstance(own, dict):
            errors["changes"] = f"changes is {str(own)[:80]!r}; it must be an object of dotted fields and values."
            own = {}
        for key, value in own.items():
            if value is None:
                new["changes"].pop(key, None)
            elif why := _refused(key):
                errors[key] = why
            else:
                new["changes"][key] = value
        if "sets" in changes:
            try:
                new["sets"] = _sets(home, draft, changes["sets"])
            except Problem as problem:
                errors["sets"] = problem.text
        if errors:
            raise Problem(" ".join(errors.values()), errors=errors)
        if new["model"] != draft["model"] and "variant" not in changes:
            new["variant"] = ""
        if new["model"] != draft["model"] and draft["example"] and new["model"] != "demo":
            new |= {"example": False, "preset": "balanced" if new["preset"] == "demo" else new["preset"]}
        if new["trigger_follows"]:
            new["trigger"] = make_trigger(new["name"], new["class_word"])
        return _save(home, new)


def _sets(home: Home, draft: Mapping[str, Any], given: Any) -> list[dict[str, Any]]:
    """Further sets of images as they are kept. Raises Problem for one that cannot be."""
    blank = {"dataset": "", "kind": "train", "visits": None, "weight": 1.0, "trigger": "", "class_word": ""}
    if not isinstance(given, list) or not all(isinstance(each, dict) and each.keys() <= blank.keys() for each in given):
        raise Problem(f"sets is {str(given)[:80]!r}; it must be a list of objects of {', '.join(blank)}.")
    kept = []
    for each in (blank | e for e in given):
        name = datasets.open(home, str(each["dataset"])).read()["name"] or each["dataset"]
        visits, weight = each["visits"], each["weight"]
        if each["dataset"] == draft["dataset"] or any(each["dataset"] == k["dataset"] for k in kept):
            raise Problem(f"The data set {name} is in this training already. Choose another.")
        if each["kind"] not in KINDS:
            raise Problem(f"kind of {name} is {each['kind']!r}; it must be one of {', '.join(KINDS)}.")
        if visits is not None and not (type(visits) is int and 1 <= visits <= 100_000):
            raise Problem(f"Visits of {name} is {str(visits)[:20]}; it must be a whole number from 1 to 100000, or empty (as the others).")
        if type(weight) not in (int, float) or not 0 < weight <= 100:
            raise Problem(f"Weight of {name} is {str(weight)[:20]}; it must be above 0 and at most 100.")
        words = {k: " ".join(str(each[k]).split())[:4000] for k in ("trigger", "class_word")}
        kept.append(each | words | {"weight": float(weight)})
    return kept


def _refused(key: str) -> str | None:
    if any(key == o or key.startswith(f"{o}.") for o in (*OURS, *forms.KEPT)):
        return f"{key} is not set here: {forms.hidden(key)}."
    if key not in forms.leaves():
        return f"{key} is not a known setting. GET /api/form lists them."
    return None


def open_dataset(home: Home, id: str) -> dict[str, Any]:
    """Train on another data set: with its trigger and class word, and under its name, where the LoRA is called as the data set before. Raises Problem for one that does not exist, or that is in the training as a further set."""
    with _lock:
        before = load(home)
        facts = datasets.open(home, id).read()
        if any(each["dataset"] == id for each in before["sets"]):
            raise Problem(f"The data set {facts['name'] or id} is a further set of this training. Take it out there first.", 409)
        if id == before["dataset"]:
            return before
        called = leave(home, before)
        new = before | {"dataset": id, "revision": before["revision"] + 1}
        if facts["trigger"] or facts["class_word"] or datasets.open(home, before["dataset"]).count():  # else they were typed for this one
            new |= {"trigger": facts["trigger"], "class_word": facts["class_word"], "trigger_follows": not facts["trigger"]}
        if facts["name"] and before["name"] in ("", called):
            new["name"] = facts["name"]
        if new["trigger_follows"]:
            new["trigger"] = make_trigger(new["name"], new["class_word"])
        return _save(home, new)


def leave(home: Home, draft: Mapping[str, Any]) -> str:
    """Let the draft's data set remember what it was trained as, so that it is found again; returns what it is called."""
    data = datasets.Dataset(home, draft["dataset"])
    with data.lock:
        facts = data.read()
        if data.count():
            words = {k: draft[k] for k in ("trigger", "class_word") if draft[k]}
            facts |= words | {"name": facts["name"] or draft["name"]}
            data.save(facts)
    return facts["name"]


def new(home: Home) -> dict[str, Any]:
    """An empty draft and data set. The one before is kept for `undo_new`."""
    with _lock:
        before = load(home)
        leave(home, before)
        write_atomic(_previous(home), json.dumps(before, ensure_ascii=False), "the draft before")
        return _save(home, _fresh(home) | {"model": "" if before["example"] else before["model"], "revision": before["revision"] + 1})


def _before(home: Home) -> dict[str, Any] | None:
    """What `undo_new` would bring back, or None where there is none or its data set is gone."""
    try:
        before = _completed(json.loads(_previous(home).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    if not _is_draft(before):
        return None
    try:
        datasets.open(home, before["dataset"])
    except Problem:
        return None
    return before


def can_undo_new(home: Home) -> bool:
    return _before(home) is not None


def undo_new(home: Home) -> dict[str, Any] | None:
    """Bring back the draft as it was before `new`, `example` or `from_run`; None where there is none."""
    with _lock:
        if (before := _before(home)) is None:
            return None
        revision = load(home)["revision"] + 1
        _previous(home).unlink()
        return _save(home, before | {"revision": revision})


def example(home: Home) -> dict[str, Any]:
    """The built-in example: zorp's pictures, the toy base, its preset."""
    with _lock:
        before = load(home)
        leave(home, before)
        data = datasets.create(home, "Zorp, the example")
        data.add_folder(EXAMPLE, undoable=False)
        write_atomic(_previous(home), json.dumps(before, ensure_ascii=False), "the draft before")
        return _save(
            home,
            _blank(data.id)
            | {"name": "Zorp", "trigger": "zorp", "trigger_follows": False, "model": "demo", "preset": "demo", "example": True}
            | {"revision": before["revision"] + 1},
        )


def from_run(home: Home, run: Path, start: bool = False) -> dict[str, Any]:
    """The settings and images of a run's folder; with `start`, its last LoRA is what training goes on from. Raises Problem."""
    paths = RunDir(run)
    try:
        values = json.loads(paths.config.read_text(encoding="utf-8"))
        config = validate(values)
    except (OSError, ValueError) as error:
        raise Problem(f"The settings of {run.name} cannot be read: {error}", 404) from None
    images = next(d.folder for d in config.data if d.kind == "train")
    if not images.is_dir():
        raise Problem(f"The images of {run.name} are not at {images} any more. Add them to a new training instead.", 409)
    lora = paths.lora(config.output.name)
    if start and not lora.is_file():
        found = sorted(paths.root.glob(f"{config.output.name}-[0-9]*.safetensors"))
        if not found:
            raise Problem(f"{run.name} has no LoRA file yet, so nothing can start from it. Wait for its first save.", 409)
        lora = found[-1]
    with _lock:
        before = load(home)
        leave(home, before)
        data = datasets.create(home)
        taken = _take(home, values, _blank(data.id) | _kind_of(run), nearest=True)
        data.add_folder(images, undoable=False)
        for entry in config.data:
            if entry.folder != images and entry.folder.is_dir():
                further = datasets.create(home, f"{entry.class_word or entry.trigger or 'Images'} of {taken['name'] or run.name}")
                further.add_folder(entry.folder, undoable=False)
                taken["sets"] = [*taken["sets"], _set_of(further.id, entry)]
        taken["example"] = taken["model"] == "demo"
        if start:
            taken["changes"]["adapter.start"] = str(lora)
        else:
            taken["changes"].pop("adapter.start", None)
        write_atomic(_previous(home), json.dumps(before, ensure_ascii=False), "the draft before")
        return _save(home, taken | {"revision": before["revision"] + 1})


def _set_of(dataset: str, entry: DataConfig) -> dict[str, Any]:
    return {"dataset": dataset} | {k: getattr(entry, k) for k in ("kind", "visits", "weight", "trigger", "class_word")}


# ---- names ----------------------------------------------------------------------------------------------------------------

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)$", re.I)  # names that Windows keeps for devices


def slug(name: str) -> str:
    """A file name made from a name: "My Cat" -> "my-cat". Letters of any script stay; never empty."""
    text = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", name).lower()).strip("-_")
    while len(text.encode()) > 120:  # with a step's number and ending a file name must stay below 255 bytes
        text = text[:-1]
    text = text.strip("-_")
    return f"lora-{text}" if _RESERVED.match(text) else text or "lora"


@cache
def _vocabulary() -> frozenset[str]:
    """Every word that CLIP reads as one token."""
    words = json.loads(WORDS.read_text(encoding="utf-8"))
    return frozenset(w.removesuffix("</w>") for w in words if w.endswith("</w>"))


def is_word(word: str) -> bool:
    """Whether the text encoder reads it as one whole word, so that it means something already ("cat", and "sks" too)."""
    return word.lower() in _vocabulary()


def make_trigger(name: str, class_word: str = "") -> str:
    """A word from a name that means nothing yet: letters only, lower case, sayable. "My Cat" -> "mycat"; "Anna" -> "annako"."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    stem = re.sub(r"[^a-z]", "", plain.lower())[:20]
    if not stem:
        if not name.strip():
            return ""
        number = sum(ord(c) * (k + 1) for k, c in enumerate(name))  # a name in another script: syllables drawn from it
        stem = "".join("zvkrm"[number // 7**k % 5] + "oaiue"[number // 11**k % 5] for k in range(3))
    if len(stem) > 2 and not is_word(stem) and stem != class_word.lower():
        return stem
    for ending in ("ko", "zu", "vi", "rax", "mo", "zor", "kelu"):
        link = "" if stem[-1] in "aeiouy" or ending[0] in "aeiou" else "o"
        if not is_word(made := stem + link + ending):
            return made
    return stem + "zokovu"


def trigger_warning(draft: Mapping[str, Any], captions: list[str]) -> str:
    """A sentence on a trigger word that is missing or means something already, or ""."""
    trigger = draft["trigger"]
    if not trigger:
        if draft["purpose"] == "style" or not draft["name"]:
            return ""
        return "Without a trigger word, what you train mixes with everything of its kind. Give it a word of its own."
    words = trigger.split()
    if all(is_word(w) for w in words):
        known = (
            f"{trigger} already means something to the model"
            if len(words) == 1
            else f"all words of {trigger} already mean something to the model"
        )
        return f"{known[0].upper()}{known[1:]}, which would mix with what you train. A made-up word like {make_trigger(trigger)} is safer."
    texts = [c for c in captions if c]
    tagged = [c for c in texts if trigger.lower() in (t.strip().lower() for t in c.split(",")[1:])]
    if tagged and len(tagged) < len(texts):
        return (
            f"{trigger} is a tag in {len(tagged)} of {len(texts)} captions, as if it were one trait among others. "
            "Take another word, or put it first in every caption."
        )
    return ""


# ---- the configuration ----------------------------------------------------------------------------------------------------


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        node = out
        *tables, last = key.split(".")
        for table in tables:
            node = node.setdefault(table, {})
        node[last] = value
    return out


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf; lists are values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def family(home: Home, draft: Mapping[str, Any]) -> str:
    """The family whose presets apply: the chosen model's, or what was said of it, or the first that can be trained."""
    model, _ = models.glance(home, draft["model"], draft["example"])
    found = model["family"] if model and model["trainable"] else None
    said = draft["changes"].get("model.family")
    return next((f for f in (found, said) if f in forms.families()), forms.families()[0])


def variants(family: str) -> list[str]:
    """Overlays for the models of a family that have words of their own, such as `anime`."""
    return [name for name in overlays(family) if name not in PURPOSES]


def variant(home: Home, draft: Mapping[str, Any]) -> str:
    """The variant whose overlay is laid on the preset: the user's word, or what the model's name says; "" for none."""
    if draft["variant"]:
        chosen = draft["variant"]
    else:
        model, _ = models.glance(home, draft["model"], draft["example"])
        chosen = model["words"] if model else ""
    return chosen if chosen in variants(family(home, draft)) else ""


def preset_name(home: Home, draft: Mapping[str, Any], course: str | None = None) -> str:
    """The preset `family/course`, and what is laid on it for the kind of model and the purpose: `sdxl/balanced+anime+style`."""
    of = family(home, draft)
    name = f"{of}/{course or draft['preset']}"
    if name not in presets():
        name = f"{forms.families()[0]}/{course or draft['preset']}"
    over = [variant(home, draft), draft["purpose"]]
    return "+".join([name, *(o for o in over if o in overlays(name.partition("/")[0]))])


def compose(home: Home, draft: Mapping[str, Any], changed: bool = True) -> dict[str, Any]:
    """The draft as nested values for trainer.config.load.validate; without `changed`, as the preset alone has them.

    A change that the family or the chosen kind of optimizer has no field for waits in the draft until one that has it is chosen.
    """
    own = {k: v for k, v in draft["changes"].items() if changed}
    kept = {k: own.pop(k) for k in forms.KEPT if k in own}
    values, of = merge(read_preset(preset_name(home, draft)), nest(own)), family(home, draft)
    flat = dict(flatten(values))
    values = nest({k: v for k, v in flat.items() if forms.applies(k, forms.defaults() | flat, of)})
    values = merge(values, nest(kept))
    if settings.load(home).memory == "low":
        batch = flat.get("train.batch_size", forms.defaults()["train.batch_size"])
        saving = {"memory": "checkpointing", "accumulation": batch}
        values["train"] = saving | {k: v for k, v in values.get("train", {}).items() if f"train.{k}" in own or k not in saving}
    made = {
        "model": {"source": models.absolute(draft["model"])},
        "data": [{"folder": str(f), **entry} for f, entry in entries(home, draft)],
        "output": {"name": slug(draft["name"])},
    }
    return merge(merge({"output": {"title": draft["name"]}}, values), made)


def entries(home: Home, draft: Mapping[str, Any]) -> Sequence[tuple[Path, dict[str, Any]]]:
    """(folder, the other values) of each `[[data]]` of the draft: the images of the page, then the further sets."""
    main = {"trigger": draft["trigger"], "class_word": draft["class_word"]}
    further = [(folder(home, each), {k: v for k, v in each.items() if k != "dataset" and v is not None}) for each in draft["sets"]]
    return [(folder(home, draft), main), *further]


def check(home: Home, draft: Mapping[str, Any]) -> tuple[TrainConfig | None, dict[str, str]]:
    """(the configuration, errors by dotted field); None where there are errors."""
    try:
        return validate(compose(home, draft)), {}
    except ConfigError as error:
        return None, {_place(field, text): forms.in_words(text) for field, text in error.errors.items()}


def _place(field: str, text: str) -> str:
    """Where an error on several fields together is shown: the first of them that the sentence names."""
    if field:
        return field
    named = next((k for k in forms.leaves() if k in text), None)
    return named or ("optimizer.kind" if "Prodigy" in text else "")


def values(home: Home, draft: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(effective values, the preset's) of every shown field; of a bad value what was typed."""
    base = dict(flatten(validate(compose(home, draft, changed=False)).model_dump(mode="json")))
    preset = {k: base.get(k, v) for k, v in forms.defaults().items()}
    made = {k: v for k, v in flatten(compose(home, draft)) if k in preset}
    own = {k: None if v == "" and forms.optional(k) else v for k, v in draft["changes"].items() if k in preset}
    return preset | made | own, preset


def captions(home: Home, draft: Mapping[str, Any]) -> list[str]:
    """The caption of every image as it stands in its file, "" where there is none."""
    try:
        return [text for _, _, text in listing(folder(home, draft))]
    except (DataError, OSError):  # no image yet; or a caption that is being written at this moment
        return []


# ---- what the page shows ----------------------------------------------------------------------------------------------------


def view(home: Home, draft: dict[str, Any] | None = None, caption_job: dict[str, Any] | None = None) -> dict[str, Any]:
    """The draft view of assets/help/api.md."""
    draft = draft or load(home)
    texts = captions(home, draft)
    model, model_error = models.glance(home, draft["model"], draft["example"])
    effective, preset = values(home, draft)
    return {
        "draft": draft,
        "slug": slug(draft["name"]),
        "trigger_warning": trigger_warning(draft, texts),
        "model": model,
        "model_error": model_error,
        "family": family(home, draft),
        "variant": variant(home, draft),
        "variants": variant_choices(family(home, draft)),
        "presets": preset_cards(home, draft),
        "values": effective,
        "preset_values": preset,
        "errors": check(home, draft)[1],
        "images": len(texts),
        "captioned": sum(bool(t) for t in texts),
        "caption_job": caption_job,
    }


def variant_choices(family: str) -> list[list[str]]:
    """[name, title, why] of every variant of a family."""
    abouts = {name: tomllib.loads(overlays(family)[name].read_text(encoding="utf-8"))["about"] for name in variants(family)}
    return [[name, about["title"], about["why"]] for name, about in abouts.items()]


def preset_cards(home: Home, draft: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The presets of the model's family from quick to thorough; the toy's own stands alone, and is not offered to others."""
    of, example = family(home, draft), draft["example"]
    order = ["demo"] if example else ["quick", "balanced", "thorough"]
    found = {n.partition("/")[2]: path for n, path in presets().items() if n.startswith(f"{of}/")}
    others = [] if example else sorted(set(found) - {*order, "demo"})
    cards = []
    for name in [n for n in order if n in found] + others:
        about = tomllib.loads(found[name].read_text(encoding="utf-8")).get("about", {})
        config = validate(read_preset(preset_name(home, draft, name)) | {"data": [{"folder": "."}]})
        facts: dict[str, Any] = {"rank": config.adapter.rank, "alpha": config.adapter.alpha}
        for part, settings_of in config.part:
            if forms.applies(f"part.{part}.train", {}, of):
                facts[part] = settings_of.learning_rate if settings_of.train else None
        facts["visits"] = config.train.visits
        cards.append({"name": name, **{k: about.get(k, "") for k in ("title", "why", "source")}, "facts": facts})
    return cards


# ---- as text ------------------------------------------------------------------------------------------------------------------


def to_toml(home: Home, draft: Mapping[str, Any]) -> str:
    """The draft as a configuration file: what was chosen as settings, what the preset says as comments beside it."""
    effective, preset = values(home, draft)
    of = family(home, draft)
    lines = [
        "# What the next training will be. Lines that begin with # are the preset's own values: take the # away to change one.",
        f"preset = {_toml(preset_name(home, draft))}",
    ]
    for path, entry in entries(home, draft):
        lines += ["", "[[data]]", f"folder = {_toml(str(path))}", *(f"{k} = {_toml(v)}" for k, v in entry.items())]
    fixed = {"model": {"source": draft["model"]}, "output": {"name": slug(draft["name"])}}
    for section in dict.fromkeys(["model", *(s["name"] for s in forms.form()["sections"])]):
        keys = [k for k in effective if k.rpartition(".")[0] == section and forms.applies(k, effective, of)]
        if keys or section in fixed:
            lines += ["", f"[{section}]", *(f"{k} = {_toml(v)}" for k, v in fixed.get(section, {}).items())]
        for key in keys:
            value, said = effective[key], key in draft["changes"] or effective[key] != preset[key]
            text = '""' if value is None else _toml(value)
            lines.append(f"{'' if said else '# '}{key.rpartition('.')[2]} = {text}")
    for entry in draft["changes"].get("model.merge", []):
        lines += ["", "[[model.merge]]", *(f"{k} = {_toml(v)}" for k, v in entry.items())]
    for block, own in draft["changes"].get("adapter.blocks", {}).items():
        lines += ["", f"[adapter.blocks.{_toml(block)}]", *(f"{k} = {_toml(v)}" for k, v in own.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def from_toml(home: Home, text: str) -> dict[str, Any]:
    """Take a configuration text over. Raises Problem with the line or fields that are wrong; nothing is changed then."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Problem(f"This is not valid TOML: {error}.") from None
    with _lock:
        draft = load(home)
        further = _further(home, draft, raw["data"]) if isinstance(raw.get("data"), list) else None
        taken = _take(home, raw, draft)
        if further is not None:  # after the values were checked
            taken["sets"] = [_set_of(id, entry) for id, entry in zip(further, _data(raw)[1:], strict=True)]
        return _save(home, taken | {"revision": draft["revision"] + 1})


def _data(raw: Mapping[str, Any]) -> tuple[DataConfig, ...]:
    return validate({"data": raw["data"]}).data


def _further(home: Home, draft: Mapping[str, Any], data: list[Any]) -> list[str]:
    """The data sets of the `[[data]]` of a text, the first of which is the draft's own. Raises Problem for folders of somewhere else."""
    found = []
    for k, entry in enumerate(data):
        named = entry.get("folder") if isinstance(entry, dict) else None
        if not isinstance(named, str):
            continue  # the settings' own check says so
        path, own = Path(named).expanduser(), folder(home, draft)
        if k == 0 and path != own:
            raise Problem(
                f"data.1.folder is {named!r}; on this page it is {str(own)!r}, the images above. Add other images there.",
                errors={"data.1.folder": f"The images of a training are added above; leave folder = {str(own)!r}."},
            )
        if k:
            if path.name != "images" or path.parent.parent != home.datasets or not path.is_dir() or path == own:
                said = f"data.{k + 1}.folder is {named!r}, which is no other data set of this page. Import its images as one first."
                raise Problem(said, errors={f"data.{k + 1}.folder": said})
            found.append(path.parent.name)
    return found


def take(home: Home, raw: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of a configuration of ours over, its folders left aside. Raises Problem; nothing is changed then."""
    with _lock:
        draft = load(home)
        return _save(home, _take(home, raw, draft, nearest=True) | {"revision": draft["revision"] + 1})


def adopt(home: Home, changes: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Lay settings from elsewhere on the draft, also such as are not allowed here: the view's errors name them."""
    with _lock:
        draft = load(home)
        new = {**draft, **fields, "changes": {**draft["changes"], **changes}, "revision": draft["revision"] + 1}
        _, preset = values(home, new)  # of the family that these say
        new["changes"] = {k: v for k, v in new["changes"].items() if v != preset.get(k)}
        if new["trigger_follows"]:
            new["trigger"] = make_trigger(new["name"], new["class_word"])
        return _save(home, new)


def _kind_of(run: Path) -> dict[str, str]:
    """The purpose for which the app started a run, where it did."""
    try:
        purpose = json.loads((run / "atelier.json").read_text(encoding="utf-8")).get("purpose")
    except (OSError, ValueError, AttributeError):
        return {}
    return {"purpose": purpose} if purpose in PURPOSES else {}


def _take(home: Home, raw: dict[str, Any], draft: Mapping[str, Any], nearest: bool = False) -> dict[str, Any]:
    """The draft that a configuration says: its own fields, and what differs from its preset as changes.

    Without a preset in it, what it does not name has the defaults of the configuration, not those of the draft's preset; with
    `nearest`, the preset is then the one that leaves the fewest changes. A preset of another family than the model's counts for its
    name, and its numbers are changes.
    """
    raw = dict(raw)
    named = raw.pop("preset", None)
    try:
        base = read_preset(named) if isinstance(named, str) else {}
    except ConfigError:
        base = None
    if base is None or not isinstance(named, str | None):
        raise Problem(f"preset is {named!r}, which does not exist. There are: {', '.join(presets())}.", errors={"preset": "no such preset"})
    course, *over = named.partition("/")[2].split("+") if named else (draft["preset"],)
    data = raw.get("data") or [{"folder": "."}]
    try:
        config = validate(merge(base, {**raw, "data": data}))
    except ConfigError as error:
        raise Problem(str(error), errors=error.errors) from None
    entry = next(d for d in config.data if d.kind == "train")
    flat = dict(flatten(config.model_dump(mode="json")))
    if entry.visits:
        flat["train.visits"] = entry.visits
    new = dict(draft) | {"changes": {}}
    if "model" in raw and "source" in raw["model"]:
        new["model"] = config.model.source
    toy = new["model"] == "demo" and "model" in raw
    if new["model"] != "demo":
        new["example"] = False
    if flat["model.family"] != "auto":
        new["changes"] = {"model.family": flat["model.family"]}  # so that its presets are those that are compared with
    if named:
        of = named.partition("/")[0]
        new["purpose"] = next((o for o in over if o in PURPOSES), draft["purpose"] if draft["purpose"] not in overlays(of) else PURPOSES[0])
        wanted = next((o for o in over if o not in PURPOSES), "")
        if variants(of):
            new["variant"] = "" if wanted == variant(home, new | {"variant": ""}) else wanted or "none"

    def changes(course: str) -> dict[str, Any]:
        name = preset_name(home, new, course)
        compared = validate(merge(read_preset(name), {"data": data}))
        reference = forms.defaults() | dict(flatten(compared.model_dump(mode="json")))
        differs = {k: v for k, v in flat.items() if k in reference and not forms.hidden(k) and v != reference[k]}
        differs = {k: v for k, v in differs.items() if forms.applies(k, flat, family(home, new))}
        return {k: "" if v is None else v for k, v in differs.items()}  # null would drop the change

    if toy and nearest and not named:
        course = "demo"
    if course == "demo" and new["model"] != "demo":
        course = "balanced"
    if nearest and not named and not toy:
        course = min((c for c in sorted(_courses()) if c != "demo"), key=lambda c: len(changes(c)))
    new |= {"preset": course, "changes": changes(course) | _whole(config)}
    if "data" in raw:
        new |= {"trigger": entry.trigger, "class_word": entry.class_word}
        new["trigger_follows"] = draft["trigger_follows"] and entry.trigger == draft["trigger"]
    if "output" in raw and "name" in raw["output"] and config.output.name != slug(draft["name"]):
        new["name"] = config.output.name
    if config.output.title and slug(config.output.title) == slug(new["name"]):  # the title is the name as it was typed
        new["name"] = new["changes"].pop("output.title", config.output.title)
    return new


def _whole(config: TrainConfig) -> dict[str, Any]:
    """What the page has no control for, as changes."""
    merges = [m.model_dump(mode="json") for m in config.model.merge]
    blocks = {name: block.model_dump(mode="json", exclude_defaults=True) for name, block in config.adapter.blocks.items()}
    return ({"model.merge": merges} if merges else {}) | ({"adapter.blocks": blocks} if blocks else {})
