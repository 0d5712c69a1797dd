"""A run's curves as figures of the page: what was trained on beside what was only watched, diversity, KL, and the alarms."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ddpo.app.shelf import Opened
from ddpo.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, chart
from ddpo.page import Html, Page, join

_page = Page("app.html")


@dataclass(frozen=True)
class Figure:
    """A chart with its words."""

    title: str
    text: str
    curves: Sequence[Curve]


def curves(run: Opened, at: int) -> Html:
    """Every figure of the run, with iteration `at` marked, then what the alarms said."""
    trained = [s for s in run.scorers if s in run.trained]
    watched = [s for s in run.scorers if s not in run.trained]
    figures = [
        *(Figure(s, "trained on · held-out prompts, band: 95 % interval", run.evaluated(s)) for s in trained),
        *(Figure(s, "only watched · held-out prompts, band: 95 % interval", run.evaluated(s)) for s in watched),
        Figure(
            "Training reward", "mean of an iteration, band: one standard deviation", run.measured("reward/mean", "reward/std")
        ),
        Figure("Diversity", "of held-out pictures", run.measured("eval/diversity/base") + run.measured("eval/diversity/tuned")),
        Figure("KL to base", "nats a denoising step", run.measured("kl/step_nats")),
    ]
    drawn = join(_figure(f, run, at) for f in figures)
    body = drawn or _page.fill("plain", text="No iteration has been recorded yet, so there are no curves.")
    return _page.fill("curves", figures=body, alarms=_alarms(run))


def together(runs: Sequence[Opened]) -> Html:
    """The same quantities of several runs, each run a curve; the first run's base model is the dashed line."""
    scorers = list(dict.fromkeys(s for run in runs for s in run.scorers))
    keys = {f"{s}, held-out prompts": lambda run, s=s: run.evaluated(s) for s in scorers} | {
        "Training reward": lambda run: run.measured("reward/mean", "reward/std"),
        "Diversity": lambda run: run.measured("eval/diversity/base") + run.measured("eval/diversity/tuned"),
        "KL to base": lambda run: run.measured("kl/step_nats"),
    }
    figures = []
    for title, of in keys.items():
        found = [curve for i, run in enumerate(runs) for curve in _named(of(run), run, i)]
        figures.append(_figure(Figure(title, "", found), None, 0))
    return join(figures)


def _named(found: list[Curve], run: Opened, i: int) -> list[Curve]:
    return [
        Curve("base", "base", c.points) if c.name == "base" else Curve(run.folder.name, f"run-{i}", c.points)
        for c in found
        if c.name != "base" or i == 0
    ]


def _figure(figure: Figure, run: Opened | None, at: int) -> Html:
    """The figure, or nothing where no curve of it has a point. With a run, its sampled iterations can be pressed."""
    shown = [c for c in figure.curves if c.points]
    if not shown:
        return Html()
    ends = [p[0] for c in shown for p in c.points]
    first, last = min(ends), max(ends)
    drawing = chart(f"{figure.title} {figure.text}", shown)
    extra = _marks(run, first, last, at) if run else ""
    keys = join(_page.fill("key", style=c.style, name=c.name) for c in shown) if len(shown) > 1 else Html()
    return _page.fill(
        "figure", title=figure.title, text=figure.text, keys=keys, first=f"{first:g}", last=f"{last:g}",
        drawing=Html(drawing.removesuffix("</svg>") + extra + "</svg>"),
    )  # fmt: skip


def across(x: float, first: float, last: float) -> float:
    """Where iteration x stands in a chart that goes from `first` to `last`, in the chart's units."""
    share = (x - first) / (last - first) if last > first else 0.5
    return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)


def _marks(run: Opened, first: float, last: float, at: int) -> str:
    """Where alarms fired, the iteration that is looked at, and a stripe to press around each that was sampled."""
    reach = {"top": TOP, "foot": HEIGHT - BOTTOM}
    cursor = _page.fill("cursor", x=f"{across(at, first, last):.1f}", **reach)
    found = [(k, a) for k, a in fired(run) if first <= k <= last]
    places = [f"{across(k, first, last):.1f}" for k, _ in found]
    flags = [
        _page.fill("alarm_mark", level=a["level"], x=x, text=f"iteration {k}: {a['text']}", **reach)
        for x, (k, a) in zip(places, found, strict=True)
    ]
    edges = [across(k, first, last) for k in run.iterations]
    middles = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(edges)), WIDTH - RIGHT]
    widths = [f"{max(b - a, 0):.1f}" for a, b in itertools.pairwise(middles)]
    stripes = [
        _page.fill("stripe", iteration=k, x=f"{x:.1f}", width=width, top=TOP, high=HEIGHT - BOTTOM - TOP)
        for k, x, width in zip(run.iterations, middles, widths, strict=False)
    ]
    return join([cursor, *stripes, *flags])


def fired(run: Opened) -> list[tuple[int, dict[str, str]]]:
    """Every alarm with its iteration."""
    return [(m["iteration"], alarm) for m in run.metrics for alarm in m.get("alarms", [])]


def _alarms(run: Opened) -> Html:
    items = [_page.fill("alarm", iteration=k, level=a["level"], name=a["name"], text=a["text"]) for k, a in fired(run)]
    return _page.fill("alarms", items=join(items)) if items else Html()
