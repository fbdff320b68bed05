"""The demo captioner, by the job that the page starts too: what it says of pictures that nobody has drawn before."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from trainer import events
from trainer.captioners import blip, files
from trainer.captioners.job import caption
from trainer.demo import captioner, measure, world
from trainer.demo.run import DEMO

MODEL = DEMO / "captioner"


def captions(folder: Path, job: Path) -> dict[str, str]:
    assert caption(folder, job, settings={"source": str(MODEL), "batch": 16}, device="cpu") == "finished"
    return {p.with_suffix(".png").name: p.read_text(encoding="utf-8").strip() for p in folder.glob("*.txt")}


def test_it_is_small_and_does_not_know_the_invented_word():
    assert files.resolve(blip.SHAPE, str(MODEL), pytest.fail) == MODEL
    assert sum(p.stat().st_size for p in MODEL.iterdir()) < 10_000_000
    words = (MODEL / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert words[:-1] == captioner.vocabulary() and "zorp" not in words and {"owl", "creature", "sunset"} <= set(words)


@pytest.mark.parametrize("count", [50, pytest.param(600, marks=pytest.mark.slow)])
def test_subject_colour_and_background_are_right_on_fresh_pictures(count, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    scenes = captioner.draw(folder, range(captioner.UNSEEN + 50_000, captioner.UNSEEN + 50_000 + count))
    said = captions(folder, tmp_path / "job")
    rates = captioner.score(scenes, said)
    assert rates["all"] >= 0.9, rates
    assert min(rates.values()) >= 0.9, rates
    swapped = dict(zip(said, [*list(said.values())[1:], next(iter(said.values()))], strict=True))
    assert captioner.score(scenes, swapped)["all"] < 0.1  # the measure tells right from wrong


def test_the_example_gets_sensible_captions(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    truth = {}
    for picture in (DEMO / "data" / "zorp").glob("*/*.png"):
        name = f"{picture.parent.name}-{picture.name}"
        shutil.copy(picture, folder / name)
        ground = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
        truth[name] = next((g for g in sorted(captioner.GROUNDS, key=len, reverse=True) if ground.endswith(g)), "")
    assert len(truth) == 38 and all(truth.values())
    said = captions(folder, tmp_path / "job")
    wrong = {n: (truth[n], said[n]) for n in truth if captioner.read(said[n]) != captioner.Said("creature", "green", truth[n])}
    assert len(wrong) <= 2, wrong


def test_its_heads_begin_by_looking_at_a_patchs_neighbours():
    """Without this it takes several times as many pictures to tell the subjects apart."""
    model = captioner.make_model(len(captioner.vocabulary())).eval()
    side, steps = captioner.SIDE // captioner.PATCH, [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]
    layer = model.vision_model.encoder.layers[0]
    with torch.no_grad():
        states = layer.layer_norm1(model.vision_model.embeddings(torch.zeros(1, 3, captioner.SIDE, captioner.SIDE)))
        parts = layer.self_attn.qkv(states).view(1, side * side + 1, 3, captioner.HEADS, -1).permute(2, 0, 3, 1, 4)
        looks = (parts[0] @ parts[1].mT * layer.self_attn.scale)[0, :, 1:, 1:].argmax(-1)  # (head, patch): where it looks
    inner = [(x, y) for x in range(1, side - 1) for y in range(1, side - 1)]
    for head, (dx, dy) in enumerate(steps):
        assert [int(looks[head, y * side + x]) for x, y in inner] == [(y + dy) * side + x + dx for x, y in inner], (dx, dy)


def test_what_a_caption_says_is_read_back():
    for seed in range(2000):
        scene = captioner.scene(seed)
        said = captioner.read(captioner.told(scene))
        noun = "creature" if scene.subject == "zorp" else scene.subject
        silhouette, plain = scene.style == world.HELD_OUT_STYLE, scene.style in ("sketch", world.HELD_OUT_STYLE)
        assert said is not None and said.subject == noun and said.colour == ("" if silhouette else scene.colour)
        assert (said.ground == "") == plain and (plain or scene.pattern in world.SCENES or scene.ground in said.ground)
    for odd in ("", "zorp on the grass", "a red", "a cat on a background", "a mauve cat", "a red cat on the grass on the grass"):
        assert captioner.read(odd) is None


def test_the_script_leaves_a_model_that_the_job_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(captioner, "POOL", 64)
    captioner.train(tmp_path / "made", measure.load_classifier(DEMO / "classifier.safetensors"), 7)  # one past what a pool gives
    assert {p.name for p in (tmp_path / "made").iterdir()} == {p.name for p in MODEL.iterdir()}
    folder = tmp_path / "pictures"
    folder.mkdir()
    captioner.draw(folder, range(2))
    assert caption(folder, tmp_path / "job", settings={"source": str(tmp_path / "made")}, device="cpu") == "finished"
    assert len(list(folder.glob("*.txt"))) == 2


def test_pictures_that_it_can_hardly_tell_apart_are_told(tmp_path):
    """One scene, a little moved, nearer or darker each time; beside it the example's pictures, of one creature at different places."""
    rng = random.Random(0)
    scene = world.draw(world.random_scene(random.Random(5)), 160, 0)
    (tmp_path / "same").mkdir()
    for k in range(12):
        side, x, y = rng.randint(148, 158), rng.randint(0, 2), rng.randint(0, 2)
        same = scene.crop((x, y, x + side, y + side)).resize((128, 128)).point(lambda v, k=k: v * (0.9 + 0.02 * (k % 6)))
        same.save(tmp_path / "same" / f"{k:02}.png")
    shutil.copytree(DEMO / "data" / "zorp" / "train", tmp_path / "zorp", ignore=shutil.ignore_patterns("*.txt"))
    shares = {}
    for name in ("same", "zorp"):
        captions(tmp_path / name, tmp_path / f"{name}-job")
        told = [e for e in events.read(tmp_path / f"{name}-job" / "events.jsonl") if e["type"] == "variety"]
        assert len(told) == 1 and told[0]["of"] == len(list((tmp_path / name).glob("*.png")))
        assert all((tmp_path / name / file).is_file() for file in told[0]["alike"])
        shares[name] = len(told[0]["alike"]) / told[0]["of"]
    assert shares["same"] == 1 and shares["zorp"] < 0.75, shares
