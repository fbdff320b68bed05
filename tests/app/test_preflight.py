"""What is said before Start: steps, minutes, memory, disk and the list of what stands against it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from app import datasets, draft, machine, preflight, settings
from app.errors import Problem
from app.paths import ROOT, Home
from app.runner import Runner
from trainer import events, memory, plan
from trainer.config.load import validate
from trainer.run_dir import RunDir

DEMO = ROOT / "assets" / "demo" / "base"
CPU = {
    "gpus": [], "gpu_unusable": None, "cpu": {"name": "A processor", "cores": 2}, "memory_gib": 8.0, "free_memory_gib": 6.0,
    "choice": {"device": "cpu", "name": "A processor", "dtype": "fp32"},
}  # fmt: skip
GPU = CPU | {
    "gpus": [{"name": "A card", "memory_gib": 8.0, "free_gib": 7.6, "compute_capability": "8.6", "bf16": True}],
    "choice": {"device": "cuda", "name": "A card", "dtype": "bf16"},
}


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    settings.save(home, {"run_folders": []})
    return home


@pytest.fixture
def has(home):
    """has(probe): what the machine is, as a probe of today that was kept."""

    def put(found: dict) -> None:
        machine._probes.pop(home.root, None)
        (home.cache / "probe.json").write_text(json.dumps({"stamp": machine.stamp(), "found": found}))

    return put


@pytest.fixture
def sd15(tmp_path) -> Path:
    """A checkpoint that looks like SD1.5: its header is that of one."""
    from tests.app.test_models import SD1, write

    return write(tmp_path / "dreamshaper_8.safetensors", SD1)


@pytest.fixture
def ready(home, draw_pictures, tmp_path, sd15):
    """A draft with everything it needs."""
    now = draft.update(home, name="My Cat", model=str(sd15))
    datasets.open(home, now["dataset"]).add_folder(draw_pictures(tmp_path / "pictures", [(512, 512)] * 6 + [(768, 512)] * 4))
    return now


def said(found: dict, level: str | None = None, field: str | None = None) -> list[str]:
    items = found["preflight"]
    return [i["text"] for i in items if level in (None, i["level"]) and field in (None, i["field"])]


def test_an_empty_draft_says_what_is_missing(home):
    found = preflight.make(home)
    assert not found["startable"] and found["steps"] == 0
    assert {i["field"] for i in found["preflight"] if i["level"] == "error"} == {"images", "model", "name"}


def test_a_ready_draft_can_start(home, ready, has):
    has(GPU)
    found = preflight.make(home)
    assert found["startable"] and said(found) == ["Everything is ready."], found["preflight"]
    assert (found["images"], found["visits"], found["steps"]) == (10, 100, 500)
    assert sum(n for _, _, n in found["buckets"]) == 10
    assert (found["memory_where"], found["memory_free_gib"]) == ("GPU", 7.6) and 4 < found["memory_gib"] < 7
    assert found["minutes"] is None and 0 < found["disk_gb"] < 2 < found["disk_free_gb"]


@pytest.mark.parametrize("seed", range(8))
def test_the_steps_are_those_that_the_trainer_will_make(seed, home, draw_pictures, tmp_path, has):
    rng = random.Random(seed)
    sizes = [rng.choice([(128, 128), (192, 96), (96, 192), (160, 128)]) for _ in range(rng.randint(1, 9))]
    now = draft.update(home, name="x", model=str(DEMO), changes={"train.visits": rng.randint(1, 9), "train.batch_size": rng.randint(1, 5)})
    datasets.open(home, now["dataset"]).add_folder(draw_pictures(tmp_path / "pictures", sizes))
    config, _ = draft.check(home, now)
    laid = plan.make(config, 128)
    found = preflight.make(home)
    assert found["steps"] == len(laid.steps) and {(w, h): n for w, h, n in found["buckets"]} == laid.buckets()


def test_it_is_fast_also_for_a_long_run(home, ready):
    draft.update(home, changes={"train.visits": 100_000})
    preflight.make(home)
    best = []
    for _ in range(3):
        began = time.perf_counter()
        assert preflight.make(home)["steps"] == 500_000
        best.append(time.perf_counter() - began)
    assert min(best) < 0.15


def test_a_gpu_that_is_not_used_is_said_first(home, ready, has):
    has(CPU | {"gpu_unusable": "An NVIDIA GPU is there, but the driver is too old."})
    draft.update(home, name="", changes={"adapter.rank": 0})
    found = preflight.make(home)
    assert found["preflight"][0] == {
        "level": "warning",
        "text": "An NVIDIA GPU is there, but the driver is too old.",
        "field": "train.device",
    }
    assert not found["startable"] and len(found["preflight"]) > 2
    has(GPU)
    draft.update(home, name="x", changes={"adapter.rank": None, "train.device": "cpu"})
    assert "A card is there, but Device is set to cpu" in preflight.make(home)["preflight"][0]["text"]
    has(CPU)
    assert "takes many hours" in preflight.make(home)["preflight"][0]["text"]


def test_images_and_captions(home, draw_pictures, tmp_path, sd15):
    now = draft.update(home, name="x", trigger="", model=str(sd15))
    folder = draw_pictures(tmp_path / "pictures", [(512, 512)] * 3)
    (folder / "00.txt").unlink()
    data = datasets.open(home, now["dataset"])
    data.add_folder(folder)
    found = preflight.make(home)
    assert "Only 3 images" in said(found, "warning", "images")[0]
    assert "there is no trigger or class word" in said(found, "warning", "captions")[0]
    draft.update(home, trigger="zorp", class_word="robot")
    assert "will be called “zorp robot”" in said(preflight.make(home), "info", "captions")[0]
    (data.images / "00.png").write_bytes(b"no image")
    found = preflight.make(home)
    assert not found["startable"] and "00.png" in said(found, "error", "images")[0]


def test_bad_settings_a_bad_trigger_and_small_images_are_said_at_their_fields(home, draw_pictures, tmp_path, sd15):
    now = draft.update(home, name="x", trigger="cat", model=str(sd15), changes={"adapter.alpha": 0})
    datasets.open(home, now["dataset"]).add_folder(draw_pictures(tmp_path / "pictures", [(100, 100)] * 8))
    found = preflight.make(home)
    assert said(found, "error", "adapter.alpha") == ["Alpha is 0; it must be greater than 0.0."] and not found["startable"]
    assert "already means something" in said(found, "warning", "trigger")[0]
    draft.update(home, changes={"adapter.alpha": None, "train.visits": 3, "adapter.start": str(tmp_path / "gone.safetensors")})
    found = preflight.make(home)
    assert "enlarged" in said(found, "warning", "images")[0] and "Only " in said(found, "warning", "train.visits")[0]
    assert "not there any more" in said(found, "error", "adapter.start")[0]
    draft.update(home, changes={"adapter.start": None, "dataset.bucket_step": 256, "dataset.resolution": 64})
    assert "Lower Bucket step" in said(preflight.make(home), "error", "dataset.bucket_step")[0]


def test_the_model(home, ready, tmp_path, sd15):
    from tests.app.test_models import INPAINTING, SD1, write

    draft.update(home, model=str(write(tmp_path / "fill.safetensors", INPAINTING)))
    assert "an inpainting or editing model of Stable Diffusion XL" in said(preflight.make(home), "error", "model")[0]
    draft.update(home, model=str(write(tmp_path / "dreamshaper_8_LCM.safetensors", SD1)))
    found = preflight.make(home)
    assert "undistilled parent" in said(found, "warning", "model")[0] and found["startable"]
    draft.update(home, changes={"model.family": "sdxl"})
    assert "a model of Stable Diffusion 1.x. Set Model family to Automatic" in said(preflight.make(home), "error", "model.family")[0]
    draft.example(home)
    found = preflight.make(home)
    assert found["startable"] and "toy" in said(found, "info", "model")[0] and found["steps"] == 266


def card(gib: float, free: float | None = None) -> dict:
    return GPU | {"gpus": [GPU["gpus"][0] | {"memory_gib": gib, "free_gib": gib - 0.3 if free is None else free}]}


def test_memory_is_saved_by_itself_and_only_then_is_something_asked_for(home, ready, has):
    has(card(5.0))
    draft.update(home, changes={"train.batch_size": 4})
    found = preflight.make(home)
    assert found["memory_mode"] == "with every block computed twice" and found["memory_gib"] < 4.7 and not said(found, "warning")
    draft.update(home, changes={"train.batch_size": 8, "dataset.resolution": 1536})
    found = preflight.make(home)
    assert found["memory_mode"].endswith("the base in 8 bits") and "held in 8 bits" in said(found, "info", "train.memory")[0]
    has(card(3.0))
    assert said(preflight.make(home), "warning", "dataset.resolution")[0].endswith("Lower the resolution to 1024.")
    has(card(2.0))
    found = said(preflight.make(home), "warning", "part.text_1.train")[0]
    assert found.endswith("Leave the text encoders alone, and lower the resolution to 512.")
    has(card(1.0))
    assert "choose a smaller base model" in said(preflight.make(home), "warning", "model")[0]
    has(card(8.0, free=1.0))
    draft.update(home, changes={"dataset.resolution": None})
    assert "Close other programs" in said(preflight.make(home), "warning")[0]


def test_a_large_model_on_cards_of_several_sizes(home, ready, has, tmp_path):
    from tests.app.test_models import SDXL, write

    draft.update(home, model=str(write(tmp_path / "juggernautXL.safetensors", SDXL)))
    modes = {}
    for gib in (24.0, 10.0, 8.0, 6.0):
        has(card(gib))
        found = preflight.make(home)
        assert found["memory_gib"] < gib and not said(found, "warning", "train.memory")
        modes[gib] = found["memory_mode"]
    every = "with every block computed twice"
    assert list(modes.values()) == ["", "with feed-forward layers computed twice", every, f"{every} and the base in 8 bits"]
    has(card(24.0))
    draft.update(home, changes={"train.memory": "checkpointing"})
    assert "room for training with everything kept, which is quicker" in said(preflight.make(home), "info", "train.memory")[0]
    draft.update(home, changes={"train.memory": None, "part.text_2.train": True})
    assert preflight.make(home)["memory_gib"] == pytest.approx(13.6, abs=1.5)


def test_sd3_says_what_becomes_of_its_text_encoders(home, ready, has, tmp_path):
    from tests.app.test_models import CLIPS, SD35, T5, write

    has(GPU)
    draft.update(home, model=str(write(tmp_path / "bare.safetensors", SD35)))
    found = preflight.make(home)
    assert not found["startable"] and "holds no text encoders" in said(found, "error", "model.text_encoders")[0]
    draft.update(home, changes={"model.text_encoders": str(tmp_path / "nowhere")})
    assert "is not there" in said(preflight.make(home), "error", "model.text_encoders")[0]
    draft.update(home, model=str(write(tmp_path / "whole.safetensors", SD35 | CLIPS | T5)), changes={"model.text_encoders": None})
    has(GPU | {"gpus": [GPU["gpus"][0] | {"memory_gib": 80.0, "free_gib": 79.0}]})
    found = preflight.make(home)
    assert found["startable"] and "without its tokenizer" in said(found, "info", "model.text_encoders")[0]
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").touch()
    draft.update(home, changes={"model.text_encoders": str(tmp_path / "words")})
    more = preflight.make(home)
    assert said(more, field="model.text_encoders") == [] and more["memory_gib"] > found["memory_gib"]
    draft.update(home, changes={"model.t5": "skip"})
    assert preflight.make(home)["memory_gib"] == found["memory_gib"]
    has(card(9.0))
    draft.update(home, changes={"model.t5": None})
    assert preflight.make(home)["memory_mode"].endswith("in 8 bits")  # T5 alone takes 8.9 GiB in 16 bits
    draft.update(home, changes={"model.t5": "8bit"})
    assert preflight.make(home)["memory_mode"] == "with every block computed twice"


def test_bucket_steps_and_sizes_are_those_of_the_family(home, ready, has, tmp_path):
    from tests.app.test_models import SD2, SDXL, write

    draft.update(home, changes={"dataset.bucket_step": 32})
    assert "takes multiples of 64. Set Bucket step to 64" in said(preflight.make(home), "error", "dataset.bucket_step")[0]
    draft.update(home, model=str(write(tmp_path / "xl.safetensors", SDXL)))
    found = preflight.make(home)
    assert found["startable"] and sum(n for w, h, n in found["buckets"] if w * h > 900**2) == 10
    draft.update(home, model=str(write(tmp_path / "sd2.safetensors", SD2)), changes={"dataset.bucket_step": None})
    assert [768, 768, 6] in preflight.make(home)["buckets"]
    draft.update(home, changes={"model.prediction": "epsilon"})
    assert [512, 512, 6] in preflight.make(home)["buckets"]


def test_a_full_disk_is_an_error(home, ready, monkeypatch):
    usage = preflight.shutil.disk_usage(home.root)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    found = preflight.make(home)
    assert not found["startable"] and "0.1 GB are free" in said(found, "error", "output.save_every")[0]


# ---- minutes


def ran(home: Home, name: str, changes: dict, *, rate: float, device: str = "A card", area: int = 512 * 512, when: float = 0) -> None:
    """A run's folder as the trainer leaves it."""
    family = changes.pop("family", "sd1")
    config = validate({"data": [{"folder": "."}], "model": {"source": changes.pop("model", "/m.safetensors")}} | draft.nest(changes))
    folder = RunDir(home.runs / name)
    folder.create()
    folder.config.write_text(config.model_dump_json(), encoding="utf-8")
    write = events.Writer(folder.events)
    side = int(area**0.5)
    write("started", name=name, total=100, images=10, buckets=[[side, side, 10]], device=device, dtype="bf16", reasons=[], family=family)
    write("memory", mode=config.train.memory.replace("auto", "fast"), accumulation=1)
    for step in range(1, 40):
        write("step", step=step, loss=0.1, rate={}, images_per_s=0.1 if step == 1 else rate, eta_s=1, epoch=1, memory_gib=4.0)
    write.close()


def test_minutes_come_from_earlier_runs_like_this_one(home, ready, has):
    has(GPU)
    ran(home, "a", {}, rate=2.0)
    pixels = sum(w * h * n for w, h, n in preflight.make(home)["buckets"]) * 100
    found = preflight.make(home)
    assert found["minutes_from"] == "1 earlier run on this machine"
    assert found["minutes"] == pytest.approx(pixels / (2.0 * 512 * 512) / 60, rel=0.05)
    ran(home, "b", {}, rate=4.0)
    ran(home, "c", {}, rate=16.0, area=256 * 256)  # as many pixels a second as b
    faster = preflight.make(home)
    assert faster["minutes_from"] == "3 earlier runs on this machine" and faster["minutes"] == pytest.approx(found["minutes"] / 2, rel=0.05)


@pytest.mark.parametrize(
    "other",
    [
        {"train.memory": "checkpointing"},
        {"part.text_1.train": False},
        {"train.dtype": "fp32"},
        {"model": "demo"},
        {"model": str(DEMO)},
        {"family": "sdxl"},
    ],
    ids=str,
)
def test_runs_of_another_kind_say_nothing(other, home, ready, has):
    has(GPU)
    ran(home, "a", dict(other), rate=2.0)
    ran(home, "b", {}, rate=2.0, device="Another card")
    (home.runs / "c").mkdir()
    (home.runs / "c" / "events.jsonl").write_text('{"torn')
    assert preflight.make(home)["minutes"] is None


def test_a_long_runs_events_are_read_at_their_ends(home, ready, has, monkeypatch):
    has(GPU)
    monkeypatch.setattr(preflight, "TAIL", 2000)
    ran(home, "a", {}, rate=2.0)
    assert (home.runs / "a" / "events.jsonl").stat().st_size > 5000
    assert preflight.make(home)["minutes_from"] == "1 earlier run on this machine"


def test_a_measurement_wins_over_runs_and_gives_the_memory(home, ready, has):
    has(GPU)
    ran(home, "a", {}, rate=2.0)
    config, _ = draft.check(home, ready)
    job = RunDir(home.jobs / "measure-20260101-000000")
    (job.root / "run").mkdir(parents=True)
    job.config.write_text(config.model_dump_json(), encoding="utf-8")
    inner = events.Writer(job.root / "run" / "events.jsonl")
    inner("started", name="x", total=10, images=10, buckets=[[512, 512, 10]], device="A card", dtype="bf16", reasons=[])
    inner.close()
    write = events.Writer(job.events)
    write("measured", seconds_per_step=0.2, images_per_s=10.0, memory_gib=4.56, device="A card", start_seconds=60.0)
    write("finished", seconds=70)
    write.close()
    found = preflight.make(home)
    pixels = sum(w * h * n for w, h, n in found["buckets"]) * 100
    assert found["minutes_from"] == "a measurement" and found["minutes"] == pytest.approx(pixels / (10 * 512**2) / 60 + 1, rel=0.05)
    assert found["memory_gib"] == pytest.approx(4.56 + memory.CONTEXT, abs=0.06)
    assert preflight.make(home, Runner(home))["measuring"] is False


def test_measuring_is_a_job_in_the_queue(home, ready, has):
    runner = Runner(home)  # nobody watches its queue, so that the job waits
    job = preflight.measure(home, runner)
    config, _ = draft.check(home, ready)
    assert validate(json.loads((job / "config.json").read_text())) == config
    assert runner.state(job) == "waiting" and preflight.make(home, runner)["measuring"]
    with pytest.raises(Problem, match="going on already"):
        preflight.measure(home, runner)
    runner.unqueue(job)
    draft.update(home, name="")
    with pytest.raises(Problem, match="Give it a name"):
        preflight.measure(home, runner)


@pytest.mark.slow
def test_the_example_is_really_measured(home, has, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runner = Runner(home)
    draft.example(home)
    job = preflight.measure(home, runner)
    deadline = time.monotonic() + 240
    while preflight.make(home, runner)["measuring"] and time.monotonic() < deadline:
        runner.tick()
        time.sleep(0.3)
    (measured,) = [e for e in events.read(job / "events.jsonl") if e["type"] == "measured"]
    has(CPU | {"choice": {"device": "cpu", "name": measured["device"], "dtype": "fp32"}})
    found = preflight.make(home, runner)
    assert found["minutes_from"] == "a measurement" and 0.05 < found["minutes"] < 30
    assert found["memory_gib"] == round(measured["memory_gib"], 1) and found["memory_where"] == "computer"
