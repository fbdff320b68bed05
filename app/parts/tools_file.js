// Choosing one LoRA file: drop or choose it, name its path, or take one that a run has made.
import { button, field, fill, get, h, megabytes, Refused, unique } from "/static/core.js";

const SUFFIX = /\.safetensors$/i;
const LIMIT = 2 * 1024 ** 3;

/** {node, show(source, name), choose(source, name), missing()}. `chose(source)` is called with {path}, {upload}, {run, file}, or null. */
export function filePicker(chose) {
  const problem = h("p", { class: "la-error", role: "alert", hidden: true });
  const say = (text) => { problem.textContent = text; problem.hidden = !text; };

  // Drop or choose

  const input = h("input", { type: "file", accept: ".safetensors", hidden: true, "aria-label": "LoRA file", on: { change() { take([...input.files]); input.value = ""; } } });
  const face = h("button", { type: "button", class: "lt-drop-face", on: { click: () => input.click() } }, h("span", { class: "lt-drop-title" }, "Drop a LoRA here"), h("span", { class: "la-help" }, "A .safetensors file of up to 2 GB. Or click to choose one."));
  const drop = h("div", { class: "lt-drop" }, face, input);
  const share = h("div", {}), percent = h("span", { class: "la-num" });
  const bar = h("div", { class: "la-progress", role: "progressbar", "aria-label": "Upload", "aria-valuemin": 0, "aria-valuemax": 100 }, share);
  let going = null;
  const sending = h("div", { class: "la-stack lt-sending", hidden: true }, h("div", { class: "la-row la-between" }, h("span", {}, "Sending the file … ", percent), button("Cancel", () => going?.abort(), { kind: "quiet" })), bar);

  function take(files) {
    say("");
    if (files.length !== 1) return say(files.length ? "One file at a time, please." : "");
    const [file] = files;
    if (!SUFFIX.test(file.name)) return say(`${file.name} is not a .safetensors file. LoRAs come as .safetensors; others are not opened here.`);
    if (file.size > LIMIT) return say(`${file.name} has ${megabytes(file.size)}; at most 2 GB can be sent. Give its path instead.`);
    const show = (part) => { const p = Math.round(part * 100); share.style.width = p + "%"; percent.textContent = p + " %"; bar.setAttribute("aria-valuenow", String(p)); };
    const end = (text = "") => { going = null; sending.hidden = true; drop.hidden = false; say(text); };
    going?.abort();
    const request = (going = new XMLHttpRequest());
    const form = new FormData();
    form.append("file", file, file.name);
    request.open("POST", "/api/tools/files");
    request.responseType = "json";
    request.upload.onprogress = (e) => e.lengthComputable && show(e.loaded / e.total);
    request.onload = () => {
      if (request.status >= 400 || !request.response) return end(request.response?.error || `The server answered with status ${request.status}.`);
      end();
      choose({ upload: request.response.upload }, request.response.name, `sent, ${megabytes(request.response.bytes)}`);
    };
    request.onerror = () => end("The upload broke off: the server does not answer. Try again when it is back.");
    request.onabort = () => end();
    show(0);
    sending.hidden = false;
    drop.hidden = true;
    request.send(form);
  }

  // A drop anywhere on the page is meant for this place, and must not make the browser leave it.
  let depth = 0;
  const over = (on) => drop.classList.toggle("lt-over", on);
  const hasFiles = (e) => [...(e.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (e) => { if (hasFiles(e)) { e.preventDefault(); depth += 1; over(true); } });
  document.addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) over(false); });
  document.addEventListener("dragover", (e) => { if (hasFiles(e)) e.preventDefault(); });
  document.addEventListener("drop", (e) => { if (hasFiles(e)) { e.preventDefault(); depth = 0; over(false); open(); take([...e.dataTransfer.files]); } });

  // A path on this computer

  const path = field("Or its path on this computer", h("input", { type: "text", id: "lora-path", spellcheck: false, autocomplete: "off", placeholder: "/home/me/loras/cat.safetensors" }), { help: "The file is read where it is. Quotes around the path are fine." });
  const usePath = () => {
    const typed = path.control.value.trim();
    if (!typed) return path.error("Type or paste the path of a .safetensors file.");
    path.error("");
    choose({ path: typed }, typed.replace(/^["'“‘]+|["'”’]+$/g, "").split(/[/\\]/).pop(), "read where it is");
  };
  path.control.addEventListener("keydown", (e) => { if (e.key === "Enter") { e.preventDefault(); usePath(); } });

  // What a run has made

  const select = h("select", { id: "lora-run" });
  const run = field("Or one of your own", select);
  const useRun = () => {
    const entry = exports[Number(select.value)];
    if (entry) choose({ run: entry.run, file: entry.file }, entry.file, `of the run ${entry.name}, step ${entry.step}`);
  };
  const own = h("div", { class: "lt-way", hidden: true }, run.node, button("Use this file", useRun, { "aria-label": "Use the chosen LoRA of a run" }));
  let exports = [];
  async function listRuns() {
    try {
      exports = (await get("/tools/exports")).files;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      return;
    }
    own.hidden = !exports.length;
    const groups = new Map();
    exports.forEach((entry, k) => { if (!groups.has(entry.run)) groups.set(entry.run, []); groups.get(entry.run).push([entry, k]); });
    fill(select, [...groups].map(([id, entries]) => h("optgroup", { label: `${entries[0][0].name} (${id})` }, entries.map(([entry, k]) => h("option", { value: String(k) }, `${entry.file}, step ${entry.step}, ${megabytes(entry.bytes)}`)))));
  }

  // What was chosen

  const name = h("b", { class: "la-mono lt-break" }), from = h("span", { class: "la-muted la-small" });
  const other = button("Choose another", () => { open(); chose(null); face.focus(); }, { id: "other-file" });
  const chosen = h("div", { class: "lt-chosen", hidden: true, data: { chosen: "" } }, h("div", { class: "lt-chosen-words" }, name, from), other);
  const ways = h("div", { class: "lt-ways" }, h("div", {}, drop, sending), h("div", { class: "la-stack lt-others" }, h("div", { class: "lt-way" }, path.node, button("Use this file", usePath, { "aria-label": "Use the file at this path" })), own));
  const title = unique("lt-file");
  const node = h("section", { class: "la-section lt-file", "aria-labelledby": title }, h("h2", { class: "la-sr", id: title }, "The file"), ways, chosen, problem);

  function open() {
    ways.hidden = false;
    chosen.hidden = true;
    listRuns();
  }
  function show(source, text, words = null) {
    say("");
    name.textContent = text;
    from.textContent = words ?? (source.path ? source.path : source.run ? "of the run " + source.run : "sent");
    chosen.dataset.chosen = text;
    chosen.hidden = false;
    ways.hidden = true;
  }
  function choose(source, text, words) {
    const inside = ways.contains(document.activeElement);
    show(source, text, words);
    if (inside) other.focus();  // what had the focus is gone
    chose(source);
  }
  listRuns();
  return { node, show, choose, missing() { say("Choose a file first: drop it here, name its path, or take one of your own."); face.focus(); } };
}
