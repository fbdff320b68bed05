// What every part shares: building elements, asking the server, polling, words for numbers, dialogs, messages.

/** An element. `attrs`: properties and attributes; `on` {event: handler}, `data` {name: value}, `class`. Children: nodes, strings, null, lists.
 *  Text is always text: nothing from a user is ever read as HTML. */
export function h(tag, attrs = {}, ...children) {
  const svg = ["svg", "path", "rect", "circle", "line", "polyline", "g", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attrs)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "on") for (const [name, call] of Object.entries(value)) node.addEventListener(name, call);
    else if (key === "data") for (const [name, v] of Object.entries(value)) node.dataset[name] = v;
    else if (key === "class") node.setAttribute("class", value);
    else if (key in node && !svg && !key.startsWith("aria") && key !== "list" && key !== "form") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

/** Replace what is in `node`. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

/** What the server refused: `message` is its sentence, `errors` {field: sentence}. `status` 0: it cannot be reached. */
export class Refused extends Error {
  constructor(message, status = 0, errors = {}) {
    super(message);
    this.status = status;
    this.errors = errors;
  }
}

/** Ask a route. `body`: an object (sent as JSON), FormData or a Blob. Resolves to the answer's JSON (null for 304). Rejects with Refused. */
export async function api(method, path, body, headers = {}) {
  const options = { method, headers: { ...headers } };
  if (body instanceof FormData || body instanceof Blob) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch("/api" + path, options);
  } catch {
    throw new Refused("The server does not answer. Start it again with python launch.py; a training that runs goes on by itself.");
  }
  if (answer.status === 304) return null;
  const type = answer.headers.get("content-type") || "";
  const said = type.includes("json") ? await answer.json() : { text: await answer.text() };
  if (answer.status === 401) location.assign("/login?next=" + encodeURIComponent(location.pathname + location.search));
  if (!answer.ok) throw new Refused(said.error || "The server answered with status " + answer.status + ".", answer.status, said.errors || {});
  if (answer.headers.get("etag")) Object.defineProperty(said, "etag", { value: answer.headers.get("etag") });
  return said;
}

export const get = (path, headers) => api("GET", path, undefined, headers);
export const post = (path, body = {}) => api("POST", path, body);

/** Call `ask` again and again while the page is visible: its result is the seconds to the next call. A failed call is tried again with
 *  growing pauses; `lost(true)` is called after the third failure in a row, `lost(false)` when the server is back. Returns {now(), stop()}. */
export function poll(ask, lost = () => {}) {
  let timer, busy = false, again = false, failures = 0, stopped = false;
  async function turn() {
    clearTimeout(timer);
    if (stopped || document.hidden) return;
    if (busy) return void (again = true);
    busy = true;
    let pause = 1;
    try {
      pause = (await ask()) || 1;
      if (failures >= 3) lost(false);
      failures = 0;
    } catch (error) {
      if (!(error instanceof Refused)) console.error(error);
      failures += 1;
      if (failures === 3) lost(true);
      pause = Math.min(10, failures);
    }
    busy = false;
    if (again) { again = false; return turn(); }
    timer = setTimeout(turn, pause * 1000);
  }
  document.addEventListener("visibilitychange", turn);
  turn();
  return { now: turn, stop() { stopped = true; clearTimeout(timer); document.removeEventListener("visibilitychange", turn); } };
}

// Words for numbers

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !isFinite(seconds)) return "";
  const s = Math.round(seconds);
  if (s < 60) return s + " s";
  if (s < 3600) return Math.floor(s / 60) + " min" + (s < 600 && s % 60 ? " " + (s % 60) + " s" : "");
  return Math.floor(s / 3600) + " h " + Math.round((s % 3600) / 60) + " min";
}
export const megabytes = (bytes) => (bytes >= 1e9 ? (bytes / 1e9).toFixed(1) + " GB" : bytes >= 1e6 ? (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0) + " MB" : Math.max(1, Math.round(bytes / 1e3)) + " kB");
export const plural = (n, one, many = one + "s") => n + " " + (n === 1 ? one : many);
export function rate(value) {
  if (!value) return "0";
  return value >= 0.01 ? String(+value.toPrecision(3)) : value.toExponential(2).replace(/\.?0+e/, "e");
}
export function ago(time) {
  const s = Date.now() / 1000 - time;
  if (s < 60) return "just now";
  if (s < 3600) return Math.floor(s / 60) + " min ago";
  if (s < 86400) return Math.floor(s / 3600) + " h ago";
  return new Date(time * 1000).toLocaleDateString();
}

// Controls

const UNIQUE = { n: 0 };
export const unique = (prefix = "la") => prefix + "-" + ++UNIQUE.n;

/** A button. `kind`: primary | quiet | danger | link | "" */
export function button(text, onclick, { kind = "", ...attrs } = {}) {
  return h("button", { type: "button", class: "la-btn" + (kind ? " la-btn-" + kind : ""), on: { click: onclick }, ...attrs }, text);
}

/** A labelled control: {node, control, error(text)}. `control` gets the id, the help and the error as description. */
export function field(label, control, { help = "", hint = "", wide = false } = {}) {
  const id = control.id || (control.id = unique("f"));
  const helpNode = h("p", { class: "la-help", id: id + "-help", hidden: !help }, help);
  const errorNode = h("p", { class: "la-error", id: id + "-error", role: "alert", hidden: true });
  control.setAttribute("aria-describedby", id + "-help " + id + "-error");
  const node = h("div", { class: "la-field" + (wide ? " la-wide" : "") },
    h("label", { htmlFor: id, class: "la-label" }, label, hint && h("span", { class: "la-hint" }, " " + hint)), control, helpNode, errorNode);
  return {
    node, control,
    help(text) { helpNode.textContent = text; helpNode.hidden = !text; },
    error(text) {
      errorNode.textContent = text || "";
      errorNode.hidden = !text;
      text ? control.setAttribute("aria-invalid", "true") : control.removeAttribute("aria-invalid");
    },
  };
}

/** Call `send` with the latest value, `wait` ms after the last call; `.flush()` at once. */
export function debounce(send, wait = 400) {
  let timer, last;
  const run = () => { clearTimeout(timer); timer = undefined; const args = last; last = undefined; if (args) return send(...args); };
  const call = (...args) => { last = args; clearTimeout(timer); timer = setTimeout(run, wait); };
  call.flush = run;
  return call;
}

/** A short message at the page's foot. `kind`: "" | good | bad. `action`: [label, call] */
export function toast(text, kind = "", action = null) {
  let region = document.querySelector(".la-toasts");
  if (!region) document.body.append((region = h("div", { class: "la-toasts la", role: "status", "aria-live": "polite" })));
  const close = () => item.remove();
  const item = h("div", { class: "la-toast la-toast-" + (kind || "plain") }, h("span", {}, text),
    action && button(action[0], () => { close(); action[1](); }, { kind: "link" }),
    h("button", { type: "button", class: "la-x", "aria-label": "Dismiss", on: { click: close } }, "×"));
  region.append(item);
  setTimeout(close, kind === "bad" ? 12000 : 6000);
  return item;
}

/** Run `call`; a refusal becomes a message at the foot (or goes to `place`, an element). Returns its result, or undefined. */
export async function attempt(call, place = null) {
  try {
    const done = await call();
    if (place) { place.textContent = ""; place.hidden = true; }
    return done;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (place) { place.textContent = error.message; place.hidden = false; } else toast(error.message, "bad");
  }
}

/** A modal question. `body`: nodes or text. Resolves to the chosen button's value, or null for Escape. `buttons`: [[label, value, kind]] */
export function ask(title, body, buttons) {
  return new Promise((resolve) => {
    const id = unique("dialog");
    const dialog = h("dialog", { class: "la la-dialog", "aria-labelledby": id },
      h("h2", { id, class: "la-h2" }, title), h("div", { class: "la-dialog-body" }, body),
      h("div", { class: "la-row la-end" }, buttons.map(([label, value, kind]) => button(label, () => dialog.close(JSON.stringify(value)), { kind }))));
    dialog.addEventListener("close", () => { const v = dialog.returnValue; dialog.remove(); resolve(v ? JSON.parse(v) : null); });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A picture large, with arrow keys. `pictures`: [{src, text}] */
export function lightbox(pictures, at = 0) {
  const img = h("img", { class: "la-big", alt: "" });
  const text = h("p", { class: "la-caption" });
  const show = (n) => { at = (n + pictures.length) % pictures.length; img.src = pictures[at].src; img.alt = text.textContent = pictures[at].text; };
  const dialog = h("dialog", { class: "la la-dialog la-lightbox", "aria-label": "Picture",
    on: { keydown(e) { if (e.key === "ArrowRight") show(at + 1); if (e.key === "ArrowLeft") show(at - 1); }, close() { dialog.remove(); },
      click(e) { if (e.target === dialog) dialog.close(); } } },
    img, h("div", { class: "la-row la-between" }, button("‹ Previous", () => show(at - 1), { kind: "quiet" }), text, button("Next ›", () => show(at + 1), { kind: "quiet" }),
      button("Close", () => dialog.close())));
  document.body.append(dialog);
  show(at);
  dialog.showModal();
}

export async function copy(text, said = "Copied.") {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no permission, or not a secure page (--listen)
    const area = h("textarea", { value: text, class: "la-offscreen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(said, "good");
}

/** The style sheets of a part, in this order, each once. Resolves when they are there (or cannot be had): a page is built after its
 *  styles, so that nothing jumps while it opens. */
export function style(...names) {
  return Promise.all(names.map((name) => new Promise((done) => {
    if (document.querySelector(`link[href="/static/${name}.css"]`)) return done();
    document.head.append(h("link", { rel: "stylesheet", href: `/static/${name}.css`, on: { load: done, error: done } }));
  })));
}

export const STATES = { waiting: "Waiting", starting: "Starting", running: "Running", finished: "Finished", stopped: "Stopped", failed: "Failed", interrupted: "Interrupted" };
export const query = (name) => new URLSearchParams(location.search).get(name);
/** Change the address without loading the page: reload and sharing keep what is shown. */
export function address(changes) {
  const url = new URL(location.href);
  for (const [k, v] of Object.entries(changes)) v === null || v === "" ? url.searchParams.delete(k) : url.searchParams.set(k, v);
  history.replaceState(null, "", url);
}
