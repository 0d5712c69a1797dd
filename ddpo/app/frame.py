"""The page around the tabs, and how it is served: `ddpo app --runs runs`, `python app.py --runs runs`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ddpo.app.shelf import Shelf


@dataclass(frozen=True)
class Frame:
    """What every tab is given.

    A tab is a module of this folder with `build(frame) -> None`, called inside its `gr.Tab`; it listens to `run.change`.
    """

    shelf: Shelf
    run: gr.Dropdown  # the run that all tabs look at, by name


def build(shelf: Shelf) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title="ddpo", analytics_enabled=False) as page:
        names = shelf.names()
        Frame(shelf, gr.Dropdown(names, value=names[0] if names else None, label="Run", elem_id="run"))
    return page


def main(words: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="ddpo app", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder that holds the run folders")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(words)
    build(Shelf(args.runs)).launch(server_name="127.0.0.1", server_port=args.port)
    return 0
