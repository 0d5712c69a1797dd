// A picture of the gallery is looked at above; its pages are turned.
element.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.page) {
    trigger("turn", { page: Number(button.dataset.page) });
    return;
  }
  trigger("visit", { row: Number(button.dataset.row), iteration: Number(button.dataset.iteration) });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.getElementById("pair").scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
});
