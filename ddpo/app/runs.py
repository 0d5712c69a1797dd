"""The Runs tab: a table of every run folder; to press one is to look at it."""

from typing import TYPE_CHECKING

import gradio as gr

from ddpo.app import asked, looks
from ddpo.app.shelf import Row, Shelf
from ddpo.figures import duration, means
from ddpo.page import Html, Page, join

if TYPE_CHECKING:
    from ddpo.app.frame import Frame

_page = Page("app.html")


def build(frame: "Frame") -> None:
    """The table; it is read anew when the tab is opened, and while a run goes on."""
    shown = looks.component("runs", table(frame.shelf.rows(), None, frame.shelf), js="runs")

    def look(chosen: str | None) -> tuple:
        rows = frame.shelf.rows()
        return table(rows, chosen, frame.shelf), gr.Timer(active=any(row.status == "running" for row in rows))

    def choose(event: gr.EventData) -> tuple:
        try:
            name = asked.text(event._data.get("run"), "the run")
            frame.shelf.folder(name)
        except ValueError as error:
            raise gr.Error(f"{error}", print_exception=False) from None
        return gr.Dropdown(frame.shelf.names(), value=name), gr.Tabs(selected="compare")

    private = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on([frame.run.change, frame.timer.tick, frame.tabs.select], look, [frame.run], [shown, frame.timer], **private)
    shown.choose(choose, None, [frame.run, frame.tabs], **private)


def table(rows: list[Row], chosen: str | None, shelf: Shelf) -> Html:
    """The runs as an HTML table, a row each, in the order given."""
    if not rows:
        text = f"There is no run folder in {shelf.root.resolve().name} yet. Make one: ddpo train configs/menagerie_compressibility.yaml"
        return _page.fill("plain", text=text)
    live = sum(row.status == "running" for row in rows)
    text = f"{len(rows)} run{'s' if len(rows) > 1 else ''} in {shelf.root.resolve().name}, newest first"
    text += f"; {live} going on, followed as it goes." if live else "."
    return _page.fill("runs", text=text, rows=join(_row(row, row.name == chosen) for row in rows))


def _row(row: Row, chosen: bool) -> Html:
    r = row.result
    result = (
        _page.fill("change", means=means(r.base, r.tuned), change=r.change, style=r.verdict.replace(" ", "-")) if r else "–"
    )
    return _page.fill(
        "run", name=row.name, objective=row.objective, result=result, algorithm=row.algorithm, model=row.model,
        status=f"{row.status}, iteration {row.iteration}" if row.status in ("running", "stopped") else row.status,
        style=row.status if row.status.isalpha() else "other", current=str(chosen).lower(),
        started=row.started.astimezone().strftime("%Y-%m-%d %H:%M") if row.started else "–",
        taken=duration(row.seconds) if row.seconds else "–",
    )  # fmt: skip
