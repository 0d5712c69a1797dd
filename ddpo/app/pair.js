// Base and tuned over each other or side by side: slider, flicker, zoom and pan in step, full screen, and the scrubber.
// The server's HTML is morphed into place at every visit, so what the reader set (mode, cut, zoom) is kept here.
const state = { mode: "slider", cut: 50, zoom: 1, x: 0, y: 0, other: false };
const pointers = new Map();
let drag = null, scrubbing = false;

const find = selector => element.querySelector(selector);
const limit = (value, low, high) => Math.min(Math.max(value, low), high);

function apply() {
  const pair = find(".pair");
  if (!pair) return;
  element.dataset.mode = state.mode;
  element.dataset.showing = state.other ? "base" : "tuned";
  element.classList.toggle("zoomed", state.zoom > 1);
  for (const [name, value] of Object.entries({ cut: `${state.cut}%`, zoom: state.zoom, x: `${state.x}%`, y: `${state.y}%` }))
    element.style.setProperty(`--${name}`, value);
  const handle = find(".handle");
  handle.setAttribute("aria-valuenow", Math.round(state.cut));
  handle.setAttribute("aria-valuetext", `${Math.round(state.cut)} % base`);
  handle.hidden = state.mode !== "slider";
  for (const button of element.querySelectorAll("[data-mode]"))
    if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", button.dataset.mode === state.mode);
  find("output").textContent = `${Math.round(100 * state.zoom)} %`;
  const full = document.fullscreenElement === element;
  find("[data-full]").textContent = full ? "Leave full screen" : "Full screen";
  find("[data-full]").hidden = !document.fullscreenEnabled;
}

function arrive() {
  const pair = find(".pair");
  if (!pair) return;
  const range = find(".scrub input");
  if (!scrubbing) range.value = pair.dataset.index;
  range.setAttribute("aria-valuetext", `iteration ${pair.dataset.iteration}`);
  document.dispatchEvent(new CustomEvent("ddpo-iteration", { detail: Number(pair.dataset.iteration) }));
  apply();
}

function remember() { // the address names what is looked at, so that it can be kept and sent
  if (element.offsetParent === null) return;
  const query = new URLSearchParams(location.search);
  for (const [key, value] of new URLSearchParams(find(".pair")?.dataset.link)) query.set(key, value);
  history.replaceState(history.state, "", `?${query}`);
}

function zoomTo(zoom, px = 50, py = 50) { // px, py: what stays where it is, in per cent of a half
  zoom = limit(zoom, 1, 16);
  state.x = limit(px - (px - state.x) * zoom / state.zoom, 100 * (1 - zoom), 0);
  state.y = limit(py - (py - state.y) * zoom / state.zoom, 100 * (1 - zoom), 0);
  state.zoom = zoom;
  apply();
}

function pan(dx, dy) {
  state.x = limit(state.x + dx, 100 * (1 - state.zoom), 0);
  state.y = limit(state.y + dy, 100 * (1 - state.zoom), 0);
  apply();
}

function place(event) { // of a pointer, in per cent of the half that it is over
  const halves = [...element.querySelectorAll(".half")].map(half => half.getBoundingClientRect());
  const box = halves.findLast(b => event.clientX >= b.left) ?? halves[0];
  return [100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height];
}

function cut(value) {
  state.cut = limit(value, 0, 100);
  apply();
}

function flick() {
  state.other = state.mode === "flicker" && !state.other;
  state.mode = "flicker";
  apply();
}

const span = () => {
  const [a, b] = [...pointers.values()];
  return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
};

element.addEventListener("pointerdown", event => {
  if (event.target.matches(".scrub input")) scrubbing = true;
  const stage = event.target.closest(".stage");
  if (!stage || event.button) return;
  stage.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  const slides = event.target.closest(".handle") || (state.mode === "slider" && state.zoom === 1);
  drag = pointers.size === 2 ? { kind: "pinch", span: span(), zoom: state.zoom } : { kind: slides ? "cut" : "pan" };
  if (drag.kind === "cut") cut(place(event)[0]);
});

element.addEventListener("pointermove", event => {
  const before = pointers.get(event.pointerId);
  if (!before || !drag) return;
  pointers.set(event.pointerId, event);
  const [x, y] = place(event);
  if (drag.kind === "pinch" && pointers.size === 2) zoomTo(drag.zoom * span() / drag.span, x, y);
  else if (drag.kind === "cut") cut(x);
  else if (drag.kind === "pan" && state.zoom > 1) pan(x - place(before)[0], y - place(before)[1]);
});

for (const name of ["pointerup", "pointercancel"])
  element.addEventListener(name, event => {
    scrubbing = false;
    pointers.delete(event.pointerId);
    if (!pointers.size) drag = null;
  });

element.addEventListener("wheel", event => { // with Ctrl, which is also how a touchpad pinches; alone it scrolls the page
  if (!event.ctrlKey || !event.target.closest(".stage")) return;
  event.preventDefault();
  zoomTo(state.zoom * Math.exp(-event.deltaY / 200), ...place(event));
}, { passive: false });

element.addEventListener("dblclick", event => {
  if (event.target.closest(".stage")) zoomTo(state.zoom > 1 ? 1 : 3, ...place(event));
});

element.addEventListener("keydown", event => {
  if (event.target.matches("input, button") || event.ctrlKey || event.metaKey || event.altKey) return;
  const far = event.shiftKey ? 10 : 2;
  const deeds = {
    ArrowLeft: () => cut(state.cut - far), ArrowDown: () => cut(state.cut - far),
    ArrowRight: () => cut(state.cut + far), ArrowUp: () => cut(state.cut + far),
    Home: () => cut(0), End: () => cut(100), " ": flick, "+": () => zoomTo(state.zoom * 1.5), "-": () => zoomTo(state.zoom / 1.5),
  };
  if (!deeds[event.key]) return;
  event.preventDefault();
  deeds[event.key]();
});

element.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  const { mode, zoom, move, seed } = button.dataset;
  if (mode === "flicker") flick();
  else if (mode) { state.mode = mode; state.other = false; apply(); }
  else if (zoom) zoomTo(state.zoom * (zoom === "in" ? 1.5 : 1 / 1.5));
  else if (move) trigger("visit", { move: Number(move) });
  else if (seed) trigger("visit", { seed: Number(seed) });
  else if ("full" in button.dataset) document.fullscreenElement ? document.exitFullscreen() : element.requestFullscreen();
});

element.addEventListener("input", event => {
  if (!event.target.matches(".scrub input")) return;
  const iteration = Number(find(".pair").dataset.iterations.split(" ")[Number(event.target.value)]);
  document.dispatchEvent(new CustomEvent("ddpo-iteration", { detail: iteration }));
  trigger("visit", { iteration });
});

element.addEventListener("fullscreenchange", apply);
watch("value", () => { arrive(); remember(); });
arrive();
