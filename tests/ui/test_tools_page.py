"""The tools page in a real browser: a file dropped, named by its path, or made by a run; what it is; rewritten and downloaded."""

import base64
import json
import re

import pytest
import torch
from playwright.sync_api import expect
from safetensors.torch import load_file, save_file

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_{}"
TAGS = {"10_cat": {"a cat": 3, "on the grass": 1}, "5_other": {"a cat": 2}}
WAIT = 90_000  # ms: a process that imports torch, on a machine with other work


@pytest.fixture
def lora(tmp_path):
    """A LoRA for SD1.x of two layers, and one layer that no program knows."""
    torch.manual_seed(1)
    tensors = {}
    for name in (*(KEY.format(n) for n in "kv"), "lora_unet_no_such_layer"):
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(4, 768),
            f"{name}.lora_up.weight": torch.randn(320, 4),
            f"{name}.alpha": torch.tensor(2.0),
        }
    metadata = {
        "modelspec.trigger_phrase": "zorp <b>bold</b>",
        "ss_sd_model_name": "dreamshaper_8",
        "ss_tag_frequency": json.dumps(TAGS),
        "ss_session_id": "42",
    }
    path = tmp_path / "my cat.safetensors"
    save_file(tensors, path, metadata)
    save_file({k: v for k, v in tensors.items() if "no_such" not in k}, tmp_path / "plain.safetensors")
    return path


def inspected(page):
    job = page.locator('[data-job="inspect"]')
    expect(job).to_have_attribute("data-state", "finished", timeout=WAIT)
    return job


def violations(page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {n['html'][:200]}" for v in found for n in v["nodes"] if "la-" in n["html"] or "lt-" in n["html"]]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "phone"])
def test_a_chosen_file_is_explained(width, dark, open_page, lora):
    page = open_page("/tools", width=width, dark=dark)
    page.locator("#la-main input[type=file]").set_input_files(lora)
    job = inspected(page)
    expect(page.locator("[data-chosen]")).to_contain_text("my cat.safetensors")
    verdict = job.locator(".lt-verdict")
    expect(verdict).to_contain_text("LoRA for Stable Diffusion 1.x")
    assert verdict.get_attribute("data-level") in ("warn", "bad")
    expect(job.locator(".lt-facts")).to_contain_text("image model")
    reader = job.locator('details[data-tool="ComfyUI"]')
    expect(reader).to_contain_text("leaves 3 keys unread")
    expect(reader.locator("li").first).to_be_hidden()
    reader.locator("summary").click()
    expect(reader.locator("li").first).to_contain_text("lora_unet_no_such_layer")
    expect(job).to_contain_text("zorp <b>bold</b>")
    expect(job).to_contain_text("dreamshaper_8")
    expect(job.locator(".lt-tags li").first).to_have_text(re.compile("a cat *5"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details").all():
        details.evaluate("d => { d.open = true; }")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.reload()  # the address knows it
    expect(inspected(page).locator(".lt-verdict")).to_contain_text("Stable Diffusion 1.x")
    expect(page.locator("[data-chosen]")).to_contain_text("my cat.safetensors")


def test_a_dropped_file_is_converted_and_downloaded(open_page, lora, tmp_path):
    page = open_page("/tools")
    content = base64.b64encode((tmp_path / "plain.safetensors").read_bytes()).decode()
    page.evaluate(
        """(text) => { const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], 'plain.safetensors'));
            for (const kind of ['dragenter', 'dragover', 'drop']) document.querySelector('.lt-drop').dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: data })); }""",
        content,
    )
    expect(page.locator("[data-chosen]")).to_contain_text("plain.safetensors")
    page.get_by_role("radio", name="diffusers").check(force=True)
    expect(page.get_by_text("Beside the file")).to_have_count(0)  # there is no place beside it
    page.get_by_role("button", name="Convert", exact=True).click()
    job = page.locator('[data-job="convert"]')
    expect(job).to_have_attribute("data-state", "finished", timeout=WAIT)
    expect(job).to_contain_text("plain_diffusers.safetensors is ready to download.")
    with page.expect_download() as download:
        job.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "plain_diffusers.safetensors"
    download.value.save_as(tmp_path / "got.safetensors")
    keys = load_file(tmp_path / "got.safetensors")
    assert len(keys) == 4 and all(key.startswith("unet.") and "lora_" in key for key in keys)


def test_the_keyboard_alone_names_a_path_and_saves_beside_it(open_page, lora):
    page = open_page("/tools")
    path = page.get_by_label("Or its path on this computer")
    path.focus()
    page.keyboard.type(f'"{lora.with_name("plain.safetensors")}"')
    page.keyboard.press("Enter")
    inspected(page)
    expect(page.locator("#other-file")).to_be_focused()
    page.get_by_role("radio", name="Most programs").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="ComfyUI alone")).to_be_checked()
    expect(page.get_by_role("radio", name="Beside the file")).to_be_checked()
    page.get_by_role("button", name="Convert", exact=True).press("Enter")
    job = page.locator('[data-job="convert"]')
    expect(job).to_have_attribute("data-state", "finished", timeout=WAIT)
    expect(job).to_contain_text(f"Saved as {lora.parent}")
    assert lora.with_name("plain_comfy.safetensors").is_file()


def test_what_goes_wrong_is_a_sentence_in_the_card(open_page, lora, tmp_path):
    page = open_page("/tools")
    page.get_by_role("button", name="Convert", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="Choose a file first")).to_be_visible()
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"x")
    page.locator("#la-main input[type=file]").set_input_files(picture)
    expect(page.get_by_role("alert").filter(has_text="cat.png is not a .safetensors file")).to_be_visible()
    page.get_by_label("Or its path on this computer").fill("/nowhere/cat.safetensors")
    page.get_by_role("button", name="Use the file at this path").click()
    job = page.locator('[data-job="inspect"]')
    expect(job).to_have_attribute("data-state", "failed")
    expect(job).to_contain_text("There is no file /nowhere/cat.safetensors")
    page.locator("#other-file").click()
    expect(job).to_be_hidden()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lora.read_bytes()[:-9])
    page.locator("#la-main input[type=file]").set_input_files(cut)
    expect(inspected(page).locator(".lt-verdict")).to_contain_text("cut off")


@pytest.mark.slow
def test_a_runs_file_is_offered(open_page, app, lora):
    folder = app.data / "runs/20261123-120000-cat"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"output": {"name": "cat"}}))
    (folder / "cat.safetensors").write_bytes(lora.read_bytes())
    page = open_page("/tools")
    chosen = page.get_by_label("Or one of your own")
    expect(chosen).to_be_visible()
    expect(chosen.locator("option")).to_have_count(1)
    page.get_by_role("button", name="Use the chosen LoRA of a run").click()
    expect(page.locator("[data-chosen]")).to_contain_text("of the run cat")
    inspected(page)
    page = open_page("/tools?run=20261123-120000-cat&file=cat.safetensors")
    expect(inspected(page)).to_contain_text("dreamshaper_8")
