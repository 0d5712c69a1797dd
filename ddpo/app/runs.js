// A row of the table is pressed anywhere; its name is a button for the keyboard.
element.addEventListener("click", event => {
  const row = event.target.closest("[data-run]");
  if (row) trigger("choose", { run: row.dataset.run });
});
