// What a LoRA file is, in words: the answer of POST /api/tools/inspect.
import { button, copy, h, megabytes, plural } from "/static/core.js";

const FAMILIES = { sd1: "Stable Diffusion 1.x", sd2: "Stable Diffusion 2.x", sdxl: "Stable Diffusion XL", sd3: "Stable Diffusion 3", flux: "Flux" };
const PARTS = { unet: "image model", text_1: "text encoder", text_2: "second text encoder", text_3: "T5" };
const ADAPTERS = { lora: "LoRA", locon: "LoCon (LoRA with convolutions)", dora: "DoRA", loha: "LoHa", lokr: "LoKr", oft: "OFT", boft: "BOFT", glora: "GLoRA", ia3: "IA3", full: "Full differences", norm: "Differences of norms" };
const LABELS = {  // what people ask for first, in this order
  "modelspec.title": "Title", ss_sd_model_name: "Base model", ss_base_model_version: "Base version", "modelspec.architecture": "Architecture", "modelspec.prediction_type": "Prediction",
  ss_resolution: "Resolution", ss_num_train_images: "Images", ss_steps: "Steps", ss_optimizer: "Optimizer", ss_unet_lr: "Learning rate of the image model", ss_text_encoder_lr: "Learning rate of the text encoder",
  "modelspec.author": "Author", "modelspec.license": "License", "modelspec.description": "Description", "modelspec.date": "Made",
};
const TRIGGER = "modelspec.trigger_phrase", TAGS = "ss_tag_frequency";
const MOST_KEYS = 200, MOST_TAGS = 60;
const number = (n) => (typeof n === "number" ? n.toLocaleString("en-US") : String(n));

/** A rank or alpha: one, or a list where layers differ. */
const words = (value) => (value === null ? "" : Array.isArray(value) ? (value.length > 6 ? `${value.length} values from ${number(value[0])} to ${number(value.at(-1))}` : value.map(number).join(", ")) : number(value));

/** The nodes of a finished inspection, verdict first. */
export function report(done) {
  const found = done.report;
  return [
    h("p", { class: `la-note lt-verdict la-note-${done.verdict.level}`, data: { level: done.verdict.level } }, done.verdict.text),
    found.adapter && problems(found),
    found.adapter && facts(found, done.bytes),
    readers(found), found.adapter && blocks(found), told(found),
    h("div", { class: "la-row" }, button("Copy all of it as JSON", () => copy(JSON.stringify(found, null, 1), "The report is copied.")),
      h("span", { class: "la-small la-muted" }, "The same as ", h("code", {}, "python -m trainer inspect FILE --json"))),
  ].filter(Boolean);
}

function problems(found) {
  return found.problems.length ? h("ul", { class: "lt-sentences", "aria-label": "Problems" }, found.problems.map((text) => h("li", {}, text))) : null;
}

/** [[part, {block: {layers, norm}}]], the image model first. */
const parts = (found) => Object.entries(found.layers).sort(([a], [b]) => (b === "unet") - (a === "unet") || (a < b ? -1 : 1));
const count = (part) => Object.values(part).reduce((sum, block) => sum + block.layers, 0);

function facts(found, bytes) {
  const layers = parts(found).map(([part, there]) => `${PARTS[part] ?? part} ${number(count(there))}`);
  const rows = [
    ["Made for", FAMILIES[found.family] ?? found.family ?? "not known"], ["Kind", ADAPTERS[found.adapter] ?? found.adapter], ["Rank", words(found.rank)], ["Alpha", words(found.alpha)],
    ["Layers", layers.join(", ")], ["Parameters", number(found.parameters)], ["Size", megabytes(bytes)],
    ["Effect", { true: "yes", false: "none at all" }[found.effect] ?? "only its base could tell"],
  ].filter(([, value]) => value);
  return h("dl", { class: "lt-facts" }, rows.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", { class: "la-num" }, String(value)))));
}

/** How much it changes, block by block. */
function blocks(found) {
  const rows = parts(found).flatMap(([part, there]) => Object.entries(there).map(([block, { layers, norm }]) => [part, block, layers, norm]));
  const most = Math.max(...rows.map((row) => row[3] ?? 0));
  if (!rows.length || !most) return null;
  return h("details", { data: { details: "blocks" } }, h("summary", {}, "How much it changes, block by block"),
    h("p", { class: "la-small la-muted" }, "The norm of the change of each block's weights. Blocks differ by nature: this compares two files rather than two blocks."),
    h("div", { class: "la-scroll lt-blocks", tabindex: 0, role: "region", "aria-label": "Blocks" }, h("table", { class: "la-table" },
      h("thead", {}, h("tr", {}, ["Part", "Block", "Layers", "Change"].map((t) => h("th", { scope: "col" }, t)))),
      h("tbody", {}, rows.map(([part, block, layers, norm]) => h("tr", {}, h("td", {}, PARTS[part] ?? part), h("td", { class: "la-mono" }, block), h("td", { class: "la-num" }, number(layers)),
        h("td", { class: "la-num" }, norm === null ? "only the base could tell" : [h("span", { class: "lt-norm-bar", "aria-hidden": "true", style: `--lt-share: ${(norm / most).toFixed(3)}` }), " ", norm.toPrecision(3)])))))));
}

function readers(found) {
  const tools = Object.entries(found.unread);
  if (!tools.length) return null;
  const whole = tools.filter(([, keys]) => !keys.length).map(([tool]) => tool), partly = tools.filter(([, keys]) => keys.length);
  return h("div", { class: "la-stack lt-readers" }, h("h3", { class: "la-h3" }, "Who reads it"),
    whole.length ? h("p", { data: { readers: "whole" } }, h("span", { class: "la-badge la-badge-good" }, "All of it"), " ", whole.join(", ")) : null,
    partly.map(([tool, keys]) => h("details", { data: { tool } }, h("summary", {}, h("span", { class: "la-badge la-badge-warn" }, "Not all of it"), ` ${tool} leaves ${plural(keys.length, "key")} unread`),
      h("div", { class: "lt-keys la-mono", tabindex: 0, role: "region", "aria-label": `Keys that ${tool} leaves unread` }, h("ul", {}, keys.slice(0, MOST_KEYS).map((key) => h("li", {}, key)),
        keys.length > MOST_KEYS && h("li", {}, `and ${number(keys.length - MOST_KEYS)} more, which the JSON has`))))));
}

/** What the file says of itself. */
function told(found) {
  const { metadata } = found;
  const trigger = metadata[TRIGGER] ?? "";
  const rows = Object.entries(LABELS).filter(([key]) => metadata[key]).map(([key, label]) => [label, metadata[key]]);
  const tags = frequencies(metadata);
  const rest = Object.entries(metadata).filter(([key]) => !(key in LABELS) && key !== TRIGGER && (key !== TAGS || !tags.length)).sort();
  if (!found.adapter && !Object.keys(metadata).length) return null;
  if (!rows.length && !trigger && !tags.length && !rest.length) return h("p", { class: "la-muted", data: { metadata: "none" } }, "The file says nothing of itself: it has no metadata.");
  return h("div", { class: "la-stack lt-told" }, h("h3", { class: "la-h3" }, "What the file says of itself"),
    trigger && h("div", { class: "la-row lt-trigger" }, h("span", { class: "la-label" }, "Trigger words"), h("code", { class: "lt-break" }, trigger), button("Copy", () => copy(trigger, "The trigger words are copied."), { class: "la-btn la-btn-small", "aria-label": "Copy the trigger words" })),
    rows.length ? table(rows) : null,
    tags.length ? h("details", { data: { details: "tags" }, open: tags.length <= 20 }, h("summary", {}, `What it was trained on: ${plural(tags.length, "tag")}`),
      h("ul", { class: "lt-tags" }, tags.slice(0, MOST_TAGS).map(([tag, count]) => h("li", {}, h("span", { class: "lt-break" }, tag), " ", h("span", { class: "la-muted la-num" }, number(count)))), tags.length > MOST_TAGS && h("li", {}, `and ${number(tags.length - MOST_TAGS)} more`))) : null,
    rest.length ? h("details", { data: { details: "rest" } }, h("summary", {}, `All other entries: ${rest.length}`), h("div", { class: "la-scroll lt-rest", tabindex: 0, role: "region", "aria-label": "All other entries" }, table(rest.map(([key, value]) => [key, cut(value)]), true))) : null);
}
const cut = (text) => (text.length > 2000 ? text.slice(0, 2000) + " …" : text);
const table = (rows, mono = false) => h("table", { class: "la-table lt-table" }, h("tbody", {}, rows.map(([label, value]) => h("tr", {}, h("th", { scope: "row", class: mono ? "la-mono" : "" }, label), h("td", { class: mono ? "la-mono" : "" }, value)))));

/** [[tag, how often]], most frequent first, over all folders of the training: {"10_cat": {"a cat": 3}} as text. */
function frequencies(metadata) {
  let folders;
  try {
    folders = JSON.parse(metadata[TAGS] ?? "{}");
  } catch {  // some tools write what is no JSON
    return [];
  }
  const counts = new Map();
  for (const tags of Object.values(folders ?? {})) if (tags && typeof tags === "object") for (const [tag, n] of Object.entries(tags)) counts.set(tag, (counts.get(tag) ?? 0) + (Number(n) || 0));
  return [...counts].sort((a, b) => b[1] - a[1]);
}
