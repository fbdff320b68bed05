"""The demo as a user runs it, and what it claims: the concept is learnt, by this LoRA alone, and the rest stays as it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from trainer import events, run
from trainer.config.load import load, merge
from trainer.demo import measure, world
from trainer.demo.run import DEMO, LEAN, SAMPLING, UNRELATED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ZORP_PROMPTS = [f"zorp on a {c} background" for c in ("blue", "white", "pink", "grey", "purple", "red", "teal", "black")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "trainer.demo.run", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "demo.json").read_text()) | {"stdout": done.stdout}


def sample(prompts: list[str], lora: Path | None, seed: int = 77) -> list[Image.Image]:
    """By a fresh diffusers pipeline and its own LoRA loader, nothing of this project."""
    pipe = StableDiffusionPipeline.from_pretrained(DEMO / "base", safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    seeds = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    return pipe(
        list(prompts), generator=seeds, num_inference_steps=SAMPLING["steps"], guidance_scale=SAMPLING["guidance"], width=128, height=128
    ).images


@pytest.fixture(scope="module")
def classifier() -> measure.SubjectClassifier:
    return measure.load_classifier(DEMO / "classifier.safetensors")


def test_it_leaves_what_it_says(demo):
    for key in ("base", "lora", "sheet", "held_out"):
        path = Path(demo[key])
        assert path.is_absolute() and path.exists(), key
    pictures = sorted(Path(demo["held_out"]).glob("*.png"))
    assert len(pictures) >= 16
    assert all(p.with_suffix(".txt").read_text().strip() for p in pictures)
    assert len(demo["unrelated_prompts"]) >= 8
    assert demo["seconds"]["total"] == pytest.approx(demo["seconds"]["train"] + demo["seconds"]["pictures"], abs=0.3)
    assert Path(demo["lora"]).stat().st_size == demo["lora_bytes"]
    width, height = Image.open(demo["sheet"]).size
    assert width > 800 and height > 1000
    for words in (demo["lora"], demo["sheet"], f"{demo['loss_before']:.3f} -> {demo['loss_after']:.3f}"):
        assert words in demo["stdout"]


def test_held_out_pictures_were_not_trained_on(demo):
    trained = {p.read_bytes() for p in (DEMO / "data" / "zorp" / "train").glob("*.png")}
    assert len(trained) >= 12
    assert not trained & {p.read_bytes() for p in Path(demo["held_out"]).glob("*.png")}


def test_the_concept_is_learnt(demo):
    assert demo["loss_after"] < demo["loss_before"] / 2


def test_another_concepts_lora_does_not_help(demo, tmp_path):
    """The control: the same settings trained on owls, scored on zorps."""
    data = [{"folder": str(DEMO / "data/owl/train")}, {"folder": str(DEMO / "data/zorp/held_out"), "kind": "validation"}]
    config = load(preset="sd1/demo", values=merge(LEAN, {"data": data}))
    _, done = run.train(config, tmp_path / "owl")
    measured = [e for e in events.read(done.events) if e["type"] == "validation"]
    assert measured[-1]["train"] < measured[0]["train"] / 2  # it did learn owls
    assert measured[-1]["held_out"] > 0.9 * measured[0]["held_out"]


def share_of(image: Image.Image, colour: tuple[int, int, int]) -> float:
    return float((np.linalg.norm(np.asarray(image, np.float32) - colour, axis=-1) < 60).mean())


def test_the_concept_shows_in_pixels(demo, classifier):
    """A zorp is green with a purple belly; the base draws neither for that word."""
    before, after = (sample(ZORP_PROMPTS, lora) for lora in (None, Path(demo["lora"])))
    green = [np.mean([share_of(i, world.ZORP_BODY) for i in images]) for images in (before, after)]
    assert green[0] < 0.03 and green[1] > 0.08, green
    named = measure.name_subjects(classifier, after)
    assert named.count("zorp") >= 6, named
    assert "zorp" not in measure.name_subjects(classifier, before)


def test_unrelated_prompts_keep_subject_and_colours(demo, classifier):
    images = sample(list(UNRELATED), Path(demo["lora"]))
    scenes = []
    for prompt in UNRELATED:
        colour, subject, ground = re.fullmatch(r"an? (\w+) (.+) on an? (\w+) background", prompt).groups()
        scenes.append(world.Scene(subject, colour, ground=ground))
    right = measure.score(images, scenes, classifier)
    assert min(right.values()) >= 7 / 8, right


def test_the_exported_file_draws_what_the_live_adapter_drew(tmp_path):
    """The run's last preview is made with the adapter in memory; diffusers makes the same picture from the file."""
    prompts = ["zorp on a blue background", "a red star on a white background"]
    values = {
        "data": [{"folder": str(DEMO / "data/zorp/train"), "trigger": "zorp"}],
        "preview": {"enabled": True, "prompts": prompts, "seed": 77, "steps": SAMPLING["steps"], "guidance": SAMPLING["guidance"]},
    }
    config = load(preset="sd1/demo", values=merge(LEAN, values), assignments=["train.visits=12", "validation.enabled=false"])
    _, done = run.train(config, tmp_path / "run")
    shown = [e for e in events.read(done.events) if e["type"] == "preview"][-1]
    live = [np.asarray(Image.open(done.previews / name), np.float32) for name in shown["images"]]
    fresh = [np.asarray(i, np.float32) for i in sample(prompts, done.lora("lora"))]
    base = [np.asarray(i, np.float32) for i in sample(prompts, None)]
    for a, b, without in zip(live, fresh, base, strict=True):
        assert np.abs(a - b).mean() < 1.0  # of 255: fp16 rounding of the file
        assert np.abs(a - without).mean() > 4 * np.abs(a - b).mean()  # and the adapter did change it
