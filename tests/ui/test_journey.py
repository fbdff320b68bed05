"""The whole way, as a newcomer goes it: from dropped pictures to a file that draws, through reloads, a killed app, stop and resume."""

import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]
ZORP = "a zorp on a blue background"


def captions(page):
    return page.locator("[data-caption] textarea")


def saved(page) -> None:
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")


def set_advanced(page, label: str, value: str) -> None:
    field = page.get_by_label(label, exact=True)
    field.fill(value)
    field.press("Tab")


def pixels(lora: Path | None) -> np.ndarray:
    """What diffusers' own pipeline draws, with a LoRA file or without."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "assets/demo/base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipe(ZORP, num_inference_steps=12, guidance_scale=4.0, generator=torch.Generator().manual_seed(7), output_type="np").images[0]


@pytest.mark.slow
def test_from_dropped_pictures_to_a_file_that_draws(open_page, app, zorps, small_blip, tmp_path):
    app.post("/draft/new")
    page = open_page("/")

    # 1. pictures, captions by hand and by the captioner (a small one of random words: what it says does not matter here)
    page.locator("#choose-files").set_input_files(zorps)
    expect(captions(page)).to_have_count(14)
    captions(page).first.fill("zorp, by hand")
    app.post("/settings", {"sentences": str(small_blip)}, method="PATCH")
    saved(page)
    page.reload()
    page.locator("#caption-sentences").click()
    page.get_by_role("dialog").get_by_role("button", name=re.compile("^Only the 13 without")).click()
    expect(page.locator("#caption-job")).to_have_attribute("data-state", "finished", timeout=120_000)
    texts = [i["caption"] for i in app.get("/images")["images"]]
    assert texts[0] == "zorp, by hand" and all(texts)
    page.locator("#undo").click()  # the words are random: for the training, the pictures' own ones
    expect(captions(page).nth(1)).to_have_value("")
    for k, picture in enumerate(zorps):
        captions(page).nth(k).fill(picture.with_suffix(".txt").read_text().strip())
    saved(page)

    # 2. what it is, and which model
    page.locator("#name").fill("My Zorp")
    page.locator("#trigger").fill("zorp")
    base = shutil.copytree(ROOT / "assets/demo/base", tmp_path / "my model")
    page.locator("#model-path").fill(f'"{base}"')
    page.locator("#model-check").click()
    page.locator("#model-use").click()
    expect(page.locator("#model-chosen")).to_contain_text("my model")

    # 3. a preset, and by hand what suits a toy
    page.locator('[data-preset="quick"]').click()
    page.locator("#advanced > summary").click()
    set_advanced(page, "Visits to each image", "60")
    set_advanced(page, "Batch size", "4")
    app.post(
        "/draft",
        {
            "changes": {
                "part.unet.learning_rate": 1.5e-3,
                "preview.steps": 6,
                "adapter.targets": ["attention", "feed_forward", "projections", "convolutions"],
            }
        },
        method="PATCH",
    )
    page.reload()
    expect(page.locator("#plan-line")).to_have_attribute("data-steps", "210")
    page.locator("#start-training").click()
    page.wait_for_url(re.compile(r"/runs\?run="))
    run = re.search(r"run=([^&]+)", page.url).group(1)

    # 4. it is alive: progress, the picture before training, the curve; a reload finds it again
    bar = page.get_by_role("progressbar", name="Progress", exact=True)
    expect(bar).to_have_attribute("data-state", "running", timeout=60_000)
    expect(page.locator('[data-file="step-000000-1.png"]')).to_be_visible(timeout=120_000)
    page.wait_for_function("Number(document.querySelector('[role=progressbar][data-step]')?.dataset.step) >= 20", timeout=180_000)
    expect(page.locator(".la-chart").first).to_be_visible()
    page.reload()
    expect(bar).to_have_attribute("data-state", "running")
    before = int(bar.get_attribute("data-step"))
    assert before >= 20

    # 5. the app is killed; the training goes on; the page finds the new one
    app.kill()
    expect(page.get_by_role("alert").filter(has_text="The server does not answer")).to_be_visible(timeout=60_000)
    app.start()
    assert app.get(f"/runs/{run}?since=-1")["run"]["state"] == "running"
    page.wait_for_function(f"Number(document.querySelector('[role=progressbar][data-step]').dataset.step) > {before}", timeout=120_000)
    expect(page.get_by_role("alert").filter(has_text="The server does not answer")).to_be_hidden(timeout=30_000)

    # 6. sample images now; stop; resume; to the end
    page.get_by_role("button", name="Preview now", exact=True).click()
    page.wait_for_function("document.querySelectorAll('[data-column]').length >= 2", timeout=120_000)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(bar).to_have_attribute("data-state", "stopped", timeout=120_000)
    stopped = int(bar.get_attribute("data-step"))
    assert before < stopped < 210
    page.get_by_role("button", name="Resume", exact=True).click()
    expect(bar).to_have_attribute("data-state", "running", timeout=60_000)
    expect(bar).to_have_attribute("data-state", "finished", timeout=400_000)
    assert bar.get_attribute("data-step") == "210"

    # 7. compared by itself, and taken home
    page.get_by_role("link", name="See results").click()
    page.locator('[data-state="finished"]').first.wait_for(timeout=400_000)
    expect(page.locator(".la-matrix img").first).to_be_visible(timeout=60_000)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download", exact=True).first.click()
    lora = tmp_path / download.value.suggested_filename
    download.value.save_as(lora)
    assert lora.name.startswith("my-zorp") or lora.name.startswith("My Zorp")
    assert np.abs(pixels(lora) - pixels(None)).mean() > 8 / 255


def start(app, name: str, **changes) -> str:
    """A run of the built-in example, in the queue."""
    small = {"train.visits": 2, "preview.enabled": False, "validation.enabled": False, "adapter.rank": 2}
    app.post("/draft/example")
    app.post("/draft", {"name": name, "changes": small | changes}, method="PATCH")
    return app.post("/runs", {"draft": True, "queue": True})["id"]


@pytest.mark.slow
def test_two_runs_in_the_queue_run_one_after_the_other(open_page, app):
    first, second = start(app, "First"), start(app, "Second")
    page = open_page("/runs")
    expect(page.get_by_text("Second").first).to_be_visible()
    states = set()
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and app.get(f"/runs/{second}?since=-1")["run"]["state"] != "finished":
        now = {r["id"]: r["state"] for r in app.runs()}
        states.add((now[first], now[second]))
        time.sleep(0.3)
    assert app.wait(first, "finished") and app.wait(second, "finished")
    assert not states & {("running", "running"), ("running", "starting"), ("starting", "running")}
    assert ("running", "waiting") in states


@pytest.mark.slow
def test_a_killed_trainer_shows_as_interrupted_and_resumes(open_page, app):
    import json
    import os

    run = start(app, "Killed", **{"train.visits": 200, "train.batch_size": 1, "output.checkpoint_every": 10})
    page = open_page(f"/runs?run={run}")
    bar = page.get_by_role("progressbar", name="Progress", exact=True)
    page.wait_for_function("Number(document.querySelector('[role=progressbar][data-step]')?.dataset.step) >= 20", timeout=180_000)
    folder = Path(app.get(f"/runs/{run}?since=-1")["run"]["folder"])
    os.kill(json.loads((folder / "process.json").read_text())["pid"], signal.SIGKILL)
    expect(bar).to_have_attribute("data-state", "interrupted", timeout=30_000)
    expect(page.locator("#la-main")).to_contain_text("ended without a word")
    page.get_by_role("button", name="Resume", exact=True).click()
    expect(bar).to_have_attribute("data-state", "running", timeout=60_000)
    page.wait_for_function("Number(document.querySelector('[role=progressbar][data-step]')?.dataset.step) >= 40", timeout=180_000)
    page.get_by_role("button", name="Discard", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Discard for good").click()
    page.wait_for_url(lambda url: run not in url)
    assert not folder.exists() and run not in [r["id"] for r in app.runs()]
