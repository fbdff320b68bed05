"""Crops and masks in the page: moved and painted by mouse and by keyboard, they stand in the data set's files and in a run's snapshot."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from test_pages import violations

from trainer.config import DataConfig
from trainer.data.scan import scan


def wide(path, seed: int) -> str:
    """A picture so wide that every bucket cuts something off."""
    dots = np.random.default_rng(seed).integers(0, 256, (6, 30, 3), dtype=np.uint8)
    Image.fromarray(dots).resize((1200, 240), Image.Resampling.BICUBIC).save(path)
    return str(path)


def files_of(app) -> dict:
    images = app.get("/images")
    return {"folder": images["folder"], "images": {i["name"]: i for i in images["images"]}}


@pytest.fixture
def page(open_page, app, tmp_path) -> Page:
    app.post("/draft/example")
    page = open_page("/")
    names = [wide(tmp_path / "wide 1.png", 1), wide(tmp_path / "wide 2.png", 2)]
    page.locator("#choose-files").set_input_files(names)
    expect(card(page, "wide 2.png")).to_be_visible()
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    return page


def card(page: Page, name: str):
    return page.locator(".nl-card", has=page.get_by_text(name, exact=True))


def crop_of(app, name: str) -> list[float]:
    return files_of(app)["images"][name]["crop"]


def drag(page: Page, box: dict, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=8)
    page.mouse.up()


@pytest.mark.slow
def test_a_crop_is_moved_and_a_mask_painted(page, app):
    middle = crop_of(app, "wide 1.png")
    assert middle[2] < 0.7 and middle[0] == pytest.approx((1 - middle[2]) / 2, abs=0.01)

    # on the card, by the arrow keys and by the mouse
    first = card(page, "wide 1.png")
    first.locator(".nl-open").focus()
    with page.expect_response(lambda r: r.url.endswith("/focus")):
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
    assert crop_of(app, "wide 1.png")[0] == pytest.approx(middle[0] - 0.06, abs=0.002)
    second = card(page, "wide 2.png")
    second.scroll_into_view_if_needed()
    with page.expect_response(lambda r: r.url.endswith("/focus")):
        drag(page, second.locator(".nl-frame").bounding_box(), (0.5, 0.5), (0.95, 0.5))
    assert crop_of(app, "wide 2.png")[0] == pytest.approx(1 - middle[2], abs=0.002)
    expect(page.locator("dialog[open]")).to_have_count(0)  # a drag enlarges nothing

    # in the editor, by both; centred, and taken back
    second.locator(".nl-adjust").click()
    slider = page.get_by_role("slider", name="Crop")
    expect(slider).to_be_focused()
    expect(slider).to_have_attribute("aria-valuenow", "100")
    assert violations(page) == []
    with page.expect_response(lambda r: r.url.endswith("/focus")):
        page.locator("#crop-centre").click()
    expect(slider).to_have_attribute("aria-valuenow", "50")
    drag(page, page.locator(".cr-stage").bounding_box(), (0.95, 0.5), (0.85, 0.5))  # from beside the bright part
    expect(slider).to_have_attribute("aria-valuenow", str(round(100 * (0.9 - middle[2]) / (1 - middle[2]))))
    with page.expect_response(lambda r: r.url.endswith("/focus")):
        drag(page, page.locator(".cr-stage").bounding_box(), (0.7, 0.5), (0.2, 0.5))
    expect(slider).to_have_attribute("aria-valuenow", "0")

    # the mask: a stroke by mouse, a dab by keyboard, one taken back
    page.locator("#mode-mask").click()
    canvas = page.locator(".cr-mask")
    expect(canvas).to_be_visible()
    box = page.locator(".cr-stage").bounding_box()
    drag(page, box, (0.1, 0.5), (0.4, 0.5))
    drag(page, box, (0.1, 0.1), (0.1, 0.9))
    page.locator("#mask-undo").click()
    assert violations(page) == []
    canvas.focus()
    for _ in range(8):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    with page.expect_response(lambda r: r.url.endswith("/mask") and r.request.method == "PUT"):
        page.locator("#editor-done").click()
    expect(page.locator("dialog[open]")).to_have_count(0)
    expect(second.get_by_text("Mask", exact=True)).to_be_visible()
    expect(first.get_by_text("Mask", exact=True)).to_be_hidden()
    page.locator("#crops-masks summary").click()
    expect(page.locator("#unmasked-weight")).to_be_visible()

    def check(folder: Path) -> None:
        found = {i.path.name: i for i in scan([DataConfig(folder=folder)]).images}
        one, two = found["wide 1.png"], found["wide 2.png"]
        assert one.focus[0] == pytest.approx(0.44, abs=0.01) and one.mask is None
        assert two.focus[0] == pytest.approx(middle[2] / 2, abs=0.01)
        grey = np.asarray(Image.open(two.mask))
        assert grey.shape == (205, 1024)
        at = [grey[int(y * 204), int(x * 1023)] for x, y in ((0.1, 0.5), (0.3, 0.5), (0.1, 0.05), (0.6, 0.5), (0.9, 0.9))]
        assert at == [255, 255, 0, 0, 255], at

    check(Path(files_of(app)["folder"]))
    run = app.post("/runs", {"draft": True, "queue": True})["id"]
    try:
        check(app.data / "runs" / run / "data")
    finally:
        app.post(f"/runs/{run}/discard", {"confirm": True})

    # what a step will see has both, and undo takes the mask away
    page.locator("#seen summary").click()
    expect(page.locator(".nl-seen-row").first).to_be_visible()
    step = next(n for n in range(1, 40) if any(r["masked"] for r in app.get(f"/draft/seen?step={n}")["rows"]))
    page.locator("#seen-step").fill(str(step))
    expect(page.locator(".nl-seen-mask").first).to_be_visible()
    expect(page.locator(".nl-seen-rows")).to_contain_text("masked")
    page.locator("#undo").click()
    expect(second.get_by_text("Mask", exact=True)).to_be_hidden()
    assert files_of(app)["images"]["wide 2.png"]["mask"] is None


@pytest.mark.slow
def test_masks_by_words_come_from_the_trainer_and_are_taken_back(page, app, small_clipseg):
    app.post("/settings", {"masker": str(small_clipseg)}, method="PATCH")
    page.locator("#crops-masks summary").click()
    page.locator("#mask-words-begin").click()
    expect(page.get_by_text("Say what the masks shall show")).to_be_visible()
    page.locator("#mask-words").fill("a cat")
    page.locator("#mask-words-begin").click()
    expect(page.locator("#mask-status")).to_contain_text("masks made", timeout=60_000)
    made = {name: bool(i["mask"]) for name, i in files_of(app)["images"].items()}
    assert len(made) == 16 and sum(made.values()) > 0
    expect(page.locator(".nl-masked:visible")).to_have_count(sum(made.values()))
    page.locator("#undo").click()
    expect(page.locator(".nl-masked:visible")).to_have_count(0)
    assert not any(i["mask"] for i in files_of(app)["images"].values())


@pytest.mark.slow
def test_a_run_shows_what_a_step_is_trained_on(open_page, app, settings):
    run = app.data / "runs" / "20260101-120000-zorp"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(settings()), encoding="utf-8")
    page = open_page(f"/runs?run={run.name}")
    page.locator("#batch summary").click()
    page.locator("#batch-step").fill("9999")
    page.locator("#batch-show").click()
    expect(page.locator("#batch")).to_contain_text("this run has steps 1 to 8", timeout=60_000)
    page.locator("#batch-step").fill("2")
    page.locator("#batch-show").click()
    expect(page.get_by_alt_text("The images of step 2")).to_be_visible(timeout=60_000)
    expect(page.locator("#batch li").first).to_contain_text(".png")
    assert violations(page) == []


def test_the_page_with_all_of_it_open_is_no_wider_than_a_phone(page, open_page, app):
    wide = next(i for i in app.get("/images")["images"] if i["name"] == "wide 1.png")
    phone = open_page("/", width=390)
    expect(phone.locator("#advice")).to_be_visible()
    for name in ("#crops-masks", "#seen"):
        phone.locator(f"{name} summary").click()
    expect(phone.locator(".nl-seen-row").first).to_be_visible()
    right = "() => Math.max(...[...document.querySelectorAll('.nl-masks, .nl-masks *, .nl-seen *')].map(e => e.closest('.nl-seen-frame') ? 0 : e.getBoundingClientRect().right))"
    assert phone.evaluate(right) <= 390
    phone.locator(f"[data-image='{wide['id']}'] .nl-adjust").click()
    for mode in ("#mode-crop", "#mode-mask"):
        phone.locator(mode).click()
        assert phone.evaluate("() => { const d = document.querySelector('dialog[open]'); return d.scrollWidth - d.clientWidth; }") == 0
