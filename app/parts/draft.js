// The draft as this page knows it: what the server says, and what was typed and is not yet there.
//
// Typing never waits for the server and is never lost: it goes into an outbox, which is sent after a short pause, kept in the browser while
// the server is away, and sent again until it is taken. What the server says never replaces what is still in the outbox.
import { api, attempt, debounce, get, post, Refused, toast } from "/static/core.js";

const KEPT = "la-unsaved";
const BUSY = ["waiting", "starting", "running"];

export function openDraft() {
  const listeners = { view: [], images: [], plan: [], saving: [], captions: [] };
  const emit = (name, ...what) => listeners[name].forEach((call) => call(...what));
  const channel = new BroadcastChannel("la-draft");
  let writes = 0;  // rises at the begin and the end of each write: a read that overlapped with one is not believed
  let outbox = { draft: {}, captions: {} }, sent = { draft: {}, captions: {} };
  let sending = null, timer, planTimer, jobTimer, retry = 1;

  const store = {
    view: null, images: null, plan: null, saving: "saved",
    /** Call `call` now (if there is something) and at each change of "view", "images", "plan", "saving" or "captions" (id: one was saved). */
    on(name, call) {
      listeners[name].push(call);
      if (store[name] && name !== "saving") call(store[name]);
    },
    /** A value of the draft as the user sees it: what was typed, else what the server has. */
    value: (key) => outbox.draft[key] ?? sent.draft[key] ?? store.view.draft[key],
    /** The same for a field of the configuration ("adapter.rank"). undefined: nothing typed that the server does not have. */
    typed: (key) => outbox.draft.changes?.[key] ?? sent.draft.changes?.[key],
    unsaved: (key) => key in outbox.draft || key in sent.draft,
    unsavedField: (key) => key in (outbox.draft.changes ?? {}) || key in (sent.draft.changes ?? {}),
    unsavedCaption: (id) => id in outbox.captions || id in sent.captions,
    captionOf: (image) => outbox.captions[image.id] ?? sent.captions[image.id] ?? image.caption,
    /** Change the draft: `part` as for PATCH /api/draft. `now`: without the pause for typing. */
    patch(part, now = false) {
      outbox.draft = merged(outbox.draft, part);
      soon(now ? 0 : 400);
    },
    caption(id, text, now = false) {
      outbox.captions[id] = text;
      soon(now ? 0 : 700);
    },
    /** Send what is waiting. Resolves to true when all of it is saved. */
    async flush() {
      clearTimeout(timer);
      while (sending || waiting()) {
        if (sending) await sending;
        else if (!(await (sending = send()))) return false;
      }
      return true;
    },
    /** A route that answers with the draft view. Rejects with Refused. */
    async change(call) {
      await store.flush();
      const view = await written(call);
      show(view);
      told();
      return view;
    },
    /** A route that answers as GET /api/images. Rejects with Refused. */
    async changeImages(call) {
      await store.flush();
      const answer = await written(call);
      showImages(answer);
      told();
      await read();
      return answer;
    },
    refresh: () => Promise.all([read(), readImages()]),
    planSoon,
  };

  const merged = (old, part) => ({ ...old, ...part, ...(old.changes || part.changes ? { changes: { ...old.changes, ...part.changes } } : {}) });
  const waiting = () => Object.keys(outbox.draft).length + Object.keys(outbox.captions).length > 0;
  function say(state) {
    if (state !== store.saving) emit("saving", (store.saving = state));
  }
  function soon(pause) {
    if (store.saving !== "lost") say("saving");
    clearTimeout(timer);
    timer = setTimeout(() => store.flush(), pause);
  }
  async function written(call) {
    writes += 1;
    try { return await call(); } finally { writes += 1; }
  }

  /** One turn of the outbox. Resolves to false if the server did not take it (it stays in the outbox and is sent again). */
  async function send() {
    sent = outbox;
    outbox = { draft: {}, captions: {} };
    try {
      if (Object.keys(sent.draft).length) {
        const view = await taken(() => api("PATCH", "/draft", sent.draft));
        sent.draft = {};
        if (view) show(view);
      }
      for (const id of Object.keys(sent.captions)) {
        const image = await taken(() => api("PATCH", "/images/" + id, { caption: sent.captions[id] }));
        delete sent.captions[id];
        if (!image) continue;
        const at = store.images?.images.findIndex((i) => i.id === id) ?? -1;
        if (at >= 0) store.images.images[at] = image;
        emit("captions", id);
        recount();
      }
      retry = 1;
      localStorage.removeItem(KEPT);
      told();
      if (!waiting()) say("saved");
      return true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      outbox = { draft: merged(sent.draft, outbox.draft), captions: { ...sent.captions, ...outbox.captions } };
      sent = { draft: {}, captions: {} };
      keep();
      say("lost");
      clearTimeout(timer);
      timer = setTimeout(() => store.flush(), 1000 * (retry = Math.min(8, retry * 2)));
      return false;
    } finally {
      sending = null;
    }
  }
  /** The answer, or undefined when the server refused for good (it would refuse again: said, not repeated). */
  async function taken(call) {
    try {
      return await written(call);
    } catch (error) {
      if (!(error instanceof Refused) || error.status === 0 || error.status >= 500 || error.status === 401) throw error;
      toast(error.message, "bad");
    }
  }
  const keep = () => localStorage.setItem(KEPT, JSON.stringify({ ...outbox, dataset: store.view?.draft.dataset }));
  const recount = debounce(() => { readImages(); read(); }, 900);  // tags and counts follow the captions
  const told = () => channel.postMessage("changed");

  async function read() {
    const at = writes;
    const view = await quiet(() => get("/draft"));
    if (view && at === writes) show(view);
  }
  async function readImages() {
    const at = writes;
    const images = await quiet(() => get("/images"));
    if (images && at === writes) showImages(images);
  }
  async function quiet(call) {
    try { return await call(); } catch (error) { if (!(error instanceof Refused)) throw error; }
  }
  function show(view) {
    const before = store.view;
    store.view = view;
    if (before && before.draft.dataset !== view.draft.dataset) readImages();
    emit("view", view);
    const job = view.caption_job, was = before?.caption_job;
    if (job && (was?.id !== job.id || was.done !== job.done || was.state !== job.state) && before) readImages();
    clearTimeout(jobTimer);
    if (job && BUSY.includes(job.state)) jobTimer = setTimeout(follow, 1000);
    planSoon();
  }
  async function follow() {
    if (document.hidden) return;  // looked at again when the page is
    await read();
    clearTimeout(jobTimer);
    if (BUSY.includes(store.view.caption_job?.state)) jobTimer = setTimeout(follow, 1000);
  }
  function showImages(images) {
    emit("images", (store.images = images));
    planSoon();
  }

  function planSoon(pause = 500) {
    clearTimeout(planTimer);
    planTimer = setTimeout(readPlan, pause);
  }
  let planned = 0;
  async function readPlan() {
    const turn = ++planned;
    const plan = await quiet(() => get("/draft/plan"));
    if (!plan || turn !== planned) return;
    emit("plan", (store.plan = plan));
    if (plan.measuring && !document.hidden) planSoon(1500);
  }
  let looked = 0;
  function again() {
    if (document.hidden || !store.view || Date.now() - looked < 800) return;
    looked = Date.now();
    store.flush();
    store.refresh();
  }
  document.addEventListener("visibilitychange", again);
  addEventListener("focus", again);
  addEventListener("online", again);
  channel.onmessage = debounce(() => { if (!document.hidden) { read(); readImages(); } }, 150);
  addEventListener("pagehide", () => {
    if (!waiting() && !sending) return;
    outbox = { draft: merged(sent.draft, outbox.draft), captions: { ...sent.captions, ...outbox.captions } };
    if (store.saving === "lost") return keep();
    const last = (path, body) => fetch("/api" + path, { method: "PATCH", keepalive: true, headers: { "content-type": "application/json" }, body: JSON.stringify(body) }).catch(keep);
    if (Object.keys(outbox.draft).length) last("/draft", outbox.draft);
    for (const [id, caption] of Object.entries(outbox.captions)) last("/images/" + id, { caption });
  });

  /** Resolves when the draft and the images are there. `failed(sentence)` is called while the server does not answer. */
  store.ready = async (failed) => {
    for (;;) {
      try {
        const [view, images] = await Promise.all([get("/draft"), get("/images")]);
        [store.view, store.images] = [view, images];
        const kept = JSON.parse(localStorage.getItem(KEPT) || "null");
        if (kept && kept.dataset === view.draft.dataset) {
          outbox = { draft: kept.draft, captions: kept.captions };
          soon(0);
        } else localStorage.removeItem(KEPT);
        if (BUSY.includes(view.caption_job?.state)) jobTimer = setTimeout(follow, 1000);
        planSoon(0);
        return;
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        failed(error.message);
        await new Promise((done) => setTimeout(done, 2000));
      }
    }
  };
  store.undo = () => store.changeImages(() => post("/draft/undo"));
  return store;
}

/** Take back the last change of pictures or captions (or of Start over), and say what it was. */
export async function undo(draft) {
  const answer = await attempt(() => draft.undo());
  if (!answer) return;
  const what = (answer.undone || "").replace(/\.$/, "");
  toast(what ? "Taken back: " + what.charAt(0).toLowerCase() + what.slice(1) + "." : "There is nothing to take back.");
}

/** Put `node`s for `items` into `box`, keeping the nodes that are there: each is made by `make(item)` once and gets `update(item)` each time.
 *  `box` holds nothing else. A node that stays is not moved, so a text field in it keeps its focus. */
export function keyed(box, items, make) {
  const old = new Map([...box.children].map((node) => [node.dataset.key, node]));
  const wanted = new Set(items.map((i) => String(i.id)));
  for (const [key, node] of old) if (!wanted.has(key)) node.remove();
  let at = box.firstElementChild;
  for (const item of items) {
    let node = old.get(String(item.id));
    if (!node) { node = make(item); node.dataset.key = item.id; }
    node.update(item);
    if (node === at) at = at.nextElementSibling;
    else box.insertBefore(node, at);
  }
}
