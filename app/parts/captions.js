// Section 4: captions, written by a captioner or by hand, one or many at a time.
import { api, ask, attempt, button, field, fill, get, h, plural, post, toast } from "/static/core.js";
import { keyed, undo } from "/static/draft.js";
import { cropped } from "/static/crop.js";
import { enlarge } from "/static/images.js";

const FEW = 12;
const MOST_TOKENS = 75;  // what one chunk of CLIP reads; the rest is read in a second one, with less effect
const BUILT_IN = "Written in seconds by a small captioner that comes with this example: it knows nothing but drawn pictures, and nothing is downloaded.";
const BUSY = ["waiting", "starting", "running"];
const COMMON = 0.8;  // a tag in this share of the captions goes with the subject more than with the picture
const RECIPES = {  // what to write, and why, in a sentence
  character: (it) => `Name pose, clothes, surroundings and light, but not ${it} own looks: what captions leave out goes into the trigger word, what they name stays changeable.`,
  style: () => "Name what is to be seen, but not how it is made: what captions leave out becomes the style, what they name stays changeable.",
  object: (it) => `Name what is around it, where and in which light, but not ${it} own shape and colours: what captions leave out goes into the trigger word, what they name stays changeable.`,
};
const ACTIONS = [
  ["trigger_first", "Put the trigger word first", null, null],
  ["replace", "Find and replace", "Find", "Replace with"],
  ["prepend", "Add at the beginning", null, "Text"],
  ["append", "Add at the end", null, "Text"],
  ["remove_tag", "Remove a tag", "Tag", null],
  ["clear", "Clear them", null, null],
];

export function captionsSection(page) {
  const { draft } = page;
  let captioners = null, asked, all = false, tag = "", bare = false;
  const present = () => draft.images.images.filter((i) => !i.removed);
  const has = (image, wanted) => draft.captionOf(image).split(",").some((t) => t.trim().toLowerCase() === wanted.toLowerCase());
  const wanted = () => present().filter((i) => (!tag || has(i, tag)) && (!bare || !i.has_caption || document.activeElement?.closest("[data-caption]")?.dataset.caption === i.id));

  // The two captioners

  const two = {}, says = h("p", { class: "la-note", role: "status", id: "captioner-note", hidden: true });
  for (const [style, title, what] of [["sentences", "Sentences", "“a small cat on a red chair”: for photo models and most others"], ["tags", "Tags", "“cat, sitting, chair”: for anime models"]]) {
    const badge = h("span", { class: "la-badge la-badge-accent", hidden: true }, "suits this model"), note = h("span", { class: "la-help" }, what);
    const face = h("button", { type: "button", class: "nl-captioner", id: "caption-" + style, on: { click: () => begin(style) } }, h("span", { class: "nl-captioner-title" }, h("b", {}, title), badge), note);
    two[style] = { face, badge, note, what };
  }
  const choice = () => [draft.view.model?.source, draft.view.draft.purpose, draft.view.draft.class_word, ...(draft.view.draft.example ? present().map((i) => i.id) : [])].join("\n");  // what the captioners hang on
  async function readCaptioners() {
    asked = choice();
    captioners = (await attempt(() => get("/captioners"))) ?? captioners;
    if (!captioners) return;
    for (const style of ["sentences", "tags"]) {
      const { badge, note, what } = two[style], c = captioners[style];
      badge.hidden = captioners.suits !== style || !draft.view.model;
      note.textContent = c.built_in ? BUILT_IN : what + `. By ${c.title}` + (c.there ? "." : c.size_mb ? `; first use downloads ${size(c.size_mb)}.` : `. ${c.note}`);
    }
    drawPrompt();
  }
  /** Have captions written: for all pictures, or for the one of `image`. */
  async function begin(style, image = null) {
    const c = captioners?.[style];
    if (!c) return readCaptioners();
    const images = present(), none = images.filter((i) => !i.has_caption).length, some = images.length - none;
    says.hidden = images.length > 0 && c.usable;
    if (!says.hidden) return void (says.textContent = c.usable ? "Add pictures first; then captions can be written for them." : c.note);
    let which = image ? "all" : none ? "missing" : "all";
    if (!c.there || (some && !image)) {
      const text = [];
      if (!c.there) text.push(h("p", {}, `This uses the captioner ${c.source}${c.licence && ` (licence: ${c.licence})`}. It is downloaded once from huggingface.co${c.size_mb ? `: ${size(c.size_mb)}` : " (how large it is, is said before it begins)"}. Your pictures stay on this computer.`));
      if (some && !image) text.push(h("p", {}, `${some === images.length ? "All" : some} of your ${plural(images.length, "picture")} have a caption. Add to them keeps what is there and writes ${style} behind it. Whatever you choose, a backup is kept and Undo brings it back.`));
      const start = c.there ? "Write captions" : "Download and write";
      which = await ask(!c.there ? `Download ${c.size_mb ? size(c.size_mb) : "the captioner"} and write ${image ? "this caption" : "captions"}?` : "Write which captions?", text,
        [["Cancel", null, "quiet"], ...(image ? [[start, "all", "primary"]] : [
          some && ["Replace all", "all"], some && ["Add to them", "add", none ? "" : "primary"], none && [some ? `Only the ${none} without` : start, "missing", "primary"]])].filter(Boolean));
      if (!which) return;
    }
    const begun = await attempt(() => draft.change(() => post("/images/caption", { style, which, ...(image && { ids: [image.id] }) })));
    if (begun && image) toast(`The caption of ${image.name} is being written anew.`);
  }

  // What captions should say, and what a captioner is told that can be told

  const recipe = h("p", { class: "la-lead", id: "caption-recipe" });
  const told = field("Prompt", h("textarea", { rows: 5, id: "caption-prompt", maxLength: 4000 }), { help: "{subject} becomes the class word. Saved for this purpose when you leave the field." });
  const own = button("Back to its own words", () => savePrompt(""), { kind: "link" });
  own.classList.add("la-small");
  const prompt = h("details", { class: "nl-tagbox", id: "prompt-box", hidden: true }, h("summary", {}, "What the captioner is told"), h("div", { class: "la-stack" }, told.node, own));
  told.control.addEventListener("change", () => savePrompt(told.control.value.trim()));
  function drawPrompt() {
    const c = captioners?.sentences, { purpose } = draft.view.draft;
    recipe.replaceChildren("One caption for each picture. ", RECIPES[purpose](draft.value("trigger") ? draft.value("trigger") + "’s" : "its"), " ", h("a", { href: "/help/captions.md" }, "More on captions"));
    prompt.hidden = !c || c.prompt === null;
    if (prompt.hidden) return;
    if (document.activeElement !== told.control) told.control.value = c.own_prompt || c.prompt;
    own.hidden = !c.own_prompt;
  }
  async function savePrompt(text) {
    const { purpose } = draft.view.draft;
    const { prompts } = await get("/settings");
    await attempt(() => api("PATCH", "/settings", { prompts: { ...prompts, [purpose]: text === captioners.sentences.prompt ? "" : text } }));
    await readCaptioners();
  }

  const bar = h("div", {}), jobText = h("span", { class: "la-small", role: "status", id: "caption-status" });
  const meter = h("div", { class: "la-progress", role: "progressbar", "aria-label": "Captions", "aria-valuemin": 0 }, bar);
  const stop = button("Cancel", () => attempt(() => draft.change(() => post("/images/caption/cancel"))), { kind: "quiet", id: "caption-cancel" });
  const job = h("div", { class: "nl-job", id: "caption-job", hidden: true }, meter, h("div", { class: "la-row la-between" }, jobText, stop));
  function drawJob(j) {
    job.hidden = !j || (j.state === "finished" && !j.text && !BUSY.includes(job.dataset.state));
    if (!j) return;
    const busy = BUSY.includes(j.state);
    job.dataset.state = j.state;
    meter.hidden = stop.hidden = !busy;
    bar.style.width = (j.total ? (100 * j.done) / j.total : 0) + "%";
    meter.setAttribute("aria-valuenow", j.done);
    meter.setAttribute("aria-valuemax", j.total);
    const words = { waiting: "Waiting for its turn …", starting: "Starting the captioner …", running: !j.total ? j.text || "Loading the captioner …" : `Writing captions: ${j.done} of ${j.total}.`,
      finished: j.text || `${plural(j.done, "caption")} written.`, stopped: `Cancelled; ${plural(j.done, "caption")} written.`, failed: "The captions were not written: " + (j.text || "no reason was given."), lost: "The captioner ended without a word. Start it again; what it had written is kept." };
    if (jobText.textContent !== words[j.state]) jobText.textContent = words[j.state];
    job.classList.toggle("la-error", j.state === "failed" || j.state === "lost");
  }

  // Many at once

  const action = field("Change captions", h("select", { id: "bulk-action" }, ACTIONS.map(([value, title]) => h("option", { value }, title))));
  const find = field("Find", h("input", { type: "text", id: "bulk-find" })), text = field("Text", h("input", { type: "text", id: "bulk-text" }));
  const apply = button("Apply", () => bulk(), { id: "bulk-apply" });
  const bulkLine = h("div", { class: "nl-bulk" }, action.node, find.node, text.node, apply);
  for (const { control } of [find, text]) control.addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.ctrlKey) { e.preventDefault(); bulk(); } });
  action.control.addEventListener("change", () => drawBulk());
  function drawBulk() {
    const [, , a, b] = ACTIONS.find(([value]) => value === action.control.value);
    find.node.hidden = !a;
    find.node.querySelector("label").textContent = a || "Find";
    text.node.hidden = !b;
    text.node.querySelector("label").textContent = b || "Text";
    const n = wanted().length;
    apply.textContent = tag || bare ? `Apply to the ${n} shown` : `Apply to ${n === 1 ? "the caption" : `all ${n}`}`;
  }
  async function bulk(what = action.control.value, look = find.control.value, only = tag || bare ? wanted().map((i) => i.id) : null) {
    text.error("");
    find.error("");
    const words = text.control.value;
    if (what === "replace" && !look) return find.error("Type what to look for.");
    if (what === "remove_tag" && !look.trim()) return find.error("Type the tag, or click it in the list of tags.");
    if ((what === "prepend" || what === "append") && !words.trim()) return text.error("Type the text to add.");
    if (what === "trigger_first" && !draft.value("trigger")) return page.go("trigger");
    const answer = await attempt(() => draft.changeImages(() => post("/images/captions", { action: what, find: look, text: words, ids: only })));
    if (!answer) return;
    toast(answer.changed ? plural(answer.changed, "caption") + " changed." : "No caption had to be changed.", answer.changed ? ["Undo", () => undo(draft)] : null);
  }

  // Tags

  const cloud = h("div", { class: "nl-tags", role: "group", "aria-label": "Tags" });
  const tagLine = h("div", { class: "la-row la-small", hidden: true });
  const tags = h("details", { class: "nl-tagbox", id: "tags" }, h("summary", {}, "Tags"), cloud);
  let allTags = false;
  function drawTags() {
    const list = draft.images.tags;
    if (tag && !list.some(([t]) => t.toLowerCase() === tag.toLowerCase())) tag = "";
    tags.hidden = !list.length;
    tags.querySelector("summary").textContent = `Tags (${list.length})`;
    const shown = (allTags ? list : list.slice(0, 60)).map(([name, n]) => ({ id: name, n }));
    keyed(cloud, list.length > 60 && !allTags ? [...shown, { id: "\u0000more", n: list.length - 60 }] : shown, (first) => {
      if (first.id === "\u0000more") {
        const node = button("", () => { allTags = true; drawTags(); }, { kind: "link" });
        node.update = (t) => { node.textContent = `and ${t.n} more`; };
        return node;
      }
      const count = h("span", { class: "nl-tag-count la-num" });
      const node = h("button", { type: "button", class: "nl-tag", data: { tag: first.id }, on: { click: () => { tag = tag === first.id ? "" : first.id; draw(); } } }, h("span", {}, first.id), count);
      node.update = (t) => { count.textContent = t.n; node.setAttribute("aria-pressed", String(t.id === tag)); };
      return node;
    });
    tagLine.hidden = !tag;
    if (tag && tagLine.dataset.shown !== tag) fill(tagLine, h("span", {}, `Shown: the captions with “${tag}”.`),
      button("Remove this tag from them", () => { const gone = tag; tag = ""; bulk("remove_tag", gone, null); }, { kind: "link" }), button("Show all captions", () => { tag = ""; draw(); }, { kind: "link" }));
    tagLine.dataset.shown = tag;
  }

  // Tags that nearly every caption has

  const kept = () => new Set(JSON.parse(localStorage.getItem("la-kept-tags:" + draft.images.folder) || "[]"));
  const commonList = h("ul", { class: "nl-common-list" }), commonWhy = h("p", { class: "la-small la-soft" });
  const leaveAll = button("Leave all of them out", () => bulk("remove_tag", commonTags().map(([t]) => t).join(", "), null));
  const keepAll = button("Keep all", () => keep(commonTags().map(([t]) => t)), { kind: "quiet" });
  for (const b of [leaveAll, keepAll]) b.classList.add("la-btn-small");
  const common = h("section", { class: "la-note nl-common", id: "common-tags", "aria-labelledby": "common-title", hidden: true },
    h("h3", { class: "la-h3", id: "common-title" }), commonWhy, commonList, h("div", { class: "la-row" }, leaveAll, keepAll));
  function commonTags() {
    const captioned = present().filter((i) => i.has_caption).length, gone = kept(), trigger = (draft.value("trigger") || "").toLowerCase();
    return captioned < 3 ? [] : draft.images.tags.filter(([t, n]) => n >= COMMON * captioned && t.toLowerCase() !== trigger && !gone.has(t.toLowerCase()));
  }
  function keep(tags) {
    const before = [...kept()], save = (list) => { localStorage.setItem("la-kept-tags:" + draft.images.folder, JSON.stringify(list)); draw(); };
    save([...before, ...tags.map((t) => t.toLowerCase())]);
    toast(tags.length === 1 ? `“${tags[0]}” is kept.` : `${tags.length} tags are kept.`, "", ["Undo", () => save(before)]);
  }
  function drawCommon() {
    const list = commonTags(), trigger = draft.value("trigger");
    common.hidden = !list.length;
    if (!list.length) return;
    common.querySelector("h3").textContent = list.length === 1 ? "One tag is in nearly every caption" : `${list.length} tags are in nearly every caption`;
    const whole = draft.value("purpose") === "style" ? "the style" : trigger || "the subject";
    commonWhy.textContent = `Left out, a tag becomes part of ${whole}, and no word is needed for it; kept, it stays something that you can ask for or not.`;
    leaveAll.hidden = keepAll.hidden = list.length === 1;
    keyed(commonList, list.map(([id, n]) => ({ id, n })), (first) => {
      const count = h("span", { class: "nl-tag-count la-num" });
      const node = h("li", {}, h("span", { class: "nl-common-tag" }, h("b", {}, first.id), " ", count),
        button("Leave out", () => bulk("remove_tag", first.id, null), { kind: "link", "aria-label": `Leave out ${first.id}` }),
        button("Keep", () => keep([first.id]), { kind: "link", "aria-label": `Keep ${first.id}` }));
      for (const b of node.querySelectorAll("button")) b.classList.add("nl-small-link");
      node.update = (t) => { count.textContent = `${t.n} of ${present().filter((i) => i.has_caption).length}`; };
      return node;
    });
  }

  // One by one

  const count = h("p", { class: "la-small", role: "status", id: "caption-count" });
  const filter = button("", () => { bare = !bare; draw(); }, { kind: "quiet" });
  filter.classList.add("la-btn-small");
  const list = h("ul", { class: "nl-captions", "aria-label": "Captions" });
  const more = button("", () => { all = !all; draw(); }, { kind: "quiet", id: "all-captions" });
  const keys = h("p", { class: "la-help nl-keys" }, "Saved as you type. ", h("kbd", {}, "Ctrl"), " ", h("kbd", {}, "Enter"), " goes to the next picture.");
  const beside = button("Write them beside the originals", async () => {
    if (!(await draft.flush())) return void toast("The captions are not saved yet, since the server does not answer. Press again when it is back.", "bad");
    const n = present().filter((i) => i.linked && i.has_caption).length;
    if (!(await ask("Write the captions into your folder?", `${n === 1 ? "One caption becomes a .txt file" : n + " captions become .txt files"} beside the pictures that are used in place. What stands there now is copied first.`, [["Cancel", false, "quiet"], ["Write them", true, "primary"]]))) return;
    await draft.flush();
    const done = await attempt(() => post("/images/write-back"));
    if (!done) return;
    toast(`${plural(done.written, "caption")} written, ${done.unchanged} unchanged.` + (done.backup ? ` What stood there is in ${done.backup}.` : ""), "good");
    for (const problem of done.problems) toast(problem, "bad");
  }, { kind: "link", id: "write-back" });
  beside.classList.add("la-small");
  const nothing = h("p", { class: "la-muted" }, "Captions appear here as soon as there are pictures.");

  function card(first) {
    let image = first, timer;
    const picture = h("img", { loading: "lazy", decoding: "async", alt: "" }), kept = h("span", { class: "nl-kept" });
    const frame = h("span", { class: "nl-frame" }, picture, kept);
    const open = h("button", { type: "button", class: "nl-open", on: { click: () => enlarge(draft, image.id) } }, frame);
    const area = h("textarea", { rows: 3, id: "caption-" + first.id, on: {
      input() { state(""); draft.caption(image.id, area.value); },
      blur() { if (draft.unsavedCaption(image.id)) draft.flush(); },
      keydown(e) { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); next(node, e.shiftKey); } },
    } });
    const name = h("span", { class: "nl-name" }), tokens = h("span", { class: "nl-tokens la-num" }), saved = h("span", { class: "nl-state" });
    const anew = button("Write anew", () => begin(draft.view.caption_job?.style ?? captioners?.suits ?? "sentences", image), { kind: "link" });
    anew.classList.add("nl-small-link");
    const node = h("li", { class: "nl-caption", data: { caption: first.id } }, open, h("div", { class: "nl-caption-text" }, h("label", { class: "nl-name", htmlFor: area.id }, name), area, h("div", { class: "nl-caption-foot" }, tokens, h("span", { class: "la-row" }, saved, anew))));
    const state = (word) => { saved.textContent = word; clearTimeout(timer); if (word) timer = setTimeout(() => { saved.textContent = ""; }, 2500); };
    node.again = () => { anew.disabled = BUSY.includes(draft.view.caption_job?.state); };
    node.saved = () => { if (!draft.unsavedCaption(image.id)) state("Saved"); };
    node.update = (now) => {
      image = now;
      if (picture.getAttribute("src") !== now.thumb) picture.src = now.thumb;
      frame.style.aspectRatio = `${now.width} / ${now.height}`;
      frame.classList.toggle("nl-tall", now.height > now.width);
      cropped(kept, now.crop);
      name.textContent = now.name;
      area.setAttribute("aria-label", "Caption of " + now.name);
      open.setAttribute("aria-label", "Enlarge " + now.name);
      anew.setAttribute("aria-label", "Write anew: the caption of " + now.name);
      node.again();
      const value = draft.captionOf(now);
      if (!draft.unsavedCaption(now.id) && area.value !== value && (document.activeElement !== area || area.dataset.was === area.value)) area.value = value;
      else if (document.activeElement !== area && area.value !== value) area.value = value;
      area.dataset.was = area.value;
      const long = now.tokens > MOST_TOKENS;
      tokens.textContent = !now.has_caption ? "no caption" : long ? `${now.tokens} tokens: the model reads the first ${MOST_TOKENS} best` : plural(now.tokens, "token");
      tokens.classList.toggle("nl-long", long);
    };
    return node;
  }
  function next(node, back) {
    let to = back ? node.previousElementSibling : node.nextElementSibling;
    if (!to && !back && !all && !more.hidden) { all = true; draw(); to = node.nextElementSibling; }
    const area = to?.querySelector("textarea");
    if (!area) return void draft.flush();
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
    to.scrollIntoView({ block: "nearest" });
  }

  function draw() {
    const images = present(), none = images.filter((i) => !i.has_caption).length;
    if (!none) bare = false;
    drawTags();
    drawCommon();
    const some = wanted();
    nothing.hidden = images.length > 0;
    tools.hidden = !images.length;
    beside.hidden = !images.some((i) => i.linked && i.has_caption);
    count.textContent = none === images.length ? "No captions yet: without one, a picture is called by its trigger and class word." : none ? `${images.length - none} of ${images.length} have a caption.` : `All ${images.length} have a caption.`;
    filter.hidden = !none || (none === images.length && !bare);
    filter.textContent = bare ? "Show all" : `Show the ${none} without`;
    filter.setAttribute("aria-pressed", String(bare));
    keyed(list, all || some.length <= FEW * 1.5 ? some : some.slice(0, FEW), card);
    more.hidden = some.length <= FEW * 1.5;
    more.textContent = all ? "Show fewer" : `Show all ${some.length} captions`;
    for (const node of document.querySelectorAll(".nl-card")) node.classList.toggle("nl-marked", Boolean(tag) && some.some((i) => i.id === node.dataset.image));
    drawBulk();
  }

  const tools = h("div", { class: "la-stack nl-caption-tools" }, common, bulkLine, tags, tagLine, h("div", { class: "la-row la-between" }, count, filter), list, more, h("div", { class: "la-row la-between" }, keys, beside));
  page.places.captions = () => {
    const area = list.querySelector("textarea") ?? two.sentences.face;
    const empty = [...list.querySelectorAll("textarea")].find((a) => !a.value) ?? area;
    empty.scrollIntoView({ block: "center" });
    empty.focus();
  };
  draft.on("images", () => { draw(); if (draft.view.draft.example && choice() !== asked) readCaptioners(); });
  draft.on("captions", (id) => { list.querySelector(`[data-caption="${CSS.escape(id)}"]`)?.saved(); draw(); });
  draft.on("view", (view) => {
    drawJob(view.caption_job);
    drawBulk();
    drawPrompt();
    drawCommon();
    for (const node of list.children) node.again();
    if (choice() !== asked || (view.caption_job?.state === "finished" && captioners && !captioners[view.caption_job.style]?.there)) readCaptioners();
  });
  return [recipe, h("div", { class: "nl-captioners" }, two.sentences.face, two.tags.face), prompt, says, job, nothing, tools];
}

const size = (mb) => (mb >= 1000 ? (mb / 1000).toFixed(1) + " GB" : Math.round(mb) + " MB");
