// Data sets as things: which one is open, the others, copies, zips, the trash; and further sets that are trained together with it.
import { api, ask, attempt, button, debounce, field, fill, get, h, megabytes, plural, post, Refused, toast } from "/static/core.js";
import { keyed } from "/static/draft.js";
import { chosen, looking, upload } from "/static/intake.js";

const day = (time) => new Date(time * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });

/** The line at the top of the images: what this data set is called, and everything that is done with whole data sets. */
export function chooser(page) {
  const { draft } = page;
  let sets = [];
  const title = h("span", {}), list = h("ul", { class: "la-list nl-sets", "aria-label": "Data sets" });
  const version = h("p", { class: "la-help", id: "dataset-version" });
  const nameOf = (set) => set.name || (set.current && draft.value("name")) || "Untitled";

  const file = h("input", { type: "file", multiple: true, accept: ".zip,image/*,.txt,.caption,.jsonl,.csv,.tsv,.json", class: "la-offscreen", tabIndex: -1, "aria-label": "Choose a data set to import", id: "import-files", on: { change: () => bring() } });
  const importing = h("span", { class: "la-small la-muted", role: "status" });
  let cancel = () => {};
  const stop = button("Cancel", () => cancel(), { kind: "link", id: "import-cancel" });
  stop.hidden = true;
  const path = field("Or a folder on this computer", h("input", { type: "text", id: "import-path", spellcheck: false, placeholder: "/home/me/kohya/img" }));
  const body = h("div", { class: "la-stack nl-sets-body" }, list, version,
    h("div", { class: "la-stack nl-import" },
      h("div", { class: "la-row" }, button("Import a data set", () => file.click(), { id: "import-dataset" }), file, importing, stop),
      h("div", { class: "nl-path" }, path.node, button("Import the folder", () => bringFolder(), { id: "import-folder" })),
      h("p", { class: "la-help" }, "A zip (exported here, or any with images), folders of kohya (10_name class), a Hugging Face image folder, captions in .jsonl, .csv or .json. ",
        h("a", { href: "/help/datasets" }, "More on data sets"), ".")));
  const box = h("details", { class: "nl-datasets", id: "datasets", on: { toggle: () => { if (box.open) read(); } } }, h("summary", {}, title), body);

  async function read() {
    const answer = await attempt(() => get("/datasets"));
    if (answer) draw(answer.datasets);
  }
  const readVersion = debounce(async () => {
    const now = sets.find((s) => s.current);
    if (!box.open || !now?.images) return void (version.textContent = "");
    try {
      const seen = await get("/datasets/" + now.id);
      version.textContent = `Version ${seen.version}: it changes with the images, captions, masks and crops. A run keeps the version that it was trained on.`;
    } catch (error) { if (!(error instanceof Refused)) throw error; }
  }, 300);

  function draw(found) {
    sets = found;
    keyed(list, found, row);
    drawTitle();
    readVersion();
  }
  function drawTitle() {
    const now = sets.find((s) => s.current && s.id === draft.view.draft.dataset);
    if (draft.images?.images.some((i) => !i.removed)) fill(title, "Data set: ", h("b", {}, nameOf(now ?? { current: true })));
    else title.textContent = "Open or import a data set";
  }
  function row(first) {
    let set = first;
    const picture = h("img", { alt: "", loading: "lazy" }), name = h("b", { class: "nl-set-name" }), open = h("span", { class: "la-badge la-badge-accent" }, "open");
    const facts = h("span", { class: "la-small la-muted la-num" }), notes = h("span", { class: "la-small la-soft nl-set-notes" });
    const small = (text, call, more = {}) => { const b = button(text, call, { kind: "link", ...more }); b.classList.add("la-small"); return b; };
    const take = small("Open", () => act(() => draft.change(() => post(`/datasets/${set.id}/open`))));
    const out = h("a", { class: "la-btn la-btn-link la-small", download: "" }, "Export");
    const copy = small("Duplicate", () => change(() => post(`/datasets/${set.id}/duplicate`), `A copy of ${nameOf(set)} was made.`));
    const edit = small("Name and notes", () => rename(set)), gone = small("Delete", () => trash(set));
    const node = h("li", { data: { dataset: first.id } }, h("span", { class: "nl-set-picture" }, picture),
      h("div", { class: "nl-set-text" }, h("span", { class: "la-row" }, name, open), facts, notes, h("span", { class: "la-row nl-set-do" }, take, edit, copy, out, gone)));
    node.update = (now) => {
      set = now;
      const called = nameOf(now);
      name.textContent = called;
      open.hidden = !now.current;
      take.hidden = now.current;
      facts.textContent = [plural(now.images, "image"), day(now.created), now.trigger && `trigger ${now.trigger}`].filter(Boolean).join(" · ");
      notes.textContent = now.notes;
      notes.hidden = !now.notes;
      out.href = `/api/datasets/${now.id}/export`;
      out.hidden = !now.images;
      picture.hidden = !now.images;
      if (now.images && !picture.src) picture.src = `/api/datasets/${now.id}/thumb`;
      for (const [control, words] of [[take, "Open"], [edit, "Name and notes of"], [copy, "Duplicate"], [out, "Export"], [gone, "Delete"]]) control.setAttribute("aria-label", `${words} ${called}`);
    };
    return node;
  }

  async function act(call) {
    const done = await attempt(call);
    if (done) { await draft.refresh(); await read(); }
    return done;
  }
  async function change(call, words, action = null) {
    if (!(await draft.flush())) return;
    const answer = await attempt(call);
    if (!answer) return;
    draw(answer.datasets);
    toast(words, "good", action);
  }
  async function rename(set) {
    const name = field("Name", h("input", { type: "text", value: nameOf(set) === "Untitled" ? "" : nameOf(set), maxLength: 200 }));
    const notes = field("Notes", h("textarea", { rows: 4, value: set.notes }), { help: "Where the pictures are from, what is still missing, what was tried." });
    if (!(await ask("Name and notes", [h("div", { class: "la-stack" }, name.node, notes.node)], [["Cancel", null, "quiet"], ["Save", true, "primary"]]))) return;
    await change(() => api("PATCH", "/datasets/" + set.id, { name: name.control.value, notes: notes.control.value }), "Saved.");
  }
  async function trash(set) {
    const called = nameOf(set);
    const answer = await act(() => post(`/datasets/${set.id}/trash`));
    if (answer) toast(`${called} is in the trash folder, ${answer.trash}.`, "", ["Undo", () => act(() => post(`/datasets/${set.id}/restore`))]);
  }
  async function bring() {
    const files = chosen(file);
    file.value = "";
    if (!files.length || !(await draft.flush())) return;
    const size = megabytes(files.reduce((n, [, f]) => n + f.size, 0));
    let end = null;
    const sent = upload(files, (share) => {
      if (share < 1) importing.textContent = `${Math.round(100 * share)} % of ${size} sent`;
      else end ??= look();
    }, "/api/datasets/import");
    stop.hidden = false;
    cancel = sent.cancel;
    const answer = await attempt(() => sent.done);
    end?.();
    done();
    if (answer) await brought(answer);
  }
  function look() {  // what came is looked at on the server
    stop.hidden = false;
    cancel = () => attempt(() => post("/images/looking/cancel"));
    importing.textContent = "Looking at the pictures …";
    return looking((now) => { importing.textContent = `Looking at the pictures: ${now.done} of ${now.total}`; });
  }
  function done() {
    stop.hidden = true;
    importing.textContent = "";
  }
  async function bringFolder() {
    if (!(await draft.flush())) return;
    const end = look();
    try {
      const answer = await post("/datasets/import-folder", { path: path.control.value });
      path.error("");
      path.control.value = "";
      await brought(answer);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      path.error(error.message);
    } finally {
      end();
      done();
    }
  }
  async function brought(answer) {
    draw(answer.datasets);
    await draft.refresh();
    toast(answer.added.length === 1 ? "The data set was imported and is open now." : `${answer.added.length} data sets were imported; they are trained together.`, "good");
    if (answer.problems.length) toast(answer.problems.slice(0, 3).join(" ") + (answer.problems.length > 3 ? ` And ${answer.problems.length - 3} more.` : ""), "bad");
  }

  draft.on("view", (view) => {
    drawTitle();
    if (box.open && !sets.some((s) => s.current && s.id === view.draft.dataset)) read();
  });
  draft.on("images", () => { drawTitle(); if (box.open) debouncedRead(); });
  const debouncedRead = debounce(read, 600);
  get("/datasets").then((a) => draw(a.datasets), () => {});  // for its name; told elsewhere when the server is away
  return box;
}

const KINDS = [["train", "Train on it"], ["prior", "Class images (regularisation)"], ["validation", "Held out, only measured"]];
const KIND_HELP = {
  train: "Seen beside the images above, with its own words.",
  prior: "Other pictures of the same class, so that the LoRA does not change all of it. Their captions stay without the trigger.",
  validation: "Never trained on; shows whether the LoRA learns by heart.",
};

/** Further sets of the same training, folded away. */
export function furtherSets(page) {
  const { draft } = page;
  let known = [];
  const title = h("span", {}), list = h("ul", { class: "la-list nl-further", "aria-label": "Further sets of images" });
  const pick = field("Data set", h("select", { id: "further-pick" })), add = button("Add this set", () => more(), { id: "further-add" });
  const none = h("p", { class: "la-help" }, "There is no other data set yet. Import one at the top of this section, or prepare it as a training of its own (Start over).");
  const adding = h("div", { class: "nl-path" }, pick.node, add);
  const keep = h("input", { type: "checkbox", id: "keep-class", on: { change: () => {
    const value = keep.checked ? draft.view.preset_values["loss.prior_weight"] || 1 : 0;
    draft.patch({ changes: { "loss.prior_weight": value === draft.view.preset_values["loss.prior_weight"] ? null : value } }, true);
  } } });
  const keepHelp = h("span", { class: "la-help", id: "keep-class-help" });
  keep.setAttribute("aria-describedby", keepHelp.id);
  const box = h("details", { class: "nl-more-sets", id: "further-sets", on: { toggle: () => { if (box.open) read(); } } }, h("summary", {}, title),
    h("div", { class: "la-stack nl-sets-body" }, list, none, adding,
      h("div", {}, h("label", { class: "la-row nl-keep" }, keep, h("span", {}, "Keep the class (no images needed)")), keepHelp)));
  const sets = () => draft.value("sets") ?? [];
  const send = (next, now = false) => { draft.patch({ sets: next }, now); draw(); };

  async function read() {
    const answer = await attempt(() => get("/datasets"));
    if (answer) { known = answer.datasets; draw(); }
  }
  function more() {
    const set = known.find((s) => s.id === pick.control.value);
    if (set) send([...sets(), { dataset: set.id, kind: "train", visits: null, weight: 1, trigger: set.trigger, class_word: set.class_word }], true);
  }
  function draw() {
    const now = sets(), visits = draft.typed("train.visits") ?? draft.view.values["train.visits"];
    title.textContent = now.length ? `${plural(now.length, "further set", "further sets")} of images` : "Add another set of images";
    keyed(list, now.map((s) => ({ id: s.dataset, ...s, visits_of_all: visits })), row);
    const free = known.filter((s) => s.id !== draft.view.draft.dataset && s.images && !now.some((n) => n.dataset === s.id));
    adding.hidden = !free.length;
    none.hidden = free.length > 0 || now.length > 0;
    const options = free.map((s) => [s.id, `${s.name || "Untitled"} (${plural(s.images, "image")}, ${day(s.created)})`]);
    if (pick.control.dataset.of !== JSON.stringify(options)) {
      pick.control.dataset.of = JSON.stringify(options);
      fill(pick.control, options.map(([value, text]) => h("option", { value }, text)));
    }
    keep.checked = (draft.typed("loss.prior_weight") ?? draft.view.values["loss.prior_weight"]) > 0;
    const word = draft.value("class_word");
    keepHelp.textContent = word ? `The model keeps drawing ${word} as it does now where the trigger word is not said. A step takes about twice as long.` : "Needs a class word, below. The model keeps drawing it as it does now; a step takes about twice as long.";
  }
  function row(first) {
    let set = first;
    const change = (part, now) => send(sets().map((s) => (s.dataset === set.dataset ? { ...s, ...part } : s)), now);
    const id = (name) => `further-${name}-${first.dataset}`;
    const number = (name, attrs) => h("input", { type: "number", id: id(name), ...attrs });
    const called = h("b", {}), count = h("span", { class: "la-small la-muted" });
    const kind = field("Used for", h("select", { id: id("kind"), on: { change: () => change({ kind: kind.control.value, ...(kind.control.value === "prior" ? { trigger: "" } : {}) }, true) } }, KINDS.map(([value, text]) => h("option", { value }, text))));
    const visits = field("Visits", number("visits", { min: 1, step: 1, on: { input: () => whole() } }));
    const weight = field("Weight", number("weight", { min: 0.01, max: 100, step: "any", on: { input: () => share() } }));
    const word = (key, label) => field(label, h("input", { type: "text", id: id(key), autocomplete: "off", spellcheck: false, on: { input: (e) => change({ [key]: e.target.value }) } }));
    const trigger = word("trigger", "Trigger word"), classWord = word("class_word", "Class word");
    const whole = () => {
      const text = visits.control.value, value = Number(text), fine = text === "" ? !visits.control.validity.badInput : Number.isInteger(value) && value >= 1 && value <= 100000;
      visits.error(fine ? "" : "A whole number from 1 to 100000, or empty: as the others.");
      if (fine) change({ visits: text === "" ? null : value });
    };
    const share = () => {
      const value = Number(weight.control.value), fine = weight.control.value !== "" && value > 0 && value <= 100;
      weight.error(fine ? "" : "A number above 0, at most 100. 1 counts as the others.");
      if (fine) change({ weight: value });
    };
    const gone = button("Take out", () => send(sets().filter((s) => s.dataset !== set.dataset), true), { kind: "link" });
    const node = h("li", { data: { further: first.dataset } }, h("div", { class: "la-row la-between" }, h("span", { class: "la-row" }, called, count), gone),
      h("div", { class: "la-cols nl-further-fields" }, kind.node, visits.node, weight.node, trigger.node, classWord.node));
    const put = (control, value) => { if (document.activeElement !== control && control.value !== String(value)) control.value = value; };
    node.update = (now) => {
      set = now;
      const about = known.find((s) => s.id === now.dataset);
      called.textContent = about?.name || "Untitled";
      count.textContent = about ? plural(about.images, "image") : "";
      gone.setAttribute("aria-label", `Take ${called.textContent} out of this training`);
      put(kind.control, now.kind);
      put(visits.control, now.visits ?? "");
      put(weight.control, now.weight);
      put(trigger.control, now.trigger);
      put(classWord.control, now.class_word);
      kind.help(KIND_HELP[now.kind]);
      visits.control.placeholder = now.kind === "prior" ? "as often as the subject" : String(now.visits_of_all);
      visits.help(now.kind === "validation" ? "" : "How often each image is seen.");
      weight.help("How much they count. 1: as the others.");
      trigger.node.hidden = now.kind === "prior";
      visits.node.hidden = weight.node.hidden = now.kind === "validation";
    };
    return node;
  }

  draft.on("images", (images) => { box.hidden = !images.images.some((i) => !i.removed) && !sets().length; });
  page.places.sets = () => { box.open = true; box.scrollIntoView({ block: "center" }); box.querySelector("summary").focus(); };
  draft.on("view", (view) => {
    if (view.draft.sets.length && !known.length) read();
    draw();
  });
  return box;
}
