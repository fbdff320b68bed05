// Section 5: how long, what it takes, what stands in the way, and the one button.
import { attempt, button, fill, get, h, plural, poll, post, rate, toast } from "/static/core.js";

const LEVELS = { error: ["!", "Missing"], warning: ["!", "Mind"], info: ["i", "Note"], ok: ["✓", "Fine"] };

export function startSection(page) {
  const { draft } = page;
  let active = null, waiting = 0, going = false;

  // Presets

  const cards = h("div", { class: "la-choices", role: "radiogroup", "aria-label": "Preset", id: "presets" });
  const changed = h("p", { class: "la-small la-muted" });
  const back = button("Back to the preset", () => {
    const drop = Object.fromEntries(Object.keys(draft.view.draft.changes).map((k) => [k, null]));
    draft.patch({ changes: drop }, true);
  }, { kind: "link" });
  back.classList.add("la-small");
  const changedLine = h("div", { class: "la-row", hidden: true }, changed, back);
  function drawPresets(view) {
    const chosen = draft.value("preset");
    if (cards.dataset.of !== JSON.stringify(view.presets)) {
      cards.dataset.of = JSON.stringify(view.presets);
      fill(cards, view.presets.map((p) => h("label", { class: "la-choice", data: { preset: p.name }, title: p.source },
        h("input", { type: "radio", name: "preset", value: p.name, on: { change: () => draft.patch({ preset: p.name }, true) } }), h("b", {}, p.title), h("span", { class: "la-help" }, p.why),
        h("span", { class: "nl-facts-list la-num" }, facts(p.facts).map(([label, value]) => h("span", {}, h("span", { class: "nl-fact" }, label + " "), value))))));
    }
    for (const radio of cards.querySelectorAll("input")) radio.checked = radio.value === chosen;
    const n = Object.keys(view.draft.changes).length;
    changedLine.hidden = !n;
    changed.textContent = `${plural(n, "setting")} changed by hand, see Advanced.`;
  }
  const facts = (f) => [["rank", String(f.rank)], ["alpha", String(f.alpha)], ["rate", f.unet ? rate(f.unet) : "off"], ["text_2" in f ? "text encoders" : "text encoder", f.text_1 || f.text_2 ? [f.text_1, f.text_2].filter(Boolean).map(rate).join(", ") : "off"], ["each picture", f.visits + " times"]];

  // The line and the list

  const line = h("p", { class: "nl-line la-num", id: "plan-line", role: "status" }), measure = button("Measure", () => measureNow(), { kind: "link", id: "measure" });
  const list = h("ul", { class: "la-list nl-preflight", id: "preflight", "aria-label": "Before you start" });
  async function measureNow() {
    if (!(await draft.flush())) return;
    if (await attempt(() => post("/draft/measure"))) draft.planSoon(0);
  }
  function drawPlan(plan) {
    const parts = [];
    const time = plan.minutes === null ? null : plan.minutes < 1 ? "under a minute" : plan.minutes < 90 ? `about ${Math.round(plan.minutes)} min` : `about ${(plan.minutes / 60).toFixed(1)} h`;
    if (plan.steps) parts.push(h("b", {}, plural(plan.steps, "step")));
    if (time) parts.push(h("span", { title: plan.minutes_from ? "From " + plan.minutes_from + "." : "" }, h("b", {}, time)));
    if (plan.memory_gib) parts.push(h("span", {}, h("b", {}, plan.memory_gib.toFixed(1) + " GiB"), ` of ${plan.memory_free_gib.toFixed(1)} GiB free memory (${plan.memory_where})` + (plan.memory_mode ? `, ${plan.memory_mode}` : "")));
    if (plan.disk_gb !== null && plan.disk_gb !== undefined) parts.push(h("span", {}, h("b", {}, gb(plan.disk_gb)), ` of ${gb(plan.disk_free_gb)} free disk`));
    const key = JSON.stringify([plan.steps, plan.minutes, plan.memory_gib, plan.memory_free_gib, plan.memory_mode, plan.disk_gb, Math.round(plan.disk_free_gb), plan.measuring]);
    if (line.dataset.of !== key) {
      line.dataset.of = key;
      const space = (nodes) => nodes.flatMap((n, i) => (i ? [h("span", { class: "nl-dot", "aria-hidden": "true" }, " · "), n] : [n]));
      fill(line, space(parts), plan.measuring ? h("span", { class: "la-muted" }, parts.length ? " · " : "", "measuring time and memory …")
        : plan.steps && plan.minutes === null && plan.startable ? [" · ", h("span", { class: "la-muted" }, "time unknown "), measure] : null);
    }
    line.dataset.steps = plan.steps ?? "";
    line.hidden = !parts.length && !plan.measuring;
    const items = plan.preflight.map((p) => JSON.stringify(p));
    if (list.dataset.of !== items.join()) {
      list.dataset.of = items.join();
      fill(list, plan.preflight.map((p) => h("li", { class: "nl-check nl-check-" + p.level, data: { level: p.level, field: p.field } },
        h("span", { class: "nl-mark", "aria-hidden": "true" }, LEVELS[p.level][0]), h("span", {}, h("span", { class: "la-sr" }, LEVELS[p.level][1] + ": "), p.text, " ",
          p.field && p.level !== "ok" && button("Show", () => page.go(p.field), { kind: "link", "aria-label": "Show where: " + p.text })))));
    }
    drawButton();
  }

  // The button

  const go = button("Start training", () => start(false), { kind: "primary", id: "start-training" });
  go.classList.add("la-btn-big");
  const queue = button("Add to queue", () => start(true), { id: "add-to-queue" });
  queue.classList.add("la-btn-big");
  const note = h("p", { class: "la-help", id: "start-note" });
  go.setAttribute("aria-describedby", note.id);
  const failed = h("p", { class: "la-note la-note-bad", role: "alert", id: "start-error", hidden: true });
  function drawButton() {
    const words = active ? `Start after ${active.name}` : "Start training";
    if (!going) go.textContent = words;
    const errors = draft.plan?.preflight.filter((p) => p.level === "error") ?? [];
    go.dataset.startable = String(Boolean(draft.plan?.startable));
    go.classList.toggle("nl-not-yet", Boolean(draft.plan) && !draft.plan.startable);
    const queued = waiting ? ` ${plural(waiting, "run waits", "runs wait")} already.` : "";
    const says = draft.plan && !draft.plan.startable ? (errors.length === 1 ? "One thing is missing, see above." : `${errors.length} things are missing, see above.`)
      : active ? `${active.name} is training (${active.percent} %): this one waits for it and then starts by itself.${queued}` : "Ctrl+Enter starts it, too. You may close this page while it trains.";
    if (note.textContent !== says) note.textContent = says;
  }
  async function start(last) {
    if (going) return;
    failed.hidden = true;
    if (!(await draft.flush())) return refuse("Not everything you typed is saved yet, since the server does not answer. It starts as soon as you press again when the server is back.");
    const plan = await attempt(() => get("/draft/plan"), failed);
    if (!plan) return;
    drawPlan((draft.plan = plan));
    if (!plan.startable) {
      const first = plan.preflight.find((p) => p.level === "error");
      if (first) { toast(first.text, "bad"); page.go(first.field || "start"); }
      return;
    }
    going = true;
    go.textContent = last ? go.textContent : "Starting …";
    const run = await attempt(() => post("/runs", { draft: true, queue: last }), failed);
    going = false;
    drawButton();
    if (!run) return;
    const there = "/runs?run=" + encodeURIComponent(run.id);
    if (!last) return location.assign(there);
    toast("Added to the queue.", "good", ["Show", () => location.assign(there)]);
    look.now();
  }
  const refuse = (text) => { failed.textContent = text; failed.hidden = false; };
  page.start = () => { go.focus(); start(false); };
  page.places.start = () => { go.scrollIntoView({ block: "center" }); go.focus(); };
  page.places[""] = page.places.start;

  draft.on("view", drawPresets);
  draft.on("plan", drawPlan);
  drawButton();
  const look = poll(async () => {
    ({ active, waiting } = await get("/system"));
    drawButton();
    return active ? 4 : 8;
  });
  return [cards, changedLine, line, list, failed, h("div", { class: "nl-go" }, h("div", { class: "la-row" }, go, queue), note)];
}

const gb = (n) => (n < 0.1 ? Math.max(1, Math.round(n * 1000)) + " MB" : n < 10 ? n.toFixed(1) + " GB" : Math.round(n) + " GB");
