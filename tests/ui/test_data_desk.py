"""Pictures without captions become a data set: captioned, corrected, advised, cropped, masked, trained; what was done shows in the batch."""

import io
import random
import re
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from app.draft import EXAMPLE_CAPTIONER
from trainer.demo.world import Scene, caption, draw, random_scene
from trainer.families.sources import DEMO

COLOURS = ("red", "blue", "green", "purple", "orange")
GAP = 8  # of trainer.batch


def drawn(folder) -> tuple[list, dict[str, str]]:
    """Sixteen pictures of the drawn world, one of them a copy and one too wide for any bucket; and what is on the first thirteen."""
    rng, files, truth = random.Random(71), [], {}
    for k in range(14):
        scene = random_scene(rng, style="flat")
        files.append(folder / f"{k:02}.png")
        draw(scene, 128, seed=k).save(files[-1])
        truth[files[-1].name] = caption(scene)
    Image.open(files[3]).resize((160, 160), Image.Resampling.LANCZOS).save(folder / "copy.png")
    wide = Image.new("RGB", (640, 128))
    for k, colour in enumerate(COLOURS):
        wide.paste(draw(Scene("cat", "white", ground=colour), 128, seed=k), (128 * k, 0))
    wide.save(folder / "wide.png")
    return [*files, folder / "copy.png", folder / "wide.png"], truth


def decoded(app, run: str, name: str, step: int) -> np.ndarray:
    """The picture of an image in a batch of the run."""
    view = app.post(f"/runs/{run}/batch", {"step": step})
    while view["state"] != "finished":
        assert view["state"] in ("waiting", "starting", "running"), view
        time.sleep(0.3)
        view = app.get(f"/runs/{run}/batch")
    k = [row["file"] for row in view["rows"]].index(name)
    with urllib.request.urlopen(app.url + view["picture"]) as answer:
        sheet = Image.open(io.BytesIO(answer.read())).convert("RGB")
    across = min(4, len(view["rows"]))
    width = (sheet.width - GAP * (across - 1)) // across
    return np.asarray(sheet.crop((k * (width + GAP), 0, k * (width + GAP) + width, sheet.height))).astype(float)


@pytest.mark.slow
def test_sixteen_pictures_are_made_a_data_set_and_trained(open_page, app, tmp_path):
    files, truth = drawn(tmp_path)
    app.post("/draft/new")
    app.post("/settings", {"sentences": str(EXAMPLE_CAPTIONER)}, method="PATCH")
    app.post("/draft", {"model": str(DEMO), "preset": "quick", "name": "Desk", "trigger": "worldo"}, method="PATCH")
    page = open_page("/")
    page.locator("#choose-files").set_input_files(files)
    card = page.locator(".nl-card")
    expect(card).to_have_count(16)

    # captioned: what they say is on the pictures
    page.locator("#caption-sentences").click()
    expect(page.locator("#caption-job")).to_have_attribute("data-state", "finished", timeout=180_000)
    said = {i["name"]: i["caption"] for i in app.get("/images")["images"]}
    assert all(text.startswith("worldo") for text in said.values())
    subjects = [all(word in said[name] for word in text.split(" on ")[0].split()[-2:]) for name, text in truth.items()]
    assert sum(subjects) >= 12, [(truth[n], said[n]) for n in truth]

    # corrected in bulk
    page.locator("#bulk-action").select_option("append")
    page.locator("#bulk-text").fill("flat drawing")
    page.locator("#bulk-apply").click()
    expect(page.locator("[data-caption] textarea").last).to_have_value(said["wide.png"] + ", flat drawing")

    # advised: the copy goes
    advice = page.locator("#advice")
    expect(advice).to_have_attribute("data-kinds", "duplicate long")
    advice.locator("summary").click()
    advice.get_by_role("button", name="Remove the copy").click()
    expect(card).to_have_count(15)
    expect(advice).to_have_attribute("data-kinds", "long")

    # the wide picture's crop goes to its left end, a stroke is painted over the left of the first picture
    wide = page.locator(".nl-card", has=page.get_by_text("wide.png", exact=True))
    wide.locator(".nl-open").focus()
    with page.expect_response(lambda r: r.url.endswith("/focus")):
        for _ in range(30):
            page.keyboard.press("ArrowLeft")
    page.locator(".nl-card", has=page.get_by_text("00.png", exact=True)).locator(".nl-adjust").click()
    page.locator("#mode-mask").click()
    box = page.locator(".cr-stage").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.05 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.95 * box["height"], steps=10)
    page.mouse.up()
    with page.expect_response(lambda r: r.url.endswith("/mask") and r.request.method == "PUT"):
        page.locator("#editor-done").click()

    # trained
    changes = {"train.visits": 3, "train.batch_size": 4, "preview.enabled": False, "validation.enabled": False, "adapter.rank": 2}
    app.post("/draft", {"changes": changes}, method="PATCH")
    page.reload()
    first = {}  # the step that has an image first
    for step in range(1, 8):
        first |= {row["file"]: step for row in app.get(f"/draft/seen?step={step}")["rows"] if row["file"] not in first}
    page.locator("#start-training").click()
    page.wait_for_url(re.compile(r"/runs\?run="))
    run = page.url.partition("run=")[2]
    assert app.wait(run, "finished", "failed")["run"]["state"] == "finished"

    # and in the batch, decoded from its latents: the crop and the mask
    now = decoded(app, run, "wide.png", first["wide.png"])
    height, width = now.shape[:2]
    source, seen = Image.open(files[-1]), 128 * width / height

    def apart(left: float) -> float:
        return np.abs(now - np.asarray(source.crop((round(left), 0, round(left + seen), 128)).resize((width, height)), float)).mean()

    assert apart(0) < 15 < 40 < apart((640 - seen) / 2)
    now, was = decoded(app, run, "00.png", first["00.png"]), np.asarray(Image.open(files[0]), float)
    painted, rest = np.s_[40:88, 26:38], np.s_[:, 72:]
    assert np.abs(now[painted] - was[painted]).mean() < 25
    assert np.abs(now[rest] - 0.25 * was[rest]).mean() < 15
    page.locator("#batch summary").click()
    expect(page.get_by_alt_text("The images of step")).to_be_visible()
