// Section 3: the base model. Nothing is chosen beforehand: only the user knows which model the pictures are made with.
import { attempt, button, debounce, field, fill, get, h, plural, post, Refused } from "/static/core.js";
import { keyed } from "/static/draft.js";

export function modelsSection(page) {
  const { draft } = page;
  let found = null, all = false, timer, turn = 0;

  const search = h("input", { type: "search", id: "model-search", placeholder: "Search by name", autocomplete: "off", spellcheck: false, "aria-label": "Search models", on: { input: () => look() } });
  const list = h("div", { class: "nl-models", role: "radiogroup", "aria-label": "Base model", id: "models" });
  const status = h("p", { class: "la-small la-muted", role: "status" });
  const more = button("", () => { all = !all; read(); }, { kind: "link" });
  more.classList.add("la-small");
  const chosen = h("div", { class: "nl-chosen", id: "model-chosen", role: "status", hidden: true });
  const kind = field("Kind of model", h("select", { id: "model-variant", on: { change: () => draft.patch({ variant: kind.control.value }, true) } }));
  const facts = h("p", { class: "la-small la-muted", id: "model-facts", hidden: true });
  const folders = h("ul", { class: "la-list la-small nl-folders" });
  const where = h("details", { class: "nl-where" }, h("summary", {}, "Where models are looked for"), folders,
    h("div", { class: "la-row la-small" }, button("Look again", () => attempt(async () => { show(await post("/models/rescan")); again(); }), { kind: "link" }), h("a", { href: "/settings" }, "Add a folder in the settings")));

  const other = field("Or a path or hub id", h("input", { type: "text", id: "model-path", spellcheck: false, autocomplete: "off", placeholder: "/models/my_model.safetensors or owner/name" }), { hint: "of a .safetensors file, a diffusers folder, or a model on the Hugging Face Hub" });
  const checkButton = button("Check", () => check(), { id: "model-check" });
  const checked = h("div", { class: "nl-checked", role: "status", id: "model-checked", hidden: true });
  other.control.addEventListener("keydown", (e) => { if (e.key === "Enter") { e.preventDefault(); check(); } });

  const read = async () => {
    const mine = ++turn;
    const answer = await attempt(() => get(`/models?q=${encodeURIComponent(search.value)}&all=${all ? 1 : 0}`));
    if (answer && mine === turn) show(answer);
  };
  const look = debounce(read, 200);
  function again() {
    clearTimeout(timer);
    timer = setTimeout(() => { if (!document.hidden) read(); else again(); }, 1200);
  }
  function show(answer) {
    found = answer;
    if (answer.scanning) again();
    draw();
  }

  function draw() {
    const view = draft.view, source = draft.value("model");
    const models = found ? [...found.models] : [];
    if (view.model?.toy) models.unshift(view.model);
    keyed(list, models.map((m) => ({ ...m, id: m.source, checked: m.source === source })), row);
    // One stop for the Tab key: the chosen model, or the first.
    const radios = [...list.querySelectorAll("input:not([disabled])")];
    radios.forEach((r, n) => { r.tabIndex = r.checked || (n === 0 && !radios.some((x) => x.checked)) ? 0 : -1; });
    list.hidden = !models.length;
    if (!found) status.textContent = "Looking for models …";
    else if (found.scanning) status.textContent = `Looking for models … ${found.models.length} so far.`;
    else if (!found.models.length) status.textContent = search.value ? `No model is called “${search.value}”.` : "No base model was found on this computer. Name one below, or add a folder in the settings.";
    else status.textContent = plural(found.models.length, "model") + (search.value ? " found." : " on this computer.");
    more.hidden = !found || (!found.hidden && !all);
    if (found) more.textContent = all ? "Show only what can be trained" : `Show the ${found.hidden} that cannot be trained`;
    if (found) fill(folders, found.folders.length ? found.folders.map((f) => h("li", {}, h("span", { class: "la-mono" }, f.path), ` ${f.where ? f.where + ", " : ""}${plural(f.count, "model")}`)) : h("li", {}, "No folder of another program was found."));

    const m = view.model, listed = models.some((x) => x.source === source);
    chosen.hidden = !(view.model_error || (m && (!listed || m.warning || m.toy)));
    chosen.className = "nl-chosen la-note" + (view.model_error ? " la-note-bad" : m?.warning && !m.toy ? " la-note-warn" : "");
    fill(chosen, view.model_error || (m && [!listed && [h("b", {}, "Chosen: " + m.name), ` – ${words(m)}. `], m.toy
      ? "The built-in example: a toy that knows nothing but small drawn shapes, made to try everything out in minutes. Choose a model of your own for real pictures."
      : m.warning && sentence(m.warning)]));
    details();
  }

  /** What the model's files say of it, and which words for quality it knows, where models of its family differ in them. */
  function details() {
    const view = draft.view, m = view.model, known = m?.trainable && !m.toy;
    facts.hidden = !(known && m.facts?.length);
    facts.textContent = known ? `${m.title}: ${m.facts.join(", ")}.` : "";
    const own = known ? view.variants : [];
    kind.node.hidden = !own.length;
    if (!own.length) return;
    const byName = own.find(([name]) => name === m.words);
    const options = [["", `By its name: ${byName ? byName[1] : "ordinary"}`], ["none", "Ordinary"], ...own];
    if (kind.control.dataset.of !== JSON.stringify(options)) {
      kind.control.dataset.of = JSON.stringify(options);
      fill(kind.control, options.map(([value, title]) => h("option", { value }, title)));
    }
    if (!draft.unsaved("variant")) kind.control.value = view.draft.variant;
    kind.help(own.find(([name]) => name === view.variant)?.[2] ?? "No quality words stand before the sample prompts.");
  }

  function row(first) {
    const radio = h("input", { type: "radio", name: "model", value: first.source, disabled: !first.trainable, on: { change: () => draft.patch({ model: first.source }, true) } });
    const title = h("b", { class: "nl-model-name" }), facts = h("span", { class: "la-help" }), warn = h("span", { class: "la-badge la-badge-warn", hidden: true });
    const node = h("label", { class: "nl-model", data: { model: first.source } }, radio, h("span", { class: "nl-model-text" }, title, facts), warn);
    node.update = (m) => {
      radio.checked = m.checked;
      title.textContent = m.name;
      node.title = m.source;
      facts.textContent = words(m);
      node.classList.toggle("nl-not", !m.trainable);
      warn.hidden = !m.warning || !m.trainable;
      warn.textContent = m.toy ? "a toy" : "distilled";
      warn.title = m.warning;
    };
    return node;
  }

  async function check() {
    const source = other.control.value.trim();
    if (!source) return void other.error("Type the path of a model file or folder, or a hub id like owner/name.");
    checkButton.disabled = true;
    other.error("");
    try {
      const m = await post("/models/check", { source });
      checked.hidden = false;
      fill(checked, h("p", {}, h("b", {}, m.name), " – ", words(m) + ".", m.facts?.length ? ` ${sentence(m.facts.join(", "))}` : "", m.download_gb ? ` A download of ${m.download_gb} GB, once.` : "", m.license ? ` Licence: ${m.license}.` : "", m.warning ? " " + sentence(m.warning) : ""),
        m.trainable && button(m.download_gb ? "Use it, download when training starts" : "Use this model", () => { draft.patch({ model: m.source }, true); checked.hidden = true; other.control.value = ""; }, { id: "model-use" }));
      if (!m.trainable) other.error(sentence(m.what) + " It cannot be trained on.");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      checked.hidden = true;
      other.error(error.message);
    } finally {
      checkButton.disabled = false;
    }
  }

  page.places.model = page.places["model.source"] = () => { search.scrollIntoView({ block: "center" }); search.focus(); };
  draft.on("view", draw);
  read();
  return [search, list, h("div", { class: "la-row la-between" }, status, more), chosen, facts, kind.node,
    h("div", { class: "nl-path" }, other.node, checkButton), checked, where];
}

function words(m) {
  if (m.toy) return "a toy model for trying things out";
  return [m.trainable ? m.title || m.what : sentence(m.what).replace(/\.$/, ""), m.size_gb ? (m.size_gb >= 1 ? m.size_gb.toFixed(1) + " GB" : Math.round(m.size_gb * 1000) + " MB") : "", m.where].filter(Boolean).join(" · ");
}
const sentence = (text) => (/^\S+\.\w+ /.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1)) + (/[.!?]$/.test(text) ? "" : ".");
