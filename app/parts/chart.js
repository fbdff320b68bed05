// A line chart as SVG: curves over steps, with crosshair, keyboard, an optional log scale and smoothing. Knows nothing about runs.
import { fill, h, unique } from "/static/core.js";

const LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;

/** The exponential mean of [[x, y]], without the bias towards its first value. `weight` from 0 (nothing) below 1. */
export function smoothed(points, weight) {
  let mean = 0, seen = 0;
  return points.map(([x, y]) => {
    mean = weight * mean + (1 - weight) * y;
    seen = weight * seen + (1 - weight);
    return [x, mean / seen];
  });
}

function ticks(low, high, log) {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) for (const m of [1, 2, 5]) all.push(m * 10 ** e);
    const inside = all.filter((t) => t >= low && t <= high);
    return inside.length > 6 ? inside.filter((t) => String(t.toExponential(0))[0] === "1") : inside;
  }
  const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const out = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step / 1e6; t += step) out.push(t);
  return out;
}

/** A chart of `series` [{key, name, kind: noisy | line | marks | squares, colour: 1..3}].
 *  Returns {node, set({key: [[step, value]]})}. `format` turns a value into words. */
export function chart(title, series, { format, height = 220, controls = false }) {
  let data = {}, width = 0, cursor = null, amount = controls ? 0.5 : 0, log = false, scale = null;
  const svg = h("svg", { class: "la-chart", tabindex: 0, role: "img", height, preserveAspectRatio: "none" });
  const readout = h("p", { class: "la-small la-num la-chart-says" });
  const node = h("figure", { class: "la-figure" });
  const has = (s) => data[s.key]?.length > 0;
  /** A noisy series as it is drawn strongly: a mean over up to a quarter of the curve, so that short and long runs look alike. */
  function mean(s) {
    const n = (amount ** 2 * data[s.key].length) / 4;
    return smoothed(data[s.key], n / (n + 1));
  }

  function settings() {
    const id = unique("smooth");
    const slider = h("input", { type: "range", id, min: 0, max: 1, step: 0.05, value: amount, class: "la-chart-slider" });
    const says = () => slider.setAttribute("aria-valuetext", Math.round(amount * 100) + " %");
    slider.addEventListener("input", () => { amount = +slider.value; says(); draw(); });
    says();
    const box = h("input", { type: "checkbox", on: { change() { log = box.checked; draw(); } } });
    return h("div", { class: "la-row la-small la-chart-controls" }, h("label", { htmlFor: id }, "Smoothing"), slider, h("label", { class: "la-row la-tight" }, box, "Log scale"));
  }
  const legend = h("ul", { class: "la-legend-list la-small" }, series.map((s) =>
    h("li", { class: "la-c" + s.colour, data: { series: s.key } }, h("span", { class: "la-swatch la-swatch-" + s.kind, "aria-hidden": "true" }), s.name)));
  fill(node, h("figcaption", { class: "la-row la-between la-chart-head" }, legend, controls && settings()), svg, readout);

  function measure() {
    const shown = series.filter(has);
    const xs = shown.flatMap((s) => [data[s.key][0][0], data[s.key].at(-1)[0]]);
    let ys = shown.flatMap((s) => {
      const values = data[s.key].map((p) => p[1]).filter((y) => isFinite(y) && (!log || y > 0));
      if (s.kind !== "noisy" || values.length < 20) return values;
      values.sort((a, b) => a - b);  // a few outliers do not flatten the curve
      return [values[Math.floor(values.length * 0.01)], values[Math.ceil(values.length * 0.99) - 1]];
    });
    if (!ys.length) ys = [log ? 0.1 : 0, 1];
    let low = Math.min(...ys), high = Math.max(...ys);
    if (log) [low, high] = [low / 1.15, high * 1.15];
    else {
      if (low > 0 && low < high * 0.7) low = 0;
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      [low, high] = [low === 0 ? 0 : low - room, high + room];
    }
    const right = Math.max(...xs, 1), f = log ? (v) => Math.log10(Math.max(v, low)) : (v) => v;
    const span = f(high) - f(low);
    const y = (v) => Math.min(height - BOTTOM, Math.max(TOP, TOP + (1 - (f(v) - f(low)) / span) * (height - TOP - BOTTOM)));
    return { low, high, right, x: (s) => LEFT + (s / right) * (width - LEFT - RIGHT), y };
  }
  const path = (points) => points.map(([s, v], i) => (i ? "L" : "M") + scale.x(s).toFixed(1) + " " + scale.y(v).toFixed(1)).join("");

  function draw() {
    if (!width) return;
    const shown = series.filter(has);
    for (const item of legend.children) item.hidden = !shown.some((s) => s.key === item.dataset.series);
    if (!shown.length) return;
    scale = measure();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const parts = [];
    for (const t of ticks(scale.low, scale.high, log)) {
      const y = scale.y(t);
      parts.push(h("line", { class: "la-chart-grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }), h("text", { class: "la-chart-text", x: LEFT - 8, y: y + 4, "text-anchor": "end" }, format(t)));
    }
    for (const t of ticks(0, scale.right, false).filter((t) => Number.isInteger(t)))
      parts.push(h("text", { class: "la-chart-text", x: scale.x(t), y: height - 6, "text-anchor": scale.x(t) > width - RIGHT - 16 ? "end" : "middle" }, String(t)));
    for (const s of shown) {
      const points = data[s.key], colour = "la-c" + s.colour;
      if (s.kind === "noisy") parts.push(h("path", { class: colour + (amount ? " la-chart-raw" : " la-chart-line"), d: path(points) }));
      if (s.kind !== "noisy" || amount) parts.push(h("path", { class: colour + " la-chart-line" + (s.kind === "squares" ? " la-chart-dash" : ""), d: path(s.kind === "noisy" ? mean(s) : points) }));
      if (s.kind === "marks" || s.kind === "squares") for (const [x, y] of points)
        parts.push(s.kind === "marks" ? h("circle", { class: colour + " la-chart-mark", cx: scale.x(x), cy: scale.y(y), r: 3.5 }) : h("rect", { class: colour + " la-chart-mark", x: scale.x(x) - 3.2, y: scale.y(y) - 3.2, width: 6.4, height: 6.4 }));
    }
    fill(svg, parts, h("g", { class: "la-chart-cross" }));
    svg.setAttribute("aria-label", summary(shown));
    cross();
  }

  function summary(shown) {
    return `${title} up to step ${scale.right}. ` + shown.map((s) => {
      const points = s.kind === "noisy" && amount ? mean(s) : data[s.key];
      return `${s.name}${s.kind === "noisy" && amount ? ", smoothed" : ""}: from ${format(points[0][1])} to ${format(points.at(-1)[1])}.`;
    }).join(" ") + " Arrow keys read single steps.";
  }

  const steps = () => [...new Set(series.filter(has).flatMap((s) => data[s.key].map((p) => p[0])))].sort((a, b) => a - b);
  const nearest = (points, step) => points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));

  /** The vertical line at `cursor`, and the values there in words. */
  function cross() {
    const group = svg.querySelector(".la-chart-cross");
    if (cursor === null || !group) {
      readout.textContent = controls ? "Point at the curve, or focus it and use the arrow keys, to read values." : "";
      if (group) fill(group);
      return;
    }
    const x = scale.x(cursor), words = [], dots = [];
    for (const s of series.filter(has)) {
      const p = nearest(data[s.key], cursor);
      if (s.kind === "noisy" && amount) {
        const middle = nearest(mean(s), cursor);
        words.push(`${s.name} ${format(p[1])} (smoothed ${format(middle[1])})`);
        dots.push(h("circle", { class: `la-c${s.colour} la-chart-mark`, cx: x, cy: scale.y(middle[1]), r: 4 }));
      } else words.push(`${s.name} ${format(p[1])}` + (p[0] === cursor ? "" : ` at step ${p[0]}`));
    }
    fill(group, h("line", { class: "la-chart-hair", x1: x, x2: x, y1: TOP, y2: height - BOTTOM }), dots);
    readout.textContent = `Step ${cursor}: ` + words.join(" · ");
  }
  svg.addEventListener("pointermove", (e) => {
    if (!scale) return;
    const all = steps(), box = svg.getBoundingClientRect();
    const step = ((e.clientX - box.left - LEFT) / (width - LEFT - RIGHT)) * scale.right;
    cursor = all.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), all[0]);
    cross();
  });
  const leave = () => { cursor = null; cross(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("focus", () => readout.setAttribute("aria-live", "polite"));
  svg.addEventListener("blur", () => { readout.removeAttribute("aria-live"); leave(); });
  svg.addEventListener("keydown", (e) => {
    const all = steps(), at = cursor === null ? all.length - 1 : all.indexOf(cursor);
    const to = { ArrowLeft: at - (cursor === null ? 0 : 1), ArrowRight: at + 1, PageUp: at - 10, PageDown: at + 10, Home: 0, End: all.length - 1 }[e.key];
    if (e.key === "Escape") return leave();
    if (to === undefined || !scale) return;
    e.preventDefault();
    cursor = all[Math.max(0, Math.min(all.length - 1, to))];
    cross();
  });
  new ResizeObserver(() => { const w = Math.round(node.clientWidth); if (w && w !== width) { width = w; draw(); } }).observe(node);
  cross();

  return { node, set(next) { data = next; draw(); } };
}
