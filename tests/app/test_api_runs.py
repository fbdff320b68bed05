"""The routes of runs, with real trainings on the demo base behind them."""

import json
import os
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app import draft
from app import settings as app_settings
from app.api import results, runs
from app.context import Context
from app.paths import Home
from app.runner import Runner
from app.server import _answer_errors
from trainer.run_dir import Lock, RunDir

LONG = {"train.visits": 4000, "output.checkpoint_every": 2}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def context(tmp_path, monkeypatch):
    home = Home(tmp_path / "home")
    home.create()
    app_settings.save(home, {"run_folders": []})
    monkeypatch.setattr(Runner, "_compare", lambda self, folder: None)
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


@pytest.fixture
def busy(context):
    """A training of somebody else: what is queued waits until it is released."""
    folder = context.home.runs / "busy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    lock = Lock(RunDir(folder))
    lock.acquire()
    yield lock
    lock.release()


def start(client, settings, changes=None, **more) -> str:
    answer = client.post("/api/runs", json={"config": settings(changes), **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def state(client, id) -> str:
    return client.get(f"/api/runs/{id}").json()["run"]["state"]


def wait(client, context, id, *states, seconds=120) -> str:
    deadline = time.monotonic() + seconds
    while (now := state(client, id)) not in states:
        assert time.monotonic() < deadline, f"{now}: {client.get(f'/api/runs/{id}/log').json()['text']}"
        context.runner.tick()
        time.sleep(0.1)
    return now


def wait_step(client, context, id, step=1) -> dict:
    deadline = time.monotonic() + 120
    while (told := client.get(f"/api/runs/{id}").json())["run"]["step"] < step:
        assert time.monotonic() < deadline and told["run"]["state"] in ("waiting", "starting", "running"), told["run"]
        context.runner.tick()
        time.sleep(0.1)
    return told


def test_a_run_from_a_configuration_to_its_file(client, context, settings):
    previews = {"preview.enabled": True, "preview.steps": 2, "preview.prompts": ["a zorp"], "preview.every": 4, "output.name": "Größe 1"}
    id = start(client, settings, {**previews, "output.save_every": 4})
    assert id.endswith("-groe-1") and state(client, id) == "starting"
    assert client.get("/api/runs").json()["active"] == id
    assert wait(client, context, id, "finished", "failed") == "finished"
    told = client.get(f"/api/runs/{id}").json()
    assert told["run"]["percent"] == 100 and told["run"]["step"] == told["run"]["total"] == 8
    assert told["run"]["device"] and told["run"]["schedule"] and told["run"]["name"] == "Größe 1"
    assert [p["step"] for p in told["previews"]] == [0, 4, 8] and told["previews"][0]["prompts"] == ["a zorp"]
    assert {e["file"]: e["final"] for e in told["exports"]} == {"Größe 1-000004.safetensors": False, "Größe 1.safetensors": True}
    assert told["points"]["loss"][-1][0] == 8 and told["points"]["rate"]["unet"]

    again = client.get(f"/api/runs/{id}", params={"since": told["seq"]})
    assert again.json()["points"]["loss"] == [] and not again.json()["reset"]
    same = client.get(f"/api/runs/{id}", params={"since": told["seq"]}, headers={"if-none-match": again.headers["etag"]})
    assert same.status_code == 304 and same.content == b""

    file = client.get(f"/api/runs/{id}/files/Größe 1.safetensors")
    assert file.content == (context.home.runs / id / "Größe 1.safetensors").read_bytes()
    assert file.headers["content-disposition"].startswith("attachment")
    picture = client.get(f"/api/runs/{id}/previews/step-000004-1.png")
    small = client.get(client.get("/api/runs").json()["runs"][0]["thumb"])
    assert picture.headers["content-type"] == "image/png" and small.headers["content-type"] == "image/webp"
    config = tomllib.loads(client.get(f"/api/runs/{id}/config").text)
    assert config["adapter"]["rank"] == 2 and config["output"]["name"] == "Größe 1" and config["data"][0]["trigger"] == "zorp"
    log = client.get(f"/api/runs/{id}/log").json()
    assert "Finished" in log["text"] and client.get(f"/api/runs/{id}/log", params={"since": log["next"]}).json()["text"] == ""
    assert "further" in told["run"]["actions"] and "stop" not in told["run"]["actions"]
    for action in ("stop", "resume", "cancel", "preview", "save"):
        refused = client.post(f"/api/runs/{id}/{action}")
        assert refused.status_code == 409 and "Größe 1 is finished" in refused.json()["error"]

    # further: at least one visit more, on the same curve
    assert client.post(f"/api/runs/{id}/further", json={"percent": 30}).status_code == 400
    assert client.post(f"/api/runs/{id}/further", json={"percent": 25}).json()["state"] == "starting"
    assert wait(client, context, id, "finished", "failed") == "finished"
    told = client.get(f"/api/runs/{id}").json()
    assert (told["run"]["visits"], told["run"]["step"], told["run"]["total"]) == (5, 10, 10)
    assert [p[0] for p in told["points"]["loss"]][-1] == 10


def test_a_run_from_the_draft_has_its_own_images(client, context):
    home = context.home
    refused = client.post("/api/runs", json={"draft": True})
    assert refused.status_code == 400 and refused.json()["errors"]
    draft.example(home)
    draft.update(home, name="My Zorp", changes={"train.visits": 1})
    answer = client.post("/api/runs", json={"draft": True})
    assert answer.status_code == 200, answer.text
    id = answer.json()["id"]
    folder = home.runs / id
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["data"][0]["folder"] == str(folder / "data") and config["output"]["name"] == "my-zorp"
    assert config["data"][0]["trigger"] == "zorp"
    assert len(list((folder / "data").glob("*.png"))) == 14 and len(list((folder / "data").glob("*.txt"))) == 14
    told = client.get(f"/api/runs/{id}").json()["run"]
    assert told["purpose"] == "character" and told["total"] > 0 and told["model"]
    assert told["state"] in ("starting", "running")
    context.runner.kill(folder, grace=0)


@pytest.mark.slow
def test_stop_resume_and_live_changes(client, context, settings):
    id = start(client, settings, LONG | {"preview.enabled": True, "preview.steps": 1, "preview.every": 0, "preview.prompts": ["a zorp"]})
    told = wait_step(client, context, id)
    assert {"stop", "save", "preview", "prompts", "length", "discard"} <= set(told["run"]["actions"])
    assert client.post(f"/api/runs/{id}/resume").status_code == 409
    assert client.post(f"/api/runs/{id}/prompts", json={"prompts": [" "]}).status_code == 400
    assert client.post(f"/api/runs/{id}/length", json={"visits": 0}).status_code == 400
    assert client.post(f"/api/runs/{id}/prompts", json={"prompts": ["a red zorp", "zwei \N{SNOWMAN}"]}).status_code == 200
    assert client.post(f"/api/runs/{id}/length", json={"visits": 3000}).status_code == 200
    assert client.post(f"/api/runs/{id}/preview").status_code == 200
    assert client.post(f"/api/runs/{id}/save").status_code == 200
    deadline = time.monotonic() + 60
    while client.get(f"/api/runs/{id}").json()["run"]["pending"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client.post(f"/api/runs/{id}/stop").status_code == 200
    assert wait(client, context, id, "stopped", "finished", "failed") == "stopped"
    told = client.get(f"/api/runs/{id}").json()
    assert told["run"]["visits"] == 3000 and told["run"]["total"] == 6000
    assert told["run"]["prompts"] == ["a red zorp", "zwei \N{SNOWMAN}"]
    assert len(told["previews"]) == 2 and len(told["exports"]) >= 1
    step = told["run"]["step"]

    answer = client.post(f"/api/runs/{id}/resume").json()
    assert answer["state"] == "starting"
    assert wait_step(client, context, id, step + 1)["run"]["visits"] == 3000
    assert client.post(f"/api/runs/{id}/discard").status_code == 400
    assert (context.home.runs / id).exists()
    assert client.post(f"/api/runs/{id}/discard", json={"confirm": True}).status_code == 200
    assert not list(context.home.runs.iterdir()) and context.runner.busy() == []
    assert client.get(f"/api/runs/{id}").status_code == 404


def test_the_queue_can_be_ordered_edited_copied_and_emptied(client, context, settings, busy):
    a, b, c = (start(client, settings, {"output.name": name}, queue=True) for name in ("one", "two", "three"))
    assert client.get("/api/runs").json()["queue"] == [a, b, c]
    assert [state(client, id) for id in (a, b, c)] == ["waiting"] * 3
    assert client.post(f"/api/runs/{c}/move", json={"to": 0}).json()["position"] == 0
    assert client.post(f"/api/runs/{a}/move", json={"to": 9}).json()["position"] == 2
    assert client.get("/api/runs").json()["queue"] == [c, b, a]
    now = start(client, settings, {"output.name": "now"})
    assert client.get("/api/runs").json()["queue"] == [now, c, b, a]

    shown = client.get(f"/api/runs/{b}").json()["run"]
    assert shown["values"]["adapter.rank"] == 2 and shown["position"] == 2 and "edit" in shown["actions"]
    changed = client.patch(
        f"/api/runs/{b}", json={"changes": {"adapter.rank": 8, "optimizer.kind": "prodigy", "part.unet.learning_rate": 1}}
    )
    assert changed.status_code == 400 and "Prodigy" in changed.json()["error"]
    changed = client.patch(f"/api/runs/{b}", json={"changes": {"adapter.rank": 8, "loss.min_snr_gamma": None}})
    assert changed.json()["run"]["values"]["adapter.rank"] == 8
    wrong = client.patch(f"/api/runs/{b}", json={"changes": {"adapter.rank": 0}})
    assert wrong.status_code == 400 and "adapter.rank" in wrong.json()["errors"]
    assert client.patch(f"/api/runs/{b}", json={"changes": {"data": []}}).status_code == 400
    assert client.patch(f"/api/runs/{b}", json={"changes": {"no.such": 1}}).status_code == 400
    assert json.loads((context.home.runs / b / "config.json").read_text())["adapter"]["rank"] == 8
    assert client.patch("/api/runs/busy", json={"changes": {}}).status_code == 409

    copy = client.post(f"/api/runs/{b}/duplicate").json()["id"]
    assert client.get("/api/runs").json()["queue"] == [now, c, b, a, copy]
    assert json.loads((context.home.runs / copy / "config.json").read_text())["adapter"]["rank"] == 8
    for id in (now, c, a, b, copy):
        assert client.post(f"/api/runs/{id}/cancel").status_code == 200
    assert sorted(p.name for p in context.home.runs.iterdir()) == ["busy"]
    assert context.runner.jobs.list() == []


def test_the_list_is_sent_again_only_when_something_changed(client, context, settings, busy):
    a = start(client, settings, queue=True)
    first = client.get("/api/runs")
    same = client.get("/api/runs", headers={"if-none-match": first.headers["etag"]})
    assert same.status_code == 304 and same.content == b"" and same.headers["etag"] == first.headers["etag"]
    b = start(client, settings, queue=True)
    second = client.get("/api/runs", headers={"if-none-match": first.headers["etag"]})
    assert second.status_code == 200 and second.json()["queue"] == [a, b]
    client.post(f"/api/runs/{b}/move", json={"to": 0})
    third = client.get("/api/runs", headers={"if-none-match": second.headers["etag"]})
    assert third.status_code == 200 and third.json()["queue"] == [b, a]


def test_a_copy_has_its_own_images(client, context, settings, busy, pictures):
    a = start(client, settings, queue=True)
    folder = context.home.runs / a
    (folder / "data").mkdir()
    (folder / "data" / "x.png").write_bytes((pictures / "00.png").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["data"][0]["folder"] = str(folder / "data")
    (folder / "config.json").write_text(json.dumps(config))
    copy = context.home.runs / client.post(f"/api/runs/{a}/duplicate").json()["id"]
    client.post(f"/api/runs/{a}/cancel")
    assert not folder.exists() and (copy / "data" / "x.png").read_bytes() == (pictures / "00.png").read_bytes()
    assert json.loads((copy / "config.json").read_text())["data"][0]["folder"] == str(copy / "data")


def test_a_waiting_resume_keeps_its_history_and_is_not_deleted(client, context, busy):
    folder = context.home.runs / "old"
    folder.mkdir()
    (folder / "config.json").write_text('{"output": {"name": "old"}, "train": {"visits": 10}}')
    lines = [
        {"seq": 0, "time": 1.0, "type": "step", "step": 10, "loss": 0.5, "rate": {}, "images_per_s": 1, "eta_s": 1, "epoch": 1},
        {"seq": 1, "time": 2.0, "type": "stopped", "step": 10, "seconds": 1},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert client.post("/api/runs/old/resume").json() == {"id": "old", "state": "waiting", "position": 0}
    told = client.get("/api/runs/old").json()
    assert told["points"]["loss"] == [[10, 0.5]] and "edit" not in told["run"]["actions"]
    assert client.patch("/api/runs/old", json={"changes": {"adapter.rank": 8}}).status_code == 409
    assert client.post("/api/runs/old/cancel").json()["state"] == "stopped"
    assert client.post("/api/runs/old/further", json={"percent": 50}).json()["state"] == "waiting"
    assert context.runner.jobs.list()[0].words[-2:] == ("--visits", "15")
    client.post("/api/runs/old/cancel")
    assert folder.exists()


def test_wrong_configurations_start_nothing(client, context, settings, tmp_path):
    for changes, field in (
        ({"adapter.rank": 0}, "adapter.rank"),
        ({"adapter.rnak": 4}, "adapter.rnak"),
        ({"data": [{"folder": str(tmp_path / "nowhere")}]}, "data"),
    ):
        answer = client.post("/api/runs", json={"config": settings(changes)})
        assert answer.status_code == 400 and field in answer.json()["errors"], answer.text
    for body in ({}, {"draft": True, "config": settings()}, {"config": {"preset": 3}}, {"config": {"preset": "sd1/none"}}, {"what": 1}):
        assert client.post("/api/runs", json=body).status_code == 400
    assert not list(context.home.runs.iterdir()) and context.runner.jobs.list() == []


TRICKS = [  # the first two are resolved by the client itself, so that they name another route
    "..",
    "../x",
    "..%2fx",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fsecret",
    "%2Fetc",
    "..%5c..%5csecret",
    "%00",
    "%2e",
    "~",
    "nobody",
]


def test_no_id_and_no_file_name_leads_out(client, context):
    (context.home.root / "config.json").write_text("{}")
    (context.home.root / "secret.png").write_bytes(b"the secret")
    (context.home.root / "secret.safetensors").write_bytes(b"the secret")
    run = context.home.runs / "run"
    for folder in ("previews", "results"):
        (run / folder).mkdir(parents=True)
    (run / "config.json").write_text("{}")
    routes = [*runs.router.routes, *results.router.routes]
    paths = [(f"/api{route.path}", route.methods) for route in routes if "{id}" in route.path]
    assert len(paths) >= 22
    bodies = {"confirm": True, "prompts": ["x"], "visits": 3, "percent": 25, "to": 0, "changes": {}, "file": "../secret.safetensors"}
    before = sorted(context.home.root.rglob("*"))
    for path, methods in paths:
        for trick in TRICKS:
            for method in methods & {"GET", "POST", "PATCH"}:
                for body in ({k: v} for k, v in bodies.items()):
                    url = path.replace("{id}", trick).replace("{file}", "x.png")
                    answer = client.request(method, url, json=None if method == "GET" else body, follow_redirects=False)
                    assert answer.status_code in (307, 400, 404, 405), (method, url, answer.status_code, answer.text)
                    if method == "GET":
                        break
    for path in (p for p, _ in paths if "{file}" in p):
        for trick in [*TRICKS[2:], "..%2f..%2f..%2fsecret.png", "..%2f..%2f..%2fsecret.safetensors", str(context.home.root / "secret.png")]:
            answer = client.get(path.replace("{id}", "run").replace("{file}", trick), follow_redirects=False)
            assert answer.status_code in (307, 404) and b"the secret" not in answer.content, (path, trick)
    for trick in ("../../secret.safetensors", str(context.home.root / "secret.safetensors"), ".."):
        for action in ("copy", "keep"):
            assert client.post(f"/api/runs/run/{action}", json={"file": trick}).status_code == 404
    assert sorted(context.home.root.rglob("*")) == before


def test_ten_at_once_read_what_one_reads(client, context, settings, busy):
    ids = [start(client, settings, {"output.name": f"n{k}"}, queue=True) for k in range(5)]

    def look(k):
        listed = client.get("/api/runs")
        one = client.get(f"/api/runs/{ids[k % 5]}")
        return listed.status_code, one.status_code, one.json()["run"]["state"], len(listed.json()["runs"])

    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(look, range(60))) == {(200, 200, "waiting", 6)}


def test_a_long_history_is_listed_quickly(client, context):
    for k in range(150):
        folder = context.home.runs / f"run{k:03}"
        folder.mkdir()
        (folder / "config.json").write_text('{"output": {"name": "n"}}')
        (folder / "lock").touch()
        (folder / "events.jsonl").write_text(json.dumps({"seq": 0, "time": k + 1.0, "type": "finished", "step": 5, "seconds": 1}) + "\n")
    answer = client.get("/api/runs").json()
    assert [r["id"] for r in answer["runs"]][:2] == ["run149", "run148"] and {r["state"] for r in answer["runs"]} == {"finished"}
    began = os.times()
    for _ in range(10):
        client.get("/api/runs")
    used = os.times()
    assert (used.user + used.system - began.user - began.system) / 10 < 0.15
    assert Path(answer["runs"][0]["folder"]) == context.home.runs / "run149"
