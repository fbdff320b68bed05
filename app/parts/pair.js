// Without and with the LoRA in one place: one picture over the other with a divider to draw, or both side by side.
import { button, fill, h, lightbox, unique } from "/static/core.js";

const WORDS = { without: "Without the LoRA", with: "With the LoRA" };

/** Returns {node, show({without, with: URLs, text})}. */
export function pair({ side = false } = {}) {
  let shown = null;
  const place = h("div", { class: "la-pair-place" });
  const modes = [["slider", "Slider"], ["side", "Side by side"]].map(([mode, title]) => button(title, () => choose(mode), { class: "la-btn la-btn-small", data: { mode } }));
  const node = h("div", { class: "la-pair la-stack" }, place, h("div", { class: "la-row la-pair-modes", role: "group", "aria-label": "How to compare" }, modes));
  let mode = side ? "side" : "slider";

  function choose(next) {
    mode = next;
    draw();
  }
  const picture = (key) => h("img", { src: shown[key], alt: `${WORDS[key]}: ${shown.text}` });
  const label = (key, more = "") => h("span", { class: "la-pair-label " + more, "aria-hidden": "true" }, WORDS[key]);

  function slider() {
    const under = picture("without"), over = picture("with");
    over.classList.add("la-pair-over");
    const range = h("input", { type: "range", class: "la-pair-range", min: 0, max: 100, step: 0.5, value: 50, id: unique("pair"), "aria-label": "How much of the picture is shown without the LoRA" });
    const frame = h("div", { class: "la-pair-frame" }, under, over, h("div", { class: "la-pair-line", "aria-hidden": "true" }), label("without", "la-left"), label("with", "la-right"), range);
    const move = () => {
      frame.style.setProperty("--la-cut", range.value + "%");
      frame.dataset.at = range.value < 18 ? "left" : range.value > 82 ? "right" : "";
      range.setAttribute("aria-valuetext", `${Math.round(range.value)} % without, ${Math.round(100 - range.value)} % with the LoRA`);
    };
    range.addEventListener("input", move);
    move();
    return frame;
  }
  function sides() {
    const both = ["without", "with"].map((key) => ({ src: shown[key], text: `${WORDS[key]}: ${shown.text}` }));
    return h("div", { class: "la-pair-sides" }, ["without", "with"].map((key, k) => h("figure", {},
      h("button", { type: "button", class: "la-pair-open", title: "Enlarge", on: { click: () => lightbox(both, k) } }, picture(key)), h("figcaption", { class: "la-small la-muted" }, WORDS[key]))));
  }
  function draw() {
    for (const b of modes) b.setAttribute("aria-pressed", String(b.dataset.mode === mode));
    if (shown) fill(place, mode === "slider" ? slider() : sides());
  }
  return { node, show(next) {
    if (shown && next.without === shown.without && next.with === shown.with) return;
    shown = next;
    draw();
  } };
}
