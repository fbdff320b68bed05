"""What will happen at Start, before it does: steps, minutes, memory, disk, and everything that stands against it.

All of it is arithmetic on small files, so that it can be asked for at each change. Minutes come from a measurement
(`measure`) or from earlier runs on this machine, memory from a measurement or from trainer.memory.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from app import advice, datasets, forms, machine, models, settings
from app import draft as drafts
from app.errors import Problem
from app.paths import Home
from app.runner import Runner
from trainer import memory, plan
from trainer.config import TrainConfig
from trainer.data.scan import DataError
from trainer.formats.probe import FormatError
from trainer.run_dir import RunDir, write_json

RUNS = 20  # that are asked how fast they were
PRIOR = 7 / 3  # how much longer a step with loss.prior_weight takes: the base says its own, and the adapter learns it (a backward is 2)
TAIL = 65_536  # bytes read at the start and the end of a run's events
ANOTHER_START = 20.0  # seconds that a run takes before and after its steps, where no measurement says more


# ---- how fast, and how large, by what ran before ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """What one earlier run or measurement says. `rate`: pixels of training images a second; memory in GiB, 0 unknown."""

    model: str
    family: str
    device: str
    rate: float
    memory: float
    settings: Mapping[str, Any]
    measured: bool
    when: float
    start: float  # seconds before the first step


_speeds: dict[Path, tuple[tuple[int, int], Speed | None]] = {}


def earlier(home: Home) -> list[Speed]:
    """The newest runs and measurements on this machine that say how fast they were, newest first."""
    roots = [home.runs, *(Path(f).expanduser() for f in settings.load(home).run_folders)]
    found = []
    for root in roots:
        found += _event_files(root)
    newest = sorted(found, reverse=True)[:RUNS]
    newest += sorted((e for e in _event_files(home.jobs) if e[1].parent.name.startswith("measure-")), reverse=True)[:RUNS]
    speeds = [s for _, path in newest if (s := _speed(path))]
    return sorted(speeds, key=lambda s: s.when, reverse=True)


def _event_files(root: Path) -> Iterator[tuple[float, Path]]:
    for path in root.glob("*/events.jsonl"):
        try:
            yield path.stat().st_mtime, path
        except OSError:
            continue


def _speed(path: Path) -> Speed | None:
    stat = path.stat()
    stamp = stat.st_mtime_ns, stat.st_size
    if _speeds.get(path, (None, None))[0] != stamp:
        _speeds[path] = stamp, _read_speed(path, stat.st_mtime)
    return _speeds[path][1]


def _read_speed(path: Path, when: float) -> Speed | None:
    """From the first and last lines of a run's events, which may be long."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        with path.open("rb") as file:
            raw = file.read(TAIL)
            if path.stat().st_size > 2 * TAIL:
                file.seek(-TAIL, 2)
                raw = raw[: raw.rfind(b"\n") + 1] + file.read().partition(b"\n")[2]
            else:
                raw += file.read()
        events = [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]
        started = next((e for e in events if e["type"] == "started"), None)
        measured = next((e for e in reversed(events) if e["type"] == "measured"), None)
        steps = [e for e in events if e["type"] == "step"]
        if measured and not started:  # the steps of a measurement have a folder of their own
            inner = [json.loads(line) for line in (path.parent / "run" / "events.jsonl").read_bytes().splitlines()]
            started = next(e for e in inner if e["type"] == "started")
            events += inner
        buckets = started["buckets"] if started else []
        area = sum(w * h * n for w, h, n in buckets) / max(1, sum(n for _, _, n in buckets))
        mode = next((e["mode"] for e in reversed(events) if e["type"] == "memory"), "fast")
        facts = {k: config["train"][k] for k in ("dtype", "batch_size")} | {"text_1": config["part"]["text_1"]["train"], "memory": mode}
        model, family = config["model"]["source"], (started or {}).get("family", forms.families()[0])
        slower = PRIOR if config.get("loss", {}).get("prior_weight") else 1
        if measured:
            return Speed(model, family, measured["device"], measured["images_per_s"] * area * slower, measured["memory_gib"], facts, True, when,
                         measured.get("start_seconds", ANOTHER_START))  # fmt: skip
        rates = [e["images_per_s"] * slower for e in steps[1:] or steps]  # the first step warms up
        if not started or not rates or not area:
            return None
        first = steps[0]["time"] - started["time"] if steps else ANOTHER_START
        return Speed(model, family, started["device"], median(rates) * area, max((e.get("memory_gib", 0) for e in steps), default=0), facts, False,
                     when, min(600.0, max(0.0, first)))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration):
        return None


def _alike(speed: Speed, config: TrainConfig, source: str, family: str, mode: str) -> bool:
    """Whether a run says something about this one: the same family and the same parts, precision and `mode` of keeping within memory."""
    toy = source == "demo" or Path(source) == models.DEMO
    its_toy = speed.model == "demo" or Path(speed.model) == models.DEMO
    return (
        toy == its_toy
        and speed.family == family
        and speed.settings["memory"] == mode
        and speed.settings["text_1"] == config.part.text_1.train
        and speed.settings["dtype"] == config.train.dtype
    )


# ---- the plan ---------------------------------------------------------------------------------------------------------------


def make(home: Home, runner: Runner | None = None, draft: dict[str, Any] | None = None) -> dict[str, Any]:
    """The plan of assets/help/api.md for the draft as it stands."""
    draft = draft or drafts.load(home)
    probe = machine.info(home)
    found = _Found(home, draft, probe)
    if runner is not None:
        found.answer["measuring"] = _measuring(home, runner)
    return found.answer


class _Found:
    """One plan on its way: `answer` grows in the order in which the page shows it."""

    def __init__(self, home: Home, draft: dict[str, Any], probe: dict[str, Any] | None) -> None:
        self.home, self.draft, self.probe = home, draft, probe
        self.items: list[dict[str, str]] = []
        self.config, self.errors = drafts.check(home, draft)
        self.texts = drafts.captions(home, draft)
        self.model, self.model_error = models.glance(home, draft["model"], draft["example"])
        self.laid: plan.Plan | None = None
        disk = shutil.disk_usage(home.root)
        self.answer: dict[str, Any] = {
            "steps": 0, "visits": self.config.train.visits if self.config else 0, "images": len(self.texts), "minutes": None,
            "minutes_from": "", "memory_gib": None, "memory_free_gib": 0.0, "memory_where": "computer",
            "memory_mode": "", "disk_gb": 0.0,
            "disk_free_gb": round(disk.free / 1e9, 1), "buckets": [], "preflight": [], "startable": False, "measuring": False,
        }  # fmt: skip
        self.gpu()
        self.images()
        self.captions()
        self.model_chosen()
        self.names()
        self.settings()
        self.lay_out()
        if self.laid is not None and self.config is not None:
            self.time_and_memory()
            self.disk(disk.free)
        if not any(i["level"] in ("error", "warning") for i in self.items):
            self.say("ok", "Everything is ready.", "")
        order = {"error": 1, "warning": 2, "info": 3, "ok": 4}
        first = [i for i in self.items if i.get("first")]
        rest = sorted((i for i in self.items if not i.get("first")), key=lambda i: order[i["level"]])
        self.answer["preflight"] = [{k: i[k] for k in ("level", "text", "field")} for i in [*first, *rest]]
        self.answer["startable"] = not any(i["level"] == "error" for i in self.items)

    def say(self, level: str, text: str, field: str, first: bool = False) -> None:
        self.items.append({"level": level, "text": text, "field": field, **({"first": "yes"} if first else {})})

    def gpu(self) -> None:
        """First of all, a GPU that is there but not used."""
        if self.probe is None:
            problem = machine.problem(self.home)
            if problem:
                self.say("warning", problem, "train.device", first=True)
            elif machine.probing(self.home):
                self.say("info", "Looking at what this machine has ...", "train.device", first=True)
            return
        asked_for_cpu = self.config is not None and self.config.train.device == "cpu"
        if self.probe.get("gpu_unusable"):
            self.say("warning", self.probe["gpu_unusable"], "train.device", first=True)
        elif asked_for_cpu and self.probe.get("gpus"):
            self.say(
                "warning",
                f"{self.probe['gpus'][0]['name']} is there, but Device is set to cpu. Set it to auto.",
                "train.device",
                first=True,
            )
        elif self.on_cpu and not self.draft["example"] and self.model and not self.model["toy"]:
            self.say(
                "warning", "There is no GPU that can be used here. On a processor a training takes many hours.", "train.device", first=True
            )

    @property
    def on_cpu(self) -> bool:
        wish = self.config.train.device if self.config else "auto"
        device = wish if wish != "auto" else str(((self.probe or {}).get("choice") or {}).get("device", ""))
        return not device.startswith(("cuda", "xpu"))

    def images(self) -> None:
        n = len(self.texts)
        if n == 0:
            self.say("error", "There are no images yet. Add 10 to 20 of what you want to train.", "images")
        elif found := advice.number(n, self.draft["purpose"]):
            self.say("warning" if found[0] == "few" else "info", found[1], "images")

    def captions(self) -> None:
        trigger, class_word = self.draft["trigger"], self.draft["class_word"]
        missing = sum(not t for t in self.texts)
        if text := advice.uncaptioned(missing, len(self.texts), trigger, class_word):
            self.say("info" if missing < len(self.texts) and (trigger or class_word) else "warning", text, "captions")

    def model_chosen(self) -> None:
        if self.model_error:
            self.say("error", self.model_error, "model")
        elif self.model is None:
            self.say("error", "Choose the model that you make pictures with: the LoRA is made for it.", "model")
        elif self.model["toy"]:
            self.say(
                "info",
                "The base is the built-in toy, which draws simple shapes: good for trying this page out, not for real pictures.",
                "model",
            )
        elif not self.model["trainable"]:
            self.say("error", f"{self.model['name']} is {self.model['what']} and cannot be trained on.", "model")
        else:
            if self.model["warning"]:
                self.say("warning", f"{self.model['name']} is {self.model['warning']}. A LoRA trained on it will not hold well.", "model")
            if self.model["kind"] == "hub":
                size = self.model.get("download_gb")
                text = f"about {size:g} GB, " if size else ""
                licence = f"licence: {self.model['license']}" if self.model.get("license") else "its licence stands on its page"
                self.say("info", f"{self.model['name']} is downloaded from the hub when training starts: {text}{licence}.", "model")
            wanted = self.config.model.family if self.config else "auto"
            if wanted not in ("auto", self.model["family"]) and self.model["family"]:
                self.say(
                    "error", f"{self.model['name']} is a model of {self.model['title']}. Set Model family to Automatic.", "model.family"
                )
            self.text_encoders()

    def text_encoders(self) -> None:
        """SD3's text encoders may be missing from a single file, and T5 may be left out."""
        assert self.model is not None
        held = self.model["text_encoders"]
        if held is None or self.config is None:
            return
        name, folder = self.model["name"], self.config.model.text_encoders
        if folder is not None and not folder.expanduser().is_dir():
            self.say(
                "error", f"The folder of text encoders, {folder}, is not there. Name another, or empty the field.", "model.text_encoders"
            )
        elif not {"text_encoder", "text_encoder_2"} <= set(held) and folder is None:
            self.say(
                "error",
                f"{name} holds no text encoders. Name the folder where clip_l and clip_g lie under Folder of text encoders.",
                "model.text_encoders",
            )
        elif not self.t5 and self.config.model.t5 != "skip":
            without = "without its tokenizer" if models.T5 in held else "not in it"
            self.say(
                "info",
                f"The largest text encoder (T5) is {without}, so captions are read by the two CLIPs, as many programs do. "
                "Folder of text encoders adds it.",
                "model.text_encoders",
            )

    @property
    def t5(self) -> bool:
        assert self.config is not None
        folder = self.config.model.text_encoders
        return self.model is not None and models.uses_t5(self.model, folder and folder.expanduser(), self.config.model.t5)

    def names(self) -> None:
        if not self.draft["name"]:
            self.say("error", "Give it a name: the file is called after it.", "name")
        if warning := drafts.trigger_warning(self.draft, self.texts):
            self.say("warning", warning, "trigger")

    def settings(self) -> None:
        for field, text in self.errors.items():
            self.say("error", text, field)
        start = self.config.adapter.start if self.config and hasattr(self.config.adapter, "start") else None
        if start is not None and not start.expanduser().is_file():
            self.say(
                "error", f"The LoRA to start from, {start}, is not there any more. Choose another, or empty the field.", "adapter.start"
            )
        for entry in self.config.model.merge if self.config else ():
            if not entry.file.expanduser().is_file():
                self.say(
                    "error", f"The LoRA to merge into the base, {entry.file}, is not there. Mend the configuration file.", "model.merge"
                )

    @cached_property
    def family(self) -> str:
        return drafts.family(self.home, self.draft)

    @property
    def table(self) -> str:
        model = self.model or {}
        return "demo" if model.get("toy") else model.get("variant") or self.family

    def lay_out(self) -> None:
        """Images into buckets, by the trainer's own plan; one visit of each is laid out, and the steps of all are counted."""
        if self.config is None or not self.texts:
            return
        try:  # so that their images are looked at once and for all, as those of the page are
            for each in self.draft["sets"]:
                datasets.open(self.home, each["dataset"]).looks()
        except Problem:
            self.say("error", "A further set of images is not there any more. Take it out.", "sets")
            return
        try:
            native = models.resolution(self.model, self.config.model.prediction)
            data = tuple(d.model_copy(update={"visits": None}) for d in self.config.data)
            once = self.config.model_copy(update={"train": self.config.train.model_copy(update={"visits": 1}), "data": data})
            self.laid = plan.make(once, native, self.family)
        except DataError as error:
            for text in error.problems[:5]:
                self.say("error", forms.in_words(_short(text)), "images")
            if len(error.problems) > 5:
                self.say("error", f"{len(error.problems) - 5} more images have problems.", "images")
            return
        except FormatError as error:
            self.say("error", str(error), "model")
            return
        except ValueError as error:  # a bucket step above the resolution, or too fine; nothing to keep, or nothing left to train on
            field = (
                "class_word" if "class_word" in str(error) else "dataset.hold_out" if "hold_out" in str(error) else "dataset.bucket_step"
            )
            self.say("error", forms.in_words(str(error)), field)
            return
        self.answer["steps"] = plan.length(self.laid, self.config)
        self.answer["buckets"] = [[w, h, n] for (w, h), n in self.laid.buckets().items()]
        self.answer["images"] = len(self.laid.images)
        for text in self.laid.warnings:
            if "empty caption" not in text:
                self.say("warning", forms.in_words(_short(text)), "images")
        if self.answer["steps"] < 100 and not self.draft["example"]:
            self.say(
                "warning", f"Only {self.answer['steps']} steps: the LoRA may learn little. Raise the visits to each image.", "train.visits"
            )

    def time_and_memory(self) -> None:
        assert self.config is not None and self.laid is not None
        config, laid = self.config, self.laid
        buckets = laid.buckets()
        if self.probe is None:  # what this machine has is not known yet
            return
        choice, gpus = self.probe["choice"], self.probe["gpus"]
        wish = config.train.device if config.train.device != "auto" else choice["device"]
        number = int(wish.partition(":")[2] or 0)
        gpu = gpus[number] if wish.startswith("cuda") and number < len(gpus) else None
        name = choice["name"] if wish == choice["device"] else gpu["name"] if gpu else self.probe["cpu"]["name"] if wish == "cpu" else ""

        dtype = config.train.dtype if config.train.dtype != "auto" else choice["dtype"] if wish == choice["device"] else "fp32"
        rows = min(config.train.batch_size, max(buckets.values()))
        need = memory.Need(self.table, max(w * h for w, h in buckets), dtype, rows, self.on_cpu, self.t5)
        known = self.table in memory.TABLES
        way = memory.choose(config, need, gpu["free_gib"]) if gpu and known else memory.ladder(config, rows)[0]

        alike = [s for s in earlier(self.home) if s.device == name and _alike(s, config, self.draft["model"], self.family, way.mode)]
        measured = next((s for s in alike if s.measured), None)
        runs = [s for s in alike if not s.measured]
        if alike:
            speed, start = (measured.rate, measured.start) if measured else (median(s.rate for s in runs), median(s.start for s in runs))
            slower = PRIOR if config.loss.prior_weight else 1
            self.answer["minutes"] = round((plan.pixels(laid, config) / speed * slower + start) / 60, 1)
            many = f"{len(runs)} earlier run{'s' if len(runs) > 1 else ''} on this machine"
            self.answer["minutes_from"] = "a measurement" if measured else many

        if known:
            self.answer["memory_gib"] = round(memory.peak(config, need, way), 1)
        exact = next((s for s in alike if s.measured and s.memory and s.settings["batch_size"] == config.train.batch_size), None)
        if exact:
            self.answer["memory_gib"] = round(exact.memory + (0 if self.on_cpu else memory.CONTEXT), 1)
        if gpu:
            total = gpu["memory_gib"]
            self.answer |= {"memory_where": "GPU", "memory_free_gib": gpu["free_gib"]}
            if way.mode != "fast":
                self.answer["memory_mode"] = memory.MODES[way.mode].title
        else:
            live = machine.live(self.home)
            total = live["memory_gib"]
            self.answer["memory_free_gib"] = live["free_memory_gib"]
        if self.answer["memory_gib"] and self.answer["memory_gib"] > self.answer["memory_free_gib"]:
            self.too_large(config, need if known and not exact else None, total)
        elif known and gpu:
            self.roomier(config, need, way, gpu["free_gib"])

    def roomier(self, config: TrainConfig, need: memory.Need, way: memory.Choice, free: float) -> None:
        """Say what the GPU's memory has to do with how long the training takes, and with what comes of it."""
        if config.train.memory == "auto":
            if way.mode in ("8bit", "4bit"):
                bits = memory.MODES[way.mode].bits
                self.say(
                    "info",
                    f"So that it fits, the frozen model is held in {bits} bits, which changes results a little. A smaller resolution or "
                    "batch, or a smaller base, would do without.",
                    "train.memory",
                )
            return
        best = memory.choose(_with(config, train={"memory": "auto"}), need, free)
        if settings.load(self.home).memory != "low" and list(memory.MODES).index(best.mode) < list(memory.MODES).index(way.mode):
            self.say(
                "info",
                f"The GPU has room for training {memory.MODES[best.mode].title}, which is quicker: set Save memory to Automatic.",
                "train.memory",
            )

    def too_large(self, config: TrainConfig, need: memory.Need | None, total: float) -> None:
        """Say that memory is short, and what would make the training fit. `need` is None where memory was measured."""
        takes, free = self.answer["memory_gib"], self.answer["memory_free_gib"]
        where = "The GPU" if self.answer["memory_where"] == "GPU" else "This computer"
        if takes <= total:  # what is free was read when the machine was looked at, and changes
            said = f"The training takes about {takes:.1f} GiB. {where} has {total:.1f} GiB, of which {free:.1f} were free when it was looked at."
            return self.say("warning", f"{said} Close other programs that use it.", "train.memory")
        way = memory.choose(config, need, total) if need else None
        stages = memory.stages(config, need, way) if need else {"training": takes}
        when = {"previews": " while it makes sample images", "encoding": " while it encodes the images"}.get(
            max(stages, key=stages.get), ""
        )
        said = f"The training takes about {takes:.1f} GiB{when}, and {where[0].lower()}{where[1:]} has {total:.1f} GiB in all."
        side = config.dataset.resolution or (self.laid.resolution if self.laid else 0)
        remedies = list(_remedies(config, need, side))
        used: list[Remedy] = []
        for remedy in remedies:
            used.append(remedy)
            if need is None or _fits(config, need, used, total):
                break
        else:
            least = _takes(config, need, remedies, total) if need else takes
            text = f"{said} Even with everything that saves memory it takes about {least:.1f} GiB: choose a smaller base model."
            return self.say("warning", text, "model")
        for remedy in list(used):  # what the later ones make needless
            rest = [r for r in used if r is not remedy]
            if need and rest and _fits(config, need, rest, total):
                used = rest
        text = ", and ".join(r.text for r in used)
        return self.say("warning", f"{said} {text[0].upper()}{text[1:]}.", used[0].field)

    def disk(self, free: int) -> None:
        """What the run's folder will hold: LoRA files along the way, resumable states, sample images."""
        assert self.config is not None
        config, steps = self.config, self.answer["steps"]
        if self.table not in memory.TABLES:
            return
        due = plan.due(config, steps)
        files = 1 + _count(due.save)
        states = min(config.output.keep_checkpoints, 1 + _count(due.checkpoint)) + 1  # the new one is written before an old one goes
        pictures = (2 + _count(due.preview)) * max(4, len(config.preview.prompts)) * 600_000 if config.preview.enabled else 0
        need = files * memory.lora_bytes(config, self.table) + states * memory.checkpoint_bytes(config, self.table) + pictures
        if self.model and self.model["kind"] == "hub":
            need += int((self.model.get("download_gb") or 0) * 1e9)
        self.answer["disk_gb"] = round(need / 1e9, 2)
        if need > free:
            self.say(
                "error",
                f"The run takes about {need / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free in {self.home.root}. Free some space.",
                "output.save_every",
            )
        elif need * 3 > free:
            self.say(
                "warning", f"The run takes about {need / 1e9:.1f} GB of disk, and only {free / 1e9:.1f} GB are free.", "output.save_every"
            )


@dataclass(frozen=True)
class Remedy:
    """Something that takes less memory: the changes of each section, said to the user, and the field that it is about."""

    changes: Mapping[str, Mapping[str, Any]]
    text: str
    field: str
    side: int = 0  # a new resolution, if it is one


def _takes(config: TrainConfig, need: memory.Need, remedies: Sequence[Remedy], total: float) -> float:
    """GiB that the training takes on a GPU (or computer) of `total`, with the remedies."""
    for remedy in remedies:
        config = _with(config, **remedy.changes)
    side = next((r.side for r in reversed(remedies) if r.side), 0)
    need = replace(need, pixels=min(need.pixels, side * side) if side else need.pixels, t5=need.t5 and config.model.t5 != "skip")
    return memory.peak(config, need, memory.choose(config, need, total))


def _fits(config: TrainConfig, need: memory.Need, remedies: Sequence[Remedy], total: float) -> bool:
    return _takes(config, need, remedies, total) <= total


def _remedies(config: TrainConfig, need: memory.Need | None, side: int) -> Iterator[Remedy]:
    """What takes less memory, from what costs the least."""
    if config.train.memory != "auto":
        yield Remedy({"train": {"memory": "auto"}}, "set Save memory to Automatic", "train.memory")
    t5 = need is not None and need.t5
    if t5 and config.model.t5 == "auto":
        yield Remedy({"model": {"t5": "8bit"}}, "load T5 in 8 bits", "model.t5")
    if t5:
        yield Remedy({"model": {"t5": "skip"}}, "leave T5 out", "model.t5")
    trained = [p for p in ("text_1", "text_2") if getattr(config.part, p).train]
    if trained and config.part.unet.train:
        off = {p: getattr(config.part, p).model_copy(update={"train": False}) for p in trained}
        yield Remedy({"part": off}, "leave the text encoders alone", f"part.{trained[-1]}.train")
    for lower in (1024, 768, 512):
        if lower < side:
            yield Remedy({}, f"lower the resolution to {lower}", "dataset.resolution", lower)


def _with(config: TrainConfig, **sections: Mapping[str, Any]) -> TrainConfig:
    """A configuration with other values; they are not checked again."""
    return config.model_copy(update={name: getattr(config, name).model_copy(update=dict(values)) for name, values in sections.items()})


def _count(times: Any) -> int:
    return len(times)


def _short(text: str) -> str:
    """A sentence of the scan without the setting's name and the long path before it."""
    head, sign, rest = text.partition("): ")
    return rest[:1].upper() + rest[1:] if sign and head.startswith("data.") else text


# ---- the measurement ----------------------------------------------------------------------------------------------------------


def measure(home: Home, runner: Runner) -> Path:
    """Have a few steps of the draft run in a process of its own. Returns the job's folder. Raises Problem where it cannot start."""
    draft = drafts.load(home)
    found = make(home, runner, draft)
    if found["measuring"]:
        raise Problem("A measurement is going on already.", 409)
    errors = [i["text"] for i in found["preflight"] if i["level"] == "error"]
    if errors:
        raise Problem(f"This cannot be measured yet: {errors[0]}", 409)
    config, _ = drafts.check(home, draft)
    assert config is not None
    job = home.jobs / f"measure-{time.strftime('%Y%m%d-%H%M%S')}"
    job.mkdir(parents=True, exist_ok=True)
    write_json(job / "config.json", config.model_dump(mode="json"))
    runner.submit("measure", job, ["measure", str(RunDir(job).config), "--run-dir", str(job)])
    return job


def _measuring(home: Home, runner: Runner) -> bool:
    newest = max(home.jobs.glob("measure-*"), default=None, key=lambda p: p.name)
    return newest is not None and runner.look(newest).state in ("waiting", "starting", "running")
