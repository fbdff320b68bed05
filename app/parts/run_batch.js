// What a step of a run is trained on: its batch decoded from its latents, when the device is free.
import { button, field, fill, get, h, post, Refused } from "/static/core.js";

const BUSY = ["waiting", "starting", "running"];

export function batchOf(path) {
  let timer, turn = 0, asked = false;
  const number = field("Step", h("input", { type: "text", inputMode: "numeric", id: "batch-step", value: "1", class: "la-num", autocomplete: "off" }));
  const show = button("Show", () => ask(), { id: "batch-show" });
  number.control.addEventListener("keydown", (e) => { if (e.key === "Enter") { e.preventDefault(); ask(); } });
  const says = h("p", { class: "la-help", role: "status" }), picture = h("div", { class: "la-run-batch" }), rows = h("ul", { class: "la-list la-small" });
  const node = h("details", { id: "batch", on: { toggle() { if (node.open) read(); } } }, h("summary", {}, "What a step is trained on"),
    h("div", { class: "la-stack" }, h("p", { class: "la-help" }, "The images as they are in memory, decoded again: cropped and mirrored, what a mask leaves out dimmed."),
      h("div", { class: "la-row la-run-batch-step" }, number.node, show), says, picture, rows));

  async function ask() {
    const text = number.control.value.trim();
    if (!/^[1-9]\d{0,8}$/.test(text)) return number.error("Type the number of a step, from 1.");
    await take(() => post(path + "/batch", { step: Number(text) }));
  }
  const read = () => take(() => get(path + "/batch"));
  async function take(call) {
    clearTimeout(timer);
    const mine = ++turn;
    let now;
    try {
      now = await call();
      if (mine !== turn) return;
      number.error("");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (mine === turn) number.error(error.message);
      return;
    }
    const busy = BUSY.includes(now.state);
    asked ||= busy;
    show.disabled = busy;
    says.textContent = { none: "", waiting: "Waiting until the device is free …", starting: "Starting …", running: "Decoding …", finished: `Step ${now.step}.` }[now.state] ?? (asked ? now.text || "It ended without a word. Try again." : "");
    fill(picture, now.picture && h("img", { src: now.picture, alt: `The images of step ${now.step}` }));
    fill(rows, now.rows.map((r) => h("li", {}, h("span", { class: "la-muted" }, [r.file, r.mirrored && "mirrored", r.masked && "masked"].filter(Boolean).join(" · ") + ": "), r.caption || "(no caption)")));
    if (busy && node.open) timer = setTimeout(read, 1000);
  }
  return { node, stop: () => clearTimeout(timer) };
}
