// Editing a run that waits: every setting with its control, searchable; only what was changed is sent.
import { api, attempt, fill, get, h, Refused, unique } from "/static/core.js";
import { CONTROLS } from "/static/advanced.js";
import { formDialog } from "/static/run_actions.js";

/** Resolves to the new run view, or null when nothing was changed. */
export async function editSettings(run, path) {
  const form = await attempt(() => get("/form"));
  if (!form) return null;
  const values = { ...run.values }, changes = {}, made = [];
  const count = h("p", { class: "la-small la-muted", role: "status" });
  const search = h("input", { type: "search", placeholder: "Search settings", "aria-label": "Search settings", autocomplete: "off", on: { input: filter } });

  function setting(spec) {
    const id = unique("edit"), error = h("p", { class: "la-error", id: id + "-error", role: "alert", hidden: true });
    const control = CONTROLS[spec.kind](spec, (value) => {
      values[spec.key] = changes[spec.key] = value;
      if (JSON.stringify(value ?? null) === JSON.stringify(run.values[spec.key] ?? null)) delete changes[spec.key];
      error.hidden = true;
      filter();
    }, id);
    control.set(values[spec.key]);
    control.main.setAttribute("aria-describedby", `${id}-help ${id}-error`);
    const label = spec.kind === "boolean" ? null : spec.kind === "choices" ? h("span", { class: "la-label", id: id + "-label" }, spec.label) : h("label", { class: "la-label", htmlFor: id }, spec.label);
    const node = h("div", { class: "la-field" + (spec.kind === "lines" ? " la-wide" : ""), data: { key: spec.key } }, label, control.node, h("p", { class: "la-help", id: id + "-help" }, spec.help), error);
    made.push({ spec, node, error });
    return node;
  }
  const sections = form.sections.map((s) => ({ ...s, node: h("section", { class: "la-edit-group", "aria-label": s.title }, h("h3", { class: "la-h3" }, s.title), h("div", { class: "la-cols" }, s.fields.map(setting))) }));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const { spec, node, error } of made) {
      const applies = (!spec.families || !run.family || spec.families.includes(run.family))
        && Object.entries(spec.when ?? {}).every(([key, allowed]) => [values[key]].flat().some((v) => allowed.includes(v)));
      const text = `${spec.label} ${spec.key} ${spec.help}`.toLowerCase();
      node.hidden = !(error.hidden ? applies && words.every((w) => text.includes(w)) : true) && !node.contains(document.activeElement);
    }
    for (const s of sections) s.node.hidden = s.fields.every((f) => made.find((m) => m.spec === f).node.hidden);
    const n = Object.keys(changes).length;
    count.textContent = n ? `${n} changed` : "Nothing is changed yet.";
  }
  filter();

  async function send() {
    if (!Object.keys(changes).length) return null;
    try {
      return await api("PATCH", path, { changes });
    } catch (refused) {
      if (!(refused instanceof Refused)) throw refused;
      let first = null;
      refused.placed = Object.keys(refused.errors).length > 0 && Object.keys(refused.errors).every((key) => made.some((m) => m.spec.key === key));
      for (const m of made) {
        const text = refused.errors[m.spec.key];
        m.error.textContent = text || "";
        m.error.hidden = !text;
        if (text) first ||= m;
      }
      filter();
      first?.node.scrollIntoView({ block: "center" });
      throw refused;
    }
  }
  const body = h("div", { class: "la-edit" });
  fill(body, h("div", { class: "la-row la-edit-tools" }, h("div", { class: "la-grow" }, search), count), sections.map((s) => s.node));
  return formDialog(`Settings of ${run.name}`, body, "Change the settings", send, { wide: true });
}
