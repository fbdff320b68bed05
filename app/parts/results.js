import { h, fill } from "/static/core.js";
export function mount(root) { fill(root, h("main", { id: "la-main", class: "la-main" }, h("h1", { class: "la-h1" }, "results"))); }
