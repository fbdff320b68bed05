"""What is changed while a run goes on, or after its end: its length, the prompts of its sample images."""

import json
from itertools import pairwise

import pytest

from trainer import control, events
from trainer.course import changes
from trainer.run_dir import RunDir, RunError

DRAWN = {
    "adapter.dropout": 0.2,
    "dataset.flip": True,
    "dataset.shuffle_tags": True,
    "dataset.tag_dropout": 0.3,
    "dataset.caption_dropout": 0.2,
    "output.save_every": 0,
    "output.checkpoint_every": 1,
    "output.keep_checkpoints": 100,
}
PREVIEWS = {"preview.enabled": True, "preview.every": 2, "preview.steps": 1, "preview.guidance": 1.0, "preview.prompts": ["zorp"]}
CASES = {
    "text encoder trained to 75 %": {"part.text_1.stop": 0.75},
    "text encoder frozen": {"part.text_1.train": False},
    "captions encoded at each step": {},
}


@pytest.fixture
def ask(train, tmp_path_factory):
    """ask({3: [("visits", {"visits": 6})]}, changes, ...): a run that is asked so after these steps; a dict is written as it is."""

    def go(wishes, settings=None, root=None, **options):
        root = root or tmp_path_factory.mktemp("asked")
        folder = RunDir(root)
        waiting = dict(wishes)

        def show(event):
            if event["type"] == "checkpoint":
                for k, (kind, payload) in enumerate(waiting.pop(event["step"], ())):
                    if isinstance(payload, dict) and not control.wrong(control.Request("", kind, payload)):
                        control.send(folder, kind, payload)
                    else:
                        (folder.control / f"{k}.json").write_text(json.dumps({"kind": kind, "payload": payload}))

        return train(DRAWN | (settings or {}), root=root, show=show, **options)

    return go


def longer(visits):
    return [("visits", {"visits": visits})]


def ends_equal(same, one, other):
    assert one.events("finished")[-1]["step"] == other.events("finished")[-1]["step"]
    (tensors, _), (tensors_2, _) = one.state(), other.state()
    return same(one.lora(), other.lora()) and same(tensors, tensors_2)


def rates(trained):
    return {e["step"]: e["rate"] for e in trained.events("step")}


@pytest.mark.slow
@pytest.mark.parametrize("more", CASES.values(), ids=CASES.keys())
def test_a_run_whose_length_changed_resumes_to_the_same_weights(more, ask, train, same, monkeypatch):
    """Longer after 3 steps, shorter after 6; then stopped at, between and after the changes."""
    if not more:
        monkeypatch.setattr("trainer.data.store.TEXT_BUDGET", 0)
        more = {"part.text_1.train": False}
    wishes = {3: longer(8), 6: longer(6)}
    whole = ask(wishes, more)
    assert [(e["step"], e["visits"], e["total"]) for e in whole.events("changed")] == [(3, 8, 16), (6, 6, 12)]
    assert whole.events("finished")[-1]["step"] == 12
    assert {(e["step"], e["detail"]) for e in whole.events("answered")} == {(3, "done"), (6, "done")}
    assert not same(whole.lora(), train(DRAWN | more | {"train.visits": 6}).lora())
    for stop in (3, 5, 9):
        with_stop = {k: [*wishes.get(k, []), *([("stop", {})] if k == stop else [])] for k in {*wishes, stop} if k <= stop}
        part = ask(with_stop, more)
        assert part.events()[-1]["type"] == "stopped"
        part = ask({k: w for k, w in wishes.items() if k > stop}, more, root=part.root, resume=True)
        assert part.events("finished"), stop
        assert ends_equal(same, whole, part), stop
        assert len(part.events("changed")) == 2  # replayed ones are not told again


@pytest.mark.slow
def test_a_change_that_the_crash_took_back_is_kept(ask, same):
    """The checkpoints after step 2 are lost, the change at 4 was asked for all the same: it counts from 2 on, as is said."""
    part = ask({4: [*longer(6), ("prompts", {"prompts": ["a dog"]})], 6: [("stop", {})]})
    for path in part.checkpoints():
        if path.stem > "step-000002":
            path.unlink()
    part = ask({5: [("stop", {})]}, root=part.root, resume=True)
    told = [{k: e[k] for k in e if k in ("step", "visits", "prompts")} for e in part.events("changed")]
    assert told == [
        {"step": 4, "visits": 6},
        {"step": 4, "prompts": ["a dog"]},
        {"step": 2, "visits": 6},
        {"step": 2, "prompts": ["a dog"]},
    ]
    assert [e["total"] for e in part.events("started")] == [8, 12]
    part = ask({}, root=part.root, resume=True)
    assert len(part.events("changed")) == 4
    whole = ask({2: longer(6)})
    assert ends_equal(same, whole, part)


def test_changes_are_read_from_the_events_in_their_order():
    told = [
        {"type": "changed", "step": 4, "visits": 9, "total": 30},
        {"type": "changed", "step": 8, "prompts": ["a"]},
        {"type": "resumed", "step": 6},
        {"type": "changed", "step": 6, "prompts": ["a"]},
        {"type": "changed", "step": 9, "visits": 7, "total": 20},
    ]
    assert changes(told) == [
        {"step": 4, "visits": 9},
        {"step": 6, "prompts": ["a"]},
        {"step": 6, "prompts": ["a"]},
        {"step": 9, "visits": 7},
    ]


@pytest.mark.slow
def test_the_rate_follows_the_new_total(ask, train, monkeypatch):
    monkeypatch.setattr("trainer.loop.EVENTS_EVERY", 1)
    short, long = rates(ask({3: longer(8)})), rates(train(DRAWN | {"train.visits": 8}))
    assert len(short) == len(long) == 16
    assert {n: short[n] for n in short if n > 3} == {n: long[n] for n in long if n > 3}
    assert short[3] != long[3]


@pytest.mark.slow
def test_a_length_that_is_used_up_is_refused_with_the_least(ask):
    asked = ask({5: longer(1), 6: longer(4)})
    assert [e["detail"] for e in asked.events("answered")] == [
        "visits is 1, which 5 steps have used up already; it must be at least 3 now.",
        "done",
    ]
    assert [(e["visits"], e["total"]) for e in asked.events("changed")] == [(4, 8)]
    least = ask({5: longer(3)})
    assert least.events("finished")[-1]["step"] == 6


@pytest.mark.slow
def test_prompts_hold_from_the_next_preview_on_and_after_a_resume(ask):
    new = {3: [("prompts", {"prompts": ["a cat", 'a "dog" <ü>']}), ("preview", {})], 5: [("stop", {})]}
    part = ask(new, PREVIEWS)
    part = ask({}, PREVIEWS, root=part.root, resume=True)
    shown = {e["step"]: e["prompts"] for e in part.events("preview")}
    assert shown == {0: ["zorp"], 2: ["zorp"], **{n: ["a cat", 'a "dog" <ü>'] for n in (3, 4, 6, 8)}}
    assert [(e["step"], e["prompts"]) for e in part.events("changed")] == [(3, ["a cat", 'a "dog" <ü>'])]
    assert all((part.root / "previews" / f"step-000006-{k}.png").is_file() for k in (1, 2))


WRONG = [
    ("visits", {}, "visits is None; it must be a whole number from 1 to 100000."),
    ("visits", {"visits": "12"}, "visits is '12'; it must be"),
    ("visits", {"visits": True}, "visits is True; it must be"),
    ("visits", {"visits": 0}, "visits is 0; it must be"),
    ("visits", {"visits": 10**9}, "visits is 1000000000; it must be"),
    ("prompts", {"prompts": []}, "prompts must be a list of 1 to 16 texts"),
    ("prompts", {"prompts": ["a"] * 17}, "prompts must be a list of 1 to 16 texts"),
    ("prompts", {"prompts": "a"}, "prompts must be a list of 1 to 16 texts"),
    ("prompts", {"prompts": ["a", " "]}, "prompts must be a list of 1 to 16 texts, none of them empty."),
    ("prompts", {"prompts": [1]}, "prompts must be a list of 1 to 16 texts"),
]


def test_a_wrong_payload_is_answered_and_the_run_goes_on(ask):
    asked = ask({2: [(kind, payload) for kind, payload, _ in WRONG], 3: [("visits", [12]), ("visits", "12")]})
    details = {e["detail"] for e in asked.events("answered") if e["step"] == 2}
    for _, _, said in WRONG:
        assert any(d.startswith(said) for d in details), said
    assert {e["detail"] for e in asked.events("answered") if e["step"] == 3} == {"unknown request"}
    assert asked.outcome == "finished"
    assert not asked.events("changed")


@pytest.mark.parametrize(("kind", "payload", "said"), WRONG)
def test_a_wrong_payload_cannot_be_sent(kind, payload, said, tmp_path):
    with pytest.raises(ValueError) as refused:
        control.send(RunDir(tmp_path), kind, payload)
    assert str(refused.value).startswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_finished_run_trains_further_and_keeps_the_lora_of_its_first_end(ask, train, same):
    first = train(DRAWN)
    before = (first.root / "lora.safetensors").read_bytes()
    sidecar = (first.root / "lora.json").read_bytes()
    with pytest.raises(RunError, match=r"made its 4 visits; visits is 4\. To train it further"):
        train(DRAWN, root=first.root, resume=True, visits=4)
    further = ask({10: [("stop", {})]}, root=first.root, resume=True, visits=7)
    assert [e["type"] for e in further.events("resumed", "changed")] == ["resumed", "changed"]
    assert [(e["step"], e["visits"], e["total"]) for e in further.events("changed")] == [(8, 7, 14)]
    assert further.events()[-1]["type"] == "stopped"
    assert (first.root / "lora.safetensors").read_bytes() == before
    further = ask({}, root=first.root, resume=True)
    assert further.events()[-1]["type"] == "finished"
    assert further.events()[-1]["step"] == 14
    assert (first.root / "lora-000008.safetensors").read_bytes() == before
    assert (first.root / "lora-000008.json").read_bytes() == sidecar
    assert not same(further.lora(), further.lora("lora-000008.safetensors"))
    *_, earlier, last = further.events("exported")
    assert (earlier["step"], earlier["file"], earlier["bytes"], earlier["final"]) == (8, "lora-000008.safetensors", len(before), False)
    assert (last["step"], last["file"], last["final"]) == (14, "lora.safetensors", True)

    again = train(DRAWN, root=train(DRAWN).root, resume=True, visits=7)  # without the stop: the same
    assert ends_equal(same, again, further)
    once_more = train(DRAWN, root=again.root, resume=True, visits=9)
    assert {p.name for p in once_more.root.glob("lora*.safetensors")} == {
        "lora.safetensors",
        "lora-000008.safetensors",
        "lora-000014.safetensors",
    }


@pytest.mark.slow
def test_a_stopped_run_gets_its_length_at_the_command_line(command, train, tmp_path):
    train(DRAWN, root=tmp_path, stop_at=3)
    process = command(tmp_path, None, "--resume", "--visits", "5")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert "After step 3 the run's length is 5 visits, 10 steps." in said
    seen = list(events.read(tmp_path / "events.jsonl"))
    assert seen[-1]["type"] == "finished"
    assert seen[-1]["step"] == 10
    at = [e["type"] for e in seen]
    assert at[at.index("resumed") + 1] == "changed"
    process = command(tmp_path, None, "--resume")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 1
    assert said.startswith("Error: The run in")
    assert "has made its 5 visits" in said
    process = command(tmp_path / "new", {}, "--visits", "5")
    assert "--visits gives a run that is resumed a new length" in process.communicate(timeout=240)[0]


@pytest.mark.slow
def test_two_processes_change_their_length_as_one(command, wait_for, train, tmp_path):
    settings = DRAWN | {"train.visits": 20, "output.checkpoint_every": 0}
    process = command(tmp_path, settings, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))
    wait_for(process, tmp_path, "step")
    control.send(RunDir(tmp_path), "visits", {"visits": 12})
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    (change,) = [e for e in events.read(tmp_path / "events.jsonl") if e["type"] == "changed"]
    assert change["step"] % 10 == 0
    assert (change["visits"], change["total"]) == (12, 24)
    assert next(e for e in events.read(tmp_path / "events.jsonl") if e["type"] == "finished")["step"] == 24


@pytest.mark.slow
def test_automatic_files_are_spread_over_the_run(train):
    run = train({"train.visits": 24, "output.checkpoint_every": 0})
    steps = [e["step"] for e in run.events("exported")]
    assert len(steps) == 8
    assert steps[-1] == run.events("finished")[-1]["step"]
    gaps = [b - a for a, b in pairwise([0, *steps])]
    assert max(gaps) - min(gaps) <= 1
