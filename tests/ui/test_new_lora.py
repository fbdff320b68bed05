"""The page on which a training is prepared: what goes in comes back after a reload, a second tab, and a killed app."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

TRICKY = "ohwx, <b>bold</b> & \"quoted\" 'single', \\back, 日本 🦊 {curly} ${dollar}"


@pytest.fixture(autouse=True)
def empty(app):
    app.post("/draft/new")


@pytest.fixture
def page(open_page):
    return open_page("/")


def add(page, files) -> None:
    page.locator("#choose-files").set_input_files(files)


def cards(page):
    return page.locator(".nl-card")


def captions(page):
    return page.locator("[data-caption] textarea")


def saved(page) -> None:
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")


def noise(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def test_dropped_pictures_and_their_captions_are_there(page, app, zorps):
    """A real drop: the browser's own event with files in it."""
    files = [[p.name, list(p.read_bytes())] for p in zorps[:2]] + [["01.txt", list(b"dropped beside it")]]
    page.evaluate(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
            const target = document.querySelector('.nl-drop');
            for (const type of ['dragenter', 'dragover', 'drop']) target.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        files,
    )
    expect(cards(page)).to_have_count(2)
    expect(captions(page).first).to_have_value("dropped beside it")
    assert {i["name"] for i in app.get("/images")["images"]} == {"01.png", "02.png"}


@pytest.mark.slow
def test_captions_are_saved_while_typing_and_survive(page, open_page, app, zorps):
    add(page, zorps[:3])
    expect(captions(page)).to_have_count(3)
    captions(page).nth(0).click()
    page.keyboard.insert_text(TRICKY)
    page.keyboard.press("Control+Enter")
    expect(captions(page).nth(1)).to_be_focused()
    page.keyboard.insert_text("second")
    saved(page)
    app.kill()
    app.start()
    page.reload()
    expect(captions(page).nth(0)).to_have_value(TRICKY)
    expect(captions(page).nth(1)).to_have_value("second")
    other = open_page("/")
    expect(captions(other).nth(0)).to_have_value(TRICKY)
    assert app.get("/images")["images"][0]["caption"] == TRICKY


@pytest.mark.slow
def test_what_is_typed_while_the_app_is_away_is_sent_when_it_is_back(page, app, zorps):
    add(page, zorps[:1])
    expect(captions(page)).to_have_count(1)
    app.kill()
    page.locator("#name").fill("Away")
    captions(page).first.fill("typed into the void")
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "lost")
    app.start()
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved", timeout=30_000)
    assert app.get("/draft")["draft"]["name"] == "Away"
    assert app.get("/images")["images"][0]["caption"] == "typed into the void"


def test_remove_and_undo(page, app, zorps):
    add(page, zorps[:2])
    expect(cards(page)).to_have_count(2)
    cards(page).first.hover()
    cards(page).first.get_by_role("button", name=re.compile("^Remove")).click()
    expect(cards(page)).to_have_count(1)
    page.locator("body").press("Control+z")
    expect(cards(page)).to_have_count(2)
    assert all(p.exists() for p in zorps)


def test_many_captions_at_once(page, app, zorps):
    add(page, zorps[:3])
    expect(captions(page)).to_have_count(3)
    for k, text in enumerate(("a red box, indoors", "a red ball", "a blue ball, indoors")):
        captions(page).nth(k).fill(text)
    page.locator("#name").fill("Ohwx Thing")
    page.locator("#name").press("Tab")
    saved(page)
    trigger = app.get("/draft")["draft"]["trigger"]
    assert trigger
    page.locator("#bulk-action").select_option("trigger_first")
    page.locator("#bulk-apply").click()
    expect(captions(page).nth(1)).to_have_value(f"{trigger}, a red ball")
    page.locator("#bulk-action").select_option("replace")
    page.locator("#bulk-find").fill("red")
    page.locator("#bulk-text").fill("green")
    page.locator("#bulk-apply").click()
    expect(captions(page).nth(1)).to_have_value(f"{trigger}, a green ball")
    page.get_by_text(re.compile(r"^Tags \(")).click()
    page.locator('[data-tag="indoors"]').click()
    page.get_by_role("button", name="Remove this tag from them").click()
    expect(captions(page).nth(2)).to_have_value(f"{trigger}, a blue ball")
    page.locator("body").press("Control+z")
    expect(captions(page).nth(2)).to_have_value(f"{trigger}, a blue ball, indoors")


def test_wrong_files_are_named_and_nothing_is_lost(page, app, zorps, tmp_path):
    (tmp_path / "broken.png").write_bytes(zorps[0].read_bytes()[:300])
    (tmp_path / "movie.mp4").write_bytes(b"no picture")
    (tmp_path / "model.safetensors").write_bytes(b"no picture either")
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("../../escaped.png", zorps[1].read_bytes())
        archive.writestr("../escaped.txt", "from the zip")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.png", b"\0" * 200_000_000)
    (tmp_path / "bomb.zip").write_bytes(bomb.getvalue())
    add(page, [zorps[0], *sorted(tmp_path.iterdir())])
    problems = page.locator(".nl-problems")
    expect(problems).to_be_visible()
    for name in ("broken.png", "movie.mp4", "model.safetensors", "bomb.zip"):
        expect(problems).to_contain_text(name)
    names = {i["name"] for i in app.get("/images")["images"]}
    assert names == {"01.png", "escaped.png"}
    assert not [p for p in app.folder.rglob("escaped.png") if "images" not in p.parts]
    assert [i["caption"] for i in app.get("/images")["images"] if i["name"] == "escaped.png"] == ["from the zip"]


def test_a_picture_of_sixty_megabytes_is_taken(page, app, tmp_path):
    big = noise(tmp_path / "big.png", (4500, 4500))
    assert big.stat().st_size > 55_000_000
    add(page, big)
    expect(cards(page)).to_have_count(1, timeout=60_000)
    assert app.get("/images")["images"][0]["width"] == 4500


def test_a_folder_of_this_computer_with_quotes_around_its_path(page, app, zorps, tmp_path):
    for p in zorps[:2]:
        (tmp_path / p.name).write_bytes(p.read_bytes())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    page.get_by_text("Use a folder on this computer").click()
    page.locator("#folder-path").fill(f'  "{tmp_path}"  ')
    page.locator("#use-folder").click()
    expect(cards(page)).to_have_count(2)
    captions(page).first.fill("only in the data set")
    saved(page)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_badges_say_what_is_wrong(page, app, zorps, tmp_path):
    small = noise(tmp_path / "small.png", (200, 180))
    Image.open(zorps[0]).convert("RGB").save(tmp_path / "again.jpg", quality=88)
    add(page, [small, zorps[0], tmp_path / "again.jpg"])
    expect(cards(page)).to_have_count(3)
    kinds = {i["name"]: {b["kind"] for b in i["badges"]} for i in app.get("/images")["images"]}
    assert "small" in kinds["small.png"] and "duplicate" in kinds["again.jpg"] | kinds["01.png"]
    expect(cards(page).filter(has_text="small.png")).to_contain_text("small")


def test_a_model_is_checked_and_named_for_what_it_is(page, app, tmp_path):
    from safetensors.numpy import save_file

    lora = tmp_path / "some.safetensors"
    save_file(
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": np.zeros((4, 320), np.float32)}, lora
    )
    page.locator("#model-path").fill(str(lora))
    page.locator("#model-check").click()
    expect(page.locator("#model-path-error")).to_contain_text("LoRA")
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04 pickled")
    page.locator("#model-path").fill(str(tmp_path / "old.ckpt"))
    page.locator("#model-check").click()
    expect(page.locator("#model-path-error")).to_contain_text("pickle")
    assert app.get("/draft")["draft"]["model"] == ""


def test_what_is_missing_is_said_and_leads_to_its_place(page, app):
    expect(page.locator('#preflight [data-field="images"]').first).to_be_visible()
    page.locator("#start-training").click()
    assert app.runs() == []
    first = page.locator('#preflight [data-level="error"]').first
    first.get_by_role("button").click()
    assert page.evaluate("document.activeElement !== document.body")


@pytest.mark.slow
def test_the_example_is_captioned_by_what_comes_with_it(page, app):
    sentences = page.locator("#caption-sentences")
    expect(sentences).to_contain_text("first use downloads")
    app.post("/draft/example")
    page.reload()
    expect(captions(page)).to_have_count(14)
    expect(sentences).to_contain_text("nothing is downloaded")
    page.locator("#bulk-action").select_option("clear")
    page.locator("#bulk-apply").click()
    expect(captions(page).first).to_have_value("")
    sentences.click()  # no question: nothing is overwritten and nothing fetched
    expect(page.locator("#caption-job")).to_have_attribute("data-state", "finished", timeout=60_000)
    for k in range(14):
        expect(captions(page).nth(k)).to_have_value(re.compile("^zorp, a (big )?green creature"))
    assert not list((app.folder / "home" / "hf").rglob("*"))

    page.locator("#choose-files").set_input_files(noise(app.folder / "mine.png", (128, 128)))
    expect(sentences).to_contain_text("first use downloads")  # drawn pictures are all that the small one knows


def test_an_advanced_setting_changes_the_plan_and_says_what_is_wrong(page, app):
    app.post("/draft/example")
    page.reload()
    line = page.locator("#plan-line")
    expect(line).to_have_attribute("data-steps", "266")
    page.locator("#advanced > summary").click()
    visits = page.get_by_label("Visits to each image", exact=True)
    visits.fill("20")
    visits.press("Tab")
    expect(line).to_have_attribute("data-steps", "70")
    visits.fill("0")
    visits.press("Tab")
    expect(page.locator("#advanced").get_by_text(re.compile("must be at least 1")).first).to_be_visible()
    expect(visits).to_have_value("0")
    page.locator("#setting-search").fill("rank")
    expect(page.get_by_label("Rank", exact=True)).to_be_visible()
    expect(visits).to_be_hidden()


def test_the_configuration_file_is_the_same_data(page, app):
    app.post("/draft/example")
    page.reload()
    page.locator("#advanced > summary").click()
    page.get_by_role("tab", name="Configuration file").click()
    area = page.locator("#toml")
    expect(area).to_have_value(re.compile("zorp"))
    text = area.input_value()
    area.fill(text + "\n[adapter]\nrank = 0\n" if "[adapter]" not in text else text.replace("[adapter]", "[adapter]\nrank = 0"))
    page.locator("#toml-apply").click()
    expect(page.locator("#advanced-file")).to_contain_text("at least 1")
    assert app.get("/draft")["values"]["adapter.rank"] == 16
    area.fill(area.input_value().replace("rank = 0", "rank = 5"))
    page.locator("#toml-apply").click()
    saved(page)
    page.wait_for_function("fetch('/api/draft').then(r => r.json()).then(d => d.values['adapter.rank'] === 5)")


def test_a_kohya_configuration_is_taken_over_and_what_is_not_is_listed(page, app, tmp_path):
    old = tmp_path / "kohya.json"
    old.write_text(json.dumps({"network_dim": 12, "network_alpha": 6, "unet_lr": 0.0002, "cache_latents": True, "LoRA_type": "Standard"}))
    page.locator("#advanced > summary").click()
    page.get_by_role("tab", name="Configuration file").click()
    page.locator("#import-file").set_input_files(old)
    expect(page.locator("#imported")).to_contain_text("cache_latents")
    values = app.get("/draft")["values"]
    assert (values["adapter.rank"], values["adapter.alpha"], values["part.unet.learning_rate"]) == (12, 6, 0.0002)


def test_two_tabs_agree(page, open_page, app):
    other = open_page("/")
    page.locator("#name").fill("Seen in both")
    page.locator("#name").press("Tab")
    saved(page)
    other.evaluate("dispatchEvent(new Event('focus'))")
    expect(other.locator("#name")).to_have_value("Seen in both")


def test_a_models_family_decides_what_is_shown(page, app, zorps):
    from tests.app.test_models import CLIPS, SD1, SD35, SDXL, V, write

    add(page, zorps[:3])
    expect(cards(page)).to_have_count(3)
    files = {"old": SD1, "noobaiXL_vPred": SDXL | V, "sd3.5_medium": SD35 | CLIPS}
    files = {name: write(app.folder / "models" / f"{name}.safetensors", tensors) for name, tensors in files.items()}
    page.locator("#advanced > summary").click()

    def use(name: str) -> set[str]:
        page.locator("#model-path").fill(str(files[name]))
        page.locator("#model-check").click()
        page.locator("#model-use").click()
        expect(page.locator("#model-chosen")).to_contain_text(name)
        saved(page)
        return set(page.eval_on_selector_all(".nl-setting:not([hidden])", "nodes => nodes.map((n) => n.dataset.key)"))

    assert "model.clip_skip" in use("old")
    expect(page.locator("#model-variant")).to_be_hidden()
    shown = use("noobaiXL_vPred")
    assert "part.text_2.train" in shown and not shown & {"model.clip_skip", "loss.shift", "part.text_2.stop", "adapter.conv_rank"}
    expect(page.locator("#model-facts")).to_contain_text("v prediction, ends in pure noise")
    expect(page.locator("#set-preview-quality")).to_have_value("masterpiece, best quality")
    expect(page.locator("[data-preset=balanced]")).to_contain_text("text encoders off")
    page.locator("#model-variant").select_option("pony")
    expect(page.locator("#set-preview-quality")).to_have_value(re.compile("^score_9"))
    page.get_by_label("Convolutions", exact=True).check()
    expect(page.locator("[data-key='adapter.conv_rank']")).to_be_visible()
    shown = use("sd3.5_medium")
    assert "loss.shift" in shown and not shown & {"loss.min_snr_gamma", "adapter.conv_rank", "model.prediction"}
    expect(page.locator("#preflight")).to_contain_text("captions are read by the two CLIPs")
