"""What is left of a run, and steps that are slow because the GPU's memory spills: by a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trainer import hardware, pace


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(at=100.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now.at)
    return now


def go(clock, made, start, steps, each):
    for step in range(start + 1, start + steps + 1):
        clock.at += each
        if step % 10 == 0 or step == 1:
            made.lap(step)


def test_the_rest_is_forecast_after_twenty_steps_without_the_first(clock):
    made = pace.Pace(0)
    clock.at += 60  # kernels are compiled
    made.lap(1)
    assert made.left(1, 100, {}) is None
    go(clock, made, 1, 9, 0.5)
    assert made.left(10, 100, {}) is None and made.left(10, 30, {}) == pytest.approx(10.0)  # of a short run at once
    go(clock, made, 10, 10, 0.5)
    assert made.left(20, 100, {}) == pytest.approx(40.0)
    assert made.left(100, 100, {"preview": ()}) == 0


def test_what_is_done_between_the_steps_counts_on_top(clock):
    made = pace.Pace(0)
    go(clock, made, 0, 20, 0.5)
    made.hooks["preview"] = 7.0
    clock.at += 7.0
    made.pause(7.0)
    go(clock, made, 20, 10, 0.5)
    assert made.each == pytest.approx(0.5)
    assert made.left(30, 100, {"preview": range(25, 100, 25)}) == pytest.approx(35 + 3 * 7)  # after 50 and 75, and at the end


def test_a_resumed_run_waits_as_long(clock):
    made = pace.Pace(500)
    go(clock, made, 500, 10, 0.5)
    assert made.left(510, 1000, {}) is None
    go(clock, made, 510, 10, 0.5)
    assert made.left(520, 1000, {}) == pytest.approx(240)


def test_steps_that_spill_are_told_of_once(clock):
    made = pace.Pace(0, limit=0.1)
    go(clock, made, 0, 10, 2.0)
    assert made.spilled(10) is None
    go(clock, made, 10, 10, 2.0)
    assert "A step takes 2 s, 20 times as long" in made.spilled(20)
    assert made.spilled(30) is None
    quick = pace.Pace(0, limit=0.1)
    go(clock, quick, 0, 20, 0.5)
    assert quick.spilled(20) is None


def test_no_limit_is_measured_where_memory_does_not_spill(monkeypatch):
    monkeypatch.setattr(hardware, "spills", lambda: False)
    assert pace.limit(torch.device("cuda"), 10.0, "bf16") is None
    monkeypatch.setattr(hardware, "spills", lambda: True)
    assert pace.limit(torch.device("cpu"), 10.0, "fp32") is None


@pytest.mark.parametrize("system, spills", [("win32", True), ("linux", False)])
def test_where_a_driver_spills_torch_may_take_no_more_than_what_is_free(system, spills, monkeypatch):
    set_to = []
    monkeypatch.setattr(hardware.sys, "platform", system)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: set_to.append(share))
    assert hardware.spills() is spills
    hardware.cap(torch.device("cuda"))
    assert set_to == ([pytest.approx((6 + 1 - 0.2) / 8)] if spills else [])
    hardware.cap(torch.device("cpu"))
    assert len(set_to) == spills
