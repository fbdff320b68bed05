// The page on which a training is prepared: one scroll, five steps, and every setting in a drawer.
import { ask, attempt, button, fill, h, post, style, toast } from "/static/core.js";
import { openDraft, undo } from "/static/draft.js";
import { imagesSection } from "/static/images.js";
import { captionsSection } from "/static/captions.js";
import { seenPanel } from "/static/seen.js";
import { purposeSection } from "/static/purpose.js";
import { modelsSection } from "/static/models.js";
import { startSection } from "/static/start.js";
import { advancedDrawer } from "/static/advanced.js";

export async function mount(root) {
  await style("new_lora", "images", "crop", "datasets");
  const draft = openDraft();
  const notice = h("p", { class: "la-loading", role: "status" }, "Loading …");
  fill(root, h("div", { id: "la-main", class: "la-main nl" }, notice));
  await draft.ready((sentence) => { notice.textContent = sentence; });

  // Where the finger of the preflight list points: each section says how to reach its fields.
  const places = {};
  const page = { draft, places, go: (place) => (places[place] ?? (place.startsWith("data.") ? places.sets : (key) => places.setting(key)))(place) };
  const section = (number, id, title, lead, ...rest) => h("section", { class: "la-section", id: "nl-" + id, "aria-labelledby": `nl-${id}-title`, data: { section: id } },
    h("div", { class: "nl-head" }, h("h2", { class: "la-h2", id: `nl-${id}-title` }, h("span", { class: "la-number" }, number), title), lead && h("p", { class: "la-lead" }, lead)), rest);

  fill(root, h("div", { id: "la-main", class: "la-main nl" },
    h("div", { class: "la-row la-between nl-top" },
      h("div", {}, h("h1", { class: "la-h1" }, "New LoRA"), h("p", { class: "la-lead" }, "Teach your model one thing from a handful of pictures: 10 to 20 are enough.")),
      h("div", { class: "la-row" }, savedLine(draft), button("Start over", () => startOver(draft), { kind: "quiet", id: "start-over" }))),
    section(1, "images", "Images", "", imagesSection(page)),
    section(2, "what", "What is it?", "", purposeSection(page)),
    section(3, "model", "Which model?", "The model you make pictures with. It is used where it is and never changed.", modelsSection(page)),
    section(4, "captions", "Captions", "", captionsSection(page)),
    section(5, "start", "Start", "", startSection(page), advancedDrawer(page))));
  document.getElementById("nl-captions").append(seenPanel(page));

  document.addEventListener("keydown", (event) => {
    const writing = event.target.closest?.("input:not([type=radio]):not([type=checkbox]):not([type=file]), textarea, select, [contenteditable]");
    if (!(event.ctrlKey || event.metaKey) || writing || document.querySelector("dialog[open]")) return;
    if (event.key === "Enter") { event.preventDefault(); page.start(); }
    if (event.key.toLowerCase() === "z" && !event.shiftKey && draft.images.undo) { event.preventDefault(); undo(draft); }
  });
}

/** One quiet line: what was typed is on the disk, or it is not. */
function savedLine(draft) {
  const line = h("span", { class: "la-small la-muted nl-saved", id: "draft-saved" });
  const show = () => {
    const text = { saved: "Saved on this computer", saving: "Saving …", lost: "Not saved yet: the server does not answer. What you typed is kept here and sent when it is back." }[draft.saving];
    line.dataset.state = draft.saving;
    if (draft.saving === "lost") line.setAttribute("role", "alert");  // "Saving, saved" at each word would only disturb
    else line.removeAttribute("role");
    line.classList.toggle("nl-lost", draft.saving === "lost");
    if (line.textContent !== text) line.textContent = text;
  };
  draft.on("saving", show);
  show();
  return line;
}

async function startOver(draft) {
  const { images } = draft.images;
  if (images.some((i) => !i.removed) && !(await ask("Start over?", "The page becomes empty. Your pictures and captions stay on this computer, and Undo brings them back.", [["Cancel", false, "quiet"], ["Start over", true, "primary"]]))) return;
  if (!(await attempt(() => draft.change(() => post("/draft/new"))))) return;
  await draft.refresh();
  document.querySelector("#nl-images .nl-drop button")?.focus();
  toast("A new, empty draft.", "", ["Undo", () => undo(draft)]);
}
