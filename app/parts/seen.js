// What a step of the training will really see: its batch as it is cropped and mirrored, with the captions drawn for it.
import { button, debounce, field, fill, get, h, Refused } from "/static/core.js";

export function seenPanel(page) {
  const { draft } = page;
  let total = 0;
  const number = field("Step", h("input", { type: "text", inputMode: "numeric", id: "seen-step", value: "1", class: "la-num", autocomplete: "off" }));
  const rows = h("ul", { class: "nl-seen-rows", "aria-label": "Images of this step" }), says = h("p", { class: "la-help", role: "status" });
  const step = (by) => { number.control.value = Math.min(Math.max(1, Number(number.control.value || 1) + by), total || 1); read(); };
  const node = h("details", { class: "nl-seen", id: "seen", on: { toggle() { if (node.open) read(); } } }, h("summary", {}, "What a step will really see"),
    h("div", { class: "nl-seen-body" }, h("p", { class: "la-help" }, "The captions as they are drawn for that step: one of several, shuffled, with tags left out, as the settings have it."),
      h("div", { class: "la-row" }, number.node, button("‹ Before", () => step(-1), { kind: "quiet" }), button("Next ›", () => step(1), { kind: "quiet", id: "seen-next" })), says, rows));
  const soon = debounce(() => read(), 300);
  number.control.addEventListener("input", () => soon());
  draft.on("plan", () => { if (node.open) soon(); });

  let turn = 0;
  async function read() {
    const mine = ++turn, text = number.control.value.trim();
    if (!/^\d{1,9}$/.test(text)) return number.error("Type the number of a step, from 1.");
    try {
      const seen = await get("/draft/seen?step=" + text);
      if (mine !== turn) return;
      number.error("");
      total = seen.total;
      says.textContent = `Step ${seen.step} of ${total}.`;
      fill(rows, seen.rows.map(row));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (mine !== turn) return;
      fill(rows);
      says.textContent = "";
      number.error(error.message);
    }
  }
  function row(r) {
    const [left, top, width, height] = r.crop;
    const place = { left: -100 * left / width + "%", top: -100 * top / height + "%", width: 100 / width + "%", height: 100 / height + "%" };
    const laid = (src, name, alt) => { const img = h("img", { src, alt, class: name }); Object.assign(img.style, place); return img; };
    const frame = h("div", { class: "nl-seen-frame", data: { mirrored: r.mirrored } }, r.full && laid(r.full, "", r.file), r.mask && laid(r.mask, "nl-seen-mask", ""));
    frame.style.aspectRatio = `${r.bucket[0]} / ${r.bucket[1]}`;
    const facts = [r.file, `${r.bucket[0]} × ${r.bucket[1]}`, r.mirrored && "mirrored", r.masked && "masked", r.weight !== 1 && `weight ${r.weight}`].filter(Boolean).join(" · ");
    return h("li", { class: "nl-seen-row" }, frame, h("span", { class: "la-muted" }, facts), h("span", {}, r.caption || "(no caption)"), r.prior && h("span", { class: "la-help" }, "As a class: " + r.prior));
  }
  return node;
}
