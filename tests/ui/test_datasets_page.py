"""Advice that is followed, data sets as things, and several of them in one training, in a real browser."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.app.test_advice import photo
from tests.ui.test_pages import violations


@pytest.fixture
def shots(tmp_path) -> list[Path]:
    """Nine pictures, one of them a smaller copy; captions that have the trigger in some only."""
    made = []
    for k in range(8):
        photo(k).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"{'zorp, ' if k > 1 else ''}a creature in place {k}", encoding="utf-8")
        made += [tmp_path / f"{k}.png", tmp_path / f"{k}.txt"]
    photo(3).resize((520, 520)).save(tmp_path / "copy.jpg", quality=70)
    return [*made, tmp_path / "copy.jpg"]


@pytest.fixture(autouse=True)
def empty(app):
    app.post("/draft/new")
    app.post("/draft", {"name": "Zorp", "trigger": "zorp", "class_word": "creature", "sets": []}, method="PATCH")


def cards(page):
    return page.locator(".nl-card")


def captions(app) -> list[str]:
    return [i["caption"] for i in app.get("/images")["images"] if not i["removed"]]


@pytest.mark.slow
def test_advice_is_shown_and_followed(open_page, app, shots):
    page = open_page("/")
    page.locator("#choose-files").set_input_files(shots)
    expect(cards(page)).to_have_count(9)
    box = page.locator("#advice")
    expect(box).to_have_attribute("data-kinds", "duplicate missing trigger")
    box.locator("summary").click()
    assert violations(page) == []

    box.get_by_role("button", name="Show the images: 1 image is nearly the same").click()
    expect(cards(page)).to_have_count(2)
    page.get_by_role("button", name="Show all", exact=True).first.click()
    expect(cards(page)).to_have_count(9)

    box.get_by_role("button", name="Remove the copy").click()
    expect(cards(page)).to_have_count(8)
    expect(box).to_have_attribute("data-kinds", "trigger")
    page.locator(".la-toast").get_by_role("button", name="Undo").last.click()
    expect(cards(page)).to_have_count(9)
    box.get_by_role("button", name="Remove the copy").click()
    expect(cards(page)).to_have_count(8)

    box.get_by_role("button", name="Put the trigger first").click()
    expect(box).to_be_hidden()
    assert all(text.startswith("zorp, a creature") for text in captions(app))
    page.locator("#trigger").fill("other")  # advice follows the words
    expect(box).to_be_hidden()


def test_a_data_set_is_named_copied_exported_imported_and_deleted(open_page, app, shots):
    page = open_page("/")
    page.locator("#choose-files").set_input_files(shots[:-1])
    expect(cards(page)).to_have_count(8)
    box, before = page.locator("#datasets"), len(app.get("/datasets")["datasets"])
    box.locator("summary").click()
    rows = box.locator(".nl-sets li")
    expect(rows).to_have_count(before)
    expect(page.locator("#dataset-version")).to_contain_text("Version")

    box.get_by_role("button", name="Name and notes of Zorp").first.click()
    page.get_by_role("dialog").get_by_label("Name").fill("My shots")
    page.get_by_role("dialog").get_by_label("Notes").fill("from the beach")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(box.locator("summary")).to_contain_text("Data set: My shots")

    box.get_by_role("button", name="Duplicate My shots").click()
    expect(rows).to_have_count(before + 1)
    with page.expect_download() as started:
        box.get_by_role("link", name="Export My shots", exact=True).click()
    assert started.value.suggested_filename == "My shots.zip"
    raw = Path(started.value.path()).read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        about = json.loads(archive.read("dataset.json"))
        assert (about["name"], about["notes"], about["trigger"]) == ("My shots", "from the beach", "zorp") and "7.png" in archive.namelist()

    first = app.get("/draft")["draft"]["dataset"]
    page.locator("#import-files").set_input_files([{"name": "shots.zip", "mimeType": "application/zip", "buffer": raw}])
    expect(rows).to_have_count(before + 2)
    expect(rows.filter(has_text="open").first).to_contain_text("My shots")
    assert app.get("/draft")["draft"]["dataset"] != first and len(captions(app)) == 8

    box.get_by_role("button", name="Delete My shots (copy)").click()
    expect(rows).to_have_count(before + 1)
    page.locator(".la-toast").get_by_role("button", name="Undo").last.click()
    expect(rows).to_have_count(before + 2)
    page.locator(f'[data-dataset="{first}"]').get_by_role("button", name="Open My shots", exact=True).click()
    expect(page.locator(f'[data-dataset="{first}"] .la-badge')).to_be_visible()
    assert app.get("/draft")["draft"]["dataset"] == first
    assert violations(page) == []


@pytest.mark.slow
def test_another_set_is_trained_together(open_page, app, shots, zorps):
    page = open_page("/")
    page.locator("#choose-files").set_input_files(zorps)
    expect(cards(page)).to_have_count(14)
    made = app.post("/datasets/import-folder", {"path": str(shots[0].parent)})["added"][0]
    app.post(f"/datasets/{next(s['id'] for s in app.get('/datasets')['datasets'] if s['name'] == 'Zorp' and s['images'] == 14)}/open")
    app.post("/draft", {"model": "demo", "preset": "demo", "changes": {"train.batch_size": 1, "train.visits": 10, "dataset.hold_out": 0}}, method="PATCH")  # fmt: skip
    page.reload()
    expect(page.locator("#plan-line")).to_have_attribute("data-steps", "140")

    box = page.locator("#further-sets")
    box.locator("summary").click()
    page.locator("#further-pick").select_option(made)
    page.locator("#further-add").click()
    expect(page.locator("#plan-line")).to_have_attribute("data-steps", str(140 + 9 * 10))
    page.locator(f"#further-visits-{made}").fill("3")
    expect(page.locator("#plan-line")).to_have_attribute("data-steps", str(140 + 9 * 3))
    page.locator(f"#further-weight-{made}").fill("0.5")
    page.locator(f"#further-trigger-{made}").fill("fuzz")
    page.locator(f"#further-kind-{made}").select_option("validation")
    expect(page.locator("#plan-line")).to_have_attribute("data-steps", "140")
    page.locator(f"#further-kind-{made}").select_option("train")
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    assert app.get("/draft")["draft"]["sets"] == [
        {"dataset": made, "kind": "train", "visits": 3, "weight": 0.5, "trigger": "fuzz", "class_word": ""}
    ]
    assert violations(page) == []
    page.locator("#keep-class").check()
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    assert app.get("/draft")["values"]["loss.prior_weight"] == 1
    page.reload()
    page.locator("#further-sets > summary").click()
    expect(page.locator("#keep-class")).to_be_checked()
    page.locator("#keep-class").uncheck()
    page.get_by_role("button", name="out of this training").click()
    expect(page.locator("#further-sets > summary")).to_have_text("Add another set of images")
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    view = app.get("/draft")
    assert view["draft"]["sets"] == [] and "loss.prior_weight" not in view["draft"]["changes"]


def test_an_import_is_cancelled(open_page, app, tmp_path):
    """Of pictures that take a third of a second each."""
    shade = np.add.outer(np.arange(3000), np.arange(4000)).astype(np.uint8)
    big = io.BytesIO()
    Image.fromarray(np.dstack([shade] * 3)).save(big, "PNG", compress_level=1)
    with zipfile.ZipFile(tmp_path / "big.zip", "w") as archive:
        for k in range(40):
            archive.writestr(f"{k}.png", big.getvalue() + bytes([k]))  # what follows the end of a PNG counts for nothing
    page = open_page("/")
    page.locator("#datasets summary").click()
    sets = len(app.get("/datasets")["datasets"])
    page.locator("#import-files").set_input_files(tmp_path / "big.zip")
    expect(page.locator(".nl-import").get_by_role("status")).to_have_text(re.compile(r"Looking at the pictures: \d+ of 40"))
    page.locator("#import-cancel").click()
    expect(page.locator(".la-toast")).to_contain_text("Cancelled; nothing was added.")
    expect(page.locator("#import-cancel")).to_be_hidden()
    assert len(app.get("/datasets")["datasets"]) == sets
