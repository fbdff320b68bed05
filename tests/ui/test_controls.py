"""The controls that no other browser test presses: each is pressed, and what it does is seen in a file, a request, a state, or on the page.

Runs are folders made on the spot. Where one must be alive, the test takes the trainer's place: it holds the folder's lock, takes requests
and writes events, as trainer/run_dir.py says. What a real trainer makes of it stands at the end.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from safetensors.numpy import load_file, save_file

from trainer import control
from trainer.config.load import validate
from trainer.events import Writer
from trainer.run_dir import Lock, RunDir

HUB_MODEL = "somebody/dreamy"


def until(holds: Callable[[], object], seconds: float = 20) -> object:
    """What `holds` answers as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


# ---- what stands around the app: a hub with one model, and a file manager


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answer about a model, with the fields that the app asks for."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        known = path == f"/api/models/{HUB_MODEL}"
        about = {
            "id": HUB_MODEL,
            "cardData": {"license": "creativeml-openrail-m"},
            "config": {"diffusers": {"_class_name": "StableDiffusionPipeline"}},
            "siblings": [
                {"rfilename": "model_index.json", "size": 600},
                {"rfilename": "unet/diffusion_pytorch_model.safetensors", "size": 3_400_000_000},
                {"rfilename": "dreamy.ckpt", "size": 9_000_000_000},  # not what a training needs
            ],
        }
        raw = json.dumps(about if known else {"error": "Repository not found"}).encode()
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The only folder in which the app finds programs."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def app_environment(hub, programs) -> dict[str, str]:
    away = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "PATH": str(programs), **away}


@pytest.fixture(autouse=True)
def empty(request):
    if "app" not in request.fixturenames:
        return
    app = request.getfixturevalue("app")
    app.post("/draft/new")
    app.post("/settings", {"run_folders": [], "lora_folder": ""}, method="PATCH")


# ---- runs that are folders


class Trainer:
    """The test in the place of a trainer."""

    def __init__(self, folder: Path) -> None:
        self.run, self.lock = RunDir(folder), None
        self.run.create()

    def begin(self, **started) -> None:
        self.lock = Lock(self.run)
        self.lock.acquire()
        self.run.process.unlink()  # whoever wants to end this trainer must not end the tests
        self.write = Writer(self.run.events)
        if started:
            facts = {"images": 2, "buckets": [[64, 64, 2]], "device": "CPU", "dtype": "fp32", "reasons": [], "schedule": "constant"}
            self.write("started", **facts | started)
            self.write("stage", name="training")

    def step(self, step: int) -> None:
        rates = {"unet": 1e-3, "text_1": 5e-4}
        self.write("step", step=step, loss=1 / step, rate=rates, images_per_s=2.0, eta_s=30, epoch=step / 2, memory_gib=0.5)

    def asked(self) -> control.Request:
        """The next request."""
        return until(lambda: control.take(self.run))[0]

    def answer(self, request: control.Request, step: int) -> None:
        self.write("answered", request=request.kind, id=request.id, step=step, detail="done")

    def end(self, kind: str, **more) -> None:
        self.write(kind, **{"seconds": 1.0, **more})
        self.close()

    def close(self) -> None:
        if self.lock:
            self.write.close()
            self.lock.release()
            self.lock = None


@pytest.fixture
def trainer() -> Iterator[Callable[[Path], Trainer]]:
    """trainer(folder): a Trainer, which has let go of the folder at the end of the test."""
    made = []

    def make(folder: Path) -> Trainer:
        made.append(Trainer(folder))
        return made[-1]

    yield make
    for it in made:
        it.close()


def lora(path: Path, value: float) -> None:
    """A LoRA for SD 1.x of one small layer."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{layer}.lora_down.weight": np.full((2, 320), value, np.float32),
        f"{layer}.lora_up.weight": np.full((320, 2), value, np.float32),
        f"{layer}.alpha": np.array(2, np.float32),
    }
    save_file(tensors, path, {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"})


@pytest.fixture
def make_run(app, zorps) -> Iterator[Callable[..., Path]]:
    """make_run("zorp", {"adapter.rank": 7}): a run's folder with settings and two images; gone at the end of the test."""
    made = []

    def make(name: str, changes: dict | None = None) -> Path:
        folder = app.data / "runs" / f"20260101-12000{len(made)}-{name}"
        made.append(folder)
        images = folder / "data"
        images.mkdir(parents=True)
        for picture in zorps[:2]:
            shutil.copy(picture, images)
            (images / f"{picture.stem}.txt").write_text(f"zorp, {picture.stem}")
        values = {
            "data": [{"folder": str(images), "trigger": "zorp"}],
            "output": {"name": name},
            "model": {"source": "demo"},
            "train": {"visits": 20},
        }
        for key, value in (changes or {}).items():
            table, _, last = key.rpartition(".")
            values.setdefault(table, {})[last] = value
        (folder / "config.json").write_text(json.dumps(validate(values).model_dump(mode="json")))
        return folder

    yield make
    for run in app.runs():
        if run["state"] == "waiting":
            app.post(f"/runs/{run['id']}/discard", {"confirm": True})
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def busy(make_run, trainer) -> Trainer:
    """A run that trains as long as the test lasts: what is started meanwhile waits."""
    it = trainer(make_run("busy"))
    it.begin(total=1000, visits=1000, name="busy")
    it.step(10)
    return it


@pytest.fixture
def finished(make_run, trainer) -> Callable[..., Path]:
    """finished("zorp"): a run of 20 steps that has ended, with three files."""

    def make(name: str = "zorp", changes: dict | None = None) -> Path:
        folder = make_run(name, changes)
        it = trainer(folder)
        it.begin(total=20, visits=20, name=name)
        for step in (5, 10, 20):
            it.step(step)
            file = f"{name}.safetensors" if step == 20 else f"{name}-{step:06d}.safetensors"
            lora(folder / file, step)
            size = (folder / file).stat().st_size
            it.write("exported", step=step, file=file, bytes=size, modules={"unet": 1}, final=step == 20)
        it.end("finished", step=20)
        return folder

    return make


def press(page, name: str):
    page.get_by_role("button", name=name, exact=True).click()


def agree(page, name: str | re.Pattern) -> None:
    page.get_by_role("dialog").get_by_role("button", name=name).click()


def fits(dialog, width: int) -> None:
    """Whether a dialog is to be seen whole in a window of that width."""
    expect(dialog).to_be_visible()
    box = dialog.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width, box


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# ---- a run's page


def test_save_now_asks_the_trainer_and_shows_what_it_did(open_page, make_run, trainer):
    folder = make_run("zorp")
    it = trainer(folder)
    it.begin(total=100, visits=100, name="zorp")
    it.step(40)
    page = open_page(f"/runs?run={folder.name}")
    press(page, "Save now")
    button = page.get_by_role("button", name="Save now", exact=True)
    expect(page.get_by_text("Save is asked: the LoRA is written after this step.")).to_be_visible()
    expect(button).to_be_disabled()
    request = it.asked()
    assert (request.kind, request.payload) == ("save", {})
    lora(folder / "zorp-000041.safetensors", 1)
    it.write("exported", step=41, file="zorp-000041.safetensors", bytes=1, modules={"unet": 1}, final=False)
    it.answer(request, 41)
    expect(page.get_by_text("Save is asked")).to_have_count(0)
    expect(button).to_be_enabled()
    press(page, "Discard")
    expect(page.get_by_role("dialog")).to_contain_text("1 LoRA file")
    agree(page, "Keep it")
    assert folder.exists()


@pytest.mark.slow
def test_the_browser_tells_when_a_run_ends_or_fails(open_page, app, make_run, trainer):
    page = open_page("/settings")
    page.context.grant_permissions(["notifications"])
    page.context.add_init_script(  # what the browser would show is written down: without a desktop it shows nothing
        """window.said = [];
        window.Notification = class extends EventTarget {
            static get permission() { return 'granted'; }
            static async requestPermission() { return 'granted'; }
            constructor(title, more) { super(); window.said.push([title, more.body]); }
        };"""
    )
    ask = page.get_by_role("button", name="Tell me when it ends", exact=True)
    for name, end, words in (
        ("first", {"kind": "finished"}, "first is finished."),
        ("second", {"kind": "failed", "text": "The disk is full."}, "second has failed: The disk is full."),
    ):
        folder = make_run(name)
        it = trainer(folder)
        it.begin(total=100, visits=100, name=name)
        it.step(99)
        page.goto(f"{app.url}/runs?run={folder.name}")
        if name == "first":
            ask.click()
            expect(page.locator(".la-toast")).to_contain_text("The browser tells you when a run ends or fails")
        expect(page.locator(".la-strip")).to_contain_text(f"{name}99 %")
        expect(ask).to_have_count(0)
        it.end(step=100, **end)
        page.wait_for_function("window.said.length > 0")
        assert page.evaluate("window.said") == [["LoRA Atelier", words]]


def test_use_these_settings_fills_the_draft(open_page, app, finished, zorps):
    folder = finished("zorp", {"adapter.rank": 7, "train.batch_size": 3})
    page = open_page("/")
    page.locator("#choose-files").set_input_files(zorps[5])
    expect(page.locator(".nl-card")).to_have_count(1)
    page.goto(f"{app.url}/runs?run={folder.name}")
    press(page, "Use these settings")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("(1 image) is put aside")
    agree(page, "Cancel")
    assert app.get("/draft")["images"] == 1
    press(page, "Use these settings")
    agree(page, "Go there")
    page.wait_for_url(app.url + "/")
    expect(page.locator(".nl-card")).to_have_count(2)
    expect(page.locator("[data-caption] textarea").first).to_have_value("zorp, 01")
    expect(page.locator("#trigger")).to_have_value("zorp")
    page.locator("#advanced > summary").click()
    expect(page.get_by_label("Rank", exact=True)).to_have_value("7")
    now = app.get("/draft")
    assert (now["values"]["train.batch_size"], now["values"]["adapter.start"]) == (3, None)
    press(page, "Undo: start a new training")
    expect(page.locator(".nl-card")).to_have_count(1)


@pytest.mark.slow
def test_start_from_this_lora_is_in_the_run_that_is_started(open_page, app, finished, busy):
    folder = finished("zorp")
    page = open_page(f"/runs?run={folder.name}")
    press(page, "Start from this LoRA")
    expect(page.get_by_role("dialog")).to_contain_text("begins from its LoRA instead of from nothing")
    agree(page, "Go there")
    page.wait_for_url(app.url + "/")
    expect(page.locator(".nl-card")).to_have_count(2)
    start = page.locator("#start-training")
    expect(start).to_have_text("Start after busy")
    expect(start).to_have_attribute("data-startable", "true")
    start.click()
    page.wait_for_url(re.compile(r"/runs\?run="))
    expect(page.get_by_text("Waiting, number 1 in the queue.")).to_be_visible()
    run = app.data / "runs" / re.search(r"run=([^&]+)", page.url)[1]
    begins = Path(settings_of(run)["adapter"]["start"])
    assert begins.parent == run / "start" and begins.read_bytes() == (folder / "zorp.safetensors").read_bytes()


def test_train_further_says_how_long_and_puts_it_in_the_queue(open_page, app, finished, busy):
    folder = finished("zorp")
    page = open_page(f"/runs?run={folder.name}")
    press(page, "Train further")
    dialog = page.get_by_role("dialog")
    for percent, visits, steps in ((25, 25, 5), (50, 30, 10), (100, 40, 20)):
        expect(dialog.locator("label", has_text=f"+{percent} %")).to_contain_text(f"to {visits} visits, {steps} more steps")
    expect(dialog).to_contain_text("The schedule is stretched over the new length")
    dialog.locator("label", has_text="+50 %").click()
    agree(page, "Train further")
    expect(page.get_by_text("Waiting, number 1 in the queue.")).to_be_visible()
    assert json.loads((folder / "waiting.json").read_text())["words"] == ["train", "--run-dir", str(folder), "--resume", "--visits", "30"]
    press(page, "Take out of the queue")
    expect(page.get_by_role("dialog")).to_contain_text("It keeps what it learnt so far")
    agree(page, "Take it out")
    expect(page.get_by_role("progressbar", name="Progress", exact=True)).to_have_attribute("data-state", "finished")
    assert folder.exists() and not (folder / "waiting.json").exists()


def test_a_waiting_run_is_edited(open_page, app, make_run, busy):
    source = make_run("zorp", {"adapter.rank": 4})
    run = app.data / "runs" / app.post(f"/runs/{source.name}/duplicate")["id"]
    page = open_page(f"/runs?run={run.name}", width=390)
    press(page, "Edit settings")
    dialog = page.get_by_role("dialog")
    fits(dialog, 390)
    expect(dialog).to_contain_text("Nothing is changed yet.")
    dialog.get_by_label("Search settings").fill("rank")
    rank = dialog.get_by_label("Rank", exact=True)
    expect(rank).to_have_value("4")
    expect(dialog.get_by_label("Visits to each image", exact=True)).to_be_hidden()
    rank.fill("0")
    rank.press("Tab")
    press(page, "Change the settings")
    expect(dialog.get_by_text(re.compile("must be at least 1")).filter(visible=True)).to_have_count(1)
    assert settings_of(run)["adapter"]["rank"] == 4
    rank.fill("9")
    rank.press("Tab")
    expect(dialog).to_contain_text("1 changed")
    press(page, "Change the settings")
    expect(page.locator(".la-toast")).to_contain_text("The settings are changed.")
    expect(dialog).to_have_count(0)
    assert settings_of(run)["adapter"]["rank"] == 9 and settings_of(source)["adapter"]["rank"] == 4


# ---- results


@pytest.mark.skipif(os.name == "nt", reason="the file manager of Windows is not found by its path")
def test_open_the_folder_opens_it_or_says_where_it_is(open_page, app, finished, programs, tmp_path):
    folder = finished()
    name = "open" if sys.platform == "darwin" else "xdg-open"
    opened = tmp_path / "opened"
    (programs / name).write_text(f"#!/bin/sh\nprintf %s \"$1\" > '{opened}.new'\n/bin/mv '{opened}.new' '{opened}'\n")
    (programs / name).chmod(0o755)
    page = open_page(f"/results?run={folder.name}")
    press(page, "Open the folder")
    until(opened.exists)
    assert opened.read_text() == str(folder)
    (programs / name).unlink()
    press(page, "Open the folder")
    expect(page.locator(".la-toast")).to_contain_text(f"({name} is missing). The folder is {folder}")


def test_keep_one_file_and_delete_the_others(open_page, app, finished):
    folder = finished()
    page = open_page(f"/results?run={folder.name}", width=390)
    keep = page.get_by_role("button", name="Keep zorp-000010.safetensors, delete the others")
    keep.click()
    dialog = page.get_by_role("dialog")
    fits(dialog, 390)
    kilobytes = round(sum((folder / name).stat().st_size for name in ("zorp-000005.safetensors", "zorp.safetensors")) / 1000)
    expect(dialog).to_contain_text(f"2 files with {kilobytes} kB in all")
    expect(dialog.get_by_role("listitem")).to_have_text(["zorp-000005.safetensors", "zorp.safetensors"])
    agree(page, "Cancel")
    assert len(list(folder.glob("*.safetensors"))) == 3
    keep.click()
    agree(page, "Delete 2 files")
    expect(page.locator(".la-toast")).to_contain_text("2 files deleted")
    expect(page.locator(".la-files tbody tr")).to_have_count(1)
    assert [p.name for p in folder.glob("*.safetensors")] == ["zorp-000010.safetensors"]
    expect(page.get_by_role("button", name=re.compile("^Keep "))).to_have_count(0)  # nothing is left to choose from
    download = page.get_by_role("link", name="Download zorp-000010.safetensors")
    assert page.request.get(app.url + download.get_attribute("href")).body() == (folder / "zorp-000010.safetensors").read_bytes()


def compared(folder: Path, colour: str) -> None:
    """What a comparison leaves behind (trainer/compare.py says what stands in it)."""
    out = folder / "results"
    out.mkdir(exist_ok=True)
    for name in ("without.png", "with.png", "000020-1-0.8.png"):
        Image.new("RGB", (64, 64), colour).save(out / name)
    best = {"file": "zorp.safetensors", "step": 20}
    found = {
        "pair": {"prompt": f"a {colour} zorp", "without": "without.png", "with": "with.png", **best},
        "matrix": {"prompts": [f"a {colour} zorp"], "strengths": [0.8], "rows": [{**best, "cells": [["000020-1-0.8.png"]]}]},
        "scores": [{**best, "gain": 0.3, "drift": 0.1}],
        "recommended": {**best, "why": f"It is {colour}."},
        "hints": [],
    }
    (out / "results.json").write_text(json.dumps(found))


def test_a_comparison_is_made_again_and_its_progress_shows(open_page, app, finished, busy, trainer):
    folder = finished()
    compared(folder, "red")
    first = trainer(folder / "results")
    first.begin()
    first.end("finished")
    page = open_page(f"/results?run={folder.name}")
    verdict = page.get_by_role("region", name="Without and with")
    expect(verdict).to_contain_text("It is red.")
    press(page, "Make it again")
    bar = page.get_by_role("progressbar", name="Comparison")
    expect(page.get_by_text("The comparison waits for its turn.")).to_be_visible()
    expect(bar).to_have_attribute("data-state", "waiting")
    assert json.loads((folder / "results/waiting.json").read_text())["words"] == ["compare", str(folder)]
    expect(page.get_by_role("button", name="Make it again", exact=True)).to_be_hidden()

    again = trainer(folder / "results")
    again.begin()
    again.write("stage", name="loading")
    again.write("stage", name="pictures", text="Drawing pictures.")
    again.write("picture", done=9, total=12, file="with.png")
    expect(bar).to_have_attribute("aria-valuenow", "75")
    expect(bar).to_have_attribute("data-state", "running")
    expect(page.locator("#la-main")).to_contain_text("75 %")
    expect(page.locator("#la-main")).to_contain_text("Drawing pictures.")
    compared(folder, "blue")
    again.end("finished")
    expect(verdict).to_contain_text("It is blue.")
    expect(bar).to_have_count(0)
    expect(page.get_by_role("button", name="Make it again", exact=True)).to_be_visible()


def test_the_playground_says_when_its_memory_is_given_back(open_page, app, finished, trainer):
    folder = finished()
    it = trainer(app.data / "jobs" / "playground")
    it.begin()
    it.write("ready", memory_gib=2.5)
    page = open_page(f"/results?run={folder.name}")
    place = page.get_by_role("region", name="Playground")
    says, free = place.get_by_role("status"), place.get_by_role("button", name="Free the memory now", exact=True)
    expect(says).to_have_text("The playground keeps 2.5 GiB of memory; freed after 5 idle minutes.")
    expect(place).to_have_attribute("data-state", "ready")
    free.click()
    assert it.asked().kind == "stop"
    expect(says).to_have_text("The memory is given back …")
    expect(free).to_be_hidden()
    it.end("stopped")
    expect(says).to_have_text("Nothing is loaded; the first picture takes longer.")
    expect(place).to_have_attribute("data-state", "idle")
    expect(free).to_be_hidden()


# ---- a new LoRA: pictures come in


def cards(page):
    return page.locator(".nl-card")


def names(app) -> set[str]:
    return {image["name"] for image in app.get("/images")["images"]}


def drop(page, *paths: Path) -> None:
    """What the browser does when these are dragged from the desktop and dropped on the page."""
    session = page.context.new_cdp_session(page)
    box = page.locator(".nl-drop").bounding_box()
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **at})


@pytest.fixture
def album(zorps, tmp_path) -> Path:
    """A folder with folders in it, captions, and what computers put beside pictures."""
    album = tmp_path / "my album"
    for k, place in enumerate((album, album / "inner", album / "inner" / "deep")):
        place.mkdir()
        shutil.copy(zorps[k], place)
        (place / f"{zorps[k].stem}.txt").write_text(f"from level {k}")
    (album / ".DS_Store").write_bytes(b"x")
    (album / "Thumbs.db").write_bytes(b"x")
    return album


def test_a_dropped_folder_is_walked_through(open_page, app, album):
    page = open_page("/")
    drop(page, album)
    expect(cards(page)).to_have_count(3)
    captions = {i["name"]: i["caption"] for i in app.get("/images")["images"]}
    assert captions == {"01.png": "from level 0", "02.png": "from level 1", "03.png": "from level 2"}
    expect(page.locator(".nl-problems")).to_be_hidden()


def test_choose_a_folder_takes_what_is_in_it(open_page, app, album):
    page = open_page("/")
    with page.expect_file_chooser() as chooser:
        press(page, "Choose a folder")
    chooser.value.set_files(album)
    expect(cards(page)).to_have_count(3)
    expect(page.locator(".la-toast")).to_contain_text("3 images added.")
    assert {i["caption"] for i in app.get("/images")["images"]} == {f"from level {k}" for k in range(3)}


def test_a_dropped_zip_is_unpacked(open_page, app, zorps, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for picture in zorps[:2]:
            archive.write(picture, f"set/{picture.name}")
        archive.writestr("set/02.txt", "from the zip")
    page = open_page("/")
    drop(page, tmp_path / "pictures.zip")
    expect(cards(page)).to_have_count(2)
    expect(page.locator("[data-caption] textarea").nth(1)).to_have_value("from the zip")
    assert names(app) == {"01.png", "02.png"}


def test_a_pasted_picture_is_added_and_a_pasted_word_is_not(open_page, app, zorps):
    page = open_page("/")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=app.url)
    for k, picture in enumerate(zorps[:2], 1):
        page.evaluate(
            """async (bytes) => navigator.clipboard.write([new ClipboardItem({ 'image/png': new Blob([new Uint8Array(bytes)], { type: 'image/png' }) })])""",
            list(picture.read_bytes()),
        )
        page.locator("h1").click()
        page.keyboard.press("Control+v")
        expect(cards(page)).to_have_count(k)
    before = app.get("/images")["images"]
    assert {(i["width"], i["height"]) for i in before} == {Image.open(p).size for p in zorps[:2]} and len({i["name"] for i in before}) == 2
    page.evaluate("navigator.clipboard.writeText('a name')")
    page.locator("#name").click()
    page.keyboard.press("Control+v")
    expect(page.locator("#name")).to_have_value("a name")
    assert app.get("/images")["images"] == before


def test_an_upload_is_cancelled(open_page, app, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    page = open_page("/")
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 100_000}
    session.send("Network.emulateNetworkConditions", slow)
    page.locator("#choose-files").set_input_files(tmp_path / "large.png")
    expect(page.get_by_role("progressbar", name="Upload")).to_be_visible()
    expect(page.locator(".nl-upload")).to_contain_text("Uploading 1 file")
    page.locator(".nl-upload").get_by_role("button", name="Cancel").click()
    expect(page.locator(".nl-problems")).to_contain_text("The upload was cancelled; nothing was added.")
    expect(page.get_by_role("progressbar", name="Upload")).to_be_hidden()
    assert app.get("/images")["images"] == []
    session.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    page.locator("#choose-files").set_input_files(tmp_path / "large.png")  # and the next one is taken
    expect(cards(page)).to_have_count(1)
    assert not list((app.data / "cache" / "uploads").iterdir())


def test_captions_are_written_back_beside_the_originals(open_page, app, zorps, tmp_path):
    for picture in zorps[:2]:
        shutil.copy(picture, tmp_path)
    (tmp_path / "01.txt").write_text("what stood there")
    page = open_page("/")
    page.get_by_text("Use a folder on this computer").click()
    page.locator("#folder-path").fill(str(tmp_path))
    page.locator("#use-folder").click()
    expect(cards(page)).to_have_count(2)
    captions = page.locator("[data-caption] textarea")
    captions.nth(0).fill("a new one")
    captions.nth(1).fill("the first one")
    button = page.locator("#write-back")
    button.click()
    expect(page.get_by_role("dialog")).to_contain_text("2 captions become .txt files")
    agree(page, "Cancel")
    assert (tmp_path / "01.txt").read_text() == "what stood there" and not (tmp_path / "02.txt").exists()
    button.click()
    agree(page, "Write them")
    toast = page.locator(".la-toast", has_text="2 captions written, 0 unchanged.")
    expect(toast).to_be_visible()
    assert [(tmp_path / f"{n}.txt").read_text().strip() for n in ("01", "02")] == ["a new one", "the first one"]
    backup = Path(re.search(r"is in (.+?)\.(?:×|$)", toast.inner_text().replace("\n", ""))[1])
    assert [p.read_text() for p in backup.glob("*01.txt")] == ["what stood there"]


# ---- a new LoRA: the model, and other programs' settings


def test_a_hub_id_is_checked_before_anything_is_downloaded(open_page, app):
    page = open_page("/")
    field = page.locator("#model-path")
    field.fill("somebody/elses")
    page.locator("#model-check").click()
    expect(page.locator("#model-path-error")).to_contain_text("no such model on the hub")
    field.fill(HUB_MODEL)
    field.press("Enter")
    checked = page.locator("#model-checked")
    expect(checked).to_contain_text("A download of 3.4 GB, once.")
    expect(checked).to_contain_text("Licence: creativeml-openrail-m.")
    expect(page.locator("#model-path-error")).to_be_hidden()
    assert app.get("/draft")["draft"]["model"] == ""
    page.get_by_role("button", name="Use it, download when training starts").click()
    expect(page.locator("#model-chosen")).to_contain_text(HUB_MODEL)
    until(lambda: app.get("/draft")["draft"]["model"] == HUB_MODEL)
    expect(page.locator("#preflight")).to_contain_text("is downloaded from the hub when training starts")
    assert not [p for p in app.folder.rglob("*") if p.name.startswith("models--")]


ONE_TRAINER = {
    "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "", "epochs": 33, "batch_size": 2, "lora_rank": 24,
    "lora_alpha": 12.0, "learning_rate": 0.0003, "resolution": "512", "ema": "GPU", "peft_type": "LORA",
}  # fmt: skip


def test_a_onetrainer_configuration_is_taken_over(open_page, app, tmp_path):
    (tmp_path / "one trainer.json").write_text(json.dumps(ONE_TRAINER))
    page = open_page("/")
    page.locator("#advanced > summary").click()
    page.get_by_role("tab", name="Configuration file").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#import").click()
    chooser.value.set_files(tmp_path / "one trainer.json")
    imported = page.locator("#imported")
    expect(imported).to_contain_text("one trainer.json: taken over from OneTrainer")
    expect(imported.locator('[data-list="left-out"]')).to_contain_text("ema")
    expect(imported.locator('[data-list="carried"]')).to_contain_text("lora_rank = 24")
    values = app.get("/draft")["values"]
    assert (values["adapter.rank"], values["adapter.alpha"], values["train.visits"], values["train.batch_size"]) == (24, 12, 33, 2)
    expect(page.locator("#toml")).to_have_value(re.compile("rank = 24"))


# ---- settings


def test_a_folder_that_is_not_there_is_named_at_its_field(open_page, app, tmp_path):
    page = open_page("/settings")
    field = page.get_by_label("My LoRA folder", exact=True)
    field.fill(str(tmp_path / "nowhere"))
    field.press("Tab")
    expect(page.get_by_text(f"There is no folder {tmp_path / 'nowhere'}.")).to_be_visible()
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_value(str(tmp_path / "nowhere"))
    assert app.get("/settings")["lora_folder"] == ""
    field.fill(f'"{tmp_path}"')
    field.press("Tab")
    expect(field).to_have_value(str(tmp_path))
    expect(field).not_to_have_attribute("aria-invalid", "true")
    assert app.get("/settings")["lora_folder"] == str(tmp_path)


@pytest.mark.slow
def test_log_out_ends_the_session(browser, start_app):
    word = "correct horse battery"
    locked = start_app("--listen", "127.0.0.1", password=word, LORA_ATELIER_PASSWORD=word)
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{locked.url}/settings")
    page.get_by_label("Password").fill(word)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{locked.url}/settings")
    press(page, "Log out of this browser")
    page.wait_for_url(f"{locked.url}/login")
    assert context.cookies() == []
    page.goto(f"{locked.url}/settings")
    expect(page.get_by_label("Password")).to_be_visible()
    assert context.request.get(f"{locked.url}/api/settings").status == 401
    context.close()


# ---- the same with the real trainer


@pytest.mark.slow
def test_save_start_from_it_and_the_playground_with_the_real_trainer(open_page, app):
    small = {"train.visits": 1000, "preview.enabled": False, "validation.enabled": False, "adapter.rank": 2, "train.batch_size": 2}
    small |= {"part.unet.learning_rate": 3e-3, "schedule.warmup": 0}  # so that five steps show in the weights
    app.post("/draft/example")
    app.post("/draft", {"name": "Real", "changes": small}, method="PATCH")
    first = app.data / "runs" / app.post("/runs", {"draft": True})["id"]
    page = open_page(f"/runs?run={first.name}")
    bar = page.get_by_role("progressbar", name="Progress", exact=True)
    page.wait_for_function("Number(document.querySelector('[role=progressbar][data-step]')?.dataset.step) >= 5", timeout=120_000)
    assert not list(first.glob("*.safetensors"))
    press(page, "Save now")
    saved = until(lambda: list(first.glob("real-0*.safetensors")), 60)[0]
    expect(page.get_by_role("button", name="Save now", exact=True)).to_be_enabled(timeout=30_000)
    expect(bar).to_have_attribute("data-state", "running")
    press(page, "Stop")
    expect(bar).to_have_attribute("data-state", "stopped", timeout=60_000)
    step = int(saved.stem.removeprefix("real-"))
    assert 5 <= step <= int(bar.get_attribute("data-step"))

    # what begins from it begins with its weights: at a rate of nearly nothing they are still there
    press(page, "Start from this LoRA")
    agree(page, "Go there")
    page.wait_for_url(app.url + "/")
    expect(cards(page)).to_have_count(14)
    rates = {"part.unet.learning_rate": 1e-9, "part.text_1.learning_rate": 1e-9, "train.visits": 1}
    app.post("/draft", {"name": "Again", "changes": rates}, method="PATCH")
    page.reload()
    expect(page.locator("#plan-line")).to_have_attribute("data-steps", "7")
    page.locator("#start-training").click()
    page.wait_for_url(re.compile(r"/runs\?run="))
    expect(bar).to_have_attribute("data-state", "finished", timeout=120_000)
    second = app.data / "runs" / re.search(r"run=([^&]+)", page.url)[1]
    begun, ended = load_file(next((second / "start").iterdir())), load_file(second / "again.safetensors")
    assert begun.keys() == ended.keys() and any(np.abs(begun[key]).max() > 1e-3 for key in begun if key.endswith("lora_up.weight"))
    assert all(np.allclose(begun[key], ended[key], rtol=1e-2, atol=1e-4) for key in begun)

    # the playground: it draws, says what it holds, and lets go of it
    until(lambda: app.get(f"/runs/{second.name}/results")["state"] == "finished", 240)
    page.goto(f"{app.url}/results?run={second.name}")
    place = page.get_by_role("region", name="Playground")
    place.get_by_label("Steps", exact=True).fill("2")
    press(page, "Generate")
    expect(place.get_by_role("img", name=re.compile("^With the LoRA"))).to_be_visible(timeout=120_000)
    expect(place.get_by_role("status")).to_contain_text(re.compile(r"keeps \d+\.\d GiB of memory"))
    press(page, "Free the memory now")
    expect(place.get_by_role("status")).to_have_text("Nothing is loaded; the first picture takes longer.", timeout=60_000)
    assert app.get("/playground")["state"] == "idle"
