// Trying a LoRA out: one picture without it and one with it. The process that draws keeps the model loaded while it is used.
import { attempt, button, field, fill, get, h, poll, post, Refused } from "/static/core.js";
import { pair } from "/static/pair.js";

const STATES = { idle: "Nothing is loaded; the first picture takes longer.", starting: "Starting …", loading: "Loading the model …", ready: "The model is loaded", working: "Drawing …", yielded: "The memory was given back." };
const BUSY = ["starting", "loading", "working"];
const HELD = [...BUSY, "ready"];
const random = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Returns {node, show(run id, results), busy(the training that runs, or null), stop()}. */
export function playground() {
  let run = null, request = "", asked = false, freeing = false, errorAt = "", filled = null, known = "";
  const number = (value, more) => h("input", { type: "number", value, ...more });
  const prompt = h("textarea", { rows: 3 }), negative = h("textarea", { rows: 2 }), file = h("select", {});
  const seed = number(1, { min: 0, max: 4294967295, step: 1 }), steps = number(20, { min: 1, max: 200, step: 1 }), guidance = number(7, { min: 1, max: 30, step: 0.5 });
  const width = number("", { min: 64, max: 2048, step: 8, placeholder: "the model's" }), height = number("", { min: 64, max: 2048, step: 8, placeholder: "the model's" });
  const strength = h("input", { type: "range", min: 0, max: 1.5, step: 0.05, value: 0.8 }), strengthSays = h("span", { class: "la-num la-play-strength", "aria-hidden": "true" });
  const showStrength = () => { strengthSays.textContent = (+strength.value).toFixed(2); strength.setAttribute("aria-valuetext", strengthSays.textContent); };
  strength.addEventListener("input", showStrength);
  showStrength();
  const dice = button("Random", () => { seed.value = random(); }, { class: "la-btn la-btn-small", "aria-label": "Random seed" });
  const fields = {
    prompt: field("Prompt", prompt), negative: field("Negative prompt", negative), file: field("LoRA file", file), seed: field("Seed", seed), strength: field("Strength", strength),
    steps: field("Steps", steps), guidance: field("Guidance (CFG)", guidance), width: field("Width", width), height: field("Height", height),
  };
  const seedRow = h("div", { class: "la-row la-seed" });
  seed.replaceWith(seedRow);
  seedRow.append(seed, dice);
  fields.strength.node.querySelector("label").append(" ", strengthSays);

  const go = button("Generate", generate, { kind: "primary", title: "Ctrl+Enter" });
  const free = button("Free the memory now", async () => { if (await attempt(() => post("/playground/close"))) { freeing = true; poller.now(); } }, { kind: "quiet", hidden: true });
  const state = h("p", { class: "la-small la-muted la-num", role: "status", "aria-live": "polite" }), wrong = h("p", { class: "la-error", role: "alert", hidden: true });
  const taken = h("p", { class: "la-note", hidden: true });
  const result = pair({ side: true }), blank = h("div", { class: "la-play-blank" }, h("p", {}, "The picture without and with the LoRA appears here."));
  result.node.hidden = true;
  const shown = h("div", { class: "la-play-result", "aria-busy": "false" }, blank, result.node);
  const form = h("form", { class: "la-stack", on: { submit(e) { e.preventDefault(); generate(); }, keydown(e) { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); generate(); } } } },
    fields.prompt.node, fields.negative.node,
    h("div", { class: "la-play-fields" }, fields.file.node, fields.strength.node, fields.seed.node, fields.steps.node, fields.guidance.node, fields.width.node, fields.height.node),
    wrong, h("div", { class: "la-row" }, go, h("span", { class: "la-small la-muted" }, "Ctrl+Enter"), free), state);
  const node = h("section", { class: "la-section", id: "playground", "aria-label": "Playground" },
    h("h2", { class: "la-h2" }, "Playground"), h("p", { class: "la-lead" }, "Type any prompt and see the same picture without and with the LoRA."), taken,
    h("div", { class: "la-play" }, form, shown));

  function read() {
    const whole = (control) => (control.value === "" ? null : Number(control.value));
    return { run, file: file.value, prompt: prompt.value, negative: negative.value, seed: whole(seed), steps: whole(steps), guidance: whole(guidance), width: whole(width), height: whole(height), strength: +strength.value };
  }
  async function generate() {
    if (go.disabled) return;
    go.disabled = true;
    for (const f of Object.values(fields)) f.error("");
    wrong.hidden = true;
    try {
      request = (await post("/playground", read())).request;
      asked = true;
      errorAt = "";
      working(true, "Asked …");
      poller.now();
    } catch (error) {
      go.disabled = false;
      if (!(error instanceof Refused)) throw error;
      let placed = false;
      for (const [key, text] of Object.entries(error.errors)) if (fields[key]) { fields[key].error(text); placed = true; }
      wrong.textContent = error.message;
      wrong.hidden = placed;
    }
  }
  function working(on, text) {
    go.disabled = on;
    shown.setAttribute("aria-busy", String(on));
    if (text && state.textContent !== text) state.textContent = text;
  }
  function show(now) {
    const waits = asked && !now.pictures && !now.error;
    node.dataset.state = now.state;
    freeing &&= HELD.includes(now.state);
    free.hidden = !HELD.includes(now.state) || freeing;
    const text = freeing ? "The memory is given back …" : now.state === "ready" && now.text ? `The playground ${now.text}.` : now.text || STATES[now.state] || "";
    working(waits, waits && !BUSY.includes(now.state) ? "Asked …" : text);
    if (now.pictures) {
      blank.hidden = true;
      result.node.hidden = false;
      result.show({ without: now.pictures.without || now.pictures.with, with: now.pictures.with, text: prompt.value });
    }
    if (now.error && now.error !== errorAt) { wrong.textContent = errorAt = now.error; wrong.hidden = false; }
    if (!waits) asked = false;
    return waits || freeing ? 0.7 : BUSY.includes(now.state) ? 2 : HELD.includes(now.state) ? 5 : 30;
  }
  const poller = poll(async () => show(await get("/playground" + (request ? "?request=" + request : ""))));

  return {
    node,
    show(id, results) {
      const list = results.files.map((f) => f.file).join("\n");
      if (id !== filled) {  // another run: its own words, and the file that is recommended
        const word = results.trigger_line.replace(/^<[^>]*>\s*/, "");
        const own = results.preview;
        [negative.value, steps.value, guidance.value] = [own.negative ?? "", own.steps ?? 20, own.guidance ?? 7];
        prompt.value = results.pair?.prompt || results.matrix?.prompts?.[0] || word;
        filled = run = id;
        known = "";
      }
      if (list === known) return;
      known = list;
      const before = file.value;
      fill(file, results.files.map((f) => h("option", { value: f.file }, f.file + (f.recommended ? " (recommended)" : ""))));
      file.value = results.files.some((f) => f.file === before) ? before : (results.files.find((f) => f.recommended) || results.files.at(-1))?.file ?? "";
    },
    busy(name) {
      taken.hidden = !name;
      if (name) taken.textContent = `${name} is training, and needs the memory. The playground waits until it has ended.`;
    },
    stop() { poller.stop(); },
  };
}
