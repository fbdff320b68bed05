// The tools page: choose one LoRA file, see what it is, rewrite it for another program.
import { address, attempt, button, fill, get, h, megabytes, poll, post, query, Refused, style } from "/static/core.js";
import { filePicker } from "/static/tools_file.js";
import { report } from "/static/tools_report.js";

const TARGETS = [
  ["kohya", "Most programs", "Kohya's names: AUTOMATIC1111, Forge, ComfyUI, SD.Next, InvokeAI. What LoRAs for download usually have."],
  ["diffusers", "diffusers", "The names of diffusers and PEFT, for Python scripts; ComfyUI reads them too."],
  ["comfy", "ComfyUI alone", "ComfyUI's own names. No other program reads them."],
];

export async function mount(root) {
  await style("tools");
  let source = null;  // {path} | {upload} | {run, file}, of the file that was chosen
  const picker = filePicker((chosen) => { source = chosen; address({ inspect: null, convert: null, run: null, file: null }); look.reset(); turn.reset(); draw(); if (chosen) look.start(); });

  // Inspect

  const look = job("inspect", "Looking into the file …", (done) => report(done));
  const lookHint = h("p", { class: "la-muted" }, "Choose a file above; what it is stands here in a moment.");

  // Convert

  const radios = (name, legend, choices, change) => h("fieldset", { class: "la-choices" }, h("legend", { class: "la-label la-legend" }, legend),
    choices.map(([value, title, says], k) => h("label", { class: "la-choice", data: { value } }, h("input", { type: "radio", name, value, checked: k === 0, on: { change } }), h("b", {}, title), h("span", { class: "la-help" }, says))));
  const picked = (name) => root.querySelector(`input[name="${name}"]:checked`)?.value;
  const where = h("div", {});
  const turn = job("convert", "Rewriting the file …", (done) => [
    h("div", { class: "la-note la-note-good" }, done.text),
    done.notes.length ? h("div", {}, h("p", { class: "la-label" }, "What to know"), h("ul", { class: "lt-sentences" }, done.notes.map((t) => h("li", {}, t)))) : null,
    h("div", { class: "la-row" }, h("a", { class: "la-btn la-btn-primary", href: done.download, download: done.file }, "Download"), h("span", { class: "la-small la-muted la-mono lt-break" }, `${done.file}, ${megabytes(done.file_bytes)}`)),
  ]);
  const convert = button("Convert", () => {
    if (!source) return picker.missing();
    turn.start({ to: picked("to"), beside: picked("where") === "beside" });
  }, { kind: "primary", id: "convert" });

  /** A tool at work: its button's start, what it says, its result. Goes on being followed after a reload. */
  function job(kind, words, shown) {
    const bar = h("div", { class: "lt-bar", role: "progressbar", "aria-label": words }, h("div", {}));
    const seconds = h("span", { class: "la-num la-muted" });
    const cancel = button("Cancel", () => attempt(() => post(`/tools/${id}/cancel`)).then(() => watch?.now()), { kind: "quiet" });
    const working = h("div", { class: "la-stack", hidden: true }, h("div", { class: "la-row la-between" }, h("span", {}, words, " ", seconds), cancel), bar);
    const said = h("p", { class: "la-note la-note-bad", hidden: true });
    const again = button("Try again", () => start(), { hidden: true });
    const out = h("div", { class: "la-stack lt-out" });
    const status = h("p", { class: "la-sr", role: "status" });
    const node = h("div", { class: "la-stack", data: { job: kind, state: "none" } }, working, said, again, out, status);
    let id = "", watch = null, turnOf = 0;

    function reset() {
      watch?.stop();
      watch = null;
      turnOf += 1;
      id = "";
      node.dataset.state = "none";
      working.hidden = said.hidden = again.hidden = true;
      fill(out);
      status.textContent = "";
    }
    function failed(text) {
      node.dataset.state = "failed";
      working.hidden = true;
      said.hidden = false;
      again.hidden = kind !== "inspect";  // the other one has its button
      said.textContent = status.textContent = text;
    }
    async function start(more = {}) {
      reset();
      const mine = turnOf;
      node.dataset.state = "running";
      working.hidden = false;
      seconds.textContent = "";
      status.textContent = words;
      try {
        const begun = await post("/tools/" + kind, { ...source, ...more });
        if (mine === turnOf) follow(begun.id);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        if (mine === turnOf) failed(error.message);
      }
    }
    /** Show an asking, also one that an earlier visit of the page began. */
    function follow(asking) {
      id = asking;
      address({ [kind]: id });
      watch = poll(async () => {
        let now;
        try {
          now = await get("/tools/" + asking);
        } catch (error) {
          if (error.status !== 404 || asking !== id) throw error;
          watch?.stop();
          return void failed(error.message);
        }
        if (asking !== id) return 60;
        working.hidden = now.state !== "running";
        node.dataset.state = now.state;
        if (now.state === "running") {
          seconds.textContent = now.seconds >= 2 ? `${Math.round(now.seconds)} s` : "";
          return 0.5;
        }
        watch?.stop();
        if (now.state === "failed") return void failed(now.text);
        fill(out, shown(now));
        status.textContent = now.verdict?.text ?? now.text;
      });
    }
    return { node, start, reset, follow };
  }

  function draw() {
    lookHint.hidden = Boolean(source);
    const before = picked("where");
    fill(where, source?.path
      ? radios("where", "Where to", [["beside", "Beside the file", "A new file in the same folder. Nothing there is written over."], ["download", "Download", "Your browser puts it where downloads go."]])
      : []);
    where.hidden = !source?.path;
    const kept = where.querySelector(`input[value="${before}"]`);
    if (kept) kept.checked = true;
  }

  const card = (id, title, lead, ...rest) => h("section", { class: "la-section", "aria-labelledby": id }, h("h2", { class: "la-h2", id }, title), lead && h("p", { class: "la-lead" }, lead), rest);
  fill(root, h("div", { id: "la-main", class: "la-main lt" },
    h("h1", { class: "la-h1" }, "Tools"),
    h("p", { class: "la-lead lt-intro" }, "For LoRA files of any origin. Nothing here changes the file that you give."),
    picker.node,
    card("lt-inspect", "Inspect a LoRA", "What it is, whether it can have any effect, and which programs read all of it.", lookHint, look.node),
    card("lt-convert", "Convert a LoRA", "The same numbers under the names that another program looks for.", h("div", {}, radios("to", "For", TARGETS)), where, h("div", {}, convert), turn.node)));
  draw();

  // What the address names: askings of an earlier visit, or a run's file

  const asked = {};
  for (const [kind, tool] of [["inspect", look], ["convert", turn]]) {
    const id = query(kind);
    if (!id) continue;
    try {
      asked[kind] = await get("/tools/" + encodeURIComponent(id));
      tool.follow(id);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      address({ [kind]: null });
    }
  }
  const before = asked.inspect || asked.convert;
  if (before) {
    source = before.source;
    picker.show(before.source, before.name);
    draw();
  } else if (query("run") && query("file")) picker.choose({ run: query("run"), file: query("file") }, query("file"));
}
