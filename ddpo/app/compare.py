"""The Compare tab: base and tuned for one prompt and seed, through the iterations; curves; all prompts; several runs."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from ddpo.app import asked, charts, looks, view
from ddpo.app.shelf import Opened
from ddpo.app.view import View
from ddpo.page import Page

if TYPE_CHECKING:
    from ddpo.app.frame import Frame

MOST = 5  # other runs beside the chosen one

_page = Page("app.html")


class Compare:
    """The tab's parts and what happens in them. Every event has the view (session state) and gives back what changed."""

    def __init__(self, frame: "Frame"):
        self.frame, self.shelf = frame, frame.shelf
        self.view, self.seen = gr.State(View()), gr.State(None)  # what is looked at, and the run as it was shown last
        self.overview = looks.component("overview", _page.fill("plain", text="Choose a run in the Runs tab."))
        with gr.Row(elem_id="look"):
            with gr.Column(scale=5, min_width=340):
                self.pair = looks.component("pair", js="pair")
            with gr.Column(scale=6, min_width=340):
                self.curves = looks.component("curves", js="curves")
        gr.Markdown("### Every prompt")
        with gr.Row(elem_id="sorting"):
            self.query = gr.Textbox(label="Only prompts with", placeholder="two owls", max_lines=1, max_length=asked.LONGEST)
            self.order = gr.Radio(view.ORDERS, value=view.ORDERS[0], label="Sorted by", elem_id="order")
            self.scorer = gr.Dropdown([], label="Gain in", elem_id="scorer", allow_custom_value=True)
        self.gallery = looks.component("gallery", js="gallery")
        gr.Markdown("### Several runs")
        self.others = gr.Dropdown([], label="Beside this run", multiselect=True, max_choices=MOST, elem_id="others")
        self.beside, self.together = looks.component("beside"), looks.component("together")
        self._listen()

    def _listen(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        whole = [self.view, self.seen, self.overview, self.pair, self.curves, self.gallery, self.scorer, self.others]
        several = [self.beside, self.together]
        chosen = [self.frame.run, self.frame.asked, self.view]
        self.frame.run.change(self.show, chosen, [*whole, *several], **private)
        self.frame.timer.tick(self.follow, [self.view, self.seen, self.others], [*whole[1:6], *several], **private)
        looked = [self.view, self.pair, self.gallery, self.beside]
        for event in (self.pair.visit, self.curves.visit, self.gallery.visit):
            event(self.visit, [self.view, self.others], looked, **private, trigger_mode="always_last")
        sort = [self.view, self.query, self.order, self.scorer]
        gr.on([self.query.change, self.order.change, self.scorer.input], self.sort, sort, [self.view, self.gallery, self.pair],
              **private, trigger_mode="always_last")  # fmt: skip
        self.gallery.turn(self.turn, [self.view], [self.view, self.gallery], **private)
        self.others.change(self.compare, [self.view, self.others], several, **private)

    def show(self, name: str | None, link: View, now: View) -> tuple:
        """A run has been chosen: all of the tab."""
        run = self._open(name)
        if run is None:
            empty = _page.fill("plain", text="Choose a run in the Runs tab.")
            return (now, None, empty, "", "", "", gr.skip(), gr.skip(), "", "")
        start = link if link.run == name and now.run == "" else replace(now, iteration=None, page=0, scorer="")
        start = start if start.kept or start is link else replace(start, prompt="", seed=None)
        found = start.within(run)
        scorers = gr.Dropdown(run.scorers, value=found.scorer or None)
        others = gr.Dropdown([n for n in self.shelf.names() if n != name], value=[])
        return (found, _stamp(run), *self._parts(run, found), scorers, others, "", "")

    def follow(self, now: View, seen: tuple | None, others: list[str]) -> tuple:
        """A run goes on: what has changed since it was shown."""
        run = self._open(now.run)
        if run is None or _stamp(run) == seen:
            return (gr.skip(),) * 7
        found = now.within(run)
        return (_stamp(run), *self._parts(run, found), *self.compare(found, others))

    def visit(self, event: gr.EventData, now: View, others: list[str]) -> tuple:
        """An iteration, a cell of the gallery, a seed, or the next prompt has been pressed."""
        run = self._demand(now.run)
        found = replace(_visited(run, now, event._data), kept=True).within(run)
        return found, view.pair(run, found), view.gallery(run, found), self._beside(run, found, others)

    def sort(self, now: View, query: str, order: str, scorer: str | None) -> tuple:
        run = self._open(now.run)
        if run is None:
            return (gr.skip(),) * 3
        found = replace(now, query=str(query or "")[: asked.LONGEST], order=order, scorer=scorer or "", page=0).within(run)
        return found, view.gallery(run, found), view.pair(run, found)

    def turn(self, event: gr.EventData, now: View) -> tuple:
        run = self._demand(now.run)
        found = replace(now, page=_number(event._data, "page"))
        return found, view.gallery(run, found)

    def compare(self, now: View, others: list[str]) -> tuple:
        """Other runs have been chosen: their pictures and their curves beside this run's."""
        run = self._open(now.run)
        if run is None or not others:
            return "", ""
        curves = charts.together([run, *self._opened(others)])
        return self._beside(run, now, others), _page.fill("together", figures=curves)

    def _parts(self, run: Opened, found: View) -> tuple:
        curves = charts.curves(run, found.iteration or 0)
        return view.overview(run), view.pair(run, found), curves, view.gallery(run, found)

    def _beside(self, run: Opened, now: View, others: list[str]) -> str:
        return view.beside(run, self._opened(others), now) if others else ""

    def _opened(self, others: list[str]) -> list[Opened]:
        return [run for run in map(self._open, others[:MOST]) if run is not None]

    def _open(self, name: str | None) -> Opened | None:
        """The run, or None where it is gone."""
        try:
            return self.shelf.open(name or "")
        except ValueError:
            return None

    def _demand(self, name: str) -> Opened:
        run = self._open(name)
        if run is None or not run.places:
            raise gr.Error("This run has no pictures, or its folder is gone; choose another run.", print_exception=False)
        return run


def build(frame: "Frame") -> None:
    """The Compare tab."""
    Compare(frame)


def _stamp(run: Opened) -> tuple:
    """What differs when a run has gone on."""
    return run.status, len(run.metrics), len(run.samples), tuple(run.notes)


def _visited(run: Opened, now: View, data: dict) -> View:
    if "row" in data:
        prompt, seed = run.places[min(_number(data, "row"), len(run.places) - 1)]
        return replace(now, prompt=prompt, seed=seed, iteration=_number(data, "iteration"))
    if "seed" in data:
        return replace(now, seed=_number(data, "seed"))
    if "move" in data:
        order = [place for place, _ in view.ranked(run, now)] or run.places
        step = -1 if data["move"] == -1 else 1
        here = order.index(now.place) if now.place in order else -1
        prompt, seed = order[(here + step) % len(order)]
        return replace(now, prompt=prompt, seed=seed)
    return replace(now, iteration=_number(data, "iteration"))


def _number(data: dict, key: str) -> int:
    try:
        return asked.whole(data.get(key), f"the {key}")
    except ValueError as error:
        raise gr.Error(f"{error}", print_exception=False) from None
