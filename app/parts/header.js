// The head of every page: name, pages, and one line on what is running.
import { get, h, fill, poll, duration, STATES } from "/static/core.js";

const PAGES = [["/", "New LoRA"], ["/runs", "Runs"], ["/results", "Results"], ["/tools", "Tools"], ["/settings", "Settings"]];

export function mount(root) {
  const here = location.pathname.replace(/\/+$/, "") || "/";
  const strip = h("a", { class: "la-strip", href: "/runs", hidden: true });
  const lost = h("p", { class: "la-lost", role: "alert", hidden: true }, "The server does not answer. Start it again with python launch.py; a training that runs goes on by itself, and this page follows when the server is back.");
  fill(root,
    h("a", { class: "la-skip", href: "#la-main" }, "Skip to content"),
    h("header", { class: "la-header" },
      h("a", { class: "la-brand", href: "/" }, h("img", { src: "/static/icon.svg", alt: "", width: 24, height: 24 }), "LoRA Atelier"),
      h("nav", { class: "la-nav", "aria-label": "Pages" }, PAGES.map(([path, name]) => h("a", { href: path, "aria-current": path === here ? "page" : null }, name))),
      strip),
    lost);
  const title = document.title;
  let before = null;
  poll(async () => {
    const { active, waiting } = await get("/system");
    document.title = active ? `${active.percent} % – ${active.name}` : title;
    strip.hidden = !active && !waiting;
    if (active) {
      strip.href = "/runs?run=" + encodeURIComponent(active.id);
      const words = active.state === "running" && active.stage === "training" ? `${active.percent} %` + (active.eta_s ? ", " + duration(active.eta_s) + " left" : "") : STATES[active.state];
      fill(strip, h("span", { class: "la-dot", "aria-hidden": "true" }), h("span", { class: "la-strip-name" }, active.name), h("span", {}, words));
    } else if (waiting) fill(strip, `${waiting} waiting`);
    if (before && (!active || active.id !== before.id)) notify(before);
    before = active;
    return active ? 2 : 5;
  }, (gone) => { lost.hidden = !gone; });
}

/** A browser notification when the run that was active has ended, if the user allowed it in the settings. */
async function notify(run) {
  if (localStorage.getItem("la-notify") !== "1" || !("Notification" in window) || Notification.permission !== "granted") return;
  const { run: now } = await get("/runs/" + encodeURIComponent(run.id) + "?since=999999999");
  const words = { finished: "is finished.", failed: "has failed: " + now.text, interrupted: "was interrupted.", stopped: "was stopped." }[now.state];
  if (words) new Notification("LoRA Atelier", { body: `${run.name} ${words}`, tag: run.id, icon: "/static/icon.svg" });
}
