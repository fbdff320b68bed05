"""Live parts of the pages: each a gr.HTML whose script (`/static/NAME.js`, beside this file) builds and polls it.

A script exports `mount(element)`. It builds its content with core.js's `h()`, which never takes text for HTML.
"""

from __future__ import annotations

import gradio as gr


def part(name: str) -> gr.HTML:
    """The part whose script is app/parts/NAME.js and whose style, if any, is NAME.css."""
    return gr.HTML(
        f'<div class="la" data-part="{name}"><p class="la-loading" role="status">Loading …</p></div>',
        js_on_load=f"import('/static/{name}.js').then((m) => m.mount(element.querySelector('[data-part={name}]')));",
        elem_id=f"part-{name}",
        apply_default_css=False,
    )
