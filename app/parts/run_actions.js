// What can be done with a run now: buttons by its state, and the dialogs that ask.
import { ask, attempt, button, duration, field, fill, get, h, megabytes, plural, post, Refused, toast, unique } from "/static/core.js";
import { cancelRun } from "/static/run_list.js";

/** A modal form that stays open, with the server's sentence, until `send` succeeds. Resolves to its result, or null when left. */
export function formDialog(title, body, label, send, { kind = "primary", wide = false } = {}) {
  return new Promise((resolve) => {
    const id = unique("dialog"), wrong = h("p", { class: "la-error", role: "alert", hidden: true });
    let result = null;
    const go = button(label, async () => {
      go.disabled = true;
      try {
        result = (await send()) ?? true;
        dialog.close();
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        wrong.textContent = error.message;
        wrong.hidden = error.placed === true;  // the sentence stands at its field already
      } finally {
        go.disabled = false;
      }
    }, { kind });
    const dialog = h("dialog", { class: "la la-dialog" + (wide ? " la-dialog-wide" : ""), "aria-labelledby": id, on: { close() { dialog.remove(); resolve(result); },
      keydown(e) { if (e.key === "Enter" && (e.ctrlKey || e.metaKey || e.target.matches("input:not([type=search])"))) { e.preventDefault(); go.click(); } } } },
      h("h2", { id, class: "la-h2" }, title), h("div", { class: "la-dialog-body la-stack" }, body, wrong),
      h("div", { class: "la-row la-end" }, button("Cancel", () => dialog.close()), go));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** `path` of the run's routes; `changed()` after each action, `gone()` when the run is deleted, `open(id)` shows another run.
 *  Returns {node, show(run)}. */
export function runActions({ path, changed, gone, open, exports, previews }) {
  let run = null, shown = "";
  const main = h("div", { class: "la-row" }), more = h("div", { class: "la-row la-run-more" });
  const node = h("div", { class: "la-run-actions", role: "group", "aria-label": "Actions" }, main, more);

  async function send(action, body = {}, said = "") {
    const answer = await attempt(() => post(`${path}/${action}`, body));
    if (answer === undefined) return;
    if (said) toast(said, "good");
    changed();
    return answer;
  }

  const make = {
    resume: () => button("Resume", () => send("resume", {}, "It goes on from its last saved state."), { kind: "primary" }),
    results: () => h("a", { class: "la-btn" + (run.state === "finished" ? " la-btn-primary" : ""), href: "/results?run=" + encodeURIComponent(run.id) }, "See results"),
    stop: () => button("Stop", () => send("stop")),
    preview: () => button("Preview now", () => send("preview")),
    save: () => button("Save now", () => send("save")),
    edit: () => button("Edit settings", async () => { const { editSettings } = await import("/static/run_edit.js"); if (await editSettings(run, path)) { toast("The settings are changed.", "good"); changed(); } }, { kind: "primary" }),
    prompts: () => button("Change prompts", prompts, { kind: "quiet" }),
    length: () => button("Change length", length, { kind: "quiet" }),
    further: () => button("Train further", further),
    start: () => button("Start from this LoRA", () => draft(true), { kind: "quiet" }),
    settings: () => button("Use these settings", () => draft(false), { kind: "quiet" }),
    duplicate: () => button("Duplicate", duplicate, { kind: "quiet", title: "A waiting copy at the end of the queue" }),
    cancel: () => button("Take out of the queue", async () => { if (await cancelRun(run)) run.step ? changed() : gone(); }),
    notify: () => button("Tell me when it ends", notify, { kind: "quiet" }),
    discard: () => button("Discard", discard, { kind: "quiet", class: "la-btn la-btn-quiet la-discard" }),
  };
  const MAIN = ["resume", "results", "edit", "stop", "preview", "save", "further", "cancel"];
  const MORE = ["prompts", "length", "start", "settings", "duplicate", "notify", "discard"];

  function possible() {
    const can = new Set(run.actions);
    const ended = !["waiting", "starting", "running"].includes(run.state);
    if (!ended) can.delete("duplicate"), run.state === "waiting" && can.add("duplicate");
    if (run.state === "waiting") can.delete("discard");  // leaving the queue does it for one that never ran
    if (ended && exports().length) can.add("results").add("start");
    if (run.state !== "running" && run.state !== "starting") can.add("settings");
    if ("Notification" in window && !ended && !(localStorage.getItem("la-notify") === "1" && Notification.permission === "granted")) can.add("notify");
    return can;
  }

  const actions = {
    node,
    show(next) {
      run = next;
      const can = possible(), names = [...MAIN, ...MORE].filter((n) => can.has(n)), now = run.state + names.join();
      if (now !== shown) {
        shown = now;
        const focused = node.contains(document.activeElement) ? document.activeElement.dataset.action : null;
        const built = (list) => list.filter((n) => can.has(n)).map((n) => { const b = make[n](); b.dataset.action = n; return b; });
        fill(main, built(MAIN));
        fill(more, built(MORE));
        if (focused) (node.querySelector(`[data-action=${focused}]`) || node.querySelector("button, a"))?.focus();
      }
      for (const kind of ["stop", "save", "preview"]) {
        const b = node.querySelector(`[data-action=${kind}]`);
        if (b) b.disabled = (run.pending || []).includes(kind);
      }
    },
  };
  return actions;

  async function duplicate() {
    const answer = await send("duplicate", {}, "A copy waits at the end of the queue.");
    if (answer) open(answer.id);
  }

  async function discard() {
    const bytes = exports().reduce((sum, e) => sum + e.bytes, 0), pictures = previews().reduce((sum, p) => sum + p.images.length, 0);
    const gone_ = [pictures && plural(pictures, "picture"), exports().length && `${plural(exports().length, "LoRA file")} (${megabytes(bytes)})`, "the state from which it could be resumed", "its comparison, its log, and its own copy of the images"].filter(Boolean);
    const live = ["starting", "running"].includes(run.state);
    const yes = await ask(`Discard ${run.name}?`, [
      h("p", {}, (live ? "It is stopped at once, and its folder is deleted for good: " : "Its folder is deleted for good: ") + gone_.join(", ") + "."),
      h("p", { class: "la-mono la-gap" }, run.folder), h("p", { class: "la-gap" }, "The images and captions of the New LoRA page stay, and so do files that you copied elsewhere.")],
    [["Keep it", false], ["Discard for good", true, "danger"]]);
    if (!yes) return;
    if ((await attempt(() => post(path + "/discard", { confirm: true }))) !== undefined) { toast(`${run.name} is discarded.`, "good"); gone(); }
  }

  async function notify() {
    if ((await Notification.requestPermission()) !== "granted") return void toast("The browser does not allow notifications for this page; allow them beside the address.", "bad");
    localStorage.setItem("la-notify", "1");
    toast("The browser tells you when a run ends or fails, while one of these pages is open.", "good");
    actions.show(run);  // its button has done its work
  }

  /** The New LoRA page with this run's settings and images. */
  async function draft(start) {
    const now = await attempt(() => get("/draft"));
    if (!now) return;
    const title = start ? `Start from ${run.name}` : "Use these settings";
    const says = (start ? "The New LoRA page is filled with this run's settings and images, and the training begins from its LoRA instead of from nothing." : "The New LoRA page is filled with this run's settings and images.")
      + (now.images ? ` What stands there now (${plural(now.images, "image")}) is put aside; the files stay on disk.` : "");
    if (!(await ask(title, says, [["Cancel", false], ["Go there", true, "primary"]]))) return;
    if ((await attempt(() => post("/draft/from-run", { run: run.id, start }))) !== undefined) location.assign("/");
  }

  async function prompts() {
    const list = h("div", { class: "la-stack" });
    const add = button("Add a prompt", () => { row(""); list.lastChild.querySelector("textarea").focus(); }, { kind: "link" });
    const count = () => [...list.children].forEach((item, k) => {
      item.querySelector("label").textContent = "Prompt " + (k + 1);
      const b = item.querySelector(".la-btn");
      b.hidden = list.children.length === 1;
      b.setAttribute("aria-label", `Remove prompt ${k + 1}`);
    });
    function row(text) {
      const f = field("Prompt", h("textarea", { rows: 2, value: text }));
      const item = h("div", { class: "la-prompt-row" }, f.node, button("Remove", () => { item.remove(); count(); }, { kind: "link" }));
      list.append(item);
      count();
    }
    (run.prompts.length ? run.prompts : [""]).forEach(row);
    const read = () => [...list.querySelectorAll("textarea")].map((t) => t.value.trim()).filter(Boolean);
    if (await formDialog("Preview prompts", [h("p", {}, "From the next pictures on. A new prompt gets a row of its own in the table."), list, h("div", {}, add)], "Use these prompts", () => post(path + "/prompts", { prompts: read() }))) changed();
  }

  function stepsFor(visits) {
    return Math.round((run.total / (run.visits || 1)) * visits);
  }
  /** About how long `steps` more steps take, from the speed so far; "" where nothing is known. */
  function time(steps) {
    const each = run.eta_s && run.total > run.step ? run.eta_s / (run.total - run.step) : run.step ? run.seconds / run.step : 0;
    return each && steps > 0 ? "about " + duration(each * steps) : "";
  }

  async function length() {
    const control = h("input", { type: "number", min: Math.max(1, Math.ceil(run.epoch)), step: 1, value: run.visits });
    const f = field("Visits to each image", control, { help: "How often each image is seen in the whole run." });
    const says = h("p", { class: "la-num", role: "status" });
    const show = () => {
      const steps = stepsFor(+control.value), left = steps - run.step;
      says.textContent = !(+control.value > 0) ? "" : left > 0 ? [`${steps} steps in all`, `${left} to go`, time(left)].filter(Boolean).join(", ") + "." : `Step ${run.step} is past that; take ${Math.ceil(run.epoch) + 1} or more, or stop the run.`;
    };
    control.addEventListener("input", show);
    show();
    if (await formDialog("Total length", [f.node, says, h("p", {}, run.learning_rate_note)], "Change the length", () => post(path + "/length", { visits: Math.round(+control.value) }))) changed();
  }

  async function further() {
    const name = unique("further"), base = run.visits || 1;
    const options = [25, 50, 100].map((percent) => {
      const visits = base + Math.max(1, Math.round(((run.visits_at_first || base) * percent) / 100)), steps = stepsFor(visits);
      return h("label", { class: "la-choice" }, h("input", { type: "radio", name, value: percent, checked: percent === 25 }), h("b", {}, `+${percent} %`),
        h("span", { class: "la-help la-num" }, [`to ${visits} visits`, `${steps - run.step} more steps`, time(steps - run.step)].filter(Boolean).join(", ")));
    });
    const set = h("fieldset", { class: "la-choices la-further" }, h("legend", { class: "la-sr" }, "How much further"), options);
    const done = await formDialog("Train further", [set, h("p", {}, run.learning_rate_note), h("p", {}, "Files that are there stay; the run goes on from its last state.")], "Train further",
      () => post(path + "/further", { percent: +set.querySelector(":checked").value }));
    if (done) changed();
  }
}
