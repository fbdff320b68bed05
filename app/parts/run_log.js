// The log, read only while it is open, and the configuration as it was used.
import { attempt, button, copy, get, h, poll } from "/static/core.js";

const KEPT = 200_000;  // characters of a log that the page holds; all of it is in log.txt of the run's folder

/** Returns {node, live(is it running), stop()}. */
export function logTail(path) {
  let next = -1, text = "", poller = null, running = false;
  const pre = h("pre", { class: "la-log", tabindex: 0, "aria-label": "Log" });
  const follow = h("input", { type: "checkbox", checked: true, on: { change() { if (follow.checked) pre.scrollTop = pre.scrollHeight; } } });
  const node = h("details", { on: { toggle() {
    if (!node.open) return void (poller?.stop(), (poller = null));
    poller ||= poll(read);
  } } }, h("summary", {}, "Log"), h("div", { class: "la-stack" },
    h("div", { class: "la-row la-between" }, h("label", { class: "la-row la-tight la-small" }, follow, "Follow"), button("Copy", () => copy(text, "The log is copied."), { kind: "quiet" })), pre));

  async function read() {
    const answer = await get(`${path}/log?since=${next}`);
    if (answer.next < next) text = "";  // the file was begun anew
    next = answer.next;
    if (answer.text || !pre.textContent) {
      text = (text + answer.text).slice(-KEPT);
      pre.textContent = text || "Nothing is written yet.";
      if (follow.checked) pre.scrollTop = pre.scrollHeight;
    }
    return running ? 1.5 : 6;
  }
  return { node, live(is) { running = is; }, stop() { poller?.stop(); } };
}

/** The effective configuration as TOML. */
export function configuration(path, id) {
  let text = "";
  const pre = h("pre", { class: "la-log", tabindex: 0, "aria-label": "Configuration" });
  const wrong = h("p", { class: "la-error", role: "alert", hidden: true });
  const node = h("details", { on: { async toggle() {
    if (!node.open) return;
    const answer = await attempt(() => get(path + "/config"), wrong);
    if (answer) pre.textContent = text = answer.text;
  } } }, h("summary", {}, "Configuration"), h("div", { class: "la-stack" },
    h("div", { class: "la-row la-between" }, h("span", { class: "la-small la-muted" }, "Every setting, as this run used it."), h("div", { class: "la-row" },
      button("Copy", () => copy(text, "The configuration is copied."), { kind: "quiet" }),
      h("a", { class: "la-btn la-btn-quiet", href: "/api" + path + "/config", download: id + ".toml" }, "Download"))), wrong, pre));
  return { node };
}
