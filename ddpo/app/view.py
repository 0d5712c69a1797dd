"""What is looked at: a run, an iteration, a prompt and a seed; and how the page shows it. Pure: a run in, HTML out."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from ddpo.app import pictures
from ddpo.app.shelf import Opened, Place
from ddpo.figures import comparisons, means, number, percent, places
from ddpo.page import Html, Page, join
from ddpo.runs import Sample

ORDERS = ("Biggest gains", "Biggest losses", "Prompt order")
ROWS, COLUMNS = 8, 6  # of a page of the gallery

_page = Page("app.html")


@dataclass(frozen=True)
class View:
    """What the Compare tab looks at. None and "": not chosen, so the first there is."""

    run: str = ""
    iteration: int | None = None
    prompt: str = ""
    seed: int | None = None
    scorer: str = ""
    order: str = ORDERS[0]
    query: str = ""
    page: int = 0
    kept: bool = False  # the prompt and seed were chosen, and are kept where another run has them too

    def within(self, run: Opened) -> "View":
        """This view with each thing that the run does not have replaced by one that it has."""
        name = run.folder.name
        iteration = self.iteration if self.iteration in run.iterations else max(run.iterations, default=0)
        same = [p for p in run.places if p[0] == self.prompt]
        scorer = self.scorer if self.scorer in run.scorers else next(iter(run.scorers), "")
        found = replace(self, run=name, iteration=iteration, scorer=scorer)
        if (self.prompt, self.seed) not in run.places:
            prompt, seed = next(iter(same or [row for row, _ in ranked(run, found)] or run.places), ("", None))
            found = replace(found, prompt=prompt, seed=seed)
        return found

    @property
    def place(self) -> Place:
        return (self.prompt, self.seed or 0)


def ranked(run: Opened, view: View) -> list[tuple[Place, float | None]]:
    """Prompts and seeds whose prompt holds the query, in the view's order, each with its gain at the view's iteration."""
    iteration = view.iteration or max(run.iterations, default=0)  # of the base model there is no gain: the last one's, then
    wanted = view.query.casefold().split()
    found = [(p, run.gain(p, iteration, view.scorer)) for p in run.places if all(w in p[0].casefold() for w in wanted)]
    if view.order == ORDERS[2]:
        return found
    sign = -1 if view.order == ORDERS[0] else 1
    return sorted(found, key=lambda item: (item[1] is None, sign * (item[1] or 0.0)))


def overview(run: Opened) -> Html:
    """Notes on what is damaged or missing, and what came of the run."""
    notes = [_page.fill("note", text=text) for text in [*run.notes, *_warnings(run)]]
    final = run.evaluations[-1] if run.evaluations else {}
    found = comparisons(final)
    rows = [
        _page.fill(
            "result", scorer=c.scorer, kind="trained on" if c.scorer in run.trained else "only watched",
            means=means(c.base, c.tuned), change=c.change, verdict=c.verdict, style=c.verdict.replace(" ", "-"),
        )
        for c in sorted(found, key=lambda c: c.scorer not in run.trained)
    ]  # fmt: skip
    if rows:
        facts = f"After iteration {final['iteration']}: tuned beats base in {percent(final.get('eval/win_rate'))} of pairs."
    else:
        facts = "The tuned model has not been evaluated yet."
    return _page.fill(
        "overview", notes=join(notes), rows=join(rows), facts=facts, name=run.folder.name,
        objective=" + ".join(run.trained) or "an unrecorded reward", status=run.status,
    )  # fmt: skip


def _warnings(run: Opened) -> list[str]:
    if run.status == "stopped" and not run.facts.get("ended"):
        command = run.facts.get("resume_command")
        again = f" To go on: {command if isinstance(command, str) else shlex.join(map(str, command))}" if command else ""
        return [f"This run did not end: its process is gone. What it wrote until then is shown.{again}"]
    return [f"The run ended early: {run.facts['exit_reason']}"] if run.facts.get("exit_reason") else []


def pair(run: Opened, view: View) -> Html:
    """Base and tuned pictures of one prompt and seed, their scores, and what leads to the others."""
    if not run.places:
        return _page.fill("plain", text="There are no sample pictures in this run yet, so there is nothing to compare.")
    of = run.by_place[view.place]
    base, tuned = of.get(0), of.get(view.iteration or 0)
    seeds = [s for p, s in run.places if p == view.prompt]
    order = [place for place, _ in ranked(run, view)]
    at = f"{order.index(view.place) + 1} of {len(order)}" if view.place in order else f"{len(order)} others"
    link = urlencode({"run": view.run, "iteration": view.iteration, "prompt": view.prompt, "seed": view.seed})
    return _page.fill(
        "pair", prompt=view.prompt, at=at, link=link, seed=view.seed, iteration=view.iteration,
        seeds=join(_page.fill("seed", seed=s, pressed=str(s == view.seed).lower()) for s in seeds),
        base=_side(run, base, "base"), tuned=_side(run, tuned, "tuned"), tuned_name=_named(view.iteration),
        rows=join(_score(name, base, tuned, run.gain(view.place, view.iteration or 0, name)) for name in run.scorers),
        iterations=" ".join(map(str, run.iterations)), last=len(run.iterations) - 1,
        index=run.iterations.index(view.iteration) if view.iteration in run.iterations else 0,
        ticks=join(_page.fill("tick", iteration=k) for k in _spread(run.iterations, 9)),
    )  # fmt: skip


def _named(iteration: int | None) -> str:
    return f"iteration {iteration}" if iteration else "iteration 0, base"


def _side(run: Opened, sample: Sample | None, side: str) -> Html:
    picture = pictures.whole(run.folder, sample)
    if picture is None or sample is None:
        return _page.fill("missing", side=side, text="not drawn" if sample is None else "picture missing or unreadable")
    return _page.fill("side", side=side, source=picture.source, style=picture.style, alt=f"{side}: {sample.prompt}")


def _score(name: str, base: Sample | None, tuned: Sample | None, change: float | None) -> Html:
    values = [s.scores.get(name) if s else None for s in (base, tuned)]
    digits = places(*values)
    before, after = (number(v, digits) for v in values)
    return _page.fill("score", scorer=name, base=before, tuned=after, change=number(change, digits, "+"), style=_sign(change))


def _sign(change: float | None) -> str:
    return "" if not change else "higher" if change > 0 else "lower"


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most this many of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def gallery(run: Opened, view: View) -> Html:
    """A page of prompt x iteration, thumbnails with scores; `view` says how it is sorted and which cell is looked at."""
    found = ranked(run, view)
    if not run.places:
        return Html()
    if not found:
        return _page.fill("plain", text=f"No prompt holds {view.query!r}. There are {len(run.places)} prompts and seeds.")
    page = min(view.page, (len(found) - 1) // ROWS)
    shown = found[page * ROWS : (page + 1) * ROWS]
    columns = _spread(run.iterations, COLUMNS)
    sampled = view.iteration or max(run.iterations, default=0)
    gains = [gain for _, gain in found if gain is not None]
    text = f"{len(found)} of {len(run.places)} prompts and seeds"
    if gains:
        up, down = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        text += (
            f"; {view.scorer} at iteration {sampled}: {up} gained, {down} lost, {len(gains) - up - down} stayed as they were"
        )
    if len(columns) < len(run.iterations):
        text += f"; {len(columns)} of {len(run.iterations)} sampled iterations"
    return _page.fill(
        "gallery", text=text + ".", count=len(columns),
        rows=join(_gallery_row(run, view, place, gain, columns) for place, gain in shown),
        pages=f"{page + 1} of {(len(found) - 1) // ROWS + 1}", before=max(page - 1, 0),
        after=min(page + 1, (len(found) - 1) // ROWS), hidden="hidden" if len(found) <= ROWS else "",
    )  # fmt: skip


def _gallery_row(run: Opened, view: View, place: Place, gain: float | None, columns: Sequence[int]) -> Html:
    cells = join(_cell(run, view, place, k) for k in columns)
    prompt, seed = place
    told = number(gain, sign="+") if gain is not None else "not scored"
    return _page.fill("gallery_row", prompt=prompt, seed=seed, gain=told, style=_sign(gain), cells=cells)


def _cell(run: Opened, view: View, place: Place, iteration: int) -> Html:
    sample = run.by_place[place].get(iteration)
    picture = pictures.thumb(run.folder, sample)
    score = number(sample.scores.get(view.scorer)) if sample else ""
    image = _page.fill("thumb", source=picture.source, style=picture.style) if picture else _page.fill("no_thumb")
    here = place == view.place and iteration == view.iteration
    return _page.fill(
        "cell", row=run.places.index(place), iteration=iteration, image=image, score=score, current=str(here).lower(),
        name="base" if iteration == 0 else iteration, label=f"{_named(iteration)}, {place[0]}, seed {place[1]}, {view.scorer} {score}",
    )  # fmt: skip


def beside(run: Opened, others: Sequence[Opened], view: View) -> Html:
    """The prompt and seed that is looked at, as every run draws it at the view's iteration or at its own last."""
    of = run.by_place.get(view.place, {})
    base = pictures.whole(run.folder, of.get(0))
    cells = [_other("base", "", base, of.get(0), run.scorers)]
    for other in (run, *others):
        own = other.by_place.get(view.place, {})
        iteration = view.iteration if view.iteration in own else max(own, default=None)
        note = _disagreement(run, other, view, iteration)
        sample = own.get(iteration) if iteration is not None else None
        title = f"{other.folder.name}" + ("" if iteration is None else f", {_named(iteration)}")
        cells.append(_other(title, note, pictures.whole(other.folder, sample), sample, run.scorers))
    return _page.fill("beside", prompt=view.prompt, seed=view.seed, cells=join(cells))


def _disagreement(run: Opened, other: Opened, view: View, iteration: int | None) -> str:
    """Why the other run's picture cannot be held against this run's, or nothing."""
    if other is run:
        return ""
    if iteration is None:
        shared = len(set(run.places) & set(other.places))
        return f"This run never drew this prompt and seed; the two have {shared} of {len(run.places)} in common."
    mine, theirs = (pictures.whole(r.folder, r.by_place[view.place].get(0)) for r in (run, other))
    notes = ["Another iteration: this one was not sampled here."] if iteration != view.iteration else []
    if mine and theirs and mine.source != theirs.source:
        notes.append("Its base picture differs: another base model, run.seed, sampler or number of steps.")
    return " ".join(notes)


def _other(title: str, note: str, picture: pictures.Picture | None, sample: Sample | None, scorers: Sequence[str]) -> Html:
    image = (
        _page.fill("side", side="one", source=picture.source, style=picture.style, alt=title)
        if picture
        else _page.fill("missing", side="one", text="not drawn" if sample is None else "picture missing or unreadable")
    )
    scores = [f"{name} {number(sample.scores.get(name))}" for name in scorers] if sample else []
    return _page.fill("other", title=title, note=note, image=image, scores=" · ".join(scores))
