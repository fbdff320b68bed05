// Section 1: pictures come in, and stand there as the training will see them.
import { attempt, button, api, field, fill, h, lightbox, plural, post, Refused, toast } from "/static/core.js";
import { cropped, draggable, editor, mover } from "/static/crop.js";
import { keyed, undo } from "/static/draft.js";
import { adviceList } from "/static/advice.js";
import { chooser, furtherSets } from "/static/datasets.js";
import { chosen, dropped, looking, sorted, upload } from "/static/intake.js";
import { masksPanel } from "/static/masks.js";

const FEW = 24;  // cards shown at first: Start must not be pushed out of reach by 300 pictures
const SHORT = { small: "small", blurred: "blurred", duplicate: "duplicate", bars: "bars", long: "long", odd: "odd", crop: "cut off" };
const ACCEPT = "image/*,.txt,.caption,.jsonl,.csv,.tsv,.json,.zip";

export function imagesSection(page) {
  const { draft } = page;
  let all = false, noted = false, only = null;  // only: the ids that an advice is about
  const shown = () => draft.images.images.filter((i) => !i.removed);

  // Coming in

  const files = h("input", { type: "file", multiple: true, accept: ACCEPT, class: "la-offscreen", tabIndex: -1, "aria-label": "Choose images", id: "choose-files", on: { change: () => come(chosen(files), files) } });
  const folder = h("input", { type: "file", webkitdirectory: true, multiple: true, class: "la-offscreen", tabIndex: -1, "aria-label": "Choose a folder of images", id: "choose-folder", on: { change: () => come(chosen(folder), folder) } });
  const dropTitle = h("b", { class: "nl-drop-title" }), dropHelp = h("span", { class: "la-help" });
  const dropButton = h("button", { type: "button", class: "nl-drop-face", on: { click: () => files.click() } }, icon(), h("span", { class: "nl-drop-words" }, dropTitle, dropHelp));
  const drop = h("div", { class: "nl-drop" }, dropButton);
  const bar = h("div", {}), cancel = button("Cancel", () => going?.cancel(), { kind: "quiet" });
  const progressText = h("span", { class: "la-small", role: "status" });
  const progress = h("div", { class: "nl-upload", hidden: true }, h("div", { class: "la-progress", role: "progressbar", "aria-label": "Upload" }, bar), h("div", { class: "la-row la-between" }, progressText, cancel));
  const problems = h("div", { class: "la-note la-note-warn nl-problems", role: "alert", hidden: true });
  let going = null;

  async function come(list, input = null) {
    if (input) input.value = "";
    if (!list.length) return;
    if (list.length === 1 && /\.(toml|json)$/i.test(list[0][0]) && list[0][0] !== "crops.json") return page.importFile(list[0][1]);
    if (going) return void toast("Wait until the upload that runs has ended.");
    const { take, problems: left } = sorted(list);
    tell(left);
    if (!take.length) return;
    let end = () => {};
    const sent = upload(take, (share) => {
      if (share < 1) return meter(share, `Uploading ${plural(take.length, "file")}: ${Math.round(100 * share)} %`);
      end();
      end = look();
    });
    going = sent;
    meter(0, `Uploading ${plural(take.length, "file")} …`);
    try {
      took(await draft.changeImages(() => sent.done), left);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      tell([...left, error.message]);
    } finally {
      end();
      done();
    }
  }
  function meter(share, text) {
    progress.hidden = false;
    bar.style.width = 100 * share + "%";
    progress.firstChild.setAttribute("aria-valuenow", Math.round(100 * share));
    progressText.textContent = text;
  }
  function look() {  // what came is looked at on the server, which takes a while for many large pictures
    going = { cancel: () => attempt(() => post("/images/looking/cancel")) };
    meter(0, "Looking at the pictures …");
    return looking((now) => meter(now.done / now.total, `Looking at the pictures: ${now.done} of ${now.total}`));
  }
  function done() {
    going = null;
    progress.hidden = true;
  }
  function took(answer, left = []) {
    tell([...left, ...(answer.problems || [])]);
    if (answer.added) toast(plural(answer.added, "image") + " added.", "good", answer.undo ? ["Undo", () => undo(draft)] : null);
  }
  function tell(sentences) {
    problems.hidden = !sentences.length;
    if (!sentences.length) return;
    const more = sentences.length - 12;
    fill(problems, h("div", { class: "la-row la-between la-top" },
      h("ul", { class: "la-list la-grow" }, sentences.slice(0, 12).map((s) => h("li", {}, s)), more > 0 && h("li", {}, `And ${more} more of this kind.`)),
      h("button", { type: "button", class: "la-x", "aria-label": "Hide these messages", on: { click: () => { problems.hidden = true; } } }, "×")));
  }

  // A drop anywhere on the page is meant for this place (and must not make the browser leave the page).
  let depth = 0;
  const over = (on) => { drop.classList.toggle("nl-over", on); };
  const hasFiles = (e) => [...(e.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (e) => { if (hasFiles(e)) { e.preventDefault(); depth += 1; over(true); } });
  document.addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) over(false); });
  document.addEventListener("dragover", (e) => { if (hasFiles(e)) e.preventDefault(); });
  document.addEventListener("drop", async (e) => {
    if (!hasFiles(e)) return;
    e.preventDefault();
    depth = 0;
    over(false);
    try { await come(await dropped(e.dataTransfer)); }
    catch (error) { if (error instanceof DOMException) tell(["The browser could not read what was dropped: " + error.message + " Use Choose a folder instead."]); else throw error; }
  });
  document.addEventListener("paste", (e) => {
    if (e.clipboardData?.files.length && !e.target.closest("input, textarea")) come([...e.clipboardData.files].map((f) => [f.name, f]));
  });

  // A folder of this computer, used in place

  const path = field("Folder on this computer", h("input", { type: "text", id: "folder-path", spellcheck: false, placeholder: "/home/me/pictures/cat or C:\\pictures\\cat" }), { help: "The pictures are used where they are; nothing is copied or changed. Quotes around the path are fine." });
  const useFolder = async () => {
    if (going) return void toast("Wait until the upload that runs has ended.");
    const end = look();
    try {
      const answer = await draft.changeImages(() => post("/images/folder", { path: path.control.value }));
      path.error("");
      path.control.value = "";
      took(answer);
      local.open = false;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      path.error(error.message);
    } finally {
      end();
      done();
    }
  };
  path.control.addEventListener("keydown", (e) => { if (e.key === "Enter") { e.preventDefault(); useFolder(); } });
  const local = h("details", { class: "nl-local" }, h("summary", {}, "Use a folder on this computer"), h("div", { class: "nl-local-body" }, path.node, button("Use this folder", useFolder, { id: "use-folder" })));

  const example = h("div", { class: "nl-example" }, h("p", { class: "la-small la-soft" },
    button("Try the built-in example", () => attempt(() => draft.change(() => post("/draft/example")).then(draft.refresh)), { kind: "link", id: "try-example" }),
    " – 14 pictures and a toy model, to see how everything works in a few minutes. Its pictures are tiny; it is not for real use."));

  // What is there

  const count = h("p", { class: "la-small nl-count", role: "status", id: "image-count" });
  const filter = button("", () => { noted = !noted && !only; only = null; draw(); }, { kind: "quiet", id: "only-noted" });
  filter.classList.add("la-btn-small");
  const back = button("Undo", () => undo(draft), { kind: "quiet", id: "undo", title: "Ctrl+Z" });
  back.classList.add("la-btn-small");
  const line = h("div", { class: "la-row la-between" }, count, h("div", { class: "la-row" }, filter, back));
  const grid = h("ul", { class: "nl-grid", "aria-label": "Images" });
  const more = button("", () => { all = !all; draw(); }, { kind: "quiet" });

  function draw() {
    const images = shown(), notes = images.filter((i) => i.badges.length);
    const empty = !images.length;
    if (!notes.length) noted = false;
    if (only && !images.some((i) => only.includes(i.id))) only = null;
    drop.classList.toggle("nl-drop-small", !empty);
    dropTitle.textContent = empty ? "Drop your pictures here" : "Add more pictures";
    dropHelp.textContent = empty ? "Images, a folder or a zip; captions in .txt files beside them are taken along. Or click to choose." : "Drop them anywhere on this page, or click to choose.";
    example.hidden = !empty;
    line.hidden = empty && !draft.images.undo;
    const captioned = images.filter((i) => i.has_caption).length;
    count.textContent = empty ? "No images." : plural(images.length, "image") + (captioned ? `, ${captioned === images.length ? "all" : captioned} with a caption` : ", no captions yet") + (images.some((i) => i.linked) ? ", used in place" : "") + ".";
    count.dataset.images = images.length;
    filter.hidden = !notes.length && !only;
    filter.textContent = noted || only ? "Show all" : `Show the ${notes.length} with notes`;
    filter.setAttribute("aria-pressed", String(noted || Boolean(only)));
    back.hidden = !draft.images.undo;
    back.textContent = "Undo: " + draft.images.undo.charAt(0).toLowerCase() + draft.images.undo.slice(1);
    const wanted = only ? images.filter((i) => only.includes(i.id)) : noted ? notes : images;
    keyed(grid, all || wanted.length <= FEW * 1.5 ? wanted : wanted.slice(0, FEW), card);
    grid.hidden = empty;
    grid.classList.toggle("nl-noted", noted);
    more.hidden = wanted.length <= FEW * 1.5;
    more.textContent = all ? "Show fewer" : `Show all ${wanted.length} images`;
  }

  function card(first) {
    let image = first;
    const picture = h("img", { loading: "lazy", decoding: "async", draggable: false });
    const kept = h("span", { class: "nl-kept" });
    const frame = h("span", { class: "nl-frame" }, picture, kept);
    const notes = h("span", { class: "nl-notes" }), facts = h("span", { class: "nl-facts la-num" }), name = h("span", { class: "nl-name" });
    const masked = h("span", { class: "nl-masked" }, "Mask");
    const open = h("button", { type: "button", class: "nl-open", on: { click: () => dragging.dragged() || enlarge(draft, image.id), keydown: (e) => move.key(e) } }, frame);
    const move = mover(draft, () => image, (crop) => cropped(kept, crop)), dragging = draggable(open, frame, move);
    const adjust = h("button", { type: "button", class: "nl-adjust", title: "Crop and mask", on: { click: () => editor(draft, image.id) } }, cropIcon());
    const drop = h("button", { type: "button", class: "nl-remove", on: { click: () => remove(image, node) } }, "×");
    const node = h("li", { class: "nl-card", data: { image: first.id } }, h("div", { class: "nl-picture" }, open, masked, adjust, drop), h("div", { class: "nl-under" }, name, facts, notes));
    node.update = (now) => {
      image = now;
      if (picture.getAttribute("src") !== now.thumb) picture.src = now.thumb;
      picture.alt = now.name;
      open.setAttribute("aria-label", "Enlarge " + now.name);
      drop.setAttribute("aria-label", "Remove " + now.name);
      drop.title = "Remove";
      frame.style.aspectRatio = `${now.width} / ${now.height}`;
      frame.classList.toggle("nl-tall", now.height > now.width);
      cropped(kept, move.crop());
      node.classList.toggle("nl-movable", move.free().some(Boolean));
      masked.hidden = !now.mask;
      adjust.hidden = !now.width;  // it cannot be read
      open.setAttribute("aria-description", move.free().some(Boolean) ? "The arrow keys move its crop." : "");
      adjust.setAttribute("aria-label", "Crop and mask of " + now.name);
      name.textContent = name.title = now.name;
      facts.textContent = `${now.width} × ${now.height}`;
      fill(notes, now.badges.map((b) => h("span", { class: "la-badge la-badge-warn", title: b.text, data: { badge: b.kind } }, SHORT[b.kind] || b.kind, h("span", { class: "nl-note-text" }, ": " + b.text))));
      node.title = now.bucket ? `Trained as ${now.bucket[0]} × ${now.bucket[1]}; what is dimmed is cut off.${move.free().some(Boolean) ? " Drag the bright part to move it." : ""}` : "";
    };
    return node;
  }

  async function remove(image, node) {
    const next = node.nextElementSibling ?? node.previousElementSibling;
    const done = await attempt(() => draft.change(async () => { await api("PATCH", "/images/" + image.id, { removed: true }); return api("GET", "/draft"); }));
    if (!done) return;
    await draft.refresh();
    (next?.querySelector(".nl-remove") ?? dropButton).focus();
    toast(image.name + " removed.", "", ["Undo", () => undo(draft)]);
  }

  page.showImages = (ids) => {
    [only, noted] = [ids, false];
    draw();
    line.scrollIntoView({ block: "center" });
    filter.focus({ preventScroll: true });
  };
  page.places.images = () => { drop.scrollIntoView({ block: "center" }); dropButton.focus(); };
  draft.on("images", draw);
  return [chooser(page), drop, files, folder, h("div", { class: "la-row nl-ways" }, button("Choose files", () => files.click()), button("Choose a folder", () => folder.click()), local), progress, problems, example, adviceList(page), line, grid, more, masksPanel(page), furtherSets(page)];
}

export function enlarge(draft, id) {
  const images = draft.images.images.filter((i) => !i.removed);
  lightbox(images.map((i) => ({ src: i.full, text: [i.name, `${i.width} × ${i.height}`, i.bucket && `trained as ${i.bucket[0]} × ${i.bucket[1]}`, ...i.badges.map((b) => b.text)].filter(Boolean).join(" · ") })), Math.max(0, images.findIndex((i) => i.id === id)));
}

function cropIcon() {
  return h("svg", { viewBox: "0 0 20 20", width: 16, height: 16, "aria-hidden": "true" }, h("path", { d: "M6 2v12h12M2 6h12v12" }));
}

function icon() {
  return h("svg", { viewBox: "0 0 48 48", width: 44, height: 44, "aria-hidden": "true", class: "nl-drop-icon" },
    h("rect", { x: 6, y: 10, width: 36, height: 28, rx: 5 }), h("circle", { cx: 17, cy: 20, r: 3.5 }), h("path", { d: "M8 35 L20 25 L27 31 L34 23 L41 30" }));
}
