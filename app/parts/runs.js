// Queue and history on the left, one run on the right. On a phone: the list, then the run with a way back.
import { address, fill, get, h, poll, query, style } from "/static/core.js";
import { runDetail } from "/static/run_detail.js";
import { runList } from "/static/run_list.js";

export async function mount(root) {
  await style("runs");
  const narrow = matchMedia("(max-width: 860px)");
  let shown = null, detail = null, first = true;

  const list = runList({ open: (id) => { open(id); history.pushState({ run: id }, "", "/runs?run=" + encodeURIComponent(id)); }, changed: () => poller.now() });
  const place = h("section", { class: "la-run", "aria-label": "Run" });
  const empty = h("div", { class: "la-empty", hidden: true },
    h("h1", { class: "la-h1" }, "No runs yet"),
    h("p", {}, "A training that you start appears here, with its pictures as they are made. It goes on when this page is closed."),
    h("a", { class: "la-btn la-btn-primary la-btn-big", href: "/" }, "Make a LoRA"));
  const page = h("div", { class: "la-runs" }, h("aside", { class: "la-runs-side", "aria-label": "All runs" }, h("h1", { class: "la-h1" }, "Runs"), list.node), place);
  fill(root, h("div", { id: "la-main", class: "la-main la-wide-main" }, empty, page));
  page.hidden = true;

  function open(id) {
    if (id === shown) return;
    detail?.stop();
    detail = null;
    shown = id;
    page.classList.toggle("la-has-run", !!id);
    list.mark(id);
    if (!id) return void fill(place, h("p", { class: "la-muted la-run-none" }, "Choose a run on the left."));
    detail = runDetail(id, {
      back: () => { open(null); history.pushState({}, "", "/runs"); },
      changed: () => poller.now(),
      gone: () => { open(null); address({ run: null }); first = true; poller.now(); },
      open: (other) => { open(other); address({ run: other }); poller.now(); },
    });
    fill(place, detail.node);
    if (narrow.matches) scrollTo(0, 0);
  }
  addEventListener("popstate", () => open(query("run")));
  if (query("run")) open(query("run"));

  const poller = poll(async () => {
    const answer = await get("/runs");
    const none = !answer.runs.length && !shown;
    empty.hidden = !none;
    page.hidden = none;
    list.show(answer);
    if (first && !shown && answer.runs.length && !narrow.matches) {
      const id = answer.active || answer.queue[0] || answer.runs[0].id;
      open(id);
      address({ run: id });
    }
    first = false;
    return answer.active ? 2.5 : answer.queue.length ? 3 : 8;
  });
}
