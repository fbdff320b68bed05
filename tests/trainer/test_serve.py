"""The playground's server on the demo base, in a process of its own and in this one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from trainer import control, events
from trainer.run_dir import RunDir, is_alive
from trainer.serve import serve

ROOT = Path(__file__).resolve().parents[2]
STRONG = {"part": {"unet": {"learning_rate": 1e-2}, "text_1": {"learning_rate": 1e-2}}, "train.visits": 2}
SMALL = {"base": "demo", "prompt": "a zorp on a beach", "steps": 3, "width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def lora(train) -> Path:
    return train(STRONG).root / "lora.safetensors"


def ask(root: Path, id: str, **more) -> None:
    folder = root / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    temp = folder / f".{id}.tmp"
    temp.write_text(json.dumps({**SMALL, **more}), encoding="utf-8")
    temp.rename(folder / f"{id}.json")


def told(root: Path, *kinds: str) -> list[dict]:
    return [e for e in events.read(root / "events.jsonl") if not kinds or e["type"] in kinds]


def picture(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def serving(root: Path, **more) -> threading.Thread:
    thread = threading.Thread(target=serve, args=(root,), kwargs={"device": "cpu", **more})
    thread.start()
    return thread


def wait(root: Path, kind: str, count: int = 1, seconds: float = 60) -> list[dict]:
    deadline = time.monotonic() + seconds
    while len(found := told(root, kind)) < count:
        assert time.monotonic() < deadline, told(root)
        time.sleep(0.02)
    return found


def test_requests_are_served_in_turn_by_one_loaded_base_until_it_is_idle(lora, tmp_path, one_thread):
    for n, more in enumerate(
        ({"lora": str(lora)}, {"lora": str(lora), "strength": 0.5}, {}, {"lora": str(lora), "seed": 4}, {"lora": str(lora), "strength": 0})
    ):
        ask(tmp_path, f"r{n}", **more)
        time.sleep(0.01)
    assert serve(tmp_path, idle=0.5, device="cpu") == "finished"
    assert told(tmp_path)[-1]["type"] == "finished" and told(tmp_path)[-1]["reason"] == "idle" and not is_alive(RunDir(tmp_path))
    (loading,), (ready,) = told(tmp_path, "loading"), told(tmp_path, "ready")
    assert loading["base"] == ready["base"] == "demo" and 0.05 < ready["memory_gib"] < 20
    assert not told(tmp_path, "problem") and not list((tmp_path / "requests").iterdir())
    made = told(tmp_path, "picture")
    assert [e["id"] for e in made] == [f"r{n}" for n in range(5)]
    assert made[2]["with"] is None and made[0]["without"] == "pictures/r0-without.png" and made[0]["with"] == "pictures/r0-with.png"
    without = [picture(tmp_path / e["without"]) for e in made]
    assert np.array_equal(without[0], without[1]) and np.array_equal(without[0], without[2]) and not np.array_equal(without[0], without[3])
    full, half, other, none = (picture(tmp_path / made[k]["with"]) for k in (0, 1, 3, 4))
    change = [np.abs(x - without[0]).mean() for x in (full, half, none)]
    assert full.shape == (64, 64, 3) and change[0] > 5 and change[1] > 1 and change[2] == 0, change
    assert not np.array_equal(full, half) and np.abs(other - without[3]).mean() > 5
    assert made[1]["seconds"] < made[0]["seconds"]  # neither the base, nor the LoRA, nor the picture without it is made again

    from trainer.generate import generate

    (alone,) = generate("demo", [SMALL["prompt"]], lora=lora, seed=3, steps=3, size=(64, 64), out=tmp_path / "alone", device="cpu")
    assert np.abs(picture(alone) - full).max() <= 2


def test_a_bad_request_is_a_problem_and_the_next_one_is_served(lora, tmp_path, one_thread):
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = tmp_path / "wide.safetensors"
    save_file({f"{stem}.lora_down.weight": torch.zeros(2, 768), f"{stem}.lora_up.weight": torch.zeros(320, 2)}, wide)
    root = tmp_path / "job"
    bad = [
        ({"lora": str(tmp_path / "none.safetensors")}, ["none.safetensors does not exist"]),
        ({"lora": str(wide)}, ["The LoRA is", "wide.safetensors", "do not fit the base"]),
        ({"base": str(tmp_path / "nothing")}, ["nothing", "no such file or folder"]),
        ({"steps": 0, "lora": str(lora)}, ["steps is 0"]),
        ({"prompt": None}, ["prompt is None"]),
    ]
    ask(root, "before", lora=str(lora))
    for n, (more, _) in enumerate(bad):
        time.sleep(0.01)
        ask(root, f"bad{n}", **more)
    time.sleep(0.01)
    (root / "requests" / "torn.json").write_text("{")
    time.sleep(0.01)
    ask(root, "after", lora=str(lora))
    assert serve(root, idle=0.3, device="cpu") == "finished"
    problems = told(root, "problem")
    assert [e["id"] for e in problems] == [*(f"bad{n}" for n in range(len(bad))), "torn"]
    for problem, (_, words) in zip(problems, bad, strict=False):
        assert all(w in problem["text"] for w in words) and "Traceback" not in problem["text"], problem
    before, after = told(root, "picture")
    for name in ("without", "with"):  # what failed left nothing of itself on the base
        assert np.array_equal(picture(root / before[name]), picture(root / after[name]))


def test_a_stop_in_the_midst_of_a_picture_ends_it_soon(tmp_path, one_thread):
    ask(tmp_path, "long", steps=200, width=256, height=256)
    ask(tmp_path, "next")
    thread = serving(tmp_path, idle=60)
    wait(tmp_path, "working")
    wait(tmp_path, "ready")
    time.sleep(0.3)
    began = time.monotonic()
    control.send(RunDir(tmp_path), "stop")
    thread.join(15)
    assert not thread.is_alive() and time.monotonic() - began < 10
    assert told(tmp_path)[-1]["type"] == "stopped" and not told(tmp_path, "picture")
    assert {e["id"] for e in told(tmp_path, "problem")} == {"long", "next"} and not list((tmp_path / "requests").iterdir())
    assert not is_alive(RunDir(tmp_path))


def test_a_stop_of_the_last_server_does_not_end_this_one(tmp_path, one_thread):
    """Of a server that was killed with a request before it: older than the process that serves now."""
    (tmp_path / "control").mkdir()
    old = tmp_path / "control" / "old.json"
    old.write_text('{"kind": "stop"}')
    os.utime(old, (1e9, 1e9))
    assert serve(tmp_path, idle=0.2, device="cpu") == "finished" and not old.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no polite kill")
def test_a_polite_kill_and_a_second_server(tmp_path):
    words = [sys.executable, "-m", "trainer", "serve", "--run-dir", str(tmp_path), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 30
    while not is_alive(RunDir(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1 and second.stderr.startswith("Error: Another process") and process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130, out
    assert [e["type"] for e in told(tmp_path)] == ["stopped"]
