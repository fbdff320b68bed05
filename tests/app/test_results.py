"""What a run has come to: the comparison's pictures, copies for other tools, and the playground, on a real training of seconds."""

import json
import shutil
import time

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from app import settings as app_settings
from app.api import results, runs
from app.context import Context
from app.paths import Home
from app.runner import Runner
from app.server import _answer_errors
from trainer.events import Writer
from trainer.formats.metadata import read_header
from trainer.run_dir import Lock, RunDir


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def context(tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    app_settings.save(home, {"run_folders": []})
    runner = Runner(home)
    yield Context(home, runner)
    for folder in runner.folders():
        runner.kill(folder, grace=0)


@pytest.fixture
def client(context):
    app = FastAPI()
    app.state.context = context
    _answer_errors(app)
    for module in (runs, results):
        app.include_router(module.router, prefix="/api")
    return TestClient(app)


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A finished run with three files, as the trainer leaves it."""
    more = {"output.save_every": 4, "output.name": "zorp", "output.description": "a small creature", "train.visits": 6}
    return train(more, tmp_path_factory.mktemp("trained") / "run").root


@pytest.fixture
def run(trained, context):
    folder = context.home.runs / "zorp-run"
    shutil.copytree(trained, folder)
    return folder


def compared(run) -> None:
    """What `compare` leaves behind, by hand (trainer/compare.py says what stands in it)."""
    out = run / "results"
    out.mkdir()
    for name in ("without.png", "with.png", "000012-1-0.6.png", "000012-1-1.0.png"):
        Image.new("RGB", (64, 48), (len(name) * 9, 0, 0)).save(out / name)
    found = {
        "pair": {"prompt": "a zorp", "without": "without.png", "with": "with.png", "file": "zorp-000004.safetensors", "step": 4},
        "matrix": {
            "prompts": ["a zorp"],
            "strengths": [0.6, 1.0],
            "rows": [{"file": "zorp.safetensors", "step": 12, "cells": [["000012-1-0.6.png", "000012-1-1.0.png"]]}],
        },
        "scores": [{"file": "zorp-000004.safetensors", "step": 4, "gain": 0.3, "drift": 0.1}],
        "recommended": {"file": "zorp-000004.safetensors", "step": 4, "why": "It is early."},
        "hints": ["Use it at 0.8."],
    }
    (out / "results.json").write_text(json.dumps(found))
    write = Writer(out / "events.jsonl")
    write("stage", name="loading")
    write("picture", done=3, total=12, file="with.png")
    write("finished", seconds=1.0)


def test_results_before_and_after_a_comparison(client, run):
    told = client.get("/api/runs/zorp-run/results").json()
    assert told["state"] == "none" and told["pair"] is None and told["matrix"] is None and told["recommended"] is None
    assert [(f["file"], f["step"], f["final"]) for f in told["files"]] == [
        ("zorp-000004.safetensors", 4, False),
        ("zorp-000008.safetensors", 8, False),
        ("zorp.safetensors", 12, True),
    ]
    assert told["trigger_line"] == "<lora:zorp:0.8> zorp" and told["lora_folder"] == ""
    assert told["metadata"]["zorp.safetensors"] == read_header(run / "zorp.safetensors")[0]

    compared(run)
    told = client.get("/api/runs/zorp-run/results").json()
    assert told["state"] == "finished" and told["percent"] == 100 and told["hints"] == ["Use it at 0.8."]
    assert told["trigger_line"] == "<lora:zorp-000004:0.8> zorp"
    assert [f["file"] for f in told["files"] if f["recommended"]] == ["zorp-000004.safetensors"]
    urls = [told["pair"]["without"], told["pair"]["with"], *told["matrix"]["rows"][0]["cells"][0]]
    for url in urls:
        assert client.get(url).headers["content-type"] == "image/png"
        assert client.get(url, params={"size": 32}).headers["content-type"] == "image/webp"
    assert client.get("/api/runs/zorp-run/results/results.json").status_code == 404


def test_progress_is_that_of_the_comparison_under_way(client, run):
    compared(run)
    lock = Lock(RunDir(run / "results"))
    lock.acquire()
    try:
        write = Writer(run / "results" / "events.jsonl")
        write("stage", name="loading", text="Downloading it.")
        told = client.get("/api/runs/zorp-run/results").json()
        assert (told["state"], told["percent"], told["text"]) == ("running", 0, "Downloading it.")
        write("scored", done=5, total=20, file="zorp.safetensors", step=12)
        assert client.get("/api/runs/zorp-run/results").json()["percent"] == 25
        refused = client.post("/api/runs/zorp-run/keep", json={"file": "zorp.safetensors", "confirm": True})
        assert refused.status_code == 409
    finally:
        lock.release()
    assert client.get("/api/runs/zorp-run/results").json()["state"] == "interrupted"


def test_a_copy_has_its_card_and_picture_and_writes_over_nothing(client, context, run, tmp_path):
    compared(run)
    body = {"file": "zorp-000004.safetensors", "folder": ""}
    assert "No LoRA folder" in client.post("/api/runs/zorp-run/copy", json=body).json()["errors"]["folder"]
    for wrong in (str(tmp_path / "nowhere"), "relative/folder"):
        assert client.post("/api/runs/zorp-run/copy", json=body | {"folder": wrong}).status_code == 400
    loras = tmp_path / "my loras"
    loras.mkdir()
    app_settings.save(context.home, {"lora_folder": str(loras)})
    paths = client.post("/api/runs/zorp-run/copy", json=body).json()["paths"]
    stem = "zorp-000004"
    assert paths == [str(loras / f"{stem}{ending}") for ending in (".safetensors", ".json", ".png")]
    assert (loras / f"{stem}.safetensors").read_bytes() == (run / f"{stem}.safetensors").read_bytes()
    card = json.loads((loras / f"{stem}.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "zorp" and card["sd version"] == "SD1" and card["description"] == "a small creature"
    assert "<lora:zorp-000004:0.8> zorp" in card["notes"]
    assert (loras / f"{stem}.png").read_bytes() == (run / "results" / "with.png").read_bytes()

    before = {p: p.read_bytes() for p in loras.iterdir()}
    again = client.post("/api/runs/zorp-run/copy", json=body | {"folder": f'"{loras}"'}).json()["paths"]
    assert again[0] == str(loras / f"{stem}-2.safetensors") and len(list(loras.iterdir())) == 6
    assert all(p.read_bytes() == raw for p, raw in before.items())
    assert f"<lora:{stem}-2:0.8>" in json.loads((loras / f"{stem}-2.json").read_text())["notes"]
    last = client.post("/api/runs/zorp-run/copy", json={"file": "zorp.safetensors"}).json()["paths"]
    assert (loras / "zorp.png").read_bytes() == (run / "results" / "000012-1-1.0.png").read_bytes() and len(last) == 3


def test_keeping_one_file_asks_first(client, run):
    compared(run)
    told = client.post("/api/runs/zorp-run/keep", json={"file": "zorp.safetensors"}).json()
    assert "zorp-000004.safetensors" in told["delete"] and told["mb"] > 0 and (run / "zorp-000004.safetensors").exists()
    assert client.post("/api/runs/zorp-run/keep", json={"file": "none.safetensors", "confirm": True}).status_code == 404
    client.post("/api/runs/zorp-run/keep", json={"file": "zorp.safetensors", "confirm": True})
    assert [p.name for p in run.glob("*.safetensors")] == ["zorp.safetensors"] and (run / "config.json").exists()
    assert list((run / "checkpoints").iterdir())
    told = client.get("/api/runs/zorp-run/results").json()
    assert [f["file"] for f in told["files"]] == ["zorp.safetensors"] and told["recommended"] is None
    assert [e["file"] for e in client.get("/api/runs/zorp-run").json()["exports"]] == ["zorp.safetensors"]


def test_a_comparison_is_queued_once(client, context, run):
    lock = Lock(RunDir(run.parent / "busy"))
    lock.run.root.mkdir()
    lock.run.config.write_text("{}")
    lock.acquire()
    try:
        for _ in range(2):
            assert client.post("/api/runs/zorp-run/compare").status_code == 200
        assert [job.words for job in context.runner.jobs.list()] == [("compare", str(run))]
        assert client.get("/api/runs/zorp-run/results").json()["state"] == "waiting"
        assert client.get("/api/runs").json()["queue"] == []
        taken = client.post("/api/playground", json={"run": "zorp-run", "file": "zorp.safetensors", "prompt": "a zorp"})
        assert taken.status_code == 409 and "training" in taken.json()["error"]
        context.runner.unqueue(run / "results")
    finally:
        lock.release()


def ask(client, **more) -> dict:
    body = {"run": "zorp-run", "file": "zorp.safetensors", "prompt": "a zorp", "steps": 2, "width": 64, "height": 64} | more
    request = client.post("/api/playground", json=body).json()["request"]
    deadline = time.monotonic() + 90
    while True:
        told = client.get("/api/playground", params={"request": request}).json()
        if told["pictures"] or told["error"]:
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


@pytest.mark.slow
def test_the_playground_draws_goes_on_and_gives_way(client, context, run):
    assert client.get("/api/playground").json() == {"state": "idle", "text": "", "pictures": None, "error": ""}
    for wrong in ({"steps": 0}, {"width": 65}, {"prompt": 3}, {"strength": 9}):
        body = {"run": "zorp-run", "file": "zorp.safetensors", "prompt": "a zorp"} | wrong
        assert client.post("/api/playground", json=body).status_code == 400
    assert client.post("/api/playground", json={"run": "..", "file": "zorp.safetensors", "prompt": "x"}).status_code == 404
    assert client.post("/api/playground", json={"run": "zorp-run", "file": "../x.safetensors", "prompt": "x"}).status_code == 404

    told = ask(client)
    assert told["error"] == "" and set(told["pictures"]) == {"without", "with"}
    raw = [client.get(url).content for url in told["pictures"].values()]
    assert all(r.startswith(b"\x89PNG") for r in raw) and raw[0] != raw[1]
    told = client.get("/api/playground").json()
    assert told["state"] == "ready" and "GiB of memory" in told["text"]
    pid = json.loads((context.home.jobs / "playground" / "launch.json").read_text())["pid"]
    ask(client, seed=2)
    assert json.loads((context.home.jobs / "playground" / "launch.json").read_text())["pid"] == pid

    context.runner.compare(run)
    deadline = time.monotonic() + 60
    while context.runner.state(run / "results") == "waiting":
        assert time.monotonic() < deadline
        context.runner.tick()
        time.sleep(0.1)
    assert client.get("/api/playground").json()["state"] == "yielded"
    refused = client.post("/api/playground", json={"run": "zorp-run", "file": "zorp.safetensors", "prompt": "x"})
    assert refused.status_code == 409 and "comparison" in refused.json()["error"]
    context.runner.kill(run / "results", grace=0)

    ask(client)
    client.post("/api/playground/close")
    while client.get("/api/playground").json()["state"] != "idle":
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)
    assert client.get("/api/playground/pictures/..%2fevents.jsonl").status_code == 404


@pytest.mark.slow
def test_a_finished_training_is_compared_and_its_results_show(client, context, settings):
    context.runner.every = 0.2
    context.runner.start()
    try:
        small = {"preview.enabled": True, "preview.steps": 1, "output.name": "zorp"}
        id = client.post("/api/runs", json={"config": settings(small)}).json()["id"]
        deadline = time.monotonic() + 400
        while (told := client.get(f"/api/runs/{id}/results").json())["state"] not in ("finished", "failed", "interrupted"):
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
    finally:
        context.runner.close()
    assert told["state"] == "finished", told["text"]
    assert told["recommended"]["file"] in {f["file"] for f in told["files"]} and told["scores"] and told["matrix"]["strengths"]
    for url in [
        told["pair"]["without"],
        told["pair"]["with"],
        *(u for row in told["matrix"]["rows"] for cells in row["cells"] for u in cells),
    ]:
        assert client.get(url).status_code == 200


def test_the_second_file_of_a_lora_for_sd3_goes_with_the_first(client, run, tmp_path):
    other = run / "zorp_diffusers.safetensors"
    other.write_bytes((run / "zorp.safetensors").read_bytes())
    told = client.get("/api/runs/zorp-run/results").json()
    entry = told["files"][-1]
    assert len(told["files"]) == 3 and (entry["file"], entry["second"]) == ("zorp.safetensors", other.name)
    assert entry["bytes"] == 2 * other.stat().st_size and told["files"][0]["second"] is None
    assert client.get(f"/api/runs/zorp-run/files/{other.name}").content == other.read_bytes()
    loras = tmp_path / "loras"
    loras.mkdir()
    paths = client.post("/api/runs/zorp-run/copy", json={"file": "zorp.safetensors", "folder": str(loras)}).json()["paths"]
    assert str(loras / other.name) in paths and (loras / other.name).read_bytes() == other.read_bytes()
    client.post("/api/runs/zorp-run/keep", json={"file": "zorp-000004.safetensors", "confirm": True})
    assert sorted(p.name for p in run.glob("*.safetensors")) == ["zorp-000004.safetensors"]


def test_the_playground_begins_with_the_runs_own_settings(client, run):
    own = json.loads((run / "config.json").read_text())["preview"]
    told = client.get("/api/runs/zorp-run/results").json()["preview"]
    assert told == {key: own[key] for key in ("negative", "steps", "guidance") if key in own}
