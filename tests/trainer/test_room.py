"""A run that the GPU's memory runs out for goes on in a smaller way; every way learns the same but for the packed ones."""

from __future__ import annotations

import json

import pytest
import torch

from trainer import capture, memory, run
from trainer.config.load import validate
from trainer.run_dir import RunDir
from trainer.step import Step
from trainer.tape import Taped

WIDE = {"adapter.targets": ["attention", "feed_forward", "projections", "convolutions"], "train.visits": 2}
ALL = list(memory.MODES)


def far(a: dict, b: dict) -> float:
    """Largest difference of two exports, over the largest weight."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / max(float(t.abs().max()) for t in a.values())


@pytest.fixture(scope="module")
def fast(train):
    return train(WIDE | {"train.memory": "fast"})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ALL[1:])
def test_each_mode_trains_every_layer(mode, train, fast):
    done = train(WIDE | {"train.memory": mode})
    ups = {k: t for k, t in done.lora().items() if k.endswith("lora_up.weight")}
    assert all(t.any() for t in ups.values()), "a layer got no gradient"
    apart = far(fast.lora(), done.lora())
    assert apart < 1e-4 if mode in ALL[:3] else 0 < apart < 0.5
    assert done.events("memory")[0] | {"mode": mode, "accumulation": 1} == done.events("memory")[0]


@pytest.fixture
def runs_out(monkeypatch):
    """runs_out(at, updating=False): the memory runs out in step `at`, before or within the optimizer's update."""

    def set_up(at: int, updating: bool = False, times: int = 1):
        left = [times]

        def fail():
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        if updating:
            update = Step.update

            def broken(self, n):
                if self.done == at and left[0]:
                    self.updating = True
                    self.optimizer.step()  # half of the weights, as it were
                    fail()
                update(self, n)

            monkeypatch.setattr(Step, "update", broken)
        else:
            for runner in (Step, Taped):

                def short(self, n, *rest, work=runner.run):
                    if n == at and left[0]:
                        fail()
                    work(self, n, *rest)

                monkeypatch.setattr(runner, "run", short)

    return set_up


@pytest.mark.parametrize("at", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_it_goes_on_where_it_was(at, train, runs_out, same):
    whole = train({})
    runs_out(at)
    done = train({})
    assert done.outcome == "finished"
    assert [e["mode"] for e in done.events("memory")] == ["fast", "selective", "selective"]
    (said,) = [e["text"] for e in done.events("warning") if "ran out" in e["text"]]
    assert said == f"The GPU's memory ran out after step {at}. The run goes on with feed-forward layers computed twice."
    assert [e["step"] for e in done.events("resumed")] == [at]
    assert same(whole.lora(), done.lora())


@pytest.mark.slow
def test_the_weights_of_an_update_that_broke_off_are_not_kept(train, runs_out, same):
    whole = train({})
    runs_out(5, updating=True)
    done = train({"output.checkpoint_every": 3})
    assert [e["step"] for e in done.events("resumed")] == [3]
    assert same(whole.lora(), done.lora())


def test_it_ends_with_a_sentence_where_nothing_is_left(train, runs_out, tmp_path):
    runs_out(2, times=99)
    with pytest.raises(run.RunError, match="even with everything that saves it"):
        train({"train.batch_size": 2}, root=tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    tried = [(e["mode"], e["accumulation"]) for e in events if e["type"] == "memory"]
    assert list(dict.fromkeys(tried)) == [
        ("fast", 1), ("selective", 1), ("checkpointing", 1), ("checkpointing", 2), ("8bit", 2), ("4bit", 2),
    ]  # fmt: skip
    assert events[-1]["type"] == "failed"


@pytest.mark.slow
def test_a_resumed_run_keeps_its_way(train, runs_out, same, tmp_path):
    whole = train({})
    runs_out(2)
    assert train({}, root=tmp_path, stop_at=4).outcome == "stopped"
    done = train({"output.checkpoint_every": 4}, root=tmp_path, resume=True)
    assert [e["mode"] for e in done.events("memory")][-1] == "selective"
    assert same(whole.lora(), done.lora())


class Spoilt:
    """A capture that fails in step 3."""

    def __init__(self, step):
        self.step, self.capturing = step, False

    def run(self, n, *rest):
        if n == 3:
            self.capturing = True
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.step.run(n, *rest)


@pytest.mark.slow
def test_after_a_capture_that_failed_the_command_starts_a_fresh_process(settings, train, same, monkeypatch, tmp_path):
    from trainer import __main__ as cli
    from trainer import run_dir

    monkeypatch.setattr(capture, "why_not", lambda step: None)
    monkeypatch.setattr(capture, "Captured", Spoilt)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings({})), encoding="utf-8")
    asked = []
    monkeypatch.setattr(run_dir, "restart", lambda *words: asked.append(words) or 0)
    assert cli.main(["train", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    assert asked == [("-m", "trainer", "train", "--run-dir", str(tmp_path / "run"), "--resume")]
    assert RunDir(tmp_path / "run").last_checkpoint()[0] == 3
    monkeypatch.undo()
    assert cli.main(list(asked[0][2:])) == 0
    from safetensors.torch import load_file

    assert same(train({}).lora(), load_file(tmp_path / "run" / "lora.safetensors"))


def config(**more):
    return validate({"data": [{"folder": "."}], "preview": {"enabled": False}} | more)


def test_the_ladder_keeps_what_is_learnt_as_long_as_it_can():
    names = [(c.mode, c.accumulation) for c in memory.ladder(config(train={"batch_size": 4}), 4)]
    assert names == [("fast", 1), ("selective", 1), ("checkpointing", 1), ("checkpointing", 4), ("8bit", 4), ("4bit", 4)]
    assert [c.mode for c in memory.ladder(config(train={"memory": "checkpointing"}), 1)] == ["checkpointing", "8bit", "4bit"]
    assert [(c.mode, c.accumulation) for c in memory.ladder(config(train={"memory": "4bit"}), 2)] == [("4bit", 1), ("4bit", 2)]


@pytest.mark.parametrize("table", ["sd1", "sd2", "sdxl", "sd35_medium", "sd35_large"])
def test_less_room_takes_a_smaller_way(table):
    need = memory.Need(table, memory.TABLES[table].native ** 2, "bf16", 2)
    asked = config(adapter={"targets": ["attention", "feed_forward"]})
    costs = [memory.training(asked, need, c) for c in memory.ladder(asked, 2)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    for choice, cost in zip(memory.ladder(asked, 2), costs, strict=True):
        found = memory.choose(asked, need, cost + 0.01)
        assert (found.mode, found.accumulation) == (choice.mode, choice.accumulation)
        assert max(memory.stages(asked, need, found).values()) <= cost + 0.01 or found.parked
    assert memory.choose(asked, need, 0.5).mode == "4bit"
    assert not memory.choose(asked, need, 200.0).parked
