// What is worth mending in the pictures and captions, most important first, each with a button that does it or leads there.
import { attempt, button, debounce, fill, get, h, plural, post, Refused, toast } from "/static/core.js";
import { undo } from "/static/draft.js";

export function adviceList(page) {
  const { draft } = page;
  const count = h("span", {}), first = h("span", { class: "la-small la-muted la-ellipsis nl-advice-first" });
  const list = h("ul", { class: "la-list nl-advice-list", "aria-label": "Advice on the images and captions" });
  const box = h("details", { class: "nl-advice", id: "advice", hidden: true },
    h("summary", {}, h("span", { class: "nl-advice-head" }, count, first)), list,
    h("p", { class: "la-help" }, "None of this must be done. ", h("a", { href: "/help/datasets" }, "More on good images"), "."));

  const doing = {
    go: ({ place }) => page.go(place),
    trigger_first: () => change(() => post("/images/captions", { action: "trigger_first" }), (a) => `${plural(a.changed, "caption")} changed.`),
    remove: ({ ids }) => change(() => post("/images/remove", { ids }), () => `${plural(ids.length, "copy", "copies")} removed.`),
  };
  async function change(call, words) {
    const answer = await attempt(() => draft.changeImages(call));
    if (answer) toast(words(answer), "good", ["Undo", () => undo(draft)]);
  }

  function draw(found) {
    box.hidden = !found.length;
    count.textContent = plural(found.length, "thing") + " to look at";
    first.textContent = found[0]?.text ?? "";
    box.dataset.kinds = found.map((a) => a.kind).join(" ");
    if (list.dataset.of === JSON.stringify(found)) return;
    list.dataset.of = JSON.stringify(found);
    fill(list, found.map((a) => h("li", { data: { advice: a.kind } }, h("span", {}, a.text), h("span", { class: "la-row nl-advice-do" },
      a.remedy && button(a.remedy.label, () => doing[a.remedy.do](a.remedy), { kind: "link" }),
      a.images.length > 0 && a.images.length < draft.images.images.filter((i) => !i.removed).length
        && button(a.images.length === 1 ? "Show this image" : "Show these images", () => page.showImages(a.images), { kind: "link", "aria-label": `Show the images: ${a.text}` })))));
  }
  let turn = 0;
  const look = debounce(async () => {
    const now = ++turn;
    let answer;
    try { answer = await get("/images/advice"); } catch (error) { if (error instanceof Refused) return; throw error; }  // told elsewhere when the server is away
    if (now === turn) draw(answer.advice);
  }, 300);
  draft.on("images", look);
  draft.on("view", look);
  return box;
}
