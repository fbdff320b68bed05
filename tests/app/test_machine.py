"""What the app knows of the machine: asked of a process of its own, once a day."""

import json
import time

import pytest

from app import machine
from app.errors import Problem
from app.paths import Home
from app.runner import Runner


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    home.create()
    return home


def test_the_machine_is_probed_once_and_the_answer_is_kept(home, monkeypatch):
    assert machine.info(home) is None and not machine.probing(home)
    thread = machine.refresh(home, Runner(home))
    assert machine.probing(home) and machine.refresh(home, Runner(home)) is thread, "one probe at a time"
    thread.join(120)
    found = machine.info(home)
    assert not machine.probing(home) and machine.problem(home) == ""
    assert found["choice"]["device"] and found["memory_gib"] > 0 and "gpus" in found

    monkeypatch.setattr(machine, "_probes", {})  # another process, the same day
    assert machine.info(home) == found
    monkeypatch.setattr(machine, "_probes", {})  # the next day
    monkeypatch.setattr(machine.time, "strftime", lambda form: "2001-01-01")
    assert machine.info(home) is None


def test_a_probe_that_fails_is_a_sentence_and_the_old_answer_stands(home):
    class Broken(Runner):
        answer = ""

        def run_tool(self, words, timeout):
            assert words == ["probe"] and timeout >= 60
            if not self.answer:
                raise Problem("`python -m trainer probe` failed: no torch", 500)
            return self.answer

    runner = Broken(home)
    machine.refresh(home, runner).join(10)
    assert machine.info(home) is None and machine.problem(home) == "`python -m trainer probe` failed: no torch"
    runner.answer = "no JSON"
    machine.refresh(home, runner).join(10)
    assert "not JSON" in machine.problem(home)
    runner.answer = json.dumps({"gpus": []})
    machine.refresh(home, runner).join(10)
    assert machine.info(home) == {"gpus": []} and machine.problem(home) == ""
    runner.answer = ""
    machine.refresh(home, runner).join(10)
    assert machine.info(home) == {"gpus": []} and machine.problem(home)


def test_memory_and_disk_are_looked_up_each_time(home):
    began = time.perf_counter()
    found = machine.live(home)
    assert time.perf_counter() - began < 0.5
    assert 0 < found["free_memory_gib"] <= found["memory_gib"] < 10_000 and found["disk_free_gb"] > 0
