// Folded away under the images: crops of all of them, and masks: what they weigh, by transparency, by words.
import { ask, attempt, button, debounce, field, fill, get, h, plural, post, Refused, toast } from "/static/core.js";
import { undo } from "/static/draft.js";

const BUSY = ["waiting", "starting", "running"];

export function masksPanel(page) {
  const { draft } = page;
  const present = () => draft.images.images.filter((i) => !i.removed);
  let words = null, timer;

  const all = (how, said) => async () => {
    const answer = await attempt(() => draft.changeImages(() => post("/images/focus", { how })));
    if (answer) toast(answer.changed ? said(answer.changed) : "No crop had to be moved.", "", answer.changed ? ["Undo", () => undo(draft)] : null);
  };
  const crops = h("div", { class: "la-stack" }, h("h3", { class: "la-h3" }, "Crops"),
    h("p", { class: "la-help" }, "An image is cut to the shape that it is trained in. Drag the bright part on a picture, or move it with the arrow keys."),
    h("div", { class: "la-row" }, button("All around the subject", all("subject", (n) => plural(n, "crop") + " moved to where something stands out."), { id: "crops-subject" }), button("Centre all", all("centre", (n) => plural(n, "crop") + " centred."), { id: "crops-centre" })));

  const count = h("p", { class: "la-help", role: "status" });

  // What is outside of masks

  const outside = h("input", { type: "range", id: "unmasked-weight", min: 0, max: 1, step: 0.01, on: { input: () => { shown.textContent = outside.value; weigh(Number(outside.value)); } } });
  const weigh = debounce((value) => draft.patch({ changes: { "dataset.unmasked_weight": value === draft.view.preset_values["dataset.unmasked_weight"] ? null : value } }, true), 200);
  const shown = h("output", { class: "la-num la-small", htmlFor: "unmasked-weight" });
  const weight = h("div", { class: "nl-outside" }, h("label", { class: "la-label", htmlFor: "unmasked-weight" }, "Weight outside masks"), h("div", { class: "la-row" }, outside, shown),
    h("p", { class: "la-help" }, "How much the dimmed part counts: 0 not at all, 1 as much as the rest. A little keeps the background from going wild."));
  const off = h("p", { class: "la-note la-note-warn" }, "Masks are not used: they are switched off in the settings. ", button("Use them", () => draft.patch({ changes: { "dataset.masks": null } }, true), { kind: "link" }));

  // Transparency

  const clearText = h("p", { class: "la-help" });
  const use = button("Let transparency count as a mask", () => draft.patch({ changes: { "dataset.masks": "alpha" } }, true), { id: "masks-alpha-use" });
  const make = button("Make masks of it", async () => {
    const answer = await attempt(() => draft.changeImages(() => post("/images/masks/alpha")));
    if (answer) toast(`${plural(answer.changed, "mask")} made.`, "", answer.changed ? ["Undo", () => undo(draft)] : null);
  }, { id: "masks-alpha" });
  const clear = h("div", { class: "la-stack" }, clearText, h("div", { class: "la-row" }, use, make));

  // By words

  const prompt = field("Masks by words", h("input", { type: "text", id: "mask-words", maxLength: 200 }), { help: "Say what shall be learned; a model looks for it in each image." });
  const begin = button("Make masks", () => start(), { id: "mask-words-begin" });
  prompt.control.addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.ctrlKey) { e.preventDefault(); start(); } });
  const bar = h("div", {}), jobText = h("span", { class: "la-small", role: "status", id: "mask-status" });
  const meter = h("div", { class: "la-progress", role: "progressbar", "aria-label": "Masks", "aria-valuemin": 0 }, bar);
  const stop = button("Cancel", async () => take(await attempt(() => post("/images/masks/words/cancel"))), { kind: "quiet", id: "mask-cancel" });
  const job = h("div", { class: "nl-job", hidden: true }, meter, h("div", { class: "la-row la-between" }, jobText, stop));

  async function start() {
    prompt.error("");
    const text = prompt.control.value.trim() || prompt.control.placeholder, images = present(), some = images.filter((i) => i.mask).length;
    if (!text) return prompt.error("Say what the masks shall show, like cat or a person.");
    if (!words) await read();
    if (!words) return;
    if (words.note) return prompt.error(words.note);
    let which = some < images.length ? "missing" : "all";
    if (!words.there || some) {
      const says = [];
      if (!words.there) says.push(h("p", {}, `This uses the model ${words.source}. It is downloaded once from huggingface.co${words.size_mb ? `: about ${words.size_mb} MB` : " (how large it is, is said before it begins)"}. Your pictures stay on this computer.`));
      if (some) says.push(h("p", {}, `${some === images.length ? "All" : some} of your ${plural(images.length, "picture")} have a mask. If they are made anew, a backup is kept and Undo brings them back.`));
      which = await ask("Make which masks?", says, [["Cancel", null, "quiet"], some ? ["All, anew", "all", some < images.length ? "" : "primary"] : null,
        some < images.length ? [some ? `Only the ${images.length - some} without` : words.there ? "Make masks" : "Download and make", "missing", "primary"] : null].filter(Boolean));
      if (!which) return;
    }
    try {
      take(await post("/images/masks/words", { prompt: text, which }));
      await draft.refresh();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      prompt.error(error.message);
    }
  }
  async function read() {
    try { take(await get("/images/masks/words")); } catch (error) { if (!(error instanceof Refused)) throw error; follow(); }
  }
  function follow() {
    clearTimeout(timer);
    if (words?.job && BUSY.includes(words.job.state)) timer = setTimeout(() => (document.hidden ? follow() : read()), 1000);
  }
  function take(answer) {
    if (!answer) return;
    const before = words?.job;
    words = answer;
    const j = words.job;
    job.hidden = !j || (j.state === "finished" && !BUSY.includes(before?.state) && job.hidden);
    if (j) {
      const busy = BUSY.includes(j.state);
      meter.hidden = stop.hidden = !busy;
      begin.disabled = busy;
      bar.style.width = (j.total ? (100 * j.done) / j.total : 0) + "%";
      meter.setAttribute("aria-valuenow", j.done);
      meter.setAttribute("aria-valuemax", j.total);
      const found = j.done === j.found ? `${plural(j.found, "mask")} made.` : `${plural(j.found, "mask")} made; in ${j.done - j.found} nothing like “${j.prompt}” was found.`;
      jobText.textContent = { waiting: "Waiting for its turn …", starting: "Starting …", running: j.total ? `Masking “${j.prompt}”: ${j.done} of ${j.total}.` : j.text || "Loading the model …",
        finished: found, stopped: "Cancelled; " + found, failed: "The masks were not made: " + (j.text || "no reason was given."), lost: "It ended without a word. Start it again; what it had made is kept." }[j.state];
      job.classList.toggle("la-error", j.state === "failed" || j.state === "lost");
      if (before && (before.done !== j.done || before.state !== j.state)) draft.refresh();
    }
    follow();
  }

  const masks = h("div", { class: "la-stack" }, h("h3", { class: "la-h3" }, "Masks"), h("p", { class: "la-help" }, "A mask says which part of an image is learned. Most trainings need none; they help where the same background is in every image. ", h("a", { href: "/help/images.md" }, "More on crops and masks")), count, off, weight, clear,
    h("div", { class: "nl-masks-words" }, prompt.node, begin), job);
  const summary = h("summary", {}, "Crops and masks");
  const node = h("details", { class: "nl-masks", id: "crops-masks", on: { toggle() { if (node.open && !words) read(); } } }, summary, h("div", { class: "nl-masks-body" }, crops, masks));

  function draw() {
    if (!draft.view || !draft.images) return;
    const images = present(), masked = images.filter((i) => i.mask).length, see = images.filter((i) => i.transparent && !i.mask).length, how = draft.view.values["dataset.masks"];
    node.hidden = !images.length;
    summary.textContent = "Crops and masks" + (masked ? ` (${plural(masked, "mask")})` : "");
    count.textContent = masked ? `${masked} of ${plural(images.length, "image")} have a mask.` : "No image has a mask. Paint one: the round button on a picture, then Mask.";
    off.hidden = how !== "off" || !masked;
    weight.hidden = !(masked || (see && how === "alpha")) || how === "off";
    clear.hidden = !see;
    use.hidden = how === "alpha";
    clearText.textContent = how === "alpha" ? `The transparency of ${plural(see, "image")} counts as a mask.` : `${plural(see, "image")} ${see === 1 ? "has" : "have"} transparent parts, which can serve as a mask.`;
    prompt.control.placeholder = draft.value("class_word");
    if (document.activeElement !== outside) { outside.value = draft.view.values["dataset.unmasked_weight"]; shown.textContent = outside.value; }
  }
  draft.on("images", draw);
  draft.on("view", draw);
  return node;
}
