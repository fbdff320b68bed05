// Crops moved on a card and in the editor, and masks painted in it. A crop is saved as the point that stays in sight.
import { api, attempt, button, debounce, fill, h, unique } from "/static/core.js";
import { undo } from "/static/draft.js";

const WHOLE = 0.995;  // a crop that keeps so much of a side is not to be moved along it
const STEP = 0.02, LEAP = 0.1;  // of a side, for an arrow key, and with Shift
const LARGEST = 1024;  // pixels of a mask's longer side, as app/masks.py has it
const STEPS = 20;  // strokes that can be taken back
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** A crop that is being moved: `image()` the IMAGE as the server has it, `show(crop)` draws it. It is saved a moment after the last move;
 *  `place`: where a refusal is told, as for `attempt`. */
export function mover(draft, image, show, place = null) {
  let focus = null;
  const crop = () => {
    const { crop } = image();
    return crop && focus ? [clamp(focus[0] - crop[2] / 2, 0, 1 - crop[2]), clamp(focus[1] - crop[3] / 2, 0, 1 - crop[3]), crop[2], crop[3]] : crop;
  };
  const send = debounce(async () => {
    const to = focus, { id } = image();
    await attempt(() => draft.changeImages(() => api("PUT", `/images/${id}/focus`, { focus: to })), place);
    if (focus === to) focus = null;
    show(crop());
  });
  const it = {
    crop,
    /** Whether it can go left and right, up and down. */
    free: () => { const c = image().crop; return c ? [c[2] < WHOLE, c[3] < WHOLE] : [false, false]; },
    to(x, y) {
      const c = image().crop, [across, down] = it.free(), old = focus ?? image().focus;
      focus = [across ? clamp(x, c[2] / 2, 1 - c[2] / 2) : old[0], down ? clamp(y, c[3] / 2, 1 - c[3] / 2) : old[1]];
      show(crop());
      send();
    },
    by(dx, dy) { const [left, top, width, height] = crop(); it.to(left + width / 2 + dx, top + height / 2 + dy); },
    /** An arrow key; whether it was one that moves this crop. */
    key(event) {
      const arrow = ARROWS[event.key], free = it.free();
      if (!arrow || event.ctrlKey || event.altKey || event.metaKey || !free[arrow[0] ? 0 : 1]) return false;
      event.preventDefault();
      const step = event.shiftKey ? LEAP : STEP;
      it.by(arrow[0] * step, arrow[1] * step);
      return true;
    },
    flush: () => send.flush(),
  };
  return it;
}

/** Let a crop be dragged on `target`; `area` is the whole picture. Returns whether a click belongs to a drag: `dragged()`. */
export function draggable(target, area, move) {
  let at = null, moved = false;
  target.addEventListener("pointerdown", (e) => {
    moved = false;
    if (e.button === 0 && move.free().some(Boolean)) at = { x: e.clientX, y: e.clientY, crop: move.crop() };
  });
  target.addEventListener("pointermove", (e) => {
    if (!at) return;
    const dx = e.clientX - at.x, dy = e.clientY - at.y;
    if (!moved && Math.hypot(dx, dy) < 4) return;
    if (!moved) target.setPointerCapture(e.pointerId);
    moved = true;
    const box = area.getBoundingClientRect(), [left, top, width, height] = at.crop;
    move.to(left + width / 2 + dx / box.width, top + height / 2 + dy / box.height);
  });
  for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => { at = null; });
  return { dragged: () => moved };
}

/** Lay the bright part over a picture: `crop` [left, top, width, height] in shares of the image. */
export function cropped(kept, crop) {
  const cut = crop && (crop[2] < WHOLE || crop[3] < WHOLE);
  kept.hidden = !cut;
  if (cut) ["left", "top", "width", "height"].forEach((side, n) => { kept.style[side] = 100 * crop[n] + "%"; });
}

/** The editor of one image's crop and mask; `mode`: "crop" | "mask". */
export function editor(draft, id, mode = "crop") {
  const all = () => draft.images.images.filter((i) => !i.removed);
  const image = () => draft.images.images.find((i) => i.id === id);
  const title = unique("editor");
  const name = h("h2", { class: "la-h2 la-ellipsis", id: title }), says = h("p", { class: "la-help", role: "status" });
  const wrong = h("p", { class: "la-error", role: "alert", hidden: true });  // what is said at the page's foot lies behind the dialog
  const picture = h("img", { draggable: false, alt: "" });
  const kept = h("div", { class: "nl-kept cr-kept", tabIndex: 0, role: "slider", "aria-label": "Crop", "aria-valuemin": 0, "aria-valuemax": 100 });
  const stage = h("div", { class: "cr-stage" }, picture, kept);

  const move = mover(draft, image, () => drawCrop(), wrong);
  stage.addEventListener("pointerdown", (e) => {  // beside the bright part: it comes there, and is then dragged on
    if (mode !== "crop" || e.target === kept) return;
    const box = stage.getBoundingClientRect();
    if (move.free().some(Boolean)) { move.to((e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height); kept.focus(); }
  });
  draggable(stage, stage, { ...move, free: () => (mode === "crop" ? move.free() : [false, false]) });
  kept.addEventListener("keydown", (e) => move.key(e));
  function drawCrop() {
    const crop = move.crop(), [across, down] = move.free();
    cropped(kept, mode === "crop" ? crop : null);
    if (mode !== "crop") return;
    const { bucket } = image();
    says.textContent = across || down ? `Trained as ${bucket[0]} × ${bucket[1]}. Drag the bright part, or move it with the arrow keys.` : bucket ? `Trained as ${bucket[0]} × ${bucket[1]}: nothing of it is cut off.` : "How it is cropped is not known yet.";
    if (!(across || down)) return;
    const share = across ? crop[0] / (1 - crop[2]) : crop[1] / (1 - crop[3]);
    kept.setAttribute("aria-orientation", across ? "horizontal" : "vertical");
    kept.setAttribute("aria-valuenow", Math.round(100 * share));
    kept.setAttribute("aria-valuetext", `${Math.round(100 * share)} % from the ${across ? "left" : "top"}`);
    centre.disabled = image().focus[0] === 0.5 && image().focus[1] === 0.5;
  }
  const change = (call) => async () => { await move.flush(); await attempt(() => draft.changeImages(call), wrong); draw(); };
  const centre = button("Centre again", change(() => api("PUT", `/images/${id}/focus`, { focus: null })), { id: "crop-centre" });
  const subject = button("Around the subject", change(() => api("POST", "/images/focus", { how: "subject", ids: [id] })), { id: "crop-subject" });
  const cropTools = h("div", { class: "la-row" }, subject, centre);

  // The mask

  const mask = painter(stage, says, () => mode === "mask");
  const alpha = button("From transparency", async () => {
    if (await attempt(() => draft.changeImages(() => api("POST", "/images/masks/alpha", { ids: [id] })), wrong)) await mask.load(image());
  }, { id: "mask-alpha" });
  mask.tools.append(alpha);
  /** Save what was painted. Resolves to false where the server did not take it. */
  async function commit() {
    await move.flush();
    if (!mask.dirty()) return true;
    const png = await mask.png();
    const done = await attempt(() => draft.changeImages(() => (png ? api("PUT", `/images/${id}/mask`, png) : api("DELETE", `/images/${id}/mask`))), wrong);
    if (done) mask.drop();
    return Boolean(done);
  }

  const modes = ["crop", "mask"].map((value) => button(value === "crop" ? "Crop" : "Mask", () => turn(value), { id: "mode-" + value }));
  async function turn(to) {
    if (!(await commit())) return;
    mode = to;
    await draw();
  }
  async function show(step) {
    const images = all();
    if (!(await commit())) return;
    id = images[(images.findIndex((i) => i.id === id) + step + images.length) % images.length].id;
    await draw();
  }
  async function draw() {
    const now = image();
    if (!now) return dialog.close();  // gone, by another tab or an undo
    name.textContent = picture.alt = now.name;
    if (picture.getAttribute("src") !== now.full) picture.src = now.full;
    stage.style.setProperty("--ratio", now.width / now.height);
    modes.forEach((b, n) => b.setAttribute("aria-pressed", String(mode === ["crop", "mask"][n])));
    cropTools.hidden = mode !== "crop" || !move.free().some(Boolean);
    mask.tools.hidden = mode !== "mask";
    alpha.hidden = !now.transparent;
    drawCrop();
    if (mode === "mask") await mask.load(now);
    else mask.hide();
  }
  const stay = (e) => { if (mask.dirty()) e.preventDefault(); };  // what was painted is not on the disk yet
  addEventListener("beforeunload", stay);
  const leave = async () => { if (await commit()) dialog.close(); };
  const dialog = h("dialog", { class: "la la-dialog la-lightbox cr-editor", "aria-labelledby": title, on: {
    cancel(e) { e.preventDefault(); leave(); },
    close() { dialog.remove(); removeEventListener("beforeunload", stay); if (mask.dirty()) commit(); },
    keydown(e) {
      if ((e.ctrlKey || e.metaKey) && e.key.toLowerCase() === "z") { e.preventDefault(); if (mode === "mask" && mask.dirty()) mask.undo(); else commit().then(() => undo(draft)).then(draw); }
      if (e.key === "PageDown" || e.key === "PageUp") { e.preventDefault(); show(e.key === "PageDown" ? 1 : -1); }
    },
  } },
    h("div", { class: "la-row la-between cr-head" }, name, h("div", { class: "la-row", role: "group", "aria-label": "What to change" }, modes)),
    stage, says, wrong, cropTools, mask.tools,
    h("div", { class: "la-row la-between" }, button("‹ Previous", () => show(-1), { kind: "quiet" }), button("Done", leave, { kind: "primary", id: "editor-done" }), button("Next ›", () => show(1), { kind: "quiet" })));
  document.body.append(dialog);
  dialog.showModal();
  return draw().then(() => (mode === "crop" && !kept.hidden ? kept : modes[mode === "crop" ? 0 : 1]).focus());
}

/** What paints a mask over `stage`. White (here: opaque) counts. An empty mask is none: the whole image counts. */
function painter(stage, says, on) {
  const kept = document.createElement("canvas");  // opaque where it counts
  const shown = h("canvas", { class: "cr-mask", tabIndex: 0, role: "application", hidden: true });
  const ring = h("span", { class: "cr-ring", hidden: true });
  stage.append(shown, ring);
  let past = [], cut = false, dirty = false, empty = true, erase = false, last = null, turn = 0, keys = [0.5, 0.5];
  const pen = kept.getContext("2d", { willReadFrequently: true });

  const brush = h("input", { type: "range", min: 1, max: 50, value: 12, id: "mask-brush", on: { input: () => place(keys) } });
  const radius = () => (brush.value / 200) * Math.min(kept.width, kept.height);
  const two = [["Paint", false], ["Erase", true]].map(([label, value]) => button(label, () => { erase = value; press(); }, { id: "mask-" + label.toLowerCase() }));
  const press = () => two.forEach((b, n) => b.setAttribute("aria-pressed", String(erase === Boolean(n))));
  press();
  const back = button("Undo", () => it.undo(), { kind: "quiet", id: "mask-undo" });
  const tools = h("div", { class: "la-row cr-tools", hidden: true }, h("div", { class: "la-row", role: "group", "aria-label": "Brush" }, two),
    h("label", { class: "la-row cr-brush", htmlFor: "mask-brush" }, h("span", { class: "la-small" }, "Size"), brush),
    button("Fill all", () => all("source-over"), { id: "mask-fill" }), button("Invert", () => all("xor"), { id: "mask-invert" }), button("Clear", () => all("copy", "transparent"), { id: "mask-clear" }), back);

  function remember() {
    cut ||= past.length >= STEPS;  // then Undo no longer leads back to what is saved
    past = [...past.slice(1 - STEPS), [pen.getImageData(0, 0, kept.width, kept.height), empty]];
    dirty = true;
  }
  function all(how, colour = "#fff") {
    remember();
    pen.globalCompositeOperation = how;
    pen.fillStyle = colour;
    pen.fillRect(0, 0, kept.width, kept.height);
    settle();
  }
  function settle() {
    const { data } = pen.getImageData(0, 0, kept.width, kept.height);
    empty = true;
    for (let k = 3; k < data.length && empty; k += 4) empty = data[k] < 8;
    draw();
  }
  function draw() {
    const view = shown.getContext("2d");
    view.globalCompositeOperation = "copy";
    view.fillStyle = empty ? "transparent" : "rgb(8 12 24 / 64%)";
    view.fillRect(0, 0, shown.width, shown.height);
    view.globalCompositeOperation = "destination-out";
    view.drawImage(kept, 0, 0);
    back.disabled = !past.length;
    says.textContent = empty ? "No mask: all of the image counts. Paint over what the LoRA shall learn." : "Bright is learned; what is dimmed counts little.";
  }
  const point = (e) => { const box = shown.getBoundingClientRect(); return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height]; };
  function line(from, to) {
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = "#fff";
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = 2 * radius();
    pen.beginPath();
    pen.moveTo(from[0] * kept.width, from[1] * kept.height);
    pen.lineTo(to[0] * kept.width + 0.01, to[1] * kept.height);
    pen.stroke();
    if (!erase) empty = false;
    draw();
  }
  function begin(at) {
    remember();
    if (erase && empty) { pen.globalCompositeOperation = "copy"; pen.fillStyle = "#fff"; pen.fillRect(0, 0, kept.width, kept.height); empty = false; }
    line(at, at);
  }
  function place(at) {
    keys = at;
    const box = shown.getBoundingClientRect(), size = (2 * radius() * box.width) / kept.width;
    Object.assign(ring.style, { left: 100 * at[0] + "%", top: 100 * at[1] + "%", width: size + "px", height: size + "px" });
    ring.hidden = !on();
  }
  const listen = {
    pointerdown(e) { if (e.button === 0) { shown.setPointerCapture(e.pointerId); last = point(e); place(last); begin(last); } },
    pointermove(e) {
      place(point(e));
      if (!last) return;
      for (const part of e.getCoalescedEvents?.().length ? e.getCoalescedEvents() : [e]) { const to = point(part); line(last, to); last = to; }
    },
    pointerup() { if (last) settle(); last = null; },
    pointercancel() { if (last) settle(); last = null; },
    pointerleave() { if (document.activeElement !== shown) ring.hidden = true; },
    focus() { place(keys); }, blur() { ring.hidden = true; },
    keydown(e) {
      const arrow = ARROWS[e.key], step = e.shiftKey ? LEAP : STEP;
      if (arrow) { e.preventDefault(); place([clamp(keys[0] + arrow[0] * step, 0, 1), clamp(keys[1] + arrow[1] * step, 0, 1)]); }
      if (e.key === " " || e.key === "Enter") { e.preventDefault(); begin(keys); settle(); }
    },
  };
  for (const [event, call] of Object.entries(listen)) shown.addEventListener(event, call);

  const it = {
    tools,
    dirty: () => dirty,
    drop() { dirty = cut = false; past = []; },
    hide() { shown.hidden = ring.hidden = true; },
    /** Show the mask of an IMAGE, as the server has it. */
    async load(image) {
      const mine = ++turn, scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
      it.drop();
      kept.width = shown.width = Math.max(1, Math.round(image.width * scale));
      kept.height = shown.height = Math.max(1, Math.round(image.height * scale));
      shown.setAttribute("aria-label", `Mask of ${image.name}. The arrow keys move the brush, Space paints.`);
      shown.hidden = false;
      if (image.mask) {
        const file = new Image();
        file.src = image.mask;
        try { await file.decode(); } catch { says.textContent = "The mask cannot be read. Clear it, or paint another."; return; }
        if (mine !== turn) return;
        pen.globalCompositeOperation = "copy";
        pen.drawImage(file, 0, 0, kept.width, kept.height);
        const found = pen.getImageData(0, 0, kept.width, kept.height), { data } = found;
        for (let k = 0; k < data.length; k += 4) { data[k + 3] = data[k]; data[k] = data[k + 1] = data[k + 2] = 255; }
        pen.putImageData(found, 0, 0);
      }
      settle();
    },
    undo() {
      const before = past.pop();
      if (!before) return;
      pen.putImageData(before[0], 0, 0);
      empty = before[1];
      dirty = cut || past.length > 0;
      draw();
    },
    /** The mask as a PNG, white on black; null where it is empty. */
    png() {
      if (empty) return Promise.resolve(null);
      const out = h("canvas", { width: kept.width, height: kept.height }), flat = out.getContext("2d");
      flat.fillStyle = "#000";
      flat.fillRect(0, 0, out.width, out.height);
      flat.drawImage(kept, 0, 0);
      return new Promise((done) => out.toBlob(done, "image/png"));
    },
  };
  return it;
}
