// The files that a run has left: download, copy to the folder of the image program, keep one, what is written in them.
import { api, ask, attempt, button, copy, field, fill, h, megabytes, plural, post, toast } from "/static/core.js";
import { formDialog } from "/static/run_actions.js";

const address = (id, file) => `/api/runs/${encodeURIComponent(id)}/files/${encodeURIComponent(file)}`;

/** A download link for one file. */
export function download(id, file, kind = "") {
  return h("a", { class: "la-btn" + (kind && " la-btn-" + kind), href: address(id, file), download: file }, "Download");
}

/** Copy a file into the LoRA folder; where none is set, ask for it first. `changed()` when the setting was made. */
export async function copyToFolder(id, file, folder, changed) {
  const send = (to) => post(`/runs/${encodeURIComponent(id)}/copy`, { file, folder: to });
  const done = folder ? await attempt(() => send("")) : await chooseFolder("", "Copy there", send);
  if (done && !folder) changed();
  if (done) toast(`Copied: ${done.paths[0]}` + (done.paths.length > 1 ? `, with ${done.paths.slice(1).map((p) => p.split(/[/\\]/).pop()).join(" and ")}.` : "."), "good");
}

/** Ask for the LoRA folder, use it for `first(folder)`, and keep it in the settings once that has worked. */
export function chooseFolder(folder, label, first = async () => true) {
  const control = h("input", { type: "text", value: folder, placeholder: "/path/to/models/Lora", spellcheck: false, autocomplete: "off" });
  const f = field("My LoRA folder", control, { help: "The folder from which your image program reads LoRAs: models/Lora in A1111 and Forge, models/loras in ComfyUI. It is asked once; the settings have it." });
  return formDialog("Where are your LoRAs?", f.node, label, async () => {
    const done = await first(control.value.trim());
    await api("PATCH", "/settings", { lora_folder: control.value.trim() });
    return done;
  });
}

/** The table of files. Returns {node, show(run id, results)}. `changed()` after something was deleted or set. */
export function fileList(changed) {
  const body = h("tbody", {}), line = h("p", { class: "la-small la-muted la-lora-folder" });
  const node = h("section", { class: "la-section", "aria-label": "Files" }, h("div", { class: "la-row la-between" }, h("h2", { class: "la-h2" }, "Files"),
    button("Open the folder", () => attempt(() => post(`/runs/${encodeURIComponent(id)}/open`)), { kind: "quiet" })),
    h("div", { class: "la-scroll" }, h("table", { class: "la-table la-files" }, h("thead", {}, h("tr", {}, ["File", "Step", "Size", ""].map((t) => h("th", { scope: "col" }, t || h("span", { class: "la-sr" }, "Actions"))))), body)), line);
  let id = "", drawn = "", files = [];

  async function keep(file) {
    const path = `/runs/${encodeURIComponent(id)}/keep`;
    const found = await attempt(() => post(path, { file, confirm: false }));
    if (!found) return;
    const size = megabytes(files.reduce((sum, f) => sum + (found.delete.includes(f.file) ? f.bytes : 0), 0));
    const yes = await ask(`Keep ${file}, delete the others?`, [
      h("p", {}, `${plural(found.delete.length, "file")} with ${size} in all are deleted for good:`), h("ul", { class: "la-gone la-mono" }, found.delete.map((name) => h("li", {}, name))),
      h("p", {}, "Copies in your LoRA folder stay. The run can still be trained further.")], [["Cancel", false], [`Delete ${plural(found.delete.length, "file")}`, true, "danger"]]);
    if (!yes) return;
    if ((await attempt(() => post(path, { file, confirm: true }))) !== undefined) { toast(`${plural(found.delete.length, "file")} deleted, ${size} freed.`, "good"); changed(); }
  }
  return { node, show(run, results) {
    const now = run + JSON.stringify([results.files, results.lora_folder]);
    if (now === drawn) return;
    drawn = now;
    [id, files] = [run, results.files];
    fill(body, results.files.map((f) => h("tr", { class: f.recommended ? "la-marked" : "", data: { file: f.file } },
      h("td", {}, h("span", { class: "la-mono" }, f.file), " ", f.recommended && h("span", { class: "la-badge la-badge-good" }, "Recommended"), f.final && !f.recommended && h("span", { class: "la-badge" }, "Last")),
      h("td", { class: "la-num" }, String(f.step)), h("td", { class: "la-num la-nowrap" }, megabytes(f.bytes)),
      h("td", {}, h("div", { class: "la-row la-file-tools" },
        h("a", { class: "la-btn la-btn-small", href: address(run, f.file), download: f.file, "aria-label": "Download " + f.file }, "Download"),
        f.second && h("a", { class: "la-btn la-btn-small", href: address(run, f.second), download: f.second, title: "The same LoRA under the names that diffusers reads", "aria-label": "Download " + f.second }, "Download for diffusers"),
        button("Copy to my LoRA folder", () => copyToFolder(run, f.file, results.lora_folder, changed), { class: "la-btn la-btn-small", "aria-label": `Copy ${f.file} to my LoRA folder` }),
        results.files.length > 1 && button("Keep this one, delete the others", () => keep(f.file), { class: "la-btn la-btn-small la-btn-quiet", "aria-label": `Keep ${f.file}, delete the others` }))))));
    fill(line, results.lora_folder ? [`My LoRA folder: ${results.lora_folder} `, button("Change", async () => { if (await chooseFolder(results.lora_folder, "Use this folder")) changed(); }, { kind: "link" })] : []);
    line.hidden = !results.lora_folder;
  } };
}

/** What stands in the files, one at a time. Returns {node, show(results)}. */
export function metadataView() {
  const choose = h("select", { on: { change: () => draw() } }), f = field("File", choose), table = h("tbody", {});
  const node = h("details", { data: { details: "metadata" } }, h("summary", {}, "What stands in the file"), h("div", { class: "la-stack" },
    h("div", { class: "la-row la-between la-meta-head" }, h("div", { class: "la-narrow la-grow" }, f.node), button("Copy", () => copy(JSON.stringify(metadata[choose.value] || {}, null, 1), "The metadata are copied."), { kind: "quiet" })),
    h("div", { class: "la-scroll la-meta", tabindex: 0, role: "region", "aria-label": "Metadata" }, h("table", { class: "la-table la-small" }, table))));
  let metadata = {}, drawn = "";
  function draw() {
    fill(table, Object.entries(metadata[choose.value] || {}).sort().map(([key, value]) => h("tr", {}, h("th", { scope: "row", class: "la-mono" }, key), h("td", { class: "la-mono" }, value))));
  }
  return { node, show(results) {
    const now = JSON.stringify(results.metadata);
    if (now === drawn) return;
    drawn = now;
    metadata = results.metadata;
    const before = choose.value;
    fill(choose, results.files.map((x) => h("option", { value: x.file }, x.file)));
    choose.value = before in metadata ? before : (results.files.find((x) => x.recommended) || results.files.at(-1))?.file ?? "";
    draw();
  } };
}
