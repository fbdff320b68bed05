"""Inspecting and converting LoRA files by the routes: real small files, the real tools in processes of their own."""

import json
import os
import time

import psutil
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from app import guard, server
from app import settings as app_settings
from app.api import tools as routes
from app.context import Context
from app.paths import Home
from app.runner import Runner
from app.tools import verdict

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TOOLS = ("ComfyUI", "Forge", "diffusers")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def context(tmp_path):
    home = Home(tmp_path / "home")
    runner = Runner(home)
    app_settings.save(home, {"run_folders": []})
    yield Context(home, runner)
    for folder in (home.cache / "tools").glob("*"):
        runner.kill(folder, grace=0)


@pytest.fixture
def client(context):
    app = FastAPI()
    app.state.context = context
    server._answer_errors(app)
    app.include_router(routes.router, prefix="/api")
    return TestClient(app)


@pytest.fixture
def lora(tmp_path):
    """A LoRA for SD1.x of one layer, rank 4, alpha 2, in a folder with a blank in its name."""
    torch.manual_seed(1)
    path = tmp_path / "my loras" / "cat.safetensors"
    path.parent.mkdir()
    write(path)
    return path


def write(path, up=None, metadata=None):
    tensors = {
        f"{KEY}.lora_down.weight": torch.randn(4, 768),
        f"{KEY}.lora_up.weight": torch.randn(320, 4) if up is None else up,
        f"{KEY}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, path, metadata or {"modelspec.trigger_phrase": "a cat"})


def ended(client, answer, seconds=120):
    """The asking as soon as it runs no more."""
    assert answer.status_code == 200, answer.text
    asking, end = answer.json(), time.monotonic() + seconds
    while asking["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.1)
        asking = client.get(f"/api/tools/{asking['id']}").json()
    return asking


def inspected(client, path):
    return ended(client, client.post("/api/tools/inspect", json={"path": str(path)}))


# ---- inspect ------------------------------------------------------------------------------------------------------------------------


def test_a_lora_is_looked_into_and_the_answer_outlives_the_app(client, context, lora):
    found = ended(client, client.post("/api/tools/inspect", json={"path": f'"{lora}"'}))
    assert found["state"] == "finished" and found["name"] == "cat.safetensors" and found["bytes"] == lora.stat().st_size
    report = found["report"]
    assert (report["family"], report["adapter"], report["rank"], report["alpha"]) == ("sd1", "lora", 4, 2.0)
    assert report["parameters"] == 4 * 768 + 320 * 4 + 1 and report["effect"] is True and report["finite"] is True
    assert report["metadata"]["modelspec.trigger_phrase"] == "a cat" and set(TOOLS) <= report["unread"].keys()
    assert found["verdict"]["text"].startswith("A LoRA for Stable Diffusion 1.x")
    later = Context(context.home, Runner(context.home))  # the app has been started again
    assert routes.tools.view(later.home, later.runner, found["id"])["report"] == report


def test_what_can_have_no_effect_and_what_is_damaged_is_said_first(client, tmp_path):
    zero, broken = tmp_path / "zero.safetensors", tmp_path / "broken.safetensors"
    write(zero, torch.zeros(320, 4))
    write(broken, torch.full((320, 4), torch.nan))
    found = inspected(client, zero)["verdict"]
    assert found["level"] == "bad" and "no effect" in found["text"]
    found = inspected(client, broken)["verdict"]
    assert found["level"] == "bad" and "damaged" in found["text"]


def test_what_is_no_lora_or_cut_off_is_a_sentence(client, tmp_path, lora):
    base, cut = tmp_path / "base.safetensors", tmp_path / "cut.safetensors"
    save_file({"first_stage_model.x": torch.zeros(2)}, base)
    cut.write_bytes(lora.read_bytes()[:-7])
    found = inspected(client, base)["verdict"]
    assert found["level"] == "warn" and "not a LoRA" in found["text"]
    found = inspected(client, cut)["verdict"]
    assert found["level"] == "bad" and "cut off" in found["text"]


def test_an_alpha_that_is_no_number_does_not_break_the_answer(client, context, lora):
    asking = client.post("/api/tools/inspect", json={"path": str(lora)}).json()
    ended(client, client.get(f"/api/tools/{asking['id']}"))
    answer = context.home.cache / "tools" / asking["id"] / "answer.txt"
    answer.write_text(answer.read_text().replace('"alpha": 2.0', '"alpha": NaN'))
    assert client.get(f"/api/tools/{asking['id']}").json()["report"]["alpha"] is None


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({}, "good", "A LoRA for Stable Diffusion XL that works: every program here reads all of it."),
        ({"unread": {"ComfyUI": [], "Forge": ["a"], "diffusers": ["a"]}}, "warn", "that ComfyUI alone reads as a whole."),
        ({"unread": {"ComfyUI": [], "Forge": [], "SD.Next": [], "diffusers": ["a"], "LyCORIS": ["a"]}}, "warn", "works, but diffusers and LyCORIS leave keys unread."),
        ({"unread": {"ComfyUI": ["a"], "Forge": ["a"]}}, "bad", "every program leaves keys unread"),
        ({"problems": ["Two alphas."]}, "warn", "Read what stands below"),
        ({"effect": None}, "good", "that works"),
        ({"adapter": "loha"}, "good", "A LoHa for Stable Diffusion XL"),
        ({"family": None, "problems": ["Unknown base."], "unread": {}}, "warn", "a base that cannot be told"),
        ({"adapter": "novel"}, "good", "An adapter of the kind novel"),
    ],
)  # fmt: skip
def test_the_verdict(changes, level, said):
    report = {"family": "sdxl", "adapter": "lora", "parameters": 9, "effect": True, "finite": True, "problems": []}
    found = verdict(report | {"unread": {tool: [] for tool in TOOLS}} | changes)
    assert found["level"] == level and said in found["text"]


# ---- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "Name one file"),
        ({"path": "a.safetensors", "upload": "b"}, 400, "Name one file"),
        ({"path": "cat.safetensors"}, 400, "whole path"),
        ({"path": "/nowhere/cat.safetensors"}, 400, "There is no file /nowhere/cat.safetensors"),
        ({"path": "/etc/passwd"}, 400, "not a .safetensors file"),
        ({"path": "/etc/\0.safetensors"}, 400, "whole path"),
        ({"upload": "../../../etc"}, 404, "no sent file"),
        ({"upload": "0" * 32}, 404, "no sent file"),
        ({"run": "../runs", "file": "x.safetensors"}, 404, "no run"),
        ({"run": "cat-run", "file": "../cat-run/cat.safetensors"}, 404, "no file"),
        ({"run": "cat-run", "file": "config.json"}, 404, "no file"),
        ({"path": "/a.safetensors", "out": "/etc/cron.d/x"}, 400, "out"),
    ],
)
def test_what_names_no_lora_is_refused_with_a_sentence(body, status, said, client, context):
    run_of(context, "cat-run")
    answer = client.post("/api/tools/inspect", json=body)
    assert answer.status_code == status and said in answer.json()["error"]
    assert not list((context.home.cache / "tools").glob("*")), "nothing was begun"


def test_a_folder_that_is_called_like_a_file_is_refused(client, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    answer = client.post("/api/tools/inspect", json={"path": str(tmp_path / "a.safetensors")})
    assert answer.status_code == 400 and "There is no file" in answer.json()["error"]


@pytest.mark.parametrize("id", ["..", "%2e%2e", "..%2f..%2fsettings.json", "nothing", "A" * 32])
def test_an_asking_is_found_by_its_id_alone(id, client):
    for path in (f"/api/tools/{id}", f"/api/tools/{id}/file"):
        assert client.get(path).status_code == 404


def test_two_at_a_time_and_cancelling_makes_room(client, context, lora):
    first, second = (client.post("/api/tools/inspect", json={"path": str(lora)}).json() for _ in range(2))
    third = client.post("/api/tools/inspect", json={"path": str(lora)})
    assert third.status_code == 409 and "at a time" in third.json()["error"]
    pid = json.loads((context.home.cache / "tools" / first["id"] / "launch.json").read_text())["pid"]
    cancelled = client.post(f"/api/tools/{first['id']}/cancel").json()
    assert (cancelled["state"], cancelled["text"]) == ("failed", "It was cancelled.")
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert ended(client, client.post("/api/tools/inspect", json={"path": str(lora)}))["state"] == "finished"
    assert ended(client, client.get(f"/api/tools/{second['id']}"))["state"] == "finished"


def test_a_tool_has_low_priority_and_holds_no_training_up(client, context, lora):
    asking = client.post("/api/tools/inspect", json={"path": str(lora)}).json()
    launch = json.loads((context.home.cache / "tools" / asking["id"] / "launch.json").read_text())
    if os.name != "nt":
        assert psutil.Process(launch["pid"]).nice() >= 10
    assert context.runner.busy() == []


def test_a_tool_that_was_killed_says_so(client, context, lora):
    asking = client.post("/api/tools/inspect", json={"path": str(lora)}).json()
    launch = json.loads((context.home.cache / "tools" / asking["id"] / "launch.json").read_text())
    psutil.Process(launch["pid"]).kill()
    found = ended(client, client.get(f"/api/tools/{asking['id']}"))
    assert found["state"] == "failed" and "without a word" in found["text"]


# ---- sent files ---------------------------------------------------------------------------------------------------------------------


def test_a_sent_file_stays_where_it_belongs_and_is_deleted_after_a_day(client, context, lora):
    files = {"file": ("../../../evil dir/Cat é.SAFETENSORS", lora.read_bytes())}
    sent = client.post("/api/tools/files", files=files).json()
    kept = context.home.cache / "tools" / sent["upload"]
    assert [p.name for p in kept.iterdir()] == [sent["name"]] == ["Cat é.safetensors"]
    assert (kept / sent["name"]).read_bytes() == lora.read_bytes()
    found = ended(client, client.post("/api/tools/inspect", json={"upload": sent["upload"]}))
    assert found["report"]["rank"] == 4 and found["source"] == {"upload": sent["upload"]}
    beside = client.post("/api/tools/convert", json={"upload": sent["upload"], "to": "comfy", "beside": True})
    assert beside.status_code == 400 and "download" in beside.json()["error"]
    for folder in (kept, context.home.cache / "tools" / found["id"]):
        os.utime(folder, (time.time() - 25 * 3600,) * 2)
    client.post("/api/tools/files", files=files)
    assert not kept.exists() and client.get(f"/api/tools/{found['id']}").status_code == 404
    answer = client.post("/api/tools/inspect", json={"upload": sent["upload"]})
    assert answer.status_code == 404 and "after a day" in answer.json()["error"]


@pytest.mark.parametrize("name", ["cat.ckpt", "cat", "cat.safetensors.exe"])
def test_only_safetensors_are_taken(name, client, context):
    answer = client.post("/api/tools/files", files={"file": (name, b"x")})
    assert answer.status_code == 400 and ".safetensors" in answer.json()["error"]
    assert not list((context.home.cache / "tools").glob("*"))
    assert client.post("/api/tools/files", data={"other": "x"}).status_code == 400


def test_the_guards_stand_before_the_tools(tmp_path):
    app = server.build(Home(tmp_path / "home"))
    client = TestClient(app, "http://127.0.0.1:7865", raise_server_exceptions=False)
    body = {"path": "/a.safetensors"}
    assert client.get("/tools").status_code == 200
    assert client.post("/api/tools/inspect", json=body).status_code == 400
    assert client.post("/api/tools/inspect", json=body, headers={"host": "evil.example"}).status_code == 403
    assert client.post("/api/tools/convert", json=body, headers={"origin": "http://evil.example"}).status_code == 403
    large = client.post("/api/tools/files", content=b"x", headers={"content-length": str(guard.LARGE + 1)})
    assert large.status_code == 413 and "2 GB" in large.json()["error"]
    nine = client.post("/api/tools/files", files={"file": ("a.bin", b"x" * (9 * 2**20))})
    assert nine.status_code == 400, "more than other routes take"


# ---- convert ------------------------------------------------------------------------------------------------------------------------


def test_a_converted_file_goes_beside_the_old_one_and_nothing_is_written_over(client, lora):
    before, occupied = lora.read_bytes(), lora.with_name("cat_diffusers.safetensors")
    occupied.write_bytes(b"mine")
    done = ended(client, client.post("/api/tools/convert", json={"path": f"'{lora}'", "to": "diffusers", "beside": True}))
    assert done["state"] == "finished" and str(lora.parent) in done["text"]
    assert occupied.read_bytes() == b"mine" and lora.read_bytes() == before
    new = lora.with_name("cat_diffusers_2.safetensors")
    assert done["path"] == str(new) and done["file_bytes"] == new.stat().st_size
    old, state = load_file(lora), load_file(new)
    assert set(state) == {f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight"}
    want = old[f"{KEY}.lora_up.weight"] @ old[f"{KEY}.lora_down.weight"] * (2 / 4)
    torch.testing.assert_close(state[f"{PEFT}.lora_B.weight"] @ state[f"{PEFT}.lora_A.weight"], want)
    answer = client.get(done["download"])
    assert answer.content == new.read_bytes() and "cat_diffusers_2.safetensors" in answer.headers["content-disposition"]


def run_of(context, id):
    """A run's folder as the trainer leaves it, as far as it is read here."""
    folder = context.home.runs / id
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"output": {"name": "cat"}}))
    write(folder / "cat.safetensors")
    return folder


def test_a_runs_file_is_offered_and_converted_for_download_without_touching_the_run(client, context):
    folder = run_of(context, "20261123-120000-cat")
    offered = client.get("/api/tools/exports").json()["files"]
    assert [(f["run"], f["file"], f["final"]) for f in offered] == [(folder.name, "cat.safetensors", True)]
    source = {"run": folder.name, "file": "cat.safetensors"}
    there = sorted(folder.iterdir())
    assert client.post("/api/tools/convert", json={**source, "to": "comfy", "beside": True}).status_code == 400
    done = ended(client, client.post("/api/tools/convert", json={**source, "to": "comfy"}))
    assert done["state"] == "finished" and done["file"] == "cat_comfy.safetensors"
    assert sorted(folder.iterdir()) == there
    (tmp := context.home.root / "got.safetensors").write_bytes(client.get(done["download"]).content)
    assert all(key.startswith("diffusion_model.") for key in load_file(tmp))


def test_a_conversion_that_cannot_be_is_a_sentence_and_has_no_file(client, tmp_path):
    base = tmp_path / "base.safetensors"
    save_file({"first_stage_model.x": torch.zeros(2)}, base)
    done = ended(client, client.post("/api/tools/convert", json={"path": str(base), "to": "kohya", "beside": True}))
    assert done["state"] == "failed" and done["text"].endswith(".") and "LoRA" in done["text"] and "Traceback" not in done["text"]
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["base.safetensors"]
    answer = client.get(f"/api/tools/{done['id']}/file")
    assert answer.status_code == 409 and "LoRA" in answer.json()["error"]
    assert client.post("/api/tools/convert", json={"path": str(base), "to": "gguf"}).status_code == 400


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_said_before(client, lora):
    lora.parent.chmod(0o500)
    try:
        answer = client.post("/api/tools/convert", json={"path": str(lora), "to": "comfy", "beside": True})
    finally:
        lora.parent.chmod(0o700)
    assert answer.status_code == 409 and "download" in answer.json()["error"]
