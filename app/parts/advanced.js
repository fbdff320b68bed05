// Every setting, made from GET /api/form: searchable, with only what applies, and with what differs from the preset marked.
import { attempt, button, fill, get, h } from "/static/core.js";
import { fileTab } from "/static/toml.js";

const OPEN = "la-advanced";

export function advancedDrawer(page) {
  const { draft } = page;
  const fields = new Map();  // key -> {node, control, spec, update(view), focus()}
  let sections = [], changedOnly = false;

  const search = h("input", { type: "search", id: "setting-search", placeholder: "Search settings", autocomplete: "off", spellcheck: false, "aria-label": "Search settings", on: { input: () => filter() } });
  const only = h("input", { type: "checkbox", id: "only-changed", on: { change: () => { changedOnly = only.checked; filter(); } } });
  const onlyText = h("span", {}, "Only changed");
  const none = h("p", { class: "la-muted", role: "status", hidden: true });
  const body = h("div", { class: "nl-form" });
  const form = h("div", { class: "la-stack" }, h("div", { class: "la-row nl-form-tools" }, search, h("label", { class: "la-row nl-only" }, only, onlyText)), none, body);
  const file = fileTab(page);

  // Two tabs over the same data
  const panels = [["settings", "Settings", form], ["file", "Configuration file", file.node]].map(([id, title, node]) => {
    const panel = h("div", { role: "tabpanel", id: "advanced-" + id, "aria-labelledby": "tab-" + id, hidden: id !== "settings" }, node);
    const tab = h("button", { type: "button", role: "tab", class: "nl-tab", id: "tab-" + id, "aria-controls": panel.id, on: { click: () => choose(id), keydown: arrows } }, title);
    return { id, tab, panel };
  });
  const tabs = h("div", { class: "la-tabs", role: "tablist", "aria-label": "Advanced" }, panels.map((p) => p.tab));
  function choose(id, focus = false) {
    for (const p of panels) {
      const on = p.id === id;
      p.panel.hidden = !on;
      p.tab.setAttribute("aria-selected", String(on));
      p.tab.tabIndex = on ? 0 : -1;
      if (on && focus) p.tab.focus();
    }
    if (id === "file") file.show();
  }
  function arrows(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const at = panels.findIndex((p) => p.tab === event.target);
    choose(panels[(at + 1) % panels.length].id, true);
  }
  choose("settings");

  const count = h("span", { class: "la-badge la-badge-accent", hidden: true });
  const drawer = h("details", { class: "nl-advanced", id: "advanced", open: localStorage.getItem(OPEN) === "1", on: { toggle: () => localStorage.setItem(OPEN, drawer.open ? "1" : "0") } },
    h("summary", {}, "Advanced ", count), h("div", { class: "la-stack nl-advanced-body" }, tabs, panels.map((p) => p.panel)));

  page.places.setting = (key) => {
    const f = fields.get(key);
    drawer.open = true;
    choose("settings");
    if (!f) return void drawer.scrollIntoView();
    search.value = "";
    only.checked = changedOnly = false;
    filter();
    f.node.hidden = f.node.closest(".nl-group").hidden = false;
    f.node.scrollIntoView({ block: "center" });
    f.focus();
  };
  page.importFile = (chosen) => { drawer.open = true; choose("file"); drawer.scrollIntoView(); return file.take(chosen); };

  async function build() {
    const answer = await attempt(() => get("/form"));
    if (!answer) return void setTimeout(build, 3000);
    sections = answer.sections.map((s) => {
      const made = s.fields.map((spec) => { const f = setting(draft, spec); fields.set(spec.key, f); return f; });
      return { ...s, made, node: h("div", { class: "nl-group", data: { group: s.name } }, h("h3", { class: "la-h3" }, s.title), h("div", { class: "la-cols nl-fields" }, made.map((f) => f.node))) };
    });
    fill(body, sections.map((s) => s.node));
    draft.on("view", update);
  }
  function update(view) {
    for (const f of fields.values()) f.update(view);
    const n = Object.keys(view.draft.changes).length;
    count.hidden = !n;
    count.textContent = n + " changed";
    onlyText.textContent = n ? `Only changed (${n})` : "Only changed";
    filter();
  }
  function filter() {
    const view = draft.view, words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const s of sections) {
      let some = false;
      for (const { spec, node } of s.made) {
        const changed = spec.key in view.draft.changes, wrong = spec.key in view.errors;
        const text = `${spec.label} ${spec.key} ${spec.help} ${s.title}`.toLowerCase();
        const on = (applies(spec, view) || wrong) && (!changedOnly || changed) && words.every((w) => text.includes(w));
        node.hidden = !(on || node.contains(document.activeElement));
        if (!node.hidden) { some = true; shown += 1; }
      }
      s.node.hidden = !some;
    }
    none.hidden = shown > 0 || !sections.length;
    none.textContent = changedOnly && !words.length ? "Everything is as the preset has it." : `No setting${changedOnly ? " that was changed" : ""} matches “${search.value}”.`;
  }
  const applies = (spec, view) => (!spec.families || spec.families.includes(view.family))
    && Object.entries(spec.when ?? {}).every(([key, values]) => [view.values[key]].flat().some((v) => values.includes(v)));

  build();
  return drawer;
}

/** One setting: label, control, help, error, and what the preset has. */
function setting(draft, spec) {
  const { key } = spec, id = "set-" + key.replaceAll(".", "-");
  const change = (value, now) => draft.patch({ changes: { [key]: value } }, now);
  const c = CONTROLS[spec.kind](spec, change, id);
  const help = h("p", { class: "la-help", id: id + "-help" }, spec.help);
  const error = h("p", { class: "la-error", id: id + "-error", role: "alert", hidden: true });
  const was = h("span", {});
  const reset = button("Reset", () => { change(null, true); c.set(draft.view.preset_values[key]); c.focus(); }, { kind: "link", "aria-label": `Reset ${spec.label} to the preset's value` });
  const mark = h("p", { class: "nl-was la-small", hidden: true }, h("span", { class: "la-badge la-badge-accent" }, "changed"), was, reset);
  const many = spec.kind === "choices";
  const label = spec.kind === "boolean" ? null : many ? h("span", { class: "la-label", id: id + "-label" }, spec.label) : h("label", { class: "la-label", htmlFor: id }, spec.label);
  c.main.setAttribute("aria-describedby", `${id}-help ${id}-error`);
  const node = h("div", { class: "la-field nl-setting" + (spec.kind === "lines" ? " la-wide" : ""), data: { key } }, label, c.node, help, error, mark);
  node.addEventListener("focusout", () => { if (draft.unsavedField(key)) draft.flush(); });
  return {
    node, spec, focus: c.focus,
    update(view) {
      if (!draft.unsavedField(key) && !(c.writes && c.main === document.activeElement)) c.set(view.values[key]);
      const changed = key in view.draft.changes, wrong = view.errors[key];
      node.dataset.changed = changed;
      mark.hidden = !changed;
      was.textContent = `the preset has ${words(spec, view.preset_values[key])}`;
      error.hidden = !wrong;
      if (error.textContent !== (wrong || "")) error.textContent = wrong || "";
      wrong ? c.main.setAttribute("aria-invalid", "true") : c.main.removeAttribute("aria-invalid");
    },
  };
}

// Each kind of control: {node, main (what has the focus and the description), set(value), focus(), writes: typed into}
export const CONTROLS = {
  integer: (spec, change, id) => number(spec, change, id, (t) => (/^[+-]?\d+$/.test(t) ? Number(t) : t)),
  number: (spec, change, id) => number(spec, change, id, (t) => { const n = Number(t.replace(",", ".")); return t && Number.isFinite(n) ? n : t; }),
  text(spec, change, id) {
    const main = h("input", { type: "text", id, spellcheck: false, placeholder: spec.empty ?? "", on: { input: () => change(main.value) } });
    return { node: main, main, writes: true, set: (v) => put(main, v ?? ""), focus: () => main.focus() };
  },
  lines(spec, change, id) {
    const main = h("textarea", { id, rows: 4, placeholder: spec.empty ?? "", on: { input: () => change(main.value.split("\n").map((l) => l.trim()).filter(Boolean)) } });
    return { node: main, main, writes: true, set: (v) => put(main, (v ?? []).join("\n")), focus: () => main.focus() };
  },
  boolean(spec, change, id) {
    const main = h("input", { type: "checkbox", id, on: { change: () => change(main.checked, true) } });
    return { node: h("label", { class: "la-row nl-switch", htmlFor: id }, main, h("span", { class: "la-label" }, spec.label)), main, set: (v) => { main.checked = v === true; }, focus: () => main.focus() };
  },
  choice(spec, change, id) {
    const main = h("select", { id, on: { change: () => change(spec.choices.find(([v]) => String(v) === main.value)?.[0] ?? "", true) } },
      spec.optional && h("option", { value: "" }, spec.empty ?? "not set"), spec.choices.map(([value, title]) => h("option", { value }, title)));
    return { node: main, main, set: (v) => { main.value = v ?? ""; }, focus: () => main.focus() };
  },
  choices(spec, change, id) {
    const boxes = spec.choices.map(([value, title]) => [value, h("input", { type: "checkbox", on: { change: () => change(boxes.filter(([, b]) => b.checked).map(([v]) => v), true) } }), title]);
    const main = h("div", { class: "la-row nl-boxes", role: "group", id, "aria-labelledby": id + "-label" }, boxes.map(([, box, title]) => h("label", { class: "la-row nl-switch" }, box, title)));
    return { node: main, main, set: (v) => boxes.forEach(([value, box]) => { box.checked = (v ?? []).includes(value); }), focus: () => boxes[0][1].focus() };
  },
  color(spec, change, id) {
    const main = h("input", { type: "text", id, spellcheck: false, class: "la-mono", on: { input: () => { change(main.value.trim()); show(); } } });
    const pick = h("input", { type: "color", class: "nl-color", "aria-label": spec.label + ", picker", on: { input: () => { main.value = pick.value; change(pick.value); } } });
    const show = () => { if (/^#[0-9a-f]{6}$/i.test(main.value.trim())) pick.value = main.value.trim(); };
    return { node: h("div", { class: "la-row nl-nowrap" }, pick, main), main, writes: true, set: (v) => { put(main, v ?? ""); show(); }, focus: () => main.focus() };
  },
};
function number(spec, change, id, read) {
  // A text field: a browser's number field hides what it cannot read, and shows 1e-4 as 0.0001.
  const main = h("input", { type: "text", inputMode: "decimal", id, autocomplete: "off", spellcheck: false, class: "la-num", placeholder: spec.empty ?? "",
    on: { input: () => change(read(main.value.trim())), keydown: (e) => {
      if ((e.key !== "ArrowUp" && e.key !== "ArrowDown") || spec.kind !== "integer" || !/^[+-]?\d+$/.test(main.value.trim())) return;
      e.preventDefault();
      const n = Number(main.value) + (e.key === "ArrowUp" ? 1 : -1) * (spec.step ?? 1);
      main.value = Math.min(spec.max ?? n, Math.max(spec.min ?? n, n));
      change(Number(main.value));
    } } });
  const range = spec.min !== undefined && spec.max !== undefined ? `${figure(spec.min)} to ${figure(spec.max)}` : spec.min !== undefined ? `${figure(spec.min)} or more` : "";
  main.title = range;
  return { node: main, main, writes: true, set: (v) => put(main, figure(v)), focus: () => main.focus() };
}
const put = (control, text) => { if (control.value !== text) control.value = text; };
function figure(value) {
  if (typeof value !== "number") return String(value ?? "");
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : String(value);
}
function words(spec, value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  const named = (v) => spec.choices?.find(([c]) => c === v)?.[1] ?? figure(v);
  if (Array.isArray(value)) return value.length ? value.map(named).join(", ") : spec.empty ?? "nothing";
  return value === null || value === undefined || value === "" ? spec.empty ?? "nothing" : named(value);
}
