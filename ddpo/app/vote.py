"""The Vote tab: blind votes on pairs of pictures; then a reward from the votes, and a run on that reward."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ddpo.app.booth import Booth
from ddpo.app.feedback import HEAD, Launcher, clip_of, train_reward
from ddpo.durable import FileError

if TYPE_CHECKING:
    from ddpo.app.frame import Frame

HERE = Path(__file__).parent


def build(frame: "Frame") -> None:
    """The tab."""
    booth = Booth(frame.shelf)
    with gr.Row():
        first = gr.Dropdown([], label="Compare", elem_id="vote-first", info="the untuned model, or an earlier one")
        second = gr.Dropdown([], label="with", elem_id="vote-second", info="the same as left: two seeds of one model")
    templates = {kind: (HERE / f"vote.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    panel = gr.HTML(
        {"run": None, "first": "0", "second": ""}, html_template=templates["html"], css_template=templates["css"],
        js_on_load=templates["js"], server_functions=_server_functions(booth), elem_id="vote",
    )  # fmt: skip
    _choices(frame, booth, first, second, panel)
    _endpoints(booth)
    if frame.alone:
        _feedback(frame)


def _choices(frame: "Frame", booth: Booth, first: gr.Dropdown, second: gr.Dropdown, panel: gr.HTML) -> None:
    """What is compared follows the run, and the panel follows both."""

    def reset(run: str | None) -> tuple[Any, Any, dict[str, Any]]:
        try:
            found = booth.stages(run) if run else []
        except (ValueError, OSError):
            found = []
        own = [key for _, key in found if "@" not in key]
        keys = (own[0], own[-1]) if own else (None, None)
        one, two = (gr.Dropdown(choices=found, value=key) for key in keys)
        return one, two, chosen(run, *keys)

    def chosen(run: str | None, one: str | None, two: str | None) -> dict[str, Any]:
        return {"run": run, "first": one or "0", "second": two or ""}

    gr.on(  # without triggers: when the page loads, and when the run changes
        fn=reset, inputs=frame.run, outputs=[first, second, panel], api_visibility="private", show_progress="hidden"
    )
    for choice in (first, second):
        choice.input(chosen, [frame.run, first, second], panel, api_visibility="private", show_progress="hidden")


def _server_functions(booth: Booth) -> list[Callable[[Any], dict[str, Any]]]:
    """What the page calls while one votes. Whatever is not right is told as {"error": text}."""

    def safely(act: Callable[[Any], dict[str, Any]], said: Any) -> dict[str, Any]:
        try:
            if not isinstance(said, dict):
                raise ValueError("the page sent something else than a vote; reload it")
            return act(said)
        except (ValueError, OSError, FileError) as error:
            return {"error": str(error)}

    def deal(said: Any) -> dict[str, Any]:
        return safely(lambda s: booth.deal(s.get("run"), s.get("rater"), s.get("first"), s.get("second")), said)

    def answer(said: Any) -> dict[str, Any]:
        return safely(lambda s: booth.answer(s.get("run"), s.get("token"), s.get("answer")), said)

    def undo(said: Any) -> dict[str, Any]:
        return safely(lambda s: booth.undo(s.get("run"), s.get("rater")), said)

    def count(said: Any) -> dict[str, Any]:
        return safely(lambda s: booth.count(s.get("run"), s.get("first"), s.get("second")), said)

    return [deal, answer, undo, count]


def _endpoints(booth: Booth) -> None:
    """The same for programs."""

    def next_pair(run: str, rater: str, first: str = "0", second: str = "") -> dict[str, str]:
        """The rater's next pair on a run: prompt, left and right (pictures as data URIs), and a token that is good for one vote.

        Args:
            run: a run's name.
            rater: 1 to 64 letters, digits, - or _; pairs come in an order of their own for each rater.
            first, second: what is compared: an iteration, or another run's as "NAME@ITERATION"; by default the base model and the
                last iteration.
        """
        with _told():
            return booth.deal(run, rater, first, second)

    def vote(run: str, token: str, answer: str) -> dict[str, Any]:
        """Vote on a pair: answer is a (left), b (right), tie or both_bad. Returns what was behind the pictures."""
        with _told():
            return booth.answer(run, token, answer)

    gr.api(next_pair, api_name="next_pair")
    gr.api(vote, api_name="vote")


def _feedback(frame: "Frame") -> None:
    """Votes -> reward -> run."""
    launcher = Launcher(frame.shelf)

    def train(run: str | None) -> str:
        with _told():
            return train_reward(frame.shelf.folder(run or ""))

    def start(run: str | None, name: str) -> str:
        with _told():
            command = launcher.start(run or "", name)
        return f"{command}\n\nIt is running; the Runs tab shows it as {name}. It goes on if this page is closed."

    def hint(run: str | None) -> str:
        try:
            folder = frame.shelf.folder(run or "")
            model = clip_of(folder)[0]
        except (ValueError, OSError):
            return ""
        there = "There is a reward trained before." if (folder / HEAD).is_file() else "There is no reward trained yet."
        return f"Votes are learned from as CLIP `{model}` sees the pictures. {there}"

    with gr.Accordion("Learn from these votes", open=False, elem_id="vote-learn"):
        about = gr.Markdown(elem_id="vote-about")
        trained = gr.Textbox(label="Report", lines=4, interactive=False, elem_id="vote-report")
        gr.Button("Train a reward from these votes", elem_id="vote-train").click(
            train, frame.run, trained, api_visibility="private", concurrency_limit=1, concurrency_id="device"
        )
        name = gr.Textbox("from-votes", label="Name of the new run", max_length=64, elem_id="vote-name")
        command = gr.Textbox(label="Command", lines=2, interactive=False, elem_id="vote-command")
        gr.Button("Start a run with it", elem_id="vote-start").click(
            start, [frame.run, name], command, api_visibility="private"
        )
    gr.on(fn=hint, inputs=frame.run, outputs=about, api_visibility="private", show_progress="hidden")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is not right reaches the page as a message, without a traceback."""
    try:
        yield
    except (ValueError, OSError, FileError) as error:
        raise gr.Error(str(error), print_exception=False) from error
