"""The page around the tabs, and how it is served: `ddpo app --runs runs`, `python app.py --runs runs`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ddpo.app import asked, compare, endpoints, generate, looks, runs, score, serve, vote
from ddpo.app.shelf import Shelf
from ddpo.app.view import View
from ddpo.page import Page

TABS = {  # what stands in each tab, by its title: a module with `build(frame)`
    "Runs": runs.build,
    "Compare": compare.build,
    "Generate": generate.build,
    "Vote": vote.build,
    "Score": score.build,
}
LIVE = 4.0  # seconds between looks at a run that goes on


@dataclass(frozen=True)
class Frame:
    """What every tab is given.

    A tab is a module of this folder with `build(frame) -> None`, called inside its `gr.Tab`; it listens to `run.change`.
    """

    shelf: Shelf
    run: gr.Dropdown  # the run that all tabs look at, by name
    asked: gr.State  # the View that the page's address names
    tabs: gr.Tabs  # the id of a tab is its title in small letters
    timer: gr.Timer  # ticks only while a run goes on
    alone: bool  # whether this machine's user alone sees the page, who may train rewards and start runs from it


def build(shelf: Shelf, alone: bool = True) -> gr.Blocks:
    """The whole page. It is served with `looks.theme()` and `looks.CSS`."""
    with gr.Blocks(title="ddpo", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="masthead"):
            looks.component("title", Page("app.html").fill("page"))
            run = gr.Dropdown(shelf.names(), value=None, label="Run", elem_id="run", min_width=220)
        view, timer = gr.State(View()), gr.Timer(LIVE, active=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            frame = Frame(shelf, run, view, tabs, timer, alone)
            for title, tab in TABS.items():
                with gr.Tab(title, id=title.lower()):
                    tab(frame)

        def arrive(request: gr.Request) -> tuple:
            """The run that the address names, or else the newest."""
            found, rows = asked.link(dict(request.query_params)), shelf.rows()
            names = [row.name for row in rows]
            if found.run and found.run not in names:
                gr.Warning(f"There is no run {found.run!r:.80} here; the newest is shown.")
            chosen = found.run if found.run in names else next(iter(names), None)
            shown = gr.Tabs(selected="compare") if found.run in names else gr.skip()
            live = any(row.status == "running" for row in rows)
            return gr.Dropdown(names, value=chosen), found, shown, gr.Timer(active=live)

        page.load(arrive, None, [run, view, tabs, timer], api_visibility="private", show_progress="hidden")
        endpoints.build(shelf)
    return page


def main(words: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="ddpo app", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder that holds the run folders")
    look = serve.Look(looks.theme(), [looks.CSS])
    return serve.main(parser, words, lambda args: build(Shelf(args.runs), serve.loopback(args.host)), look)
