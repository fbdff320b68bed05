"""What only a CUDA device can show; run by hand with `pytest -m gpu`."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from safetensors.torch import load_file

import trainer.loop
from trainer import capture, control, events, memory, run
from trainer.config.load import validate
from trainer.demo.run import DEMO
from trainer.run_dir import RunDir

pytestmark = pytest.mark.gpu


def config(**changes):
    values = {
        "data": [
            {"folder": str(DEMO / "data/zorp/train"), "trigger": "zorp"},
            {"folder": str(DEMO / "data/zorp/held_out"), "kind": "validation"},
        ],
        "adapter": {"rank": 8, "alpha": 8, "targets": ["attention", "feed_forward", "projections", "convolutions"]},
        "part": {"unet": {"learning_rate": 1e-3}, "text_1": {"learning_rate": 1e-3, "stop": 0.5}},
        "train": {"visits": 10, "batch_size": 4, "device": "cuda"},
        "preview": {"enabled": False},
        "validation": {"every": 0},
        "output": {"dtype": "fp32"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return validate(values)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_each_dtype_learns(dtype, tmp_path):
    outcome, done = run.train(config(train__dtype=dtype, train__visits=30), tmp_path / dtype)
    losses = [e["held_out"] for e in events.read(done.events) if e["type"] == "validation"]
    assert outcome == "finished"
    assert losses[-1] < losses[0] * 0.5, losses


@pytest.mark.parametrize(("dtype", "dropout"), [("fp32", 0.1), ("fp32", 0.0), ("bf16", 0.1), ("bf16", 0.0)])
def test_a_resumed_run_is_bit_equal_when_reproducible(dtype, dropout, tmp_path):
    """With dropout each step is launched by itself, without by graphs, also after the checkpoint, while the rate falls."""
    settings = {"train__dtype": dtype, "train__reproducible": True, "adapter__dropout": dropout, "output__checkpoint_every": 12}
    _, whole = run.train(config(**settings), tmp_path / "whole")
    cut = RunDir(tmp_path / "cut")

    def stop(event):
        if event["type"] == "checkpoint" and event["step"] == 12:
            control.send(cut, "stop")

    assert run.train(config(**settings), cut.root, show=stop)[0] == "stopped"
    assert run.train(config(**settings), cut.root, resume=True)[0] == "finished"
    a, b = load_file(whole.lora("lora")), load_file(cut.lora("lora"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(dtype, tmp_path, monkeypatch):
    """torch raises at any synchronising call between the start of a step and the end of its update."""
    from trainer.step import Step

    whole, seen = Step.run, []

    def strict(self, n, *rest):
        if n > 2:  # the first steps compile and pick algorithms
            torch.cuda.set_sync_debug_mode("error")
        whole(self, n, *rest)
        torch.cuda.set_sync_debug_mode("default")
        seen.append(n)

    monkeypatch.setattr(Step, "run", strict)
    monkeypatch.setattr(capture, "why_not", lambda step: "the test asks for eager steps")
    try:
        run.train(config(train__dtype=dtype, validation__enabled=False), tmp_path / "run")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 35


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_previews_borrow_the_frozen_encoder_and_the_vae(dtype, tmp_path):
    """With the text encoder frozen, it and the VAE wait on the CPU; previews have them on the GPU, and the pictures change."""
    import numpy as np
    from PIL import Image

    values = config(train__dtype=dtype, preview__enabled=True).model_dump(mode="json")
    values["part"]["text_1"]["train"] = False
    _, done = run.train(validate(values), tmp_path / "run")
    shown = [e["images"] for e in events.read(done.events) if e["type"] == "preview"]
    first, last = (np.stack([np.asarray(Image.open(done.previews / n), np.float32) for n in names]) for names in (shown[0], shown[-1]))
    assert first.std() > 20 and np.abs(first - last).mean() > 1


def test_previews_by_graph_change_nothing_that_is_learnt(tmp_path):
    """Between steps that are replayed themselves, in the same kernels each time."""
    same = {"train__reproducible": True, "train__dtype": "bf16", "validation__enabled": False}
    _, without = run.train(config(**same), tmp_path / "without")
    _, shown = run.train(config(**same, preview__enabled=True, preview__every=3), tmp_path / "shown")
    torch.use_deterministic_algorithms(False)
    told = list(events.read(shown.events))
    assert len([e for e in told if e["type"] == "preview"]) >= 10 and not any("CUDA graphs" in e.get("text", "") for e in told)
    a, b = load_file(without.lora("lora")), load_file(shown.lora("lora"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_way_to_save_memory_learns_the_same(tmp_path, monkeypatch):
    """Over 50 steps; a packed base makes a small difference."""
    monkeypatch.setattr(trainer.loop, "EVENTS_EVERY", 1)
    losses = {}
    for mode in memory.MODES:
        settings = {
            "train__memory": mode,
            "train__dtype": "bf16",
            "train__reproducible": True,
            "train__visits": 15,
            "validation__enabled": False,
        }
        outcome, done = run.train(config(**settings), tmp_path / mode)
        told = list(events.read(done.events))
        assert outcome == "finished" and [e["mode"] for e in told if e["type"] == "memory"] == [mode]
        losses[mode] = [e["loss"] for e in told if e["type"] == "step"]
    torch.use_deterministic_algorithms(False)
    apart = {mode: max(abs(a - b) for a, b in zip(losses["fast"], losses[mode], strict=True)) for mode in losses}
    assert len(losses["fast"]) >= 50 and max(apart["selective"], apart["checkpointing"]) < 1e-3, apart
    assert 0 < apart["8bit"] < 0.02 and 0 < apart["4bit"] < 0.05, apart


def test_a_full_gpu_makes_the_run_go_on_in_a_smaller_way(tmp_path, monkeypatch):
    """With three quarters of the memory that its tensors would take, by torch's own cap; as many steps, and the same learnt to rounding.

    At 256 px, so that it is more than the workspaces of cuBLAS (32 MiB for each of its streams), which stay. Where memory is short, cuDNN
    takes other algorithms, whose rounding bf16 and Adam's first steps make 6 % of on an H200 by the tenth step.
    """
    monkeypatch.setattr(trainer.loop, "EVENTS_EVERY", 1)
    settings = {"train__batch_size": 14, "train__reproducible": True, "train__dtype": "bf16", "dataset__resolution": 256}
    _, whole = run.train(config(**settings), tmp_path / "whole")
    peak = max(e["memory_gib"] for e in events.read(whole.events) if e["type"] == "step")
    total = torch.cuda.mem_get_info()[1] / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_allocated() / 2**30
    torch.cuda.set_per_process_memory_fraction((kept + 0.75 * (peak - kept)) / total)
    try:
        outcome, short = run.train(config(**settings), tmp_path / "short")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.use_deterministic_algorithms(False)
    told = list(events.read(short.events))
    assert outcome == "finished"
    assert next(e["mode"] for e in told if e["type"] == "memory") == "fast"
    assert [e["mode"] for e in told if e["type"] == "memory"][-1] in ("selective", "checkpointing")
    assert any("ran out after step" in e["text"] for e in told if e["type"] == "warning")
    losses = [{e["step"]: e["loss"] for e in events.read(done.events) if e["type"] == "step"} for done in (whole, short)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


FULL = """
import sys, torch
from trainer import capture
from trainer.__main__ import main

whole = capture.Captured._capture

def full(self, *rest):
    global held
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - 2**26, dtype=torch.uint8, device="cuda")
    return whole(self, *rest)

capture.Captured._capture = full
sys.exit(main(sys.argv[3:]))
"""


def test_a_capture_that_fails_is_made_up_for_by_a_fresh_process(command, tmp_path):
    """All but 64 MiB of the GPU are taken just before the first capture, by the process itself: the next one has them again."""
    values = config(train__batch_size=14, train__dtype="bf16", dataset__resolution=256, validation__enabled=False)
    path, root = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(values.model_dump(mode="json")), encoding="utf-8")
    process = command(root, None, str(path), launcher=("-c", FULL))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    told = list(events.read(root / "events.jsonl"))
    assert [e["text"] for e in told if e["type"] == "warning" and "ran out after step 1." in e["text"]], said
    assert [(e["type"], e.get("step")) for e in told if e["type"] in ("resumed", "finished")] == [("resumed", 1), ("finished", 10)], said
    assert [e["mode"] for e in told if e["type"] == "memory"][-1] == "selective"
