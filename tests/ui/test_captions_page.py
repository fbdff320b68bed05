"""Captions by captioners, on the page: a small tagger of random weights writes; of the others only the kind matters here."""

import json
import re

import pytest
from playwright.sync_api import expect
from small_captioners import make_wd


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioners")
    for name in ("blip", "qwen3_vl"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"model_type": name}))
    return {"sentences": root / "blip", "tags": make_wd(root / "my tagger"), "prompt": root / "qwen3_vl"}


@pytest.fixture
def page(app, models, zorps, open_page):
    """The page with three pictures, the first of which has a caption; the trigger is zorpo."""
    app.post("/draft/new")
    app.post("/settings", {"sentences": str(models["sentences"]), "tags": str(models["tags"]), "prompts": {}}, method="PATCH")
    app.post("/draft", {"trigger": "zorpo", "purpose": "character"}, method="PATCH")
    page = open_page("/")
    page.locator("#choose-files").set_input_files(zorps[:3])
    expect(captions(page)).to_have_count(3)
    captions(page).first.fill("zorpo, by hand")
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    return page


def captions(page):
    return page.locator("[data-caption] textarea")


def texts(app) -> list[str]:
    return [i["caption"] for i in app.get("/images")["images"]]


def finished(page) -> None:
    expect(page.locator("#caption-job")).to_have_attribute("data-state", "finished", timeout=60_000)


def clean(page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.slow
def test_tags_go_behind_what_is_there_one_is_written_anew_and_all_is_undone(page, app):
    expect(page.locator("#caption-tags")).to_contain_text("By my tagger.")
    page.locator("#caption-tags").click()
    page.get_by_role("dialog").get_by_role("button", name="Add to them").click()
    finished(page)
    first, *others = texts(app)
    assert first.startswith("zorpo, by hand, ") and len(first.split(", ")) > 3 and all(re.match(r"zorpo, \S", text) for text in others)
    expect(captions(page).first).to_have_value(first)

    captions(page).nth(1).fill("mine")
    expect(page.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    anew = page.get_by_role("button", name=re.compile("^Write anew: the caption of 02"))
    anew.focus()
    page.keyboard.press("Enter")
    expect(captions(page).nth(1)).to_have_value(others[0], timeout=60_000)
    assert texts(app) == [first, *others]
    finished(page)
    page.locator("#undo").click()
    expect(captions(page).nth(1)).to_have_value("mine")
    for _ in range(2):
        expect(page.locator("#undo")).to_be_visible()
        page.locator("#undo").click()
        page.wait_for_timeout(300)
    expect(captions(page).first).to_have_value("zorpo, by hand")
    assert texts(app) == ["zorpo, by hand", "", ""]


def test_tags_of_nearly_every_caption_are_left_out_or_kept(page, app):
    box = page.locator("#common-tags")
    expect(box).to_be_hidden()
    for k, text in enumerate(("zorpo, green skin, one eye, hat", "zorpo, green skin, one eye, sitting", "zorpo, green skin, one eye")):
        captions(page).nth(k).fill(text)
    expect(box).to_contain_text("2 tags are in nearly every caption")
    expect(box).to_contain_text("Left out, a tag becomes part of zorpo")
    expect(box.locator("li")).to_have_text([re.compile("^green skin 3 of 3"), re.compile("^one eye 3 of 3")])
    clean(page)
    box.get_by_role("button", name="Keep all").click()
    expect(box).to_be_hidden()
    page.locator(".la-toast", has_text="2 tags are kept").get_by_role("button", name="Undo").click()
    box.get_by_role("button", name="Keep one eye").click()
    expect(box.locator("li")).to_have_count(1)
    box.get_by_role("button", name="Leave out green skin").click()
    expect(box).to_be_hidden()
    assert texts(app) == ["zorpo, one eye, hat", "zorpo, one eye, sitting", "zorpo, one eye"]
    page.reload()
    expect(captions(page)).to_have_count(3)
    expect(box).to_be_hidden()
    page.locator("#undo").click()
    expect(captions(page).nth(2)).to_have_value("zorpo, green skin, one eye")
    expect(box.locator("li")).to_have_count(1)


def test_a_captioner_is_told_what_the_lora_is_for(page, app, models):
    recipe = page.locator("#caption-recipe")
    expect(recipe).to_contain_text("not zorpo’s own looks")
    expect(page.locator("#prompt-box")).to_be_hidden()  # BLIP takes none
    page.locator("input[name=purpose][value=style]").check(force=True)
    expect(recipe).to_contain_text("not how it is made")
    app.post("/settings", {"sentences": str(models["prompt"])}, method="PATCH")
    page.reload()
    page.locator("#prompt-box summary").click()
    prompt = page.locator("#caption-prompt")
    expect(prompt).to_have_value(re.compile("Say nothing of how it is made"))
    clean(page)
    prompt.fill("Describe a cat")
    prompt.blur()
    own = page.get_by_role("button", name="Back to its own words")
    expect(own).to_be_visible()
    assert app.get("/settings")["prompts"] == {"style": "Describe a cat"}
    page.locator("input[name=purpose][value=object]").check(force=True)
    expect(prompt).to_have_value(re.compile("call it just"))
    page.locator("input[name=purpose][value=style]").check(force=True)
    expect(prompt).to_have_value("Describe a cat")
    own.click()
    expect(prompt).to_have_value(re.compile("Say nothing of how it is made"))
    app.post("/settings", {"sentences": "/gone/captioner"}, method="PATCH")
    page.reload()
    expect(page.locator("#caption-sentences")).to_contain_text("Change it under Settings")
    page.locator("#caption-sentences").click()
    expect(page.locator("#captioner-note")).to_contain_text("/gone/captioner is neither a folder of this machine nor a hub id")


def test_captioners_are_chosen_under_settings(open_page, app, models):
    app.post("/settings", {"sentences": "", "tags": ""}, method="PATCH")
    page = open_page("/settings", width=390)
    tags = page.locator("#captioner-tags")
    expect(tags.get_by_role("radio", name="WD tagger, ViT")).to_be_checked()
    expect(tags).to_contain_text("Download: 379 MB; licence Apache-2.0.")
    expect(page.get_by_label("Its hub id or folder")).to_have_count(2)
    expect(page.get_by_label("Its hub id or folder").nth(1)).to_be_hidden()
    tags.get_by_role("radio", name="WD tagger, EVA02 large").check(force=True)
    page.wait_for_function("document.querySelectorAll('.la-toast').length > 0")
    assert app.get("/settings")["tags"] == "SmilingWolf/wd-eva02-large-tagger-v3"
    tags.get_by_role("radio", name="Another one").check(force=True)
    other = page.get_by_label("Its hub id or folder").nth(1)
    expect(other).to_be_focused()
    other.fill(str(models["tags"]))
    other.blur()
    clean(page)
    probability = page.get_by_label("Least probability of a tag")
    probability.fill("many")
    probability.blur()
    expect(page.locator(".la-error", has_text="tag_probability is 'many'")).to_be_visible()
    probability.fill("0,5")
    probability.blur()
    expect(page.locator(".la-error", has_text="tag_probability")).to_have_count(0)
    page.reload()
    expect(page.get_by_label("Its hub id or folder").nth(1)).to_have_value(str(models["tags"]))
    now = app.get("/settings")
    assert (now["tags"], now["tag_probability"]) == (str(models["tags"]), 0.5)
