// The draft as a configuration file: edit, copy, download, and take over files of ours and of other trainers.
import { button, copy, field, fill, get, h, plural, post, api, Refused, attempt } from "/static/core.js";

export function fileTab(page) {
  const { draft } = page;
  let server = "", open = false, turn = 0;
  const area = field("Configuration", h("textarea", { id: "toml", rows: 18, class: "la-mono", spellcheck: false, autocomplete: "off", wrap: "off", on: { input: dirty } }), { help: "The same settings as text. Nothing changes until you press Apply." });
  const errors = h("ul", { class: "la-list la-error", role: "alert", hidden: true });
  const apply = button("Apply", () => take(), { id: "toml-apply" }), revert = button("Discard what I typed", () => { area.control.value = server; dirty(); }, { kind: "quiet" });
  const newer = h("p", { class: "la-small la-muted", role: "status", hidden: true }, "The draft has changed since you began to type here; Apply takes what stands here.");

  const clean = () => area.control.value === server;
  function dirty() {
    revert.hidden = apply.disabled = clean();
    revert.hidden = clean();
    if (clean()) { newer.hidden = true; say({}); }
  }
  function say(list) {
    errors.hidden = !Object.keys(list).length;
    fill(errors, Object.entries(list).map(([key, text]) => h("li", {}, h("code", {}, key), " ", text)));
  }
  async function read() {
    const mine = ++turn;
    const answer = await attempt(() => get("/draft/toml"));
    if (!answer || mine !== turn) return;
    if (clean() || !server) area.control.value = answer.text;
    else newer.hidden = answer.text === server;
    server = answer.text;
    dirty();
  }
  async function take() {
    try {
      await draft.change(() => api("PUT", "/draft/toml", { text: area.control.value }));
      area.error("");
      say({});
      server = area.control.value;
      read();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const named = Object.keys(error.errors).length > 0;
      area.error(named ? "Not applied; nothing was changed:" : error.message);
      say(error.errors);
    }
  }
  function save() {
    const url = URL.createObjectURL(new Blob([area.control.value], { type: "application/toml" }));
    const link = h("a", { href: url, download: draft.view.slug + ".toml" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 5000);
  }

  // Files of other programs

  const chooser = h("input", { type: "file", accept: ".toml,.json", class: "la-offscreen", tabIndex: -1, "aria-label": "Choose a configuration file", id: "import-file", on: { change: async () => { const [file] = chooser.files; if (file) await importFile(file); chooser.value = ""; } } });
  const result = h("div", { class: "nl-imported", id: "imported", role: "status", tabIndex: -1, hidden: true });
  const refused = h("p", { class: "la-error", role: "alert", hidden: true });
  async function importFile(file) {
    refused.hidden = true;
    const text = await file.text();
    const view = await attempt(() => draft.change(() => post("/draft/import", { name: file.name, text })), refused);
    if (!view) return;
    const { from, carried, left_out: left } = view.imported;
    const rows = Object.entries(carried);
    result.hidden = false;
    fill(result, h("div", { class: "la-row la-between" }, h("h3", { class: "la-h3" }, `${file.name}: taken over from ${from}`), h("button", { type: "button", class: "la-x", "aria-label": "Hide this list", on: { click: () => { result.hidden = true; } } }, "×")),
      h("p", { class: "la-small" }, `${plural(rows.length, "setting")} carried over, ${left.length ? left.length + " not" : "nothing left out"}.`),
      left.length > 0 && h("details", { open: true }, h("summary", {}, `Not carried over (${left.length})`), table(["There", "Value", "Why not"], left.map((l) => [l.key, String(l.value), l.why]), "left-out")),
      rows.length > 0 && h("details", {}, h("summary", {}, `Carried over (${rows.length})`), table(["Here", "From"], rows, "carried")));
    result.focus();
    if (open) read();
  }
  const table = (heads, rows, name) => h("div", { class: "la-scroll" }, h("table", { class: "la-table", data: { list: name } }, h("thead", {}, h("tr", {}, heads.map((t) => h("th", { scope: "col" }, t)))), h("tbody", {}, rows.map((r) => h("tr", {}, r.map((t, n) => h("td", {}, n === r.length - 1 ? t : h("code", {}, t))))))));

  draft.on("view", () => { if (open) read(); });
  dirty();
  return {
    show() { open = true; read(); },
    take: importFile,
    node: h("div", { class: "la-stack" },
      h("div", { class: "la-row" }, button("Import a file", () => chooser.click(), { id: "import" }), h("span", { class: "la-help" }, "A configuration of LoRA Atelier, kohya_ss (.json, .toml) or OneTrainer (.json).")), chooser, refused, result,
      area.node, errors, newer, h("div", { class: "la-row" }, apply, revert, button("Copy", () => copy(area.control.value, "Configuration copied."), { kind: "quiet" }), button("Download", save, { kind: "quiet", id: "toml-download" }))),
  };
}
