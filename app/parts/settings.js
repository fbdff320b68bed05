// The settings page. Each field is saved when it is left; an error stands below its field and what was typed stays.
import { api, ask, button, field, fill, get, h, Refused, toast } from "/static/core.js";

const lines = (text) => text.split("\n").map((l) => l.trim()).filter(Boolean);

export async function mount(root) {
  const [settings, system, offered] = await Promise.all([get("/settings"), get("/system"), get("/captioners")]);

  /** A field that is saved when it is left. `read` and `write` turn the text into the value and back. */
  function text(key, label, { help = "", rows = 0, read = (t) => t.trim(), write = (v) => v, placeholder = "" } = {}) {
    const control = rows ? h("textarea", { rows, spellcheck: false, placeholder }) : h("input", { type: "text", spellcheck: false, placeholder });
    control.value = write(settings[key]);
    control.dataset.key = key;
    const f = field(label, control, { help });
    control.addEventListener("change", async () => { if (await save(key, read(control.value), f)) control.value = write(settings[key]); });
    return f.node;
  }
  async function save(key, value, f = null) {
    try {
      Object.assign(settings, await api("PATCH", "/settings", { [key]: value }));
      f?.error("");
      toast("Saved.", "good");
      return true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      f ? f.error(error.message) : toast(error.message, "bad");
    }
  }
  function choice(key, label, options, then = () => {}) {
    const name = "settings-" + key;
    return h("fieldset", { class: "la-choices" }, h("legend", { class: "la-label la-legend" }, label), options.map(([value, title, says]) =>
      h("label", { class: "la-choice" },
        h("input", { type: "radio", name, value, checked: settings[key] === value, on: { async change() { if (await save(key, value)) then(value); } } }),
        h("b", {}, title), h("span", { class: "la-help" }, says))));
  }
  /** The captioner behind a button: one of those that are offered, or any other by its hub id or folder. */
  function captioner(key, label) {
    const known = offered.known[key], size = (mb) => (mb ? (mb >= 1000 ? (mb / 1000).toFixed(1) + " GB" : mb + " MB") : "size said before it begins");
    const other = text(key, "Its hub id or folder", { placeholder: "owner/name or a folder", help: `A model on huggingface.co or a folder on this computer. ${key === "tags" ? "A WD tagger: model.onnx and selected_tags.csv." : "BLIP, Florence-2 or a Qwen vision-language model in transformers’ format."}` });
    const input = other.querySelector("input"), own = () => !known.some((k) => k.source === settings[key]) && settings[key] !== "";
    const show = () => { other.hidden = !own(); };
    const pick = (value, checked, title, says, on) => h("label", { class: "la-choice" },
      h("input", { type: "radio", name: "captioner-" + key, value, checked, on: { change: on } }), h("b", {}, title), h("span", { class: "la-help" }, says));
    const now = settings[key] || known[0].source;
    show();
    return h("div", { class: "la-stack" }, h("fieldset", { class: "la-choices", id: "captioner-" + key }, h("legend", { class: "la-label la-legend" }, label),
      known.map((k) => pick(k.source, now === k.source, k.title, `${k.why} ${k.there ? "On this computer" : "Download: " + size(k.size_mb)}; licence ${k.licence}.`, async () => { if (await save(key, k.source)) { input.value = ""; show(); } })),
      pick("other", own(), "Another one", "A hub id or a folder of yours.", () => { other.hidden = false; input.value = own() ? settings[key] : ""; input.focus(); })), other);
  }
  const section = (title, lead, ...rest) => h("section", { class: "la-section" }, h("h2", { class: "la-h2" }, title), lead && h("p", { class: "la-lead" }, lead), rest);

  fill(root, h("div", { id: "la-main", class: "la-main" },
    h("h1", { class: "la-h1" }, "Settings"),
    section("Folders", "Models are used where they are; nothing is copied. The usual places of AUTOMATIC1111, Forge, ComfyUI, SD.Next, StabilityMatrix and the hub's cache are looked through anyway.",
      h("div", { class: "la-cols" },
        text("model_folders", "More folders with models", { rows: 3, read: lines, write: (v) => v.join("\n"), help: "One folder a line." }),
        text("lora_folder", "My LoRA folder", { help: "“Copy to my LoRA folder” on the Results page copies there, for instance ComfyUI/models/loras.", placeholder: "/path/to/models/loras" }),
        text("run_folders", "More folders with runs", { rows: 3, read: lines, write: (v) => v.join("\n"), help: "Runs that were started on the command line are listed too." }),
        h("div", { class: "la-field" }, h("span", { class: "la-label" }, "Data folder"), h("p", { class: "la-mono" }, system.data_dir), h("p", { class: "la-help" }, "Images, captions and runs are kept here. Choose another with --data-dir at start.")))),
    section("Captions", "What stands behind the two buttons of the page New LoRA.",
      captioner("sentences", "Sentences"), captioner("tags", "Tags"),
      h("div", { class: "la-cols" },
        text("tag_probability", "Least probability of a tag", { read: (t) => Number(t.replace(",", ".")) || t, help: "0.35 is usual. Lower: more tags, and more that are wrong." }),
        text("blocked_tags", "Tags that are never written", { placeholder: "simple background, watermark", help: "With commas between." }))),
    section("Masks", "", h("div", { class: "la-narrow" }, text("masker", "Masks by words", { help: "What finds in an image what you name: a CLIPSeg model on huggingface.co or a folder on this computer." }))),
    section("Memory", "", choice("memory", "When training", [["auto", "Automatic", "Fast: whatever fits is kept on the GPU."], ["low", "Save memory", "Slower: activations are computed twice (gradient checkpointing). For GPUs that run full."]])),
    token(),
    section("Appearance", "", choice("theme", "Theme", [["system", "Like the computer", "Changes with it."], ["light", "Light", ""], ["dark", "Dark", ""]], theme), notifications()),
    about()));
  theme(settings.theme);

  function theme(value) {
    localStorage.setItem("la-theme", value);
    dispatchEvent(new Event("la-theme"));
  }

  function notifications() {
    const box = h("input", { type: "checkbox", checked: localStorage.getItem("la-notify") === "1" && Notification?.permission === "granted" });
    const says = h("span", { class: "la-help", role: "status" });
    box.addEventListener("change", async () => {
      if (box.checked && (await Notification.requestPermission()) !== "granted") {
        box.checked = false;
        says.textContent = "The browser does not allow notifications for this page; allow them beside the address.";
      }
      localStorage.setItem("la-notify", box.checked ? "1" : "0");
    });
    return h("div", {}, h("label", { class: "la-row" }, box, h("span", {}, "Tell me when a run ends or fails (in this browser)")), says);
  }

  function token() {
    const control = h("input", { type: "password", autocomplete: "off", placeholder: "hf_…" });
    const f = field("Hub token", control, { help: "For models that ask you to accept their terms. It is kept by huggingface_hub on this computer and never shown again." });
    const state = h("span", { class: "la-badge" });
    const remove = button("Remove", async () => { if ((await ask("Remove the token?", "Models that need it can then not be downloaded.", [["Cancel", false], ["Remove", true, "danger"]])) && (await save("token", "", f))) show(); }, { kind: "quiet" });
    const set = button("Save token", async () => { set.disabled = true; if (await save("token", control.value.trim(), f)) control.value = ""; set.disabled = false; show(); });
    const show = () => { state.textContent = settings.token ? "A token is set" : "No token"; state.className = "la-badge" + (settings.token ? " la-badge-good" : ""); remove.hidden = !settings.token; };
    show();
    return section("huggingface.co", "", h("div", { class: "la-row" }, state), h("div", { class: "la-narrow" }, f.node), h("div", { class: "la-row" }, set, remove));
  }

  function about() {
    const ticks = { captions: "captions", prompts: "prompts", names: "file and folder names" };
    const boxes = Object.entries(ticks).map(([key, name]) => [key, h("input", { type: "checkbox" }), name]);
    const link = h("a", { class: "la-btn la-btn-link", href: "/api/report", download: "" }, "Download the bug report");
    const update = () => { link.href = "/api/report?" + boxes.filter(([, b]) => b.checked).map(([k]) => k + "=1").join("&"); };
    boxes.forEach(([, b]) => b.addEventListener("change", update));
    const rows = [["Version", system.version], ["Device", system.device || "…"], ["Memory", system.memory_gib ? `${system.memory_gib} GiB, ${system.free_memory_gib} GiB free` : "…"], ["Disk", `${Math.round(system.disk_free_gb)} GB free`]];
    return section("About", "",
      system.gpu_unusable && h("p", { class: "la-note la-note-warn" }, system.gpu_unusable),
      h("table", { class: "la-table la-narrow" }, h("tbody", {}, rows.map(([k, v]) => h("tr", {}, h("th", { scope: "row" }, k), h("td", {}, v))))),
      h("div", { class: "la-stack" }, h("h3", { class: "la-h3" }, "Bug report"),
        h("p", { class: "la-lead" }, "A zip with the log, the settings of the last runs and versions. It holds no images and no token; captions, prompts, names and home folders are blotted out unless you tick them."),
        h("div", { class: "la-row" }, boxes.map(([, b, name]) => h("label", { class: "la-row" }, b, "with " + name))), h("div", {}, link)),
      system.password && h("form", { method: "post", action: "/logout" }, h("button", { type: "submit", class: "la-btn" }, "Log out of this browser")),
      h("p", { class: "la-small la-muted" }, "Scripts can do what this page does: ", h("a", { href: "/help/api.md" }, "the HTTP interface"), "."));
  }
}
