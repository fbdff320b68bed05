"""The Blocks: one page for each address, the theme, and what every page loads.

Gradio brings the shell: pages, theme, dark mode. What stands on a page is a part (app/parts): one gr.HTML whose script talks to the
REST routes. Gradio's own inputs were tried on paper and left out: an event in flight when the server goes away reloads the page and
loses what was typed, and they have no place for an error beside a field.
"""

from __future__ import annotations

import gradio as gr

from app.pages import new_lora, results, runs, settings, tools

TITLE = "LoRA Atelier"
PAGES = (  # (name, address, builder); the first one is the main page
    ("New LoRA", "/", new_lora.build),
    ("Runs", "/runs", runs.build),
    ("Results", "/results", results.build),
    ("Tools", "/tools", tools.build),
    ("Settings", "/settings", settings.build),
)

# Gradio's default theme fails WCAG's contrast in eight places; these values pass in both modes.
THEME = gr.themes.Default(primary_hue="indigo", neutral_hue="slate").set(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_text_color="white",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_text_color="white",
    block_label_text_color="*neutral_700",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/static/core.css">
<script src="/static/theme.js"></script>
<link rel="modulepreload" href="/static/core.js">
"""


def build() -> gr.Blocks:
    """All pages. Needs no server and no data folder: the parts ask the REST routes."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as demo:
        PAGES[0][2]()
    for name, path, page in PAGES[1:]:
        with demo.route(name, path, show_in_navbar=False):
            page()
    return demo
