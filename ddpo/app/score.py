"""The Score tab: drop a picture, type a prompt, see what every scorer says of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ddpo import shots
from ddpo.app.device import QUEUED, Tell, chosen, device, told
from ddpo.app.generate import SAID, TABLE
from ddpo.offer import BUILT_IN, Offer

if TYPE_CHECKING:  # it imports its tabs
    from ddpo.app.frame import Frame

LARGEST = 20 << 20  # bytes of a picture file
FIRST = ["clip, built-in", "jpeg:Compressibility", "scene:Scene"]  # chosen at first, where a run has no scorers of its own

SCORES = """
{{#if value}}<table class="verdicts"><thead><tr><th scope="col">Scorer</th>
<th scope="col">Score</th><th scope="col" class="words">Range</th>
<th scope="col" class="words">What it measures</th></tr></thead><tbody>
{{#each value}}<tr><th scope="row">{{this.scorer}}</th>
{{#if this.trouble}}<td colspan="2" class="words">cannot score: {{this.trouble}}</td>
{{else}}<td>{{this.score}}</td><td class="words">{{this.range}}</td>{{/if}}
<td class="words">{{this.measures}}</td></tr>{{/each}}
</tbody></table>{{/if}}"""


def build(frame: "Frame") -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = gr.Image(
                label="Picture (PNG, JPEG or WebP)",
                sources=["upload", "clipboard"],
                buttons=["fullscreen"],
                height=320,
                elem_id="picture",
            )
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=shots.LONGEST, elem_id="score-prompt")
            scorers = gr.Dropdown(
                list(BUILT_IN), value=FIRST, multiselect=True, label="Scorers", allow_custom_value=True, elem_id="score-scorers"
            )
            with gr.Row():
                go = gr.Button("Score", variant="primary", elem_id="score")
                cancel = gr.Button("Cancel", elem_id="score-cancel")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML("", html_template=SAID, elem_id="score-said", label="Progress")
            scores = gr.HTML([], html_template=SCORES, css_template=TABLE, elem_id="scores", label="Scores")
    tab = _Tab(frame)
    private: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    gr.on(None, tab.offers, [frame.run], [scorers], **private)  # when the page loads, and when the run changes
    scoring = go.click(
        tab.score, [frame.run, picture, prompt, scorers], [scores, said], api_name="score", show_progress="minimal",
        show_progress_on=said, **QUEUED,
    )  # fmt: skip
    cancel.click(lambda: "Stopped.", None, said, cancels=[scoring], **private)


class _Tab:
    """What the tab's events do."""

    def __init__(self, frame: "Frame"):
        self.shelf = frame.shelf

    def offers(self, run: str | None) -> Any:
        with told():
            offered = list(self._offered(run))
        return gr.Dropdown(choices=offered, value=[name for name in offered if name not in BUILT_IN] or FIRST)

    def score(self, run: str | None, picture: dict[str, Any], prompt: str, scorers: list[str]) -> Iterator[tuple[Any, str]]:
        """Ask scorers what they make of a picture.

        Args:
            run: whose rewards may be asked beside the built-in scorers.
            picture: a PNG, JPEG or WebP file, at most 4096 pixels a side and 20 MiB.
            prompt: what it is a picture of, at most 2000 characters.
            scorers: their names.

        Returns:
            Each scorer's score, its range and what it measures; and what was done.
        """
        with told():
            text, asked = shots.text("the prompt", prompt), chosen(self._offered(run), scorers)
            if not asked:
                raise ValueError("choose at least one scorer")
            data = _read(picture)

            def work(tell: Tell) -> list[dict[str, str]]:
                return _scored(data, text, asked, tell)

            with device().task(work) as task:
                for said in task:
                    yield gr.skip(), said
                yield task.result(), f"{len(asked)} asked."

    def _offered(self, run: str | None) -> dict[str, dict[str, Any]]:
        own = Offer.of(self.shelf.folder(run)).scorers if run is not None else {}
        return {**own, **BUILT_IN}


def _read(picture: Any) -> bytes:
    """An upload's bytes. Gradio has seen to it that the path is one of its own uploads, and decoded nothing: Pillow would try
    forty formats.

    Raises:
        ValueError: there is none, or it is too large.
    """
    if not isinstance(picture, dict) or not isinstance(picture.get("path"), str):
        raise ValueError("drop a picture first: a PNG, JPEG or WebP file")
    with Path(picture["path"]).open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"the picture's file is larger than {LARGEST >> 20} MiB, the most that is read; save it smaller")
    return data


def _scored(data: bytes, prompt: str, asked: dict[str, dict[str, Any]], tell: Tell) -> list[dict[str, str]]:
    """A row a scorer, in the device's thread."""
    tell("Reading the picture ...")
    from ddpo.panel import about
    from rewards._pictures import upright

    pixels = upright(data)[None]
    rows = []
    for name, entry in asked.items():
        tell(f"Scoring: {name}")
        [opinion] = device().panel().ask(entry, pixels, [prompt], [{}])
        span, measures = about(entry)
        score = "" if opinion.score is None else f"{opinion.score:.6g}"
        rows.append({"scorer": name, "score": score, "range": span, "measures": measures, "trouble": opinion.trouble})
    return rows
