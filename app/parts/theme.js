// Before anything is drawn: the theme that the user chose in the settings ("system" follows the computer).
// Gradio reads ?__theme= or the computer's own; `dark` on the body is its switch, so that class is what is set.
(function () {
  const chosen = () => localStorage.getItem("la-theme") || "system";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  function apply() {
    const forced = new URLSearchParams(location.search).get("__theme");
    const on = forced ? forced === "dark" : chosen() === "system" ? dark.matches : chosen() === "dark";
    document.documentElement.classList.toggle("la-dark", on);
    document.documentElement.style.colorScheme = on ? "dark" : "light";
    if (document.body && document.body.classList.contains("dark") !== on) document.body.classList.toggle("dark", on);
  }
  apply();
  dark.addEventListener("change", apply);
  addEventListener("storage", apply);
  addEventListener("la-theme", apply);
  addEventListener("DOMContentLoaded", () => {
    apply();
    new MutationObserver(apply).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });
})();
