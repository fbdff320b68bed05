// The list of runs: what runs now, the queue in its order, and the history with a search.
import { ago, ask, attempt, button, duration, h, plural, post, STATES } from "/static/core.js";

const MOST = 40;

/** `open(id)` shows a run, `changed()` asks for the list again. Returns {node, show(answer of GET /api/runs), mark(id)}. */
export function runList({ open, changed }) {
  const items = new Map();  // id -> item; kept, so that a poll changes words and nothing jumps
  let answer = { runs: [], queue: [] }, chosen = null, dragged = null, all = false;
  const now = group("Now", "now"), queue = group("Queue", "queue"), past = group("History", "history");
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search the history", autocomplete: "off", spellcheck: false, on: { input: () => draw() } });
  const none = h("p", { class: "la-muted la-small", role: "status", hidden: true });
  const more = button("", () => { all = true; draw(); }, { kind: "link", hidden: true });
  past.head.append(search);
  past.node.append(none, more);
  const said = h("p", { class: "la-sr", role: "status", "aria-live": "polite" });

  function group(title, key) {
    const list = h(key === "queue" ? "ol" : "ul", { class: "la-list la-run-list", data: { list: key } });
    const head = h("div", { class: "la-row la-between la-run-group" }, h("h2", { class: "la-h3" }, title));
    return { list, head, node: h("section", { hidden: true, "aria-label": title }, head, list) };
  }

  function item(id) {
    const img = h("img", { alt: "", width: 44, height: 44, loading: "lazy" });
    const blank = h("span", { class: "la-run-blank", "aria-hidden": "true" });
    const name = h("span", { class: "la-run-name la-ellipsis" }), state = h("span", { class: "la-badge" }), says = h("span", { class: "la-small la-muted la-ellipsis la-num" });
    const link = h("a", { class: "la-run-link", href: "/runs?run=" + encodeURIComponent(id), draggable: false, on: { click(e) {
      if (e.metaKey || e.ctrlKey || e.shiftKey || e.button) return;
      e.preventDefault();
      open(id);
    } } }, h("span", { class: "la-run-picture" }, img, blank), h("span", { class: "la-run-words" }, h("span", { class: "la-run-top" }, name, state), says));
    const up = button("↑", () => move(id, -1, up), { kind: "quiet", class: "la-btn la-btn-quiet la-mini" });
    const down = button("↓", () => move(id, 1, down), { kind: "quiet", class: "la-btn la-btn-quiet la-mini" });
    const drop = button("×", () => cancel(id), { class: "la-btn la-btn-quiet la-mini" });
    const tools = h("div", { class: "la-run-tools", hidden: true }, up, down, drop);
    const node = h("li", { class: "la-run-item", data: { run: id } }, link, tools);
    node.addEventListener("dragstart", (e) => { dragged = id; e.dataTransfer.effectAllowed = "move"; e.dataTransfer.setData("text/plain", id); node.classList.add("la-dragged"); });
    node.addEventListener("dragend", () => { dragged = null; node.classList.remove("la-dragged"); draw(); });
    return { show(run, at, count) {
      const waiting = run.state === "waiting";
      if (run.thumb && img.getAttribute("src") !== run.thumb) img.src = run.thumb;
      img.hidden = !run.thumb;
      blank.hidden = !!run.thumb;
      put(name, run.name);
      put(blank, run.name.slice(0, 1).toUpperCase());
      state.className = "la-badge la-state-" + run.state;
      put(state, waiting ? (at ? "No. " + (at + 1) : "Next") : run.state === "running" && run.stage === "training" ? run.percent + " %" : STATES[run.state]);
      put(says, sentence(run));
      node.dataset.state = run.state;
      node.draggable = waiting && count > 1;
      tools.hidden = !waiting;
      up.disabled = at === 0;
      down.disabled = at === count - 1;
      up.setAttribute("aria-label", `Move ${run.name} up`);
      down.setAttribute("aria-label", `Move ${run.name} down`);
      drop.setAttribute("aria-label", `Take ${run.name} out of the queue`);
      drop.title = "Take out of the queue";
      run.id === chosen ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }, node, link };
  }
  function sentence(run) {
    if (run.state === "running") return run.stage === "training" ? `step ${run.step} of ${run.total}` + (run.eta_s ? `, ${duration(run.eta_s)} left` : "") : stageWords(run);
    if (run.state === "failed" && run.text) return run.text;
    if (run.state === "waiting") return run.model;
    return [run.model, ago(run.created)].filter(Boolean).join(" · ");
  }

  async function move(id, by, pressed) {
    const to = answer.queue.indexOf(id) + by;
    await place(id, to);
    pressed.disabled ? items.get(id).link.focus() : pressed.focus();
  }
  async function place(id, to) {
    const name = answer.runs.find((r) => r.id === id).name;
    if (await attempt(() => post(`/runs/${encodeURIComponent(id)}/move`, { to })) === undefined) return;
    answer.queue.splice(answer.queue.indexOf(id), 1);
    answer.queue.splice(to, 0, id);
    said.textContent = `${name} is now number ${to + 1} of ${answer.queue.length}.`;
    draw();
    changed();
  }
  async function cancel(id) {
    const run = answer.runs.find((r) => r.id === id);
    if (await cancelRun(run)) changed();
  }

  queue.list.addEventListener("dragover", (e) => {
    if (!dragged) return;
    e.preventDefault();
    const after = [...queue.list.children].find((li) => { const b = li.getBoundingClientRect(); return li.dataset.run !== dragged && e.clientY < b.top + b.height / 2; });
    queue.list.insertBefore(items.get(dragged).node, after || null);
  });
  queue.list.addEventListener("drop", (e) => {
    if (!dragged) return;
    e.preventDefault();
    const id = dragged, to = [...queue.list.children].findIndex((li) => li.dataset.run === id);
    if (to !== answer.queue.indexOf(id)) place(id, to);
  });

  function draw() {
    if (dragged) return;
    const by = new Map(answer.runs.map((r) => [r.id, r]));
    const running = answer.runs.filter((r) => r.state === "running" || r.state === "starting");
    const waiting = answer.queue.map((id) => by.get(id)).filter((r) => r?.state === "waiting");
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const old = answer.runs.filter((r) => !running.includes(r) && !waiting.includes(r));
    const found = old.filter((r) => words.every((w) => `${r.name} ${r.id} ${r.model} ${r.purpose} ${STATES[r.state]}`.toLowerCase().includes(w)));
    const shown = all || words.length ? found : found.slice(0, MOST);
    arrange(now, running);
    arrange(queue, waiting);
    arrange(past, shown);
    past.node.hidden = !old.length;
    search.hidden = old.length < 6;
    none.hidden = !old.length || found.length > 0;
    none.textContent = `No run matches “${search.value}”.`;
    more.hidden = shown.length === found.length;
    more.textContent = `Show all ${plural(found.length, "run")}`;
    for (const id of [...items.keys()]) if (!by.has(id)) items.delete(id);
  }
  /** The items of one group, in order, moving only what is in another place. */
  function arrange(g, runs) {
    g.node.hidden = !runs.length;
    runs.forEach((run, at) => {
      if (!items.has(run.id)) items.set(run.id, item(run.id));
      const it = items.get(run.id);
      it.show(run, at, runs.length);
      if (g.list.children[at] !== it.node) g.list.insertBefore(it.node, g.list.children[at] || null);
    });
    while (g.list.children.length > runs.length) g.list.lastChild.remove();
  }

  return {
    node: h("div", { class: "la-stack la-run-groups" }, now.node, queue.node, past.node, said),
    show(next) { answer = next; draw(); },
    mark(id) { chosen = id; draw(); },
  };
}

const STAGES = { loading: "Loading the model", encoding: "Reading the images and captions", training: "Training", exporting: "Saving the LoRA" };

/** What a running run is at, in words; of encoding, how far. */
export function stageWords(run) {
  const e = run.encoded;
  return e ? `Reading the ${e.what}: ${e.done} of ${e.total}` + (e.eta_s ? `, ${duration(e.eta_s)} left` : "") : STAGES[run.stage] || "";
}

/** Ask, then take a waiting run out of the queue. Resolves to whether it was done. */
export async function cancelRun(run) {
  const says = run.step ? "It keeps what it learnt so far and can be resumed later." : "It has not begun, so its folder is deleted. The images and captions of the New LoRA page stay.";
  if (!(await ask(`Take ${run.name} out of the queue?`, says, [["Keep it", false], ["Take it out", true, "danger"]]))) return false;
  return (await attempt(() => post(`/runs/${encodeURIComponent(run.id)}/cancel`))) !== undefined;
}

/** Text that is only written where it is another: a poll must not disturb a selection or a screen reader. */
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
