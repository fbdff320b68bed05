// One run: state and progress, pictures above everything else, then the curve, then what it runs on, log and configuration.
import { ago, duration, fill, get, h, plural, poll, rate, Refused, STATES } from "/static/core.js";
import { chart } from "/static/chart.js";
import { matrix } from "/static/matrix.js";
import { runActions } from "/static/run_actions.js";
import { batchOf } from "/static/run_batch.js";
import { put, stageWords } from "/static/run_list.js";
import { configuration, logTail } from "/static/run_log.js";

const LIVE = ["starting", "running"];
const PARTS = { unet: "UNet", text_1: "Text encoder", text_2: "Second text encoder" };
const DATA = { prior: " of the class", validation: " held out" };
const PENDING = {
  stop: "Stop is asked: it ends after this step, with a state from which it can be resumed.",
  save: "Save is asked: the LoRA is written after this step.",
  preview: "Preview is asked: pictures are made after this step.",
  prompts: "New prompts are handed over; the next pictures use them.",
  visits: "A new length is handed over.",
};

/** `to`: {back(), changed(), gone(), open(id)}. Returns {node, stop()}. */
export function runDetail(id, to) {
  const path = "/runs/" + encodeURIComponent(id);
  let view = null, etag = null, pause = 1;
  let points, previews, exports, shapes = "";

  const name = h("h2", { class: "la-h1 la-run-title" }), state = h("span", { class: "la-badge" }), about = h("p", { class: "la-muted la-small" });
  const bar = h("div", {}), progress = h("div", { class: "la-progress", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 }, bar);
  const percent = h("span", { class: "la-run-percent la-num" }), counted = h("span", { class: "la-num la-soft" });
  const line = h("div", { class: "la-stack la-run-progress" }, h("div", { class: "la-row la-between" }, percent, counted), progress);
  const spoken = h("p", { class: "la-sr", role: "status", "aria-live": "polite" });
  const sentence = h("p", { class: "la-note", hidden: true }), tail = h("pre", { class: "la-tail", hidden: true, tabindex: 0, "aria-label": "End of the log" });
  const pending = h("ul", { class: "la-list la-pending", role: "status", "aria-live": "polite" });
  const actions = runActions({ path, changed: () => { poller.now(); to.changed(); }, gone: to.gone, open: to.open, exports: () => exports, previews: () => previews });

  const pictures = matrix("Pictures made while training", { follow: true });
  const noPictures = h("p", { class: "la-muted" });
  const short = (v) => String(+v.toPrecision(3));
  const loss = chart("Loss", [
    { key: "loss", name: "Loss", kind: "noisy", colour: 1 },
    { key: "train", name: "Fixed noise, training images", kind: "marks", colour: 2 },
    { key: "held", name: "Fixed noise, images kept out", kind: "squares", colour: 3 },
  ], { format: short, controls: true });
  const rates = chart("Learning rate", Object.entries(PARTS).map(([key, name], i) => ({ key, name, kind: "line", colour: i + 1 })), { format: rate, height: 120 });
  const schedule = h("p", { class: "la-small la-soft" });
  const curve = section("Curve", h("p", { class: "la-small la-soft" }, "Do not judge by the loss; look at the pictures. It is noisy by nature, and a good LoRA may have any."), loss.node);
  const rateSection = section("Learning rate", schedule, rates.node);
  const facts = h("dl", { class: "la-facts la-num" }), machine = section("Machine", facts);
  const warnings = h("ul", { class: "la-list" }), warningSection = section("Warnings", warnings);
  const log = logTail(path), config = configuration(path, id), batch = batchOf(path);

  function section(title, ...rest) {
    return h("section", { class: "la-section la-run-section", "aria-label": title }, h("h3", { class: "la-h2" }, title), rest);
  }
  const body = h("div", {},
    h("a", { class: "la-run-back", href: "/runs", on: { click(e) { e.preventDefault(); to.back(); } } }, "‹ All runs"),
    h("header", { class: "la-stack la-run-head" }, h("div", { class: "la-run-line" }, name, state), about, line, sentence, tail, pending, actions.node, spoken),
    section("Pictures", noPictures, pictures.node), curve, rateSection, machine, warningSection,
    section("Details", batch.node, log.node, config.node));
  const node = h("div", {}, h("p", { class: "la-loading", role: "status" }, "Loading …"));

  const poller = poll(async () => {
    let next;
    try {
      next = await get(path + (view ? "?since=" + view.seq : ""), etag ? { "If-None-Match": etag } : {});
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 404) throw error;
      poller.stop();
      return void fill(node, h("div", { class: "la-empty" }, h("p", {}, error.message), h("a", { class: "la-btn", href: "/runs", on: { click(e) { e.preventDefault(); to.gone(); } } }, "All runs")));
    }
    if (next) {
      etag = next.etag || null;
      take(next);
      pause = LIVE.includes(next.run.state) ? 1 : next.run.state === "waiting" ? 2 : 5;
    }
    return pause;
  });

  function take(next) {
    const anew = !view || next.reset, before = view?.run.state;
    if (anew) [points, previews, exports] = [{ loss: [], validation: [], rate: {} }, [], []];
    points.loss.push(...next.points.loss);
    points.validation.push(...next.points.validation);
    for (const [part, more] of Object.entries(next.points.rate)) (points.rate[part] ||= []).push(...more);
    for (const p of next.previews) {
      const at = previews.findIndex((x) => x.step === p.step);
      // Pictures made again at one step have the old names: another address makes the browser look again.
      at < 0 ? previews.push(p) : (previews[at] = { ...p, version: next.seq });
    }
    previews.sort((a, b) => a.step - b.step);
    for (const e of next.exports) exports = [...exports.filter((x) => x.file !== e.file), e];
    view = next;
    if (body.parentNode !== node) fill(node, body);
    if (before && before !== view.run.state) { to.changed(); spoken.textContent = `${view.run.name}: ${STATES[view.run.state]}.`; }
    draw(anew || next.points.loss.length || next.points.validation.length);
  }

  function draw(curves) {
    const { run } = view, live = LIVE.includes(run.state);
    put(name, run.name);
    put(state, STATES[run.state]);
    state.className = "la-badge la-state-" + run.state;
    node.dataset.state = run.state;
    put(about, [run.model, run.purpose, run.images ? plural(run.images, "image") : "", ago(run.created)].filter(Boolean).join(" · "));
    drawProgress(run, live);
    drawSentence(run);
    const asked = (run.pending || []).map((kind) => PENDING[kind] || `${kind} is asked.`);
    if (asked.join() !== [...pending.children].map((c) => c.textContent).join()) fill(pending, asked.map((text) => h("li", { class: "la-note" }, text)));
    actions.show(run);
    drawPictures(run, live);
    curve.hidden = !points.loss.length;
    const rated = Object.values(points.rate).some((p) => p.length);
    rateSection.hidden = !rated;
    if (curves && !curve.hidden) {
      loss.set({ loss: points.loss, train: points.validation.map((p) => [p[0], p[1]]), held: points.validation.filter((p) => p[2] !== null).map((p) => [p[0], p[2]]) });
      if (rated) rates.set(points.rate);
    }
    const now = Object.entries(run.rate || {}).map(([part, value]) => `${PARTS[part] || part} ${rate(value)}`).join(", ");
    put(schedule, [live && now ? `Now ${now}.` : "", run.schedule ? `Schedule: ${run.schedule}.` : ""].filter(Boolean).join(" "));
    drawFacts(run, live);
    warningSection.hidden = !run.warnings.length;
    if (warnings.children.length !== run.warnings.length) fill(warnings, run.warnings.map((text) => h("li", { class: "la-note la-note-warn" }, text)));
    machine.hidden = log.node.hidden = run.state === "waiting" && !run.device;
    log.live(live);
  }

  function drawProgress(run, live) {
    const training = run.state !== "running" || run.stage === "training";
    bar.style.width = run.percent + "%";
    progress.dataset.state = run.state;
    progress.dataset.step = run.step;
    progress.setAttribute("aria-valuenow", run.percent);
    line.hidden = run.state === "waiting" && !run.step;
    put(percent, run.state === "starting" ? "Starting" : training ? run.percent + " %" : stageWords(run) || "Preparing");
    const counts = [
      run.total ? `step ${run.step} of ${run.total}` : "",
      run.visits && run.step ? `visit ${Math.min(run.visits, Math.floor(run.epoch))} of ${run.visits}` : run.visits ? plural(run.visits, "visit") + " to each image" : "",
      live && run.eta_s !== null && training ? duration(run.eta_s) + " left" : "",
      !live && run.seconds ? "took " + duration(run.seconds) : "",
    ];
    put(counted, counts.filter(Boolean).join(" · "));
    progress.setAttribute("aria-valuetext", `${run.percent} %, step ${run.step} of ${run.total}`);
  }

  function drawSentence(run) {
    const text = run.state === "interrupted" ? "The run ended without a word: a power cut, a full memory, or somebody ended its process. Resume goes on from its last saved state, or begins again where there is none."
      : run.state === "failed" ? run.text || "The run failed."
      : run.state === "stopped" ? "Stopped. Everything is kept; Resume goes on where it ended."
      : run.state === "waiting" ? `Waiting, number ${(run.position ?? 0) + 1} in the queue. It starts by itself when what runs before it has ended.` : "";
    put(sentence, text);
    sentence.hidden = !text;
    sentence.className = "la-note" + (run.state === "failed" ? " la-note-bad" : run.state === "interrupted" ? " la-note-warn" : "");
    const end = run.state === "failed" || run.state === "interrupted" ? run.log_tail : "";
    if (tail.textContent !== end) { tail.textContent = end; tail.hidden = !end; tail.scrollTop = tail.scrollHeight; }
  }

  function drawPictures(run, live) {
    noPictures.hidden = previews.length > 0;
    pictures.node.hidden = !previews.length;
    if (!previews.length) return put(noPictures, live ? (run.step ? "None yet. “Preview now” makes some." : "The first pictures, from before the training, are made as soon as the model is loaded.") : run.state === "waiting" ? "Pictures appear here when it runs." : "This run made no pictures.");
    // Rows are prompts. One that was changed on the way gets a row of its own, the prompts of now stand first.
    const key = (texts, k) => texts[k] + "\n" + texts.slice(0, k).filter((t) => t === texts[k]).length;
    const cells = new Map(), rows = new Map();
    for (const p of [...previews].reverse()) p.images.forEach((file, k) => {
      const row = key(p.prompts, k);
      if (!rows.has(row)) rows.set(row, p.prompts[k]);
      cells.set(row + "\n" + p.step, { file, version: p.version });
    });
    const words = (step) => (step === 0 ? "before training" : "step " + step);
    const now = [...rows].map(([row, text]) => row).join() + previews.map((p) => p.step + "." + (p.version || "")).join();
    if (now === shapes) return;
    shapes = now;
    pictures.set({
      corner: "Prompt", stay: previews[0].step === 0,
      columns: previews.map((p) => ({ key: p.step, head: p.step === 0 ? "Before training" : "Step " + p.step })),
      rows: [...rows].map(([row, text]) => ({ key: row, head: text })),
      cell(row, step) {
        const c = cells.get(row + "\n" + step);
        if (!c) return null;
        const url = "/api" + path + "/previews/" + encodeURIComponent(c.file), more = c.version ? "v=" + c.version : "";
        return { thumb: url + "?size=256" + (more && "&" + more), full: url + (more && "?" + more), text: `${rows.get(row)} (${words(step)})`, data: { step, file: c.file } };
      },
    });
  }

  function drawFacts(run, live) {
    const shapes = (run.buckets || []).slice(0, 6).map(([w, h, n]) => `${w} × ${h} (${n})`).join(", ") + (run.buckets?.length > 6 ? `, and ${run.buckets.length - 6} more` : "");
    const rows = [
      ["Device", [run.device, run.dtype].filter(Boolean).join(", ")],
      ["Memory", run.memory_gib ? `${run.memory_gib.toFixed(1)} GiB` + (live ? "" : " at most") : ""],
      ["Speed", run.images_per_s ? `${run.images_per_s >= 10 ? Math.round(run.images_per_s) : run.images_per_s.toFixed(1)} images a second` : ""],
      ["Time", run.seconds ? duration(run.seconds) : ""],
      ["Images", (run.data || []).map((d) => `${d.name || "Untitled"}: ${plural(d.images, "image")}${DATA[d.kind] || ""}, version ${d.version}`).join("; ")],
      ["Shapes", shapes],
      ["Why so", (run.reasons || []).join(" ")],
      ["Folder", run.folder],
    ].filter(([, value]) => value);
    const old = facts.querySelectorAll("dd");
    if (old.length === rows.length && [...facts.querySelectorAll("dt")].every((dt, i) => dt.textContent === rows[i][0])) rows.forEach(([, value], i) => put(old[i], value));
    else fill(facts, rows.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", { class: label === "Folder" ? "la-mono" : "" }, value))));
  }

  return { node, stop() { poller.stop(); log.stop(); batch.stop(); } };
}
