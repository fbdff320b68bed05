"""Several sets of images in one training: the draft, its text, the plan, and the run that comes of it."""

import json
from pathlib import Path

import pytest

from app import draft, exchange, preflight
from app.api import runs
from app.context import Context
from app.errors import Problem
from tests.app.test_exchange import make
from trainer import plan
from trainer.config.load import validate


@pytest.fixture
def three(home):
    """The draft trains zorp's pictures, and two data sets with other words stand beside it."""
    draft.example(home)
    draft.update(home, class_word="creature", changes={"train.visits": 4, "dataset.hold_out": 0})
    return make(home, 3, "Cats"), make(home, 2, "Creatures")


def further(data, **more) -> dict:
    return {"dataset": data.id, **more}


def test_each_set_has_its_own_visits_weight_trigger_and_kind(home, three):
    cats, creatures = three
    alone = preflight.make(home)
    now = draft.update(
        home,
        sets=[
            further(cats, visits=9, weight=0.5, trigger="mycat", class_word="cat"),
            further(creatures, kind="prior", visits=2, class_word="creature"),
        ],
    )
    config, errors = draft.check(home, now)
    assert errors == {} and [(d.kind, d.visits, d.weight, d.trigger, d.class_word) for d in config.data] == [
        ("train", None, 1.0, "zorp", "creature"), ("train", 9, 0.5, "mycat", "cat"), ("prior", 2, 1.0, "", "creature"),
    ]  # fmt: skip
    found = preflight.make(home)
    assert (alone["images"], found["images"]) == (14, 19)
    laid = plan.make(config, 128, "sd1")
    assert found["steps"] == len(laid.steps) > alone["steps"]
    seen = [laid.images[row.image].source for step in laid.steps for row in step]
    assert (seen.count(0), seen.count(1), seen.count(2)) == (14 * 4, 3 * 9, 2 * 2)
    assert plan.pixels(laid, config) == sum(w * h for step in laid.steps for row in step for w, h in [laid.bucket(row.image)])
    rows = [row for n in range(len(laid.steps)) for row in plan.seen(laid, config, n + 1) if row["file"].is_relative_to(cats.root)]
    assert rows and all(row["weight"] == 0.5 and row["caption"].startswith("mycat") for row in rows)
    held = draft.update(home, sets=[further(cats, kind="validation")])
    laid = plan.make(draft.check(home, held)[0], 128, "sd1")
    assert (len(laid.images), len(laid.held_out)) == (14, 3)


def test_a_run_has_every_set_and_says_what_exactly_it_holds(home, three, runner):
    cats, creatures = three
    draft.update(home, sets=[further(cats, visits=2, trigger="mycat"), further(creatures, kind="prior")])
    run = runs._from_draft(Context(home, runner))
    config = validate(json.loads((run.folder / "config.json").read_text()))
    assert [d.folder.relative_to(run.folder).as_posix() for d in config.data] == ["data", "data-2", "data-3"]
    assert len(list((run.folder / "data-2").glob("[0-9].png"))) == 3 and (run.folder / "data-2/0-masklabel.png").is_file()
    about = json.loads((run.folder / "atelier.json").read_text())["data"]
    assert [(d["name"], d["images"], d["kind"]) for d in about] == [
        ("Zorp, the example", 14, "train"), ("Cats", 3, "train"), ("Creatures", 2, "prior"),
    ]  # fmt: skip
    assert [d["version"] for d in about][1:] == [exchange.version(d.images, home.cache) for d in three]
    known = json.loads((run.folder / "images.json").read_text())
    assert len(known) == 17 and [80, 60] in known.values()  # what the trainer need not decode to know; two sets have two pictures in common
    cats.set_caption(cats.image_id("1.png"), "changed later")  # the run keeps what it has
    assert exchange.version(run.folder / "data-2", home.cache) == about[1]["version"] != exchange.version(cats.images, home.cache)
    again = draft.from_run(home, run.folder)
    assert [(s["kind"], s["visits"], s["trigger"]) for s in again["sets"]] == [("train", 2, "mycat"), ("prior", None, "")]
    assert preflight.make(home)["images"] == 19


def test_the_text_of_the_draft_has_every_set(home, three):
    cats, creatures = three
    now = draft.update(home, sets=[further(cats, visits=9, trigger="mycat", weight=0.25), further(creatures, kind="prior")])
    text = draft.to_toml(home, now)
    assert text.count("[[data]]") == 3 and "visits = 9" in text and 'kind = "prior"' in text
    changed = draft.from_toml(home, text.replace("visits = 9", "visits = 7"))
    assert changed["sets"] == [now["sets"][0] | {"visits": 7}, now["sets"][1]]
    one = text[: text.index("[[data]]", text.index("[[data]]") + 1)] + text[text.index("[model]") :]
    assert draft.from_toml(home, one)["sets"] == []
    with pytest.raises(Problem, match="no other data set of this page"):
        draft.from_toml(home, text.replace(str(creatures.images), "/somewhere/else"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x", "must be a list"), ([{"folder": "/"}], "must be a list"), ([{"dataset": "none"}], "no data set"), ([{"kind": "reg"}], "must be one of"),
        ([{"visits": 0}], "whole number"), ([{"visits": True}], "whole number"), ([{"weight": 0}], "above 0"), ([{"weight": "2"}], "above 0"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_is_refused_and_nothing_is_changed(home, three, given, said):
    if isinstance(given, list):
        given = [{"dataset": three[0].id} | each if "folder" not in each else each for each in given]
    before = draft.load(home)
    with pytest.raises(Problem, match=said) as refused:
        draft.update(home, sets=given)
    assert "sets" in refused.value.errors and draft.load(home) == before
    with pytest.raises(Problem, match="already"):
        draft.update(home, sets=[further(three[0]), further(three[0])])
    with pytest.raises(Problem, match="already"):
        draft.update(home, sets=[{"dataset": before["dataset"]}])


def test_what_is_used_is_not_thrown_away_and_what_is_gone_is_said(home, three, client):
    cats, _ = three
    draft.update(home, sets=[further(cats)])
    assert client.post(f"/api/datasets/{cats.id}/trash").status_code == 409
    assert client.post(f"/api/datasets/{cats.id}/open").status_code == 409
    exchange.trash(cats)  # by hand, say
    found = preflight.make(home)
    assert not found["startable"] and [i["field"] for i in found["preflight"] if i["level"] == "error"] == ["sets"]
    assert client.get("/api/images/advice").status_code == 200


def test_the_advice_knows_the_words_of_the_other_sets(home, three, client):
    cats, _ = three
    cats.set_caption(cats.image_id("1.png"), "mycat beside a zorp")
    draft.update(home, sets=[further(cats, trigger="mycat")])
    said = [a["text"] for a in client.get("/api/images/advice").json()["advice"] if a["kind"] == "other_trigger"]
    assert said == ["1 caption of Cats says “zorp”, the trigger word of the images here. Take it out there, so that the two stay apart."]


def test_keeping_the_class_takes_longer_and_needs_a_word(home, three, monkeypatch):
    speed = preflight.Speed("demo", "sd1", "", 1e6, 0, {"text_1": True, "dtype": "auto", "memory": "fast", "batch_size": 1}, True, 0, 0)
    monkeypatch.setattr(preflight, "earlier", lambda home: [speed])
    monkeypatch.setattr(preflight, "_alike", lambda *given: True)
    monkeypatch.setattr(preflight.machine, "info", lambda home: {"choice": {"device": "cpu", "name": "", "dtype": "fp32"}, "gpus": [], "cpu": {"name": ""}})  # fmt: skip
    monkeypatch.setattr(preflight.machine, "live", lambda home: {"memory_gib": 8.0, "free_memory_gib": 8.0})
    draft.update(home, changes={"train.visits": 50_000})
    plain = preflight.make(home)["minutes"]
    draft.update(home, changes={"loss.prior_weight": 1.0})
    assert preflight.make(home)["minutes"] == pytest.approx(plain * 7 / 3, rel=0.01)
    draft.update(home, class_word="")
    found = preflight.make(home)
    assert [i["field"] for i in found["preflight"] if i["level"] == "error"] == ["class_word"]


def test_a_draft_of_an_earlier_version_gets_no_further_sets(home):
    kept = draft.load(home)
    del kept["sets"]
    Path(home.draft).write_text(json.dumps(kept), encoding="utf-8")
    assert draft.load(home)["sets"] == []
