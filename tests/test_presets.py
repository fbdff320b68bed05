"""The presets that ship: every number has its source, and what belongs together stays together."""

from __future__ import annotations

import itertools
import re
import tomllib

import pytest

from app import draft
from trainer.config import TrainConfig
from trainer.config.load import ConfigError, load, overlays, presets, read_preset, validate
from trainer.data.scan import Image
from trainer.formats.probe import RESOLUTIONS
from trainer.plan import preview_prompts

FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
COURSES = ("quick", "balanced", "thorough")
NAMES = [f"{family}/{course}" for family in FAMILIES for course in COURSES]
OVERLAYS = [(family, name) for family in FAMILIES for name in overlays(family)]


def preset(name: str) -> TrainConfig:
    return validate(read_preset(name) | {"data": [{"folder": ".", "trigger": "zorp"}]})


def test_every_family_has_three_courses_and_the_toy_its_own():
    assert set(presets()) == {*NAMES, "sd1/demo"}
    assert OVERLAYS == [("sdxl", "anime"), ("sdxl", "pony"), ("sdxl", "style")]


@pytest.mark.parametrize("name", presets())
def test_a_preset_says_what_it_is_for_and_every_line_its_source(name):
    text = presets()[name].read_text(encoding="utf-8")
    about = tomllib.loads(text)["about"]
    assert about.keys() == {"title", "why", "source"} and all(len(v) > 3 for v in about.values())
    settings = [line for line in text.partition("\n[adapter]")[2].splitlines() if re.match(r"\w+ = ", line)]
    assert settings and all("#" in line.partition('"]')[2] or " # " in line for line in settings if line != "train = false")


@pytest.mark.parametrize("family, name", OVERLAYS)
def test_an_overlay_says_the_same(family, name):
    text = overlays(family)[name].read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    assert raw.pop("about").keys() == {"title", "why", "source"} and raw.keys() <= {"all", *COURSES}
    assert all(" # " in line for line in text.partition("\n[about]")[2].partition("\n[")[2].splitlines() if re.match(r"\w+ = ", line))


@pytest.mark.parametrize("name", NAMES)
def test_rank_alpha_and_warm_up(name):
    config = preset(name)
    assert config.adapter.alpha == config.adapter.rank
    assert config.schedule.warmup <= 0.05
    assert config.preview.enabled and config.preview.every is None and config.output.save_every is None


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_trained_and_sampled_at_the_size_of_the_base(name):
    config = preset(name)
    assert config.dataset.resolution is None and (config.preview.width, config.preview.height) == (None, None)
    assert RESOLUTIONS == {"sd1": 512, "sd2": 768, "sdxl": 1024, "sd3": 1024}


@pytest.mark.parametrize("family", FAMILIES)
def test_more_visits_and_rank_go_at_a_lower_rate(family):
    quick, balanced, thorough = (preset(f"{family}/{course}") for course in COURSES)
    for less, more in itertools.pairwise([quick, balanced, thorough]):
        assert more.train.visits == 2 * less.train.visits and more.adapter.rank == 2 * less.adapter.rank
        assert 0.5 <= more.part.unet.learning_rate / less.part.unet.learning_rate < 1
    assert balanced.part.unet.learning_rate == 1e-4
    for config in (quick, balanced, thorough):
        trained = [p for p in (config.part.text_1, config.part.text_2) if p.train]
        assert all(p.learning_rate <= config.part.unet.learning_rate / 2 and p.stop < 1 for p in trained)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("sdxl", "sd3"))])
def test_large_families_leave_their_text_encoders_alone(name):
    config = preset(name)
    assert not config.part.text_1.train and not config.part.text_2.train and config.part.text_1.learning_rate == 1e-5
    assert config.train.memory == "auto" and config.train.batch_size == 1


def test_overlays_change_what_they_are_about_and_nothing_else():
    plain, anime, both = (dict(draft.flatten(read_preset(f"sdxl/balanced{over}"))) for over in ("", "+anime", "+anime+style"))
    changed = {k for k in anime if plain.get(k) != anime[k]}
    assert changed == {"dataset.shuffle_tags", "preview.quality", "preview.negative", "preview.steps", "preview.guidance"}
    assert {k for k in both if both[k] != anime[k]} == {"train.visits"} and both["train.visits"] == 67
    pony = preset("sdxl/quick+pony+style")
    assert pony.preview.quality.startswith("score_9") and pony.preview.negative == "" and pony.train.visits == 33
    assert load(preset="sdxl/quick+pony+style", values={"data": [{"folder": "/", "trigger": "zorp"}]}).preview == pony.preview


@pytest.mark.parametrize("name", ["sdxl/best", "sdxl/balanced+best", "sd1/balanced+anime", "sdxl/balanced+../style", "sdxl/balanced+"])
def test_what_is_no_preset_is_named(name):
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        read_preset(name)


def test_the_quality_words_stand_before_what_is_made_and_not_before_what_is_typed(tmp_path):
    images = [Image(tmp_path / "a.png", "d", 64, 64, "zorp, a robot in a field", 0, True)]
    plain, anime = (preview_prompts(preset(f"sdxl/balanced{over}"), images) for over in ("", "+anime"))
    assert anime == tuple(f"masterpiece, best quality, {text}" for text in plain)
    typed = {"data": [{"folder": "."}], "preview": {"prompts": ["a zorp"], "quality": "masterpiece"}}
    assert preview_prompts(validate(typed), images) == ("a zorp",)
