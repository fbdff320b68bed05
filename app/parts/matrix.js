// A table of pictures: named rows and columns, thumbnails that open large. What did not change is never touched, so nothing flickers.
import { fill, h, lightbox } from "/static/core.js";

/** Returns {node, set({corner, columns, rows, cell, stay})}. With `follow`, the newest columns (at the right) stay in sight; with `stay`, the first one too.
 *  columns, rows: [{key, head: text or node, mark}]; cell(row key, column key) -> {thumb, full, text, data} or null. */
export function matrix(label, { follow = false } = {}) {
  const table = h("table", { class: "la-matrix" });
  const node = h("div", { class: "la-scroll la-matrix-scroll", tabindex: 0, role: "region", "aria-label": label }, table);
  let atEnd = true;
  if (follow) {  // unless the user looks at older ones
    node.addEventListener("scroll", () => { atEnd = node.scrollLeft + node.clientWidth >= node.scrollWidth - 24; }, { passive: true });
    new ResizeObserver(() => { if (atEnd) node.scrollLeft = node.scrollWidth; }).observe(table);
  }
  let cells = new Map(), lines = null, head = null, columns = [], rows = [], look = () => null;
  const id = (r, c) => r.key + "\n" + c.key;

  function open(r, c) {
    const all = rows.flatMap((row) => columns.map((column) => ({ id: id(row, column), picture: look(row.key, column.key) }))).filter((x) => x.picture);
    lightbox(all.map((x) => ({ src: x.picture.full, text: x.picture.text })), Math.max(0, all.findIndex((x) => x.id === id(r, c))));
  }
  function make(r, c, p) {
    if (!p) return h("td", {}, h("span", { class: "la-sr" }, "no picture"));
    const img = h("img", { src: p.thumb, alt: p.text, loading: "lazy", decoding: "async" });
    // Cells are square until the first picture says its shape, so that nothing jumps while the others load.
    img.addEventListener("load", () => { if (img.naturalWidth) table.style.setProperty("--la-shape", `${img.naturalWidth} / ${img.naturalHeight}`); }, { once: true });
    return h("td", {}, h("button", { type: "button", class: "la-thumb", data: p.data || {}, title: "Enlarge", on: { click: () => open(r, c) } }, img));
  }
  /** The cell's td, made anew only when its picture is another one. */
  function cell(r, c) {
    const p = look(r.key, c.key), before = cells.get(id(r, c)), thumb = p?.thumb || "";
    const td = before?.thumb === thumb ? before.td : make(r, c, p);
    td.className = (p ? "" : "la-cell-empty") + (c.mark ? " la-marked" : "");
    cells.set(id(r, c), { td, thumb });
    return td;
  }
  const columnHead = (c) => h("th", { scope: "col", class: c.mark ? "la-marked" : "", data: { column: c.key } }, c.head);
  const same = (a, b) => a.length === b.length && a.every((x, i) => x.key === b[i].key && !!x.mark === !!b[i].mark);

  return {
    node,
    set(next) {
      const grows = lines && same(rows, next.rows) && same(columns, next.columns.slice(0, columns.length));
      const known = grows ? columns.length : 0;
      ({ rows, columns } = next);
      look = next.cell;
      table.toggleAttribute("data-first", next.stay === true);
      if (grows) {
        for (const r of rows) columns.slice(0, known).forEach((c) => {
          const old = cells.get(id(r, c)).td, now = cell(r, c);
          if (old !== now) old.replaceWith(now);
        });
        head.append(...columns.slice(known).map(columnHead));
        for (const r of rows) lines.get(r.key).append(...columns.slice(known).map((c) => cell(r, c)));
      } else {
        head = h("tr", {}, h(next.corner ? "th" : "td", { class: "la-matrix-corner" }, next.corner || ""), columns.map(columnHead));
        lines = new Map(rows.map((r) => [r.key, h("tr", { class: r.mark ? "la-marked" : "", data: { row: r.key } },
          h("th", { scope: "row" }, h("span", { class: "la-matrix-name" }, r.head)), columns.map((c) => cell(r, c)))]));
        fill(table, h("thead", {}, head), h("tbody", {}, [...lines.values()]));
        cells = new Map([...cells].filter(([, c]) => table.contains(c.td)));
      }
    },
  };
}
