// Blind voting in the browser. Pairs are dealt by the server under tokens; two wait decoded, so that the next one shows at once.
const AHEAD = 3, BOUNCE = 300; // pairs held; milliseconds in which a second press is no answer to a pair just shown
const KEYS = { ArrowLeft: "a", ArrowRight: "b", ArrowDown: "tie", ArrowUp: "both_bad", x: "both_bad", X: "both_bad" };
const part = (name) => element.querySelector(`[data-is="${name}"]`);
const rater = sessionStorage.getItem("ddpo-rater") || Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36)).join("");
sessionStorage.setItem("ddpo-rater", rater);
let queue = [], shownAt = 0, round = 0, filling = false, counted = 0, chain = Promise.resolve();

const asked = () => ({ run: props.value.run, first: props.value.first, second: props.value.second, rater });
const say = (text) => { part("message").textContent = text; };

async function ask(name, more) {
  const said = await server[name]({ ...asked(), ...more });
  return said || { error: "The app does not answer. Is it still running? Reload the page." };
}

function show() {
  const pair = queue[0], holder = part("pair");
  shownAt = performance.now();
  holder.style.visibility = pair ? "visible" : "hidden";
  part("prompt").textContent = pair ? pair.prompt : "";
  for (const side of ["left", "right"]) {
    if (pair) part(side).src = pair[side]; else part(side).removeAttribute("src");
  }
}

async function fill() {
  if (filling) return;
  filling = true;
  const mine = round;
  try {
    while (mine === round && queue.length < AHEAD && props.value.run) {
      const pair = await ask("deal");
      if (mine !== round) return;
      if (pair.error) { say(pair.error); return; }
      for (const side of ["left", "right"]) {
        const picture = new Image();
        picture.src = pair[side];
        await picture.decode().catch(() => {});
        part("pair").classList.toggle("fine", picture.naturalWidth > 256);
      }
      if (mine !== round) return;
      queue.push(pair);
      if (queue.length === 1) show();
    }
  } finally {
    filling = false;
    if (mine !== round) fill();
  }
}

async function recount() {
  const turn = ++counted, found = await ask("count");
  if (turn !== counted) return; // a later answer was faster
  if (found.error) { say(found.error); return; }
  for (const name of ["title", "overall", "outlook", "bias"]) part(name).textContent = found[name];
  part("neither").textContent = found.neither + (found.left ? "; left picture: " + found.left : "");
  part("scale").hidden = !found.rate;
  if (found.rate) {
    const [rate, low, high] = found.rate.map((share) => 100 * share);
    part("dot").style.left = rate + "%";
    part("band").style.left = low + "%";
    part("band").style.width = high - low + "%";
  }
  part("details").hidden = !found.prompts.length;
  part("prompts").replaceChildren(...found.prompts.map((row) => {
    const line = document.createElement("tr");
    for (const text of row) line.insertCell().textContent = text;
    return line;
  }));
  part("notes").replaceChildren(...found.notes.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

function reveal(told) {
  part("reveal").hidden = false;
  part("was").textContent = "The pair before: " + told.prompt;
  for (const side of ["left", "right"]) {
    const name = document.createElement("b"), more = document.createElement("span"), place = part("behind-" + side);
    name.textContent = told[side].is;
    const scores = Object.entries(told[side].scores).map(([scorer, score]) => `${scorer} ${score === null ? "not scored" : score.toPrecision(4)}`);
    more.textContent = ["seed " + told[side].seed, ...scores].join(" · ");
    place.replaceChildren(name, more);
    place.classList.toggle("chosen", told.preferred === side);
  }
}

function vote(answer) {
  if (!queue.length || performance.now() - shownAt < BOUNCE) return;
  const { token } = queue.shift();
  say("");
  show();
  chain = chain.then(async () => {
    const told = await ask("answer", { token, answer });
    if (told.error) say(told.error); else reveal(told);
    await recount();
    fill();
  });
}

function undo() {
  chain = chain.then(async () => {
    const pair = await ask("undo");
    if (pair.error) { say(pair.error); return; }
    queue.unshift(pair);
    part("reveal").hidden = true;
    show();
    say("Your last vote is withdrawn; here is its pair again.");
    await recount();
  });
}

function start() {
  round += 1;
  queue = [];
  say(props.value.run ? "" : "There is no run yet. Train one, then vote on its pictures here.");
  part("reveal").hidden = true;
  show();
  if (props.value.run) { fill(); recount(); }
}

element.addEventListener("click", (event) => {
  const pressed = event.target.closest("[data-answer],[data-undo]");
  if (pressed && "undo" in pressed.dataset) undo(); else if (pressed) vote(pressed.dataset.answer);
});
function key(event) {
  if (!element.isConnected) { document.removeEventListener("keydown", key); return; }
  const busy = event.target.closest?.("input,textarea,select,summary,[contenteditable],[role=tab],[role=listbox],[role=slider]");
  if (element.offsetParent === null || busy || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (KEYS[event.key]) vote(KEYS[event.key]); else if (event.key === "u" || event.key === "U") undo(); else return;
  event.preventDefault();
}
document.addEventListener("keydown", key);
// Who came by pressing the tab has the focus there, where arrows change tabs: it goes to the pictures, so that they answer.
let pointed = performance.now();
document.addEventListener("pointerdown", () => { pointed = performance.now(); }, true);
new IntersectionObserver((seen) => {
  const came = seen.some((entry) => entry.isIntersecting) && performance.now() - pointed < 2000;
  if (came && document.activeElement?.getAttribute("role") === "tab") element.querySelector(".vote").focus({ preventScroll: true });
}).observe(element);
watch("value", start);
start();
