// What a run has come to: without and with, which file to take and why, the table of checkpoints and strengths, files, playground.
import { address, ago, attempt, button, copy, fill, get, h, poll, post, query, Refused, style } from "/static/core.js";
import { matrix } from "/static/matrix.js";
import { pair } from "/static/pair.js";
import { playground } from "/static/playground.js";
import { copyToFolder, download, fileList, metadataView } from "/static/results_files.js";

const WORKING = ["waiting", "starting", "running"];

export async function mount(root) {
  await style("runs", "results");
  let id = query("run"), runs = null, results = null, drawn = "", prompt = 0;

  const choose = h("select", { "aria-label": "Run", on: { change() { show(choose.value); } } });
  const toRun = h("a", { class: "la-small" }, "Show the run");
  const again = button("Make it again", compare, { kind: "quiet", hidden: true });
  const head = h("header", { class: "la-results-head" }, h("h1", { class: "la-h1" }, "Results"), h("div", { class: "la-row la-results-pick" }, choose, toRun));
  const empty = h("div", { class: "la-empty", hidden: true });
  const job = h("div", { class: "la-note la-stack", role: "status", "aria-live": "polite", hidden: true });
  const both = pair(), says = h("div", { class: "la-stack la-verdict" });
  const caption = h("p", { class: "la-small la-muted" });
  const hero = h("section", { class: "la-section la-hero", "aria-label": "Without and with" }, h("div", { class: "la-stack" }, both.node, caption), says);
  const tabs = h("div", { class: "la-tabs la-prompt-tabs", role: "tablist", "aria-label": "Prompts" });
  const grid = matrix("Pictures of each checkpoint and strength");
  const panel = h("div", { role: "tabpanel", id: "matrix-panel", tabindex: -1 }, grid.node);
  const table = h("section", { class: "la-section", "aria-label": "Checkpoints and strengths" }, h("div", { class: "la-row la-between" }, h("h2", { class: "la-h2" }, "Checkpoints and strengths"), again),
    h("p", { class: "la-lead" }, "The same picture from each saved file, at three strengths. Each prompt has its own table; a prompt without the trigger word should look as it does without the LoRA."), tabs, panel);
  const files = fileList(() => poller.now()), play = playground(), meta = metadataView();
  const scores = h("tbody", {});
  const scoreView = h("details", { data: { details: "scores" } }, h("summary", {}, "How it was measured"), h("div", { class: "la-stack" },
    h("p", { class: "la-small la-soft" }, "Gain: how much smaller the loss on fixed noise is with the LoRA than without it; 0 is nothing learnt. Drift: how far it pushes pictures without the trigger word, against what their own prompt does; 0 is not at all. Recommended is the earliest file with nine tenths of the best gain, before the drift grows too large."),
    h("div", { class: "la-scroll" }, h("table", { class: "la-table la-scores la-num" }, h("thead", {}, h("tr", {}, ["File", "Step", "Gain", "Drift"].map((t) => h("th", { scope: "col" }, t)))), scores))));
  const details = h("section", { class: "la-section la-run-section", "aria-label": "Details" }, h("h2", { class: "la-h2" }, "Details"), scoreView, meta.node);
  const body = h("div", { hidden: true }, job, hero, table, files.node, play.node, details);
  fill(root, h("div", { id: "la-main", class: "la-main" }, head, empty, body));
  head.hidden = true;

  function show(next) {
    id = next;
    address({ run: id });
    results = null;
    drawn = "";
    prompt = 0;
    poller.now();
  }
  async function compare() {
    if ((await attempt(() => post(`/runs/${encodeURIComponent(id)}/compare`))) !== undefined) poller.now();
  }

  // The runs for the list and the playground's sentence, less often than the results
  let listed = 0;
  async function list() {
    if (runs && Date.now() - listed < 8000) return;
    const answer = await get("/runs");
    runs = answer.runs;
    listed = Date.now();
    const active = runs.find((r) => r.id === answer.active);
    play.busy(active?.name);
    const done = runs.filter((r) => r.step > 0 && (r.state !== "starting" && r.state !== "waiting" || r.id === id));
    id ||= (done.find((r) => r.state === "finished") || done[0])?.id ?? null;
    const options = done.map((r) => [r.id, `${r.name} (${r.state === "finished" ? ago(r.created) : r.state})`]);
    if (id && !options.some(([value]) => value === id)) options.unshift([id, runs.find((r) => r.id === id)?.name || id]);
    if ([...choose.options].map((o) => o.value + o.textContent).join() !== options.map((o) => o.join("")).join()) fill(choose, options.map(([value, text]) => h("option", { value }, text)));
    choose.value = id || "";
  }

  const poller = poll(async () => {
    await list();
    if (!id) return nothing("No results yet", "When a training has finished, its pictures, its best file and a place to try it out are here.", h("a", { class: "la-btn la-btn-primary la-btn-big", href: "/" }, "Make a LoRA")), 5;
    const asked = id;
    let next;
    try {
      next = await get(`/runs/${encodeURIComponent(id)}/results`);
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 404) throw error;
      nothing("This run is gone", error.message, h("a", { class: "la-btn", href: "/results" }, "Show the newest results"));
      return 10;
    }
    if (asked === id) draw((results = next));
    return WORKING.includes(next.state) ? 1.5 : 6;
  });

  function nothing(title, text, action) {
    body.hidden = true;
    head.hidden = !runs?.length;
    empty.hidden = false;
    if (empty.dataset.for !== title + id) fill(empty, h(head.hidden ? "h1" : "h2", { class: "la-h1" }, title), h("p", {}, text), action);
    empty.dataset.for = title + id;
  }

  function draw(r) {
    const now = id + JSON.stringify(r);
    if (now === drawn) return;
    drawn = now;
    const run = runs.find((x) => x.id === id);
    toRun.href = "/runs?run=" + encodeURIComponent(id);
    head.hidden = false;
    if (!r.files.length && !r.pair) {
      const live = run && ["running", "starting", "waiting"].includes(run.state);
      return nothing(live ? "Not there yet" : "This run has saved no LoRA", live ? `${run.name} is still ${run.state === "waiting" ? "waiting" : "training"}; its results appear here when it ends.` : "It ended before its first file was written.", h("a", { class: "la-btn la-btn-primary", href: toRun.href }, "Show the run"));
    }
    empty.hidden = true;
    body.hidden = false;
    body.dataset.state = r.state;
    drawJob(r, run);
    hero.hidden = false;
    both.node.parentNode.hidden = !r.pair;
    hero.classList.toggle("la-alone", !r.pair);
    if (r.pair) {
      both.show({ ...r.pair, text: r.pair.prompt });
      caption.textContent = `“${r.pair.prompt}”, drawn from ${r.pair.file}`;
    }
    drawVerdict(r);
    drawMatrix(r);
    files.show(id, r);
    play.show(id, r);
    meta.show(r);
    scoreView.hidden = !r.scores.length;
    fill(scores, r.scores.map((s) => h("tr", { class: s.file === r.recommended?.file ? "la-marked" : "" }, h("td", { class: "la-mono" }, s.file), h("td", {}, String(s.step)), h("td", {}, figure(s.gain)), h("td", {}, figure(s.drift)))));
    again.hidden = WORKING.includes(r.state);
  }
  const figure = (v) => (v === null || v === undefined ? "–" : (+v).toFixed(3));

  /** How far the comparison is, or a way to make it. */
  function drawJob(r, run) {
    const working = WORKING.includes(r.state), live = run && ["running", "starting"].includes(run.state);
    const bad = r.state === "failed" || r.state === "interrupted";
    job.hidden = !(working || bad || !r.matrix);
    job.className = "la-note la-stack" + (bad ? " la-note-bad" : "");
    if (job.hidden) return;
    if (working) {
      const words = r.state === "waiting" ? "The comparison waits for its turn." : r.text || "The comparison is made: pictures from each saved file.";
      fill(job, h("div", { class: "la-row la-between" }, h("span", {}, words), h("span", { class: "la-num" }, r.state === "running" ? r.percent + " %" : "")),
        h("div", { class: "la-progress", role: "progressbar", "aria-label": "Comparison", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": r.percent, data: { state: r.state } }, h("div", { style: `width: ${r.percent}%` })));
    } else fill(job, h("div", { class: "la-row la-between" },
      h("span", {}, bad ? r.text || "The comparison ended before it was done." : live ? "The run is still training; its comparison is made when it ends." : r.state === "stopped" ? "The comparison was stopped. It draws pictures from each saved file, and says which one to take." : "There is no comparison yet. It draws pictures from each saved file, and says which one to take."),
      !live && button(bad ? "Make the comparison again" : "Make the comparison", compare, { kind: "primary" })));
  }

  /** Which file, why, and the ways to take it along. */
  function drawVerdict(r) {
    const best = r.recommended?.file || r.files.at(-1)?.file;
    const step = r.recommended?.step ?? r.files.at(-1)?.step;
    fill(says,
      r.recommended ? [h("p", { class: "la-small la-muted" }, "Recommended"), h("h2", { class: "la-h1 la-num" }, `Step ${step}`), h("p", { class: "la-lead" }, r.recommended.why)]
        : best && [h("p", { class: "la-small la-muted" }, "Last file"), h("h2", { class: "la-h1 la-num" }, `Step ${step}`)],
      r.hints.length > 0 && h("ul", { class: "la-list" }, r.hints.map((text) => h("li", { class: "la-note la-small" }, text))),
      best && h("div", { class: "la-row la-take" }, download(id, best, "primary"), button("Copy to my LoRA folder", () => copyToFolder(id, best, r.lora_folder, () => poller.now()))),
      best && h("p", { class: "la-small la-muted la-mono la-break" }, best),
      r.trigger_line && h("div", { class: "la-use" }, h("span", { class: "la-label" }, "Use this prompt"), h("div", { class: "la-row la-use-line" }, h("code", { class: "la-grow la-break" }, r.trigger_line),
        button("Copy", () => copy(r.trigger_line, "The line is copied."), { class: "la-btn la-btn-small", "aria-label": "Copy the prompt line" })), h("p", { class: "la-help" }, "For A1111, Forge and SD.Next. In ComfyUI, load the file and write only the words after it.")));
  }

  function drawMatrix(r) {
    table.hidden = !r.matrix;
    if (!r.matrix) return;
    const { prompts, strengths, rows } = r.matrix;
    prompt = Math.min(prompt, prompts.length - 1);
    const pick = (k, focus) => { prompt = (k + prompts.length) % prompts.length; drawMatrix(results); if (focus) tabs.children[prompt].focus(); };
    if ([...tabs.children].map((t) => t.textContent).join("\n") !== prompts.join("\n")) fill(tabs, prompts.map((text, k) => h("button", { type: "button", role: "tab", class: "la-tab", id: "prompt-tab-" + k, "aria-controls": "matrix-panel", title: text, on: {
      click: () => pick(k), keydown(e) { if (e.key === "ArrowRight") pick(k + 1, true); if (e.key === "ArrowLeft") pick(k - 1, true); } } }, text)));
    [...tabs.children].forEach((t, k) => { t.setAttribute("aria-selected", String(k === prompt)); t.tabIndex = k === prompt ? 0 : -1; });
    panel.setAttribute("aria-labelledby", "prompt-tab-" + prompt);
    const best = r.recommended?.file;
    grid.set({
      corner: "File",
      columns: strengths.map((s, k) => ({ key: k, head: `Strength ${s}` })),
      rows: rows.map((row) => ({ key: row.file, mark: row.file === best, head: [h("span", { class: "la-num" }, `Step ${row.step}`), row.file === best && h("span", { class: "la-row-best" }, "Recommended")] })),
      cell(file, k) {
        const row = rows.find((x) => x.file === file), url = row.cells[prompt]?.[k];
        return url ? { thumb: url + "?size=320", full: url, text: `${prompts[prompt]} (step ${row.step}, strength ${strengths[k]})`, data: { file, strength: strengths[k] } } : null;
      },
    });
  }
}
