"""Every page in a real browser: accessible, usable on a phone, reachable by keyboard, in as many tabs as one likes."""

import re

import pytest
from playwright.sync_api import expect

PAGES = ("/", "/runs", "/results", "/tools", "/settings")
# Gradio's own, measured on its bare components; none of them may come from our parts.
GRADIO = {"aria-prohibited-attr", "label-content-name-mismatch", "target-size", "nested-interactive", "image-redundant-alt"}


@pytest.fixture(scope="module")
def finished(app) -> str:
    """A short finished run of the built-in example, compared: so that no page is empty."""
    app.post("/draft/example")
    app.post("/draft", {"changes": {"train.visits": 4, "preview.steps": 2, "validation.draws": 1}}, method="PATCH")
    run = app.post("/runs", {"draft": True})["id"]
    app.wait(run, "finished")
    return run


def violations(page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    lines = []
    for v in found:
        own = [n for n in v["nodes"] if v["id"] not in GRADIO or "la-" in n["html"] or "nl-" in n["html"]]
        lines += [f"{v['id']} ({v['impact']}): {n['html'][:160]} {n['failureSummary'][:200]}" for n in own]
    return lines


@pytest.mark.parametrize("dark", [pytest.param(False, id="light"), pytest.param(True, id="dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", PAGES)
def test_no_accessibility_violation(path, dark, open_page, finished):
    page = open_page(path, dark=dark)
    page.wait_for_timeout(1000)
    for details in page.locator("details").all():  # what is folded away counts too
        details.evaluate("d => { d.open = true; }")
    page.wait_for_timeout(700)
    assert page.evaluate("document.body.classList.contains('dark')") is dark
    assert violations(page) == []


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_wider_than_a_phone(path, open_page, finished):
    page = open_page(path, width=390)
    page.wait_for_timeout(1200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("path", PAGES)
def test_the_keyboard_reaches_every_control(path, open_page, finished):
    """Tab visits each button, link and field that can be seen, and where it is shows."""
    page = open_page(path)
    page.wait_for_timeout(1000)
    wanted = page.evaluate(
        """() => [...document.querySelectorAll('.la button, .la a[href], .la input, .la select, .la textarea, .la summary')]
            .filter(e => e.checkVisibility({ visibilityProperty: true, opacityProperty: false }) && !e.disabled && e.tabIndex >= 0 && e.type !== 'radio').map((e, k) => (e.dataset.k = k)).length"""
    )
    assert wanted > 5
    seen, hidden = set(), []
    for _ in range(wanted * 2 + 60):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => { const e = document.activeElement, c = getComputedStyle(e), l = e.closest('label');
                const o = l && e.type === 'radio' ? getComputedStyle(l) : c;
                return [e.dataset.k ?? null, o.outlineStyle !== 'none' || c.boxShadow !== 'none' || e === document.body || e.classList.contains('la-offscreen'), e.outerHTML.slice(0, 120)]; }"""
        )
        if at[0] is not None:
            seen.add(at[0])
        if not at[1]:
            hidden.append(at[2])
        if len(seen) == wanted:
            break
    missed = page.evaluate(
        "(seen) => [...document.querySelectorAll('[data-k]')].filter(e => !seen.includes(e.dataset.k)).map(e => e.outerHTML.slice(0, 120))",
        sorted(seen),
    )
    assert missed == []
    assert hidden == []


def test_the_theme_is_kept(open_page, app):
    page = open_page("/settings")
    page.locator("label.la-choice", has_text="Dark").click()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    page.reload()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    assert app.get("/settings")["theme"] == "dark"
    page.locator("label.la-choice", has_text="Like the computer").click()
    expect(page.locator("body")).not_to_have_class(re.compile(r"\bdark\b"))


def test_a_settings_field_is_saved_when_it_is_left(open_page, app, tmp_path):
    page = open_page("/settings")
    field = page.get_by_label("My LoRA folder", exact=True)
    field.fill(str(tmp_path))
    field.press("Tab")
    expect(page.locator(".la-toast")).to_contain_text("Saved")
    assert app.get("/settings")["lora_folder"] == str(tmp_path)
    page.reload()
    expect(page.get_by_label("My LoRA folder", exact=True)).to_have_value(str(tmp_path))


@pytest.mark.slow
def test_twelve_tabs_work_at_once(open_page, app, finished):
    """All in one browser context: more than the six connections that HTTP/1.1 allows to one place."""
    first = open_page(f"/runs?run={finished}")
    context = first.context
    pages = [first]
    for path in ("/", "/runs", "/results", "/settings") * 3:
        if len(pages) == 12:
            break
        page = context.new_page()
        page.goto(app.url + path)
        pages.append(page)
    for page in pages:
        page.locator("#la-main :is(h1, h2)").filter(visible=True).first.wait_for()
    pages[-1].bring_to_front()
    last = next(p for p in reversed(pages) if p.url == f"{app.url}/")
    last.bring_to_front()
    last.locator("#name").fill("From the twelfth tab")
    last.locator("#name").press("Tab")
    expect(last.locator("#draft-saved")).to_have_attribute("data-state", "saved")
    assert app.get("/draft")["draft"]["name"] == "From the twelfth tab"
