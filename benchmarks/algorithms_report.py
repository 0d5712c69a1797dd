"""The tables and plots of algorithms.py, from the curves of its runs.

A curve is a run's evaluations, the base model's first: lines of metrics.jsonl, each with the seconds "spent" until then.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

GOAL = 0.02  # of held-out CLIP score, for "pictures and seconds to"
Curve = list[dict]


@dataclass(frozen=True)
class Found:
    """What a method's runs found, a seed each."""

    rate: float
    curves: list[Curve]
    distances: list[float]  # KL of their ends to the base model


def table(methods: dict[str, Found]) -> str:
    """Markdown, the best first: each figure is a mean over the seeds with the lowest and the highest."""
    shortest = min(curve[-1]["spent"] for found in methods.values() for curve in found.curves)
    rows = []
    for method, found in methods.items():
        ends = [curve[-1] for curve in found.curves]
        rows.append((
            -mean(e["eval/clip/delta"] for e in ends), method, f"{found.rate:g}",
            spread([e["eval/clip/delta"] for e in ends], "+.3f"),
            spread([at(c, "spent", shortest, "eval/clip/delta") for c in found.curves], "+.3f"),
            spread([e["eval/scene/delta"] for e in ends], "+.3f"),
            spread([e["eval/diversity/tuned"] / e["eval/diversity/base"] - 1 for e in ends], "+.0%"),
            spread(found.distances, ".2g"), spread([reached(c, "images", GOAL) for c in found.curves], ",.0f"),
            spread([reached(c, "spent", GOAL) for c in found.curves], ",.0f"), spread([e["spent"] for e in ends], ",.0f"),
        ))  # fmt: skip
    head = (
        f"| method | lr | CLIP score | after {shortest:.0f} s | rules | diversity | KL | images to +{GOAL} | seconds to it | seconds |",
        "|" + "---|" * 10,
    )
    return "\n".join([*head, *("| " + " | ".join(row[1:]) + " |" for row in sorted(rows))]) + "\n"


def search_table(gains: dict[str, dict[float, float]]) -> str:
    """Markdown: {method: {learning rate: held-out gain}}, of those that were tried, the best method first."""
    rates = sorted({rate for tried in gains.values() for rate in tried}, reverse=True)
    rows = []
    for method, tried in gains.items():
        told = [f"{tried[rate]:+.3f}" if rate in tried else "" for rate in rates]
        rows.append((-max(tried.values(), default=-math.inf), f"| {method} | {' | '.join(told)} |"))
    head = (f"| learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |", "|" + "---|" * (len(rates) + 1))
    return "\n".join([*head, *(row for _, row in sorted(rows))]) + "\n"


def at(curve: Curve, axis: str, where: float, key: str) -> float:
    """A metric at a point of the curve, on the straight line between its neighbours; NaN past its end."""
    for before, after in itertools.pairwise(curve):
        if before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / (after[axis] - before[axis])
            return before[key] + share * (after[key] - before[key])
    return math.nan


def reached(curve: Curve, axis: str, goal: float) -> float:
    """Where the held-out gain first reaches the goal; infinity where it never does."""
    for before, after in itertools.pairwise(curve):
        low, high = before["eval/clip/delta"], after["eval/clip/delta"]
        if low < goal <= high:
            return before[axis] + (goal - low) / (high - low) * (after[axis] - before[axis])
    return math.inf


def spread(values: Iterable[float], form: str) -> str:
    """ "mean (lowest .. highest)", or "never" for the runs that did not get there."""
    values = list(values)
    known = [v for v in values if math.isfinite(v)]
    if len(known) < len(values):
        return "never" if not known else f"{len(known)} of {len(values)} runs: {mean(known):{form}}"
    return f"{mean(known):{form}}" + (f" ({min(known):{form}} .. {max(known):{form}})" if len(known) > 1 else "")


def draw(root: Path, models: dict[str, dict[str, Found]]) -> None:
    """learning.png: held-out gain by pictures and by seconds. cost.png: by CLIP's gain, that of the rules, and diversity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for name, axes_of in (
        ("learning", [("images", "eval/clip/delta"), ("spent", "eval/clip/delta")]),
        ("cost", [("eval/clip/delta", "eval/scene/delta"), ("eval/clip/delta", "eval/diversity/tuned")]),
    ):
        figure, axes = plt.subplots(len(models), 2, figsize=(12, 4.5 * len(models)), squeeze=False)
        for row, (model, methods) in zip(axes, models.items(), strict=True):
            for axis, (x, y) in zip(row, axes_of, strict=True):
                for i, (method, found) in enumerate(methods.items()):
                    points = [
                        [mean(line.get(k, 0.0) for line in lines) for k in (x, y)] for lines in zip(*found.curves, strict=True)
                    ]
                    style = ("-", "--", ":", "-.")[i // 10]
                    axis.plot(*zip(*points, strict=True), style, label=method, marker=".", color=f"C{i % 10}")
                axis.set(xlabel=LABELS[x], ylabel=LABELS[y], title=f"{model} menagerie, mean over seeds")
                axis.grid(alpha=0.3)
            row[-1].legend(fontsize=7, ncols=2)
        figure.tight_layout()
        figure.savefig(root / f"{name}.png", dpi=110)


LABELS = {
    "images": "pictures drawn", "spent": "seconds of drawing, scoring and learning", "eval/clip/delta": "held-out CLIP score, gain",
    "eval/scene/delta": "rules, gain (never trained on)",
    "eval/diversity/tuned": "diversity",
}  # fmt: skip
