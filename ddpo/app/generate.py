"""The Generate tab: base and tuned from the same noise, with the scorers' verdicts, and grids."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ddpo import sheet, shots
from ddpo.app.device import QUEUED, Tell, chosen, device, told
from ddpo.offer import Offer
from ddpo.shots import GRIDS, Grid, Shot

if TYPE_CHECKING:  # it imports its tabs
    from ddpo.app.frame import Frame

VERDICTS = """
{{#if value}}<table class="verdicts"><thead><tr><th scope="col">Scorer</th><th scope="col">Base</th><th scope="col">Tuned</th>
<th scope="col">Difference</th></tr></thead><tbody>
{{#each value}}<tr><th scope="row">{{this.scorer}}</th>
{{#if this.trouble}}<td colspan="3" class="words">cannot score: {{this.trouble}}</td>
{{else}}<td>{{this.base}}</td><td>{{this.tuned}}</td><td class="{{this.sign}}">{{this.difference}}</td>{{/if}}</tr>{{/each}}
</tbody></table>{{/if}}"""
TABLE = """
table { border-collapse: collapse; width: 100%; font-size: 0.95rem; }
th, td { text-align: right; padding: 0.3rem 0.5rem; border: 0; border-bottom: 1px solid var(--line, var(--border-color-primary));
  font-weight: normal; font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--ink, var(--body-text-color)); }
table, thead, tr { border: 0 !important; }
th:first-child { min-width: 5.5rem; }
th:first-child, .words { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { font-weight: 600; }
.up { color: var(--good, #1a7f37); } .down { color: var(--bad, #c62828); }
"""
SAID = '<p role="status">{{value}}</p>'
KEYS = """
document.addEventListener('keydown', event => {
  const button = document.getElementById('draw');
  if ((event.ctrlKey || event.metaKey) && event.key === 'Enter' && button && button.offsetParent && !button.disabled) {
    event.preventDefault();
    button.click();
  }
});"""
EXAMPLES = {  # of what the two axes of a grid may be
    "LoRA scale x iteration": ("0, 0.5, 1, 1.5", "{iterations}"),
    "prompt x seed": ("{prompt}\n{prompt}, at night", "0-3"),
    "guidance x LoRA scale": ("1, 3, 5", "0, 0.5, 1, 1.5"),
}


def build(frame: "Frame") -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=shots.LONGEST, elem_id="prompt", info="Ctrl+Enter draws")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=shots.SEEDS[1], elem_id="seed", min_width=120)
                dice = gr.Button("Another seed", elem_id="dice", min_width=120)
            steps = gr.Slider(*shots.STEPS, 20, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(*shots.GUIDANCES, 1.0, step=0.1, label="Guidance (1 is none)", elem_id="guidance")
            scale = gr.Slider(*shots.SCALES, 1.0, step=0.05, label="LoRA scale (0 is the base model)", elem_id="scale")
            iteration = gr.Dropdown(
                [0], value=0, label="Iteration (0 is the base model)", elem_id="iteration", allow_custom_value=True
            )
            scorers = gr.Dropdown([], multiselect=True, label="Scorers", elem_id="scorers", allow_custom_value=True)
            with gr.Row():
                draw = gr.Button("Draw base and tuned", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="cancel")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML("", html_template=SAID, js_on_load=KEYS, elem_id="said", label="Progress")
            pair = gr.ImageSlider(
                label="Base (left) and tuned (right), from the same noise", format="png", interactive=False, elem_id="drawn"
            )
            verdicts = gr.HTML([], html_template=VERDICTS, css_template=TABLE, elem_id="verdicts", label="Verdicts")
    with gr.Accordion("X/Y grid", open=False, elem_id="grids"):
        name = next(iter(GRIDS))
        with gr.Row():
            kind = gr.Dropdown(list(GRIDS), value=name, label="Grid", elem_id="kind", allow_custom_value=True)
            across = gr.Textbox(label="Across", lines=3, elem_id="across", info=GRIDS[name][0].hint)
            down = gr.Textbox(label="Down", lines=3, elem_id="down", info=GRIDS[name][1].hint)
        lay = gr.Button(f"Draw the grid (at most {shots.MOST_CELLS} pictures)", elem_id="lay")
        picture = gr.Image(label="Grid", format="png", interactive=False, buttons=["download", "fullscreen"], elem_id="grid")
        table = gr.File(label="What was drawn, and the scores (CSV)", interactive=False, elem_id="csv")

    tab = _Tab(frame)
    asked = [frame.run, prompt, seed, steps, guidance, scale, iteration, scorers]
    private: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    # Without triggers: when the page loads, and when an input changes.
    gr.on(None, tab.offers, [frame.run], [prompt, steps, guidance, iteration, scorers, said], **private)
    gr.on(None, tab.examples, [frame.run, kind], [across, down], **private)
    dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {shots.SEEDS[1]})", api_visibility="private")
    busy: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": said, **QUEUED}
    drawing = draw.click(tab.generate, asked, [pair, verdicts, said], api_name="generate", **busy)
    laying = lay.click(tab.grid, [*asked, kind, across, down], [picture, table, said], api_name="grid", **busy)
    cancel.click(lambda: "Stopped.", None, said, cancels=[drawing, laying], **private)


class _Tab:
    """What the tab's events do."""

    def __init__(self, frame: "Frame"):
        self.shelf = frame.shelf

    def offers(self, run: str | None) -> list[Any]:
        """The run's own settings, to begin with."""
        if run is None:
            return [gr.skip()] * 5 + ["There is no run yet; train one first."]
        with told():
            offer = Offer.of(self.shelf.folder(run))
        note = offer.note or (
            "This run has saved no LoRA yet: there is only the base model." if len(offer.iterations) == 1 else ""
        )
        return [
            offer.prompt or gr.skip(), offer.num_steps, offer.guidance,
            gr.Dropdown(choices=offer.iterations, value=offer.iterations[-1]),
            gr.Dropdown(choices=list(offer.scorers), value=list(offer.scorers)), note,
        ]  # fmt: skip

    def examples(self, run: str | None, kind: str) -> list[Any]:
        """What the axes of this grid may be, of this run."""
        if run is None or kind not in GRIDS:
            return [gr.skip(), gr.skip()]
        with told():
            offer = Offer.of(self.shelf.folder(run))
        known = {"iterations": ", ".join(map(str, offer.iterations)), "prompt": offer.prompt or "a cat"}
        return [
            gr.Textbox(
                example.format(**known), label=f"Across: {axis.title}" if i == 0 else f"Down: {axis.title}", info=axis.hint
            )
            for i, (axis, example) in enumerate(zip(GRIDS[kind], EXAMPLES[kind], strict=True))
        ]

    def generate(
        self, run: str, prompt: str, seed: int, steps: int, guidance: float, scale: float, iteration: int, scorers: list[str]
    ) -> Iterator[tuple[Any, Any, str]]:
        """Draw a prompt with the base model and with a run's LoRA, from the same noise.

        Args:
            run: its name.
            prompt: at most 2000 characters.
            seed: of the noise, 0 to 2147483647.
            steps: denoising steps, 1 to 200.
            guidance: scale of classifier-free guidance, 0 to 30; 1 is none.
            scale: of the LoRA, 0 to 1.5.
            iteration: after which the LoRA was saved; 0 is the base model.
            scorers: names of the run's rewards to ask.

        Returns:
            (base, tuned) pictures, each scorer's verdict, and what was done.
        """
        with told():
            folder = self.shelf.folder(run)
            shot = Shot(prompt, seed, steps, guidance, scale, iteration)
            asked = chosen(Offer.of(folder).scorers, scorers)

            def work(tell: Tell) -> tuple[list[Image.Image], sheet.Scores, dict[str, str]]:
                return _drawn(folder, [shot.base, shot], asked, tell)

            with device().task(work) as task:
                for said in task:
                    yield gr.skip(), gr.skip(), said
                pictures, scores, troubles = task.result()
            base, tuned = pictures
            done = f"Seed {shot.seed}, {shot.num_steps} steps, guidance {shot.guidance:g}, LoRA scale {shot.scale:g}, "
            done += f"iteration {shot.iteration}."
            yield (base, tuned), _verdicts(scores, troubles), done

    def grid(
        self, run: str, prompt: str, seed: int, steps: int, guidance: float, scale: float, iteration: int, scorers: list[str],
        kind: str, across: str, down: str,
    ) -> Iterator[tuple[Any, Any, str]]:  # fmt: skip
        """Draw a grid of pictures with a run's LoRA.

        Args:
            run, prompt, seed, steps, guidance, scale, iteration, scorers: as of `generate`; the two axes replace theirs.
            kind: "LoRA scale x iteration", "prompt x seed" or "guidance x LoRA scale".
            across, down: the values of the first and of the second axis: numbers with commas between them, prompts a line each.

        Returns:
            The grid as a PNG, a CSV of its pictures' settings and scores, and what was done.
        """
        with told():
            folder = self.shelf.folder(run)
            asked = chosen(Offer.of(folder).scorers, scorers)
            grid = Grid.of(Shot(prompt, seed, steps, guidance, scale, iteration), kind, across, down)

            def work(tell: Tell) -> tuple[list[Image.Image], sheet.Scores, dict[str, str]]:
                return _drawn(folder, grid.shots, asked, tell)

            with device().task(work) as task:
                for said in task:
                    yield gr.skip(), gr.skip(), said
                pictures, scores, troubles = task.result()
            done = " ".join(
                [f"{len(grid.shots)} pictures.", *(f"{name} cannot score: {why}." for name, why in troubles.items())]
            )
            with tempfile.TemporaryDirectory() as kept:  # gradio copies what it is given
                png, csv = Path(kept, "grid.png"), Path(kept, "grid.csv")
                png.write_bytes(sheet.png(grid, pictures, scores))
                csv.write_text(sheet.table(grid.shots, scores), encoding="utf-8")
                yield str(png), str(csv), done


def _drawn(
    folder: Path, wanted: Sequence[Shot], asked: dict[str, dict[str, Any]], tell: Tell
) -> tuple[list[Image.Image], sheet.Scores, dict[str, str]]:
    """(pictures, scores, {scorer: why it could not score some}), in the device's thread."""
    tell("Loading the model ...")
    studio = device().studio(folder)
    tell("Drawing ...")
    images = studio.draw(wanted, lambda done, total: tell(f"Drawing: step {done} of {total}"))
    known = studio.metadata()
    prompts, pixels = [shot.prompt for shot in wanted], images.float() / 255
    scores: sheet.Scores = {}
    troubles: dict[str, str] = {}
    for name, entry in asked.items():
        tell(f"Scoring: {name}")
        said = device().panel().ask(entry, pixels, prompts, [known.get(prompt, {}) for prompt in prompts])
        scores[name] = [opinion.score for opinion in said]
        if told_of := [opinion.trouble for opinion in said if opinion.trouble]:
            troubles[name] = told_of[0]
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], scores, troubles


def _verdicts(scores: sheet.Scores, troubles: dict[str, str]) -> list[dict[str, Any]]:
    """A row a scorer, for the page and for whoever asks the endpoint."""
    rows: list[dict[str, Any]] = []
    for name, (base, tuned) in scores.items():
        if base is None or tuned is None:
            rows.append({"scorer": name, "trouble": troubles.get(name, "this picture")})
            continue
        change = tuned - base
        rows.append({
            "scorer": name, "base": f"{base:.4g}", "tuned": f"{tuned:.4g}", "difference": f"{change:+.4g}",
            "sign": "up" if change > 0 else "down" if change < 0 else "", "trouble": "",
        })  # fmt: skip
    return rows
