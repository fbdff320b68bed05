// Section 2: what the LoRA is for, what it is called, and the words that bring it out.
import { button, field, h } from "/static/core.js";

const PURPOSES = [
  ["character", "Character", "A person, an animal or a figure that should stay itself in every picture."],
  ["style", "Style", "A way of drawing, painting or photographing."],
  ["object", "Object", "A thing, a piece of clothing, a vehicle, a place."],
];
const WORDS = {
  character: ["woman, man, dog", ["woman", "man", "girl", "boy", "dog", "cat", "creature", "cartoon character"]],
  style: ["style, watercolor, photo", ["style", "illustration", "watercolor", "oil painting", "photo", "pixel art"]],
  object: ["chair, dress, car", ["chair", "dress", "car", "toy", "bag", "house", "sculpture"]],
};

export function purposeSection(page) {
  const { draft } = page;
  const radios = PURPOSES.map(([value, title, says]) => [value, h("input", { type: "radio", name: "purpose", value, on: { change: () => draft.patch({ purpose: value }, true) } }), title, says]);
  const input = (id, attrs = {}) => h("input", { type: "text", id, autocomplete: "off", spellcheck: false, ...attrs });
  const name = field("Name", input("name", { placeholder: "Zorp" }));
  const list = h("datalist", { id: "class-words" });
  const word = field("Class word", input("class-word", { list: "class-words" }), { hint: "what it is, in one word" });
  const trigger = field("Trigger word", input("trigger", { autocapitalize: "off" }));
  const warning = h("p", { class: "nl-warning", role: "status", id: "trigger-warning", hidden: true });
  const follow = button("Make it from the name again", () => { draft.patch({ trigger: null }, true); trigger.control.focus(); }, { kind: "link" });
  follow.classList.add("la-small");
  trigger.node.append(warning, follow);
  trigger.control.setAttribute("aria-describedby", trigger.control.getAttribute("aria-describedby") + " trigger-warning");

  const texts = { name, class_word: word, trigger };
  for (const [key, { control }] of Object.entries(texts)) {
    control.addEventListener("input", () => draft.patch({ [key]: control.value }));
    control.addEventListener("blur", () => { if (draft.unsaved(key)) draft.flush(); });
    page.places[key] = () => { control.scrollIntoView({ block: "center" }); control.focus(); };
  }
  page.places["output.name"] = page.places.name;

  draft.on("view", (view) => {
    const purpose = draft.value("purpose");
    for (const [value, radio] of radios) radio.checked = value === purpose;
    for (const [key, { control }] of Object.entries(texts)) {
      const value = draft.value(key) ?? "";
      if (document.activeElement !== control && control.value !== value) control.value = value;
      else if (document.activeElement === control && !draft.unsaved(key) && control.value.split(/\s+/).join(" ").trim() !== value) control.value = value;  // changed elsewhere, or made from the name
    }
    const [examples, words] = WORDS[purpose];
    word.control.placeholder = examples;
    if (list.dataset.of !== purpose) { list.dataset.of = purpose; list.replaceChildren(...words.map((w) => h("option", { value: w }))); }
    word.help(purpose === "style" ? "Optional. Used in sample images." : "Used in sample images, and as the caption of pictures that have none.");
    name.help(view.draft.name ? `Saved as ${view.slug}.safetensors` : "Also the name of the file.");
    name.error(view.errors["output.name"] && view.draft.name ? view.errors["output.name"] : "");
    const style = purpose === "style";
    trigger.node.querySelector("label").replaceChildren("Trigger word", h("span", { class: "la-hint" }, style ? " optional" : " brings it out in a prompt"));
    trigger.help(view.draft.trigger_follows ? "Made from the name; type to choose your own." : "");
    follow.hidden = view.draft.trigger_follows || !view.draft.name;
    const says = view.trigger_warning && (view.draft.name || view.draft.trigger) ? view.trigger_warning : "";
    if (warning.textContent !== says) warning.textContent = says;
    warning.hidden = !says;
  });

  return [
    h("fieldset", { class: "la-choices", id: "purpose" }, h("legend", { class: "la-label la-legend" }, "Purpose"),
      radios.map(([, radio, title, says]) => h("label", { class: "la-choice" }, radio, h("b", {}, title), h("span", { class: "la-help" }, says)))),
    h("div", { class: "la-cols" }, name.node, word.node, trigger.node), list,
  ];
}
