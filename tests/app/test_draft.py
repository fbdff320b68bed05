"""The draft: what the user said survives, becomes a configuration, and comes back from text and from runs."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app import datasets, draft, settings
from app.api import draft as routes
from app.api import models as model_routes
from app.context import Context
from app.paths import ROOT, Home
from app.runner import Runner
from app.server import _answer_errors
from trainer.config.load import load, validate
from trainer.run_dir import RunDir

DEMO = ROOT / "assets" / "demo" / "base"


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    settings.save(home, {"run_folders": []})
    return home


@pytest.fixture
def client(home):
    app = FastAPI()
    for module in (routes, model_routes):
        app.include_router(module.router, prefix="/api")
    _answer_errors(app)
    app.state.context = Context(home, Runner(home))
    with TestClient(app) as client:
        yield client


@pytest.fixture
def ready(home, draw_pictures, tmp_path) -> dict:
    """A draft with four pictures and a real (toy) model by its path."""
    now = draft.update(home, name="My Cat", model=f'"{DEMO}"')
    datasets.open(home, now["dataset"]).add_folder(draw_pictures(tmp_path / "pictures", [(128, 128)] * 4))
    return now


def test_there_is_always_a_draft_and_it_is_the_same_tomorrow(home):
    first = draft.load(home)
    assert draft.folder(home, first).is_dir() and first["revision"] == 1
    changed = draft.update(home, name="My Cat", changes={"adapter.rank": 32})
    assert changed == draft.load(Home(home.root)) and changed["revision"] == 2
    assert (changed["name"], changed["trigger"], changed["changes"]) == ("My Cat", "mycat", {"adapter.rank": 32})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": 1}', "\x00"])
def test_a_damaged_draft_is_kept_aside(home, text):
    draft.load(home)
    home.draft.write_text(text)
    assert draft.load(home)["name"] == ""
    assert (home.root / "draft.damaged.json").read_text() == text


def test_a_deleted_data_set_takes_nothing_that_was_typed_along(home):
    before = draft.update(home, name="My Cat")
    shutil.rmtree(home.datasets / before["dataset"])
    after = draft.load(home)
    assert after["name"] == "My Cat" and after["dataset"] != before["dataset"] and draft.folder(home, after).is_dir()


def test_the_trigger_follows_the_name_until_it_is_typed(home):
    assert draft.update(home, name="My Cat")["trigger"] == "mycat"
    assert draft.update(home, name="My Dog")["trigger"] == "mydog"
    assert draft.update(home, trigger="ohwx woman")["trigger_follows"] is False
    assert draft.update(home, name="Someone")["trigger"] == "ohwx woman"
    assert draft.update(home, trigger="")["trigger"] == "" == draft.update(home, name="Else")["trigger"]
    assert draft.update(home, trigger=None)["trigger"] == draft.make_trigger("Else") != ""


@pytest.mark.parametrize("name", ["My Cat", "Anna", "cat", "X", "Jo", "Кошка", "東京", "Ünïcode 7", "!!!", "a" * 300])
def test_a_made_trigger_is_a_new_word_of_letters(name):
    made = draft.make_trigger(name)
    assert made.isascii() and made.isalpha() and made.islower() and 3 <= len(made) <= 26
    assert not draft.is_word(made) and made == draft.make_trigger(name)
    assert any(c in "aeiouy" for c in made)


def test_trigger_warnings():
    def said(trigger, captions=(), **more):
        return draft.trigger_warning({"trigger": trigger, "purpose": "character", "name": "x", **more}, list(captions))

    assert said("mycat") == "" and said("mycat", ["mycat, red", "a dog", ""]) == ""
    assert "Cat already means something" in said("cat") and "catoko" in said("cat")
    assert "already means something" in said("sks")
    assert said("zorp woman") == "" and "all words" in said("young woman").lower()
    assert "is a tag in 1 of 2 captions" in said("mycat", ["a room, mycat", "a dog, green", ""])
    assert said("mycat", ["a room, mycat", "a dog, mycat"]) == ""
    assert "mixes with everything" in said("") and said("", purpose="style") == "" and said("", name="") == ""


@pytest.mark.parametrize("name", ["My Cat", "a/b\\c:*?", "..", "CON", "   ", "é" * 300, "Кошка", ".hidden", "-x-", "a\x00b", "x\n"])
def test_a_slug_is_a_file_name_everywhere(name, tmp_path):
    slug = draft.slug(name)
    config = validate({"data": [{"folder": "."}], "output": {"name": slug}})
    assert config.output.name == slug and not slug.startswith((".", "-")) and slug.upper() != "CON"
    (tmp_path / f"{slug}-000100.safetensors").touch()
    assert draft.slug("My Cat") == "my-cat"


def test_the_draft_becomes_a_configuration(home, ready):
    config, errors = draft.check(home, draft.update(home, class_word="cat", changes={"adapter.rank": 8, "loss.min_snr_gamma": ""}))
    assert errors == {}
    assert config.model.source == str(DEMO) and config.output.name == "my-cat" and config.output.title == "My Cat"
    assert (config.data[0].folder, config.data[0].trigger, config.data[0].class_word) == (draft.folder(home, ready), "mycat", "cat")
    assert config.adapter.rank == 8 and config.loss.min_snr_gamma is None
    assert config.part.text_1.stop == 0.67 and config.train.batch_size == 2  # of the preset
    quick, _ = draft.check(home, draft.update(home, preset="quick", changes={"adapter.rank": None, "loss.min_snr_gamma": None}))
    assert quick.adapter.rank == 8 and not quick.part.text_1.train and quick.loss.min_snr_gamma == 5


def test_bad_values_are_kept_and_named_at_their_field(home, client):
    answer = client.patch("/api/draft", json={"changes": {"adapter.rank": 0, "dataset.resolution": 500, "train.dtype": "int3"}}).json()
    assert answer["draft"]["changes"] == {"adapter.rank": 0, "dataset.resolution": 500, "train.dtype": "int3"}
    assert answer["errors"].keys() == {"adapter.rank", "dataset.resolution", "train.dtype"}
    assert "Nearest: 504" in answer["errors"]["dataset.resolution"]
    assert answer["values"]["adapter.rank"] == 0 and answer["preset_values"]["adapter.rank"] == 16
    answer = client.patch(
        "/api/draft", json={"changes": {"optimizer.kind": "prodigy", "adapter.rank": 8, "dataset.resolution": None, "train.dtype": None}}
    )
    (field,) = answer.json()["errors"]
    assert field.startswith(("part.", "optimizer.")) and "Prodigy needs one rate" in answer.json()["errors"][field]


@pytest.mark.parametrize(
    "body, said",
    [
        ({"nam": "x"}, "nam is not a field"),
        ({"purpose": "poem"}, "character, style, object"),
        ({"preset": "best"}, "does not exist"),
        ({"name": 7}, "must be a text"),
        ({"changes": []}, "must be an object"),
        ({"changes": {"adapter.rnk": 7}}, "not a known setting"),
        ({"changes": {"data.folder": "/etc"}}, "not set here"),
        ({"changes": {"model.source": "x"}}, "not set here"),
        ({"changes": {"output.name": "../x"}}, "not set here"),
    ],
)
def test_what_is_no_field_is_refused_and_nothing_changed(client, home, body, said):
    before = draft.load(home)
    answer = client.patch("/api/draft", json={"class_word": "dog", **body})
    assert answer.status_code == 400 and said in answer.json()["error"] and answer.json()["errors"]
    assert draft.load(home) == before


def test_a_setting_of_another_optimizer_waits_until_that_one_is_chosen(home, ready):
    rates = {"part.unet.learning_rate": 1.0, "part.text_1.learning_rate": 1.0}
    now = draft.update(home, changes={"optimizer.eps": 1e-6, "optimizer.kind": "prodigy", **rates})
    config, errors = draft.check(home, now)
    assert errors == {} and config.optimizer.kind == "prodigy" and now["changes"]["optimizer.eps"] == 1e-6
    config, _ = draft.check(home, draft.update(home, changes={"optimizer.kind": None}))
    assert config.optimizer.eps == 1e-6


def test_low_memory_mode_saves_memory_unless_the_user_says_otherwise(home, ready):
    assert draft.check(home, ready)[0].train.memory == "auto"
    settings.save(home, {"memory": "low"})
    config, _ = draft.check(home, ready)
    assert config.train.memory == "checkpointing" and config.train.accumulation == config.train.batch_size == 2
    view = draft.view(home)
    assert view["preset_values"]["train.memory"] == "checkpointing" and view["values"]["train.accumulation"] == 2
    config, _ = draft.check(home, draft.update(home, changes={"train.memory": "fast", "train.batch_size": 4}))
    assert config.train.memory == "fast" and config.train.accumulation == 4


def test_the_view_says_what_the_page_shows(client, ready):
    view = client.get("/api/draft").json()
    assert (view["slug"], view["images"], view["captioned"], view["errors"], view["caption_job"]) == ("my-cat", 4, 4, {}, None)
    assert [p["name"] for p in view["presets"]] == ["quick", "balanced", "thorough"]
    quick, balanced, _ = view["presets"]
    assert quick["facts"] == {"rank": 8, "alpha": 8.0, "unet": 2e-4, "text_1": None, "visits": 50} and quick["why"] and quick["source"]
    assert balanced["facts"]["text_1"] == 5e-5
    form = client.get("/api/form").json()
    keys = {f["key"] for s in form["sections"] for f in s["fields"]}
    assert view["values"].keys() == view["preset_values"].keys() == keys
    assert view["values"] == view["preset_values"]


def test_new_and_undo(client, home, ready):
    client.patch("/api/draft", json={"changes": {"adapter.rank": 8}})
    fresh = client.post("/api/draft/new").json()
    assert fresh["images"] == 0 and fresh["draft"]["name"] == "" and fresh["draft"]["changes"] == {}
    assert draft.can_undo_new(home)
    back = draft.undo_new(home)
    assert back["name"] == "My Cat" and back["changes"] == {"adapter.rank": 8} and back["revision"] > fresh["draft"]["revision"]
    assert draft.view(home)["images"] == 4 and not draft.can_undo_new(home) and draft.undo_new(home) is None


def test_the_example_is_ready_to_start(client, home):
    view = client.post("/api/draft/example").json()
    assert (view["images"], view["captioned"], view["slug"], view["draft"]["trigger"]) == (14, 14, "zorp", "zorp")
    assert view["model"]["toy"] and view["errors"] == {} and [p["name"] for p in view["presets"]] == ["demo"]
    config, _ = draft.check(home, view["draft"])
    assert config == load(preset="sd1/demo", values=json.loads(json.dumps(draft.compose(home, view["draft"]))))
    view = client.patch("/api/draft", json={"model": str(home.root / "other.safetensors")}).json()
    assert not view["draft"]["example"] and view["draft"]["preset"] == "balanced" and "no file or folder" in view["model_error"]
    view = client.patch("/api/draft", json={"model": "demo"}).json()
    assert view["model"] is None and "toy of the built-in example" in view["model_error"]


# ---- as text


def test_the_text_is_the_same_configuration_for_the_command_line(client, home, ready, tmp_path):
    changes = {"adapter.rank": 24, "preview.prompts": ['a "cat"\n', "\\ é 🐈"], "loss.min_snr_gamma": "", "output.author": 'J\\"'}
    now = draft.update(home, changes=changes)
    path = tmp_path / "draft.toml"
    path.write_text(client.get("/api/draft/toml").json()["text"], encoding="utf-8")
    config, errors = draft.check(home, now)
    assert errors == {} and load(path).model_copy(update={"output": config.output}) == config
    assert load(path).output.author == 'J\\"' and "# alpha = 16" in path.read_text()


def test_a_text_comes_back_as_it_was(client, home, ready):
    client.patch("/api/draft", json={"changes": {"adapter.rank": 24, "loss.min_snr_gamma": "", "optimizer.weight_decay": 0.1}})
    before = client.get("/api/draft").json()
    after = client.put("/api/draft/toml", json=client.get("/api/draft/toml").json()).json()
    assert after["draft"] == before["draft"] | {"revision": after["draft"]["revision"]} and after["values"] == before["values"]


def test_an_edited_text_is_taken_over(client, ready):
    text = client.get("/api/draft/toml").json()["text"]
    text = text.replace("# rank = 16", "rank = 4").replace("sd1/balanced", "sd1/thorough").replace('trigger = "mycat"', 'trigger = "ohwx"')
    view = client.put("/api/draft/toml", json={"text": text.replace('name = "my-cat"', 'name = "other"')}).json()
    assert view["draft"]["preset"] == "thorough" and view["draft"]["changes"] == {"adapter.rank": 4}
    assert (view["draft"]["trigger"], view["draft"]["trigger_follows"], view["slug"]) == ("ohwx", False, "other")


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda t: t + "\nrank = = 3", "line"),
        (lambda t: t.replace("# rank = 16", "rank = -1"), "adapter.rank is -1"),
        (lambda t: t.replace("# rank = 16", "rnk = 1"), "Did you mean rank?"),
        (lambda t: t.replace("sd1/balanced", "sd1/best"), "does not exist"),
        (lambda t: t.replace("/images", "/elsewhere"), "the images above"),
        (lambda t: t + '\n[[data]]\nfolder = "/x"', "no other data set of this page"),
    ],
)
def test_a_wrong_text_changes_nothing_and_says_where(client, home, ready, edit, said):
    before = draft.load(home)
    answer = client.put("/api/draft/toml", json={"text": edit(client.get("/api/draft/toml").json()["text"])})
    assert answer.status_code == 400 and said in answer.json()["error"]
    assert draft.load(home) == before


def test_without_a_preset_a_text_means_the_defaults(client, ready):
    view = client.put("/api/draft/toml", json={"text": "[adapter]\nrank = 4"}).json()
    assert view["draft"]["changes"]["adapter.targets"] == ["attention"] and view["draft"]["changes"]["train.batch_size"] == 1
    assert view["values"]["part.text_1.stop"] == 1.0 and view["draft"]["name"] == "My Cat"


# ---- from a run


@pytest.fixture
def run(home, ready) -> Path:
    """A run's folder as the app makes it, with an exported LoRA."""
    config, _ = draft.check(home, draft.update(home, preset="quick", changes={"adapter.rank": 4, "train.max_grad_norm": ""}))
    folder = RunDir(home.runs / "20260101-000000-my-cat")
    folder.create()
    datasets.open(home, ready["dataset"]).snapshot(folder.root / "data")
    values = config.model_dump(mode="json")
    values["data"][0]["folder"] = str(folder.root / "data")
    folder.config.write_text(json.dumps(values), encoding="utf-8")
    folder.lora("my-cat").write_bytes(b"x")
    return folder.root


def test_a_draft_from_a_run_has_its_settings_and_images(client, home, run):
    old, _ = draft.check(home, draft.load(home))
    client.post("/api/draft/new")
    view = client.post("/api/draft/from-run", json={"run": run.name}).json()
    assert view["images"] == 4 and view["draft"]["preset"] == "quick"
    assert view["draft"]["changes"] == {"adapter.rank": 4, "train.max_grad_norm": ""}
    assert (view["draft"]["name"], view["draft"]["trigger"]) == ("My Cat", "mycat")
    new, errors = draft.check(home, draft.load(home))
    assert errors == {} and new.model_copy(update={"data": old.data}) == old
    assert new.data[0].folder not in (old.data[0].folder, run / "data")


def test_training_starts_from_a_runs_lora(client, home, run):
    view = client.post("/api/draft/from-run", json={"run": run.name, "start": True}).json()
    assert view["values"]["adapter.start"] == str(run / "my-cat.safetensors") and view["errors"] == {}
    assert draft.check(home, draft.load(home))[0].adapter.start == run / "my-cat.safetensors"
    (run / "my-cat.safetensors").rename(run / "my-cat-000100.safetensors")
    view = client.post("/api/draft/from-run", json={"run": run.name, "start": True}).json()
    assert view["values"]["adapter.start"].endswith("my-cat-000100.safetensors")
    (run / "my-cat-000100.safetensors").unlink()
    answer = client.post("/api/draft/from-run", json={"run": run.name, "start": True})
    assert answer.status_code == 409 and "no LoRA file yet" in answer.json()["error"]


def test_a_run_that_is_not_there_or_cannot_be_read_changes_nothing(client, home, run):
    before = draft.load(home)
    assert client.post("/api/draft/from-run", json={"run": "../x"}).status_code == 404
    shutil.rmtree(run / "data")
    assert "not at" in client.post("/api/draft/from-run", json={"run": run.name}).json()["error"]
    (run / "config.json").write_text("{}")
    assert client.post("/api/draft/from-run", json={"run": run.name}).status_code == 404
    assert draft.load(home) == before


def test_every_value_survives_toml():
    values = ["", "a\x7f\x00\\\"'é🐈\n", True, 0, -3, 1e-5, 1.0, 5e-324, ["a", "b"], []]
    for value in values:
        assert tomllib.loads(f"x = {draft._toml(value)}")["x"] == value


def test_flat_and_nested_are_one():
    nested = {"a": {"b": 1, "c": {"d": [1]}}, "e": ""}
    assert draft.nest(dict(draft.flatten(nested))) == nested


# ---- families


@pytest.fixture
def large(home, tmp_path) -> dict[str, Path]:
    """A file of each family, by its header."""
    from tests.app.test_models import CLIPS, SD1, SD2, SD35, SDXL, write

    files = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "sd3": SD35 | CLIPS, "noobai": SDXL, "pony": SDXL}
    return {name: write(tmp_path / "models" / f"{name}.safetensors", tensors) for name, tensors in files.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_each_family_has_its_own_presets(client, home, ready, large, family):
    view = client.patch("/api/draft", json={"model": str(large[family])}).json()
    assert (view["family"], view["model"]["family"], view["model_error"], view["errors"]) == (family, family, "", {})
    assert [p["name"] for p in view["presets"]] == ["quick", "balanced", "thorough"]
    facts = view["presets"][1]["facts"]
    assert ("text_2" in facts) == (family in ("sdxl", "sd3")) and facts["unet"] == 1e-4
    assert (facts["text_1"] is None) == (family in ("sdxl", "sd3"))
    config, errors = draft.check(home, draft.load(home))
    assert errors == {} and config == load(
        preset=f"{family}/balanced",
        values={k: v for k, v in draft.compose(home, draft.load(home)).items() if k in ("model", "data", "output")},
    )


def test_a_setting_of_another_family_waits_until_a_model_has_it(client, home, ready, large):
    changes = {"model.clip_skip": 2, "part.text_2.train": True, "loss.shift": 2.0, "loss.min_snr_gamma": 3.0}
    for family, kept in (("sd1", (2, False, None, 3.0)), ("sdxl", (1, True, None, 3.0)), ("sd3", (1, True, 2.0, 5.0))):
        view = client.patch("/api/draft", json={"model": str(large[family]), "changes": changes}).json()
        assert view["draft"]["changes"] == changes and view["errors"] == {}
        c, _ = draft.check(home, view["draft"])
        assert (c.model.clip_skip, c.part.text_2.train, c.loss.shift, c.loss.min_snr_gamma) == kept
        text = client.get("/api/draft/toml").json()["text"]
        assert ("clip_skip" in text) == (family == "sd1") and ("[part.text_2]" in text) == (family != "sd1")


def test_models_with_words_of_their_own(client, home, ready, large):
    def now(**changes):
        view = client.patch("/api/draft", json=changes).json()
        config, errors = draft.check(home, draft.load(home))
        assert errors == {}
        return view, config.preview

    view, preview = now(model=str(large["noobai"]))
    assert (view["draft"]["variant"], view["variant"]) == ("", "anime") and preview.quality == "masterpiece, best quality"
    assert [name for name, _, _ in view["variants"]] == ["anime", "pony"] and all(title and why for _, title, why in view["variants"])
    assert view["preset_values"]["preview.quality"] == preview.quality and preview.guidance == 5.0 and view["draft"]["changes"] == {}
    view, preview = now(variant="pony")
    assert view["variant"] == "pony" and preview.quality.startswith("score_9") and preview.negative == ""
    view, preview = now(variant="none")
    assert view["variant"] == "" and preview.quality == "" and preview.guidance == 6.0
    view, preview = now(model=str(large["pony"]))  # another model: by its name again
    assert (view["draft"]["variant"], view["variant"]) == ("", "pony")
    view, preview = now(model=str(large["sd1"]))
    assert (view["variants"], view["variant"], preview.quality) == ([], "", "")
    answer = client.patch("/api/draft", json={"variant": "anime"})
    assert answer.status_code == 400 and "variant is 'anime'" in answer.json()["error"]


def test_a_styles_preset_has_fewer_visits(client, home, ready, large, tmp_path):
    view = client.patch("/api/draft", json={"model": str(large["noobai"]), "purpose": "style"}).json()
    assert view["values"]["train.visits"] == 67 and [p["facts"]["visits"] for p in view["presets"]] == [33, 67, 133]
    text = client.get("/api/draft/toml").json()["text"]
    assert 'preset = "sdxl/balanced+anime+style"' in text
    path = tmp_path / "draft.toml"
    path.write_text(text, encoding="utf-8")
    assert load(path).train.visits == 67 and load(path).preview.quality == "masterpiece, best quality"
    client.patch("/api/draft", json={"purpose": "object", "variant": "none", "preset": "quick"})
    back = client.put("/api/draft/toml", json={"text": text}).json()
    now = back["draft"]
    assert (now["purpose"], now["variant"], now["preset"], now["changes"]) == ("style", "", "balanced", {})


def test_what_has_no_control_is_kept_with_the_draft(client, home, ready, large):
    text = client.get("/api/draft/toml").json()["text"]
    text += '\n[[model.merge]]\nfile = "/loras/detail.safetensors"\nstrength = 0.5\n\n[adapter.blocks."unet.mid_block"]\nrank = 4\n'
    view = client.put("/api/draft/toml", json={"text": text}).json()
    merges, blocks = [{"file": "/loras/detail.safetensors", "strength": 0.5}], {"unet.mid_block": {"rank": 4}}
    assert view["draft"]["changes"] == {"model.merge": merges, "adapter.blocks": blocks} and view["errors"] == {}
    config, _ = draft.check(home, draft.load(home))
    assert config.model.merge[0].strength == 0.5 and config.adapter.blocks["unet.mid_block"].rank == 4
    again = client.put("/api/draft/toml", json={"text": client.get("/api/draft/toml").json()["text"]}).json()
    assert again["draft"]["changes"] == view["draft"]["changes"]
    assert "configuration file" in client.patch("/api/draft", json={"changes": {"model.merge": merges}}).json()["error"]
    assert client.patch("/api/draft", json={"changes": {"model.merge": None}}).json()["draft"]["changes"] == {"adapter.blocks": blocks}


def test_sentences_on_the_page_have_labels(client, ready):
    view = client.patch("/api/draft", json={"changes": {"adapter.alpha": 0, "dataset.resolution": 500}}).json()
    assert view["errors"]["adapter.alpha"].startswith("Alpha is 0;") and view["errors"]["dataset.resolution"].startswith(
        "Resolution is 500;"
    )
    assert "adapter.alpha is 0" in client.put("/api/draft/toml", json={"text": "[adapter]\nalpha = 0"}).json()["error"]  # as in the text


def test_a_draft_of_an_earlier_version_is_kept(home):
    before = draft.update(home, name="My Cat")
    del before["variant"]
    home.draft.write_text(json.dumps(before))
    assert draft.load(home) == before | {"variant": ""} and not (home.root / "draft.damaged.json").exists()


@pytest.mark.parametrize("name", ["my pictures", "", "..", "."])
def test_the_page_opens_where_the_data_set_was_renamed(client, home, ready, name):
    (home.datasets / name / "images").mkdir(parents=True, exist_ok=True)
    home.draft.write_text(json.dumps(ready | {"dataset": name}))
    answer = client.get("/api/draft")
    assert answer.status_code == 200 and answer.json()["draft"]["name"] == "My Cat" and answer.json()["draft"]["dataset"] != name


@pytest.mark.parametrize("gone", ["images", "dataset", "datasets", "everything but the draft"])
def test_the_page_opens_where_the_data_set_is_gone(client, home, ready, gone):
    data = home.datasets / ready["dataset"]
    shutil.rmtree({"images": data / "images", "dataset": data, "datasets": home.datasets}.get(gone, home.datasets))
    if gone.startswith("everything"):
        shutil.rmtree(home.cache)
    answer = client.get("/api/draft")
    assert answer.status_code == 200, answer.json()
    assert answer.json()["draft"]["name"] == "My Cat" and answer.json()["images"] == 0
    assert client.get("/api/draft").json()["draft"] == answer.json()["draft"]
