// A chart is pressed at an iteration; the line that marks it follows the scrubber.
const SIDES = [42, 312]; // ddpo.figures: LEFT, WIDTH - RIGHT
let shown = null;

function mark() {
  if (shown === null) return;
  for (const figure of element.querySelectorAll("figure")) {
    const [first, last] = [Number(figure.dataset.first), Number(figure.dataset.last)];
    const share = last > first ? Math.min(Math.max((shown - first) / (last - first), 0), 1) : 0.5;
    const cursor = figure.querySelector(".cursor");
    if (cursor) cursor.setAttribute("transform", `translate(${(SIDES[0] + share * (SIDES[1] - SIDES[0])).toFixed(1)})`);
  }
}

element.addEventListener("click", event => {
  const stripe = event.target.closest(".stripe");
  if (stripe) trigger("visit", { iteration: Number(stripe.dataset.iteration) });
});
document.addEventListener("ddpo-iteration", event => {
  shown = event.detail;
  mark();
});
watch("value", mark);
