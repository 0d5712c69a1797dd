"""What gradio_client can ask for by name, without the page: /runs, /run and /pair."""

from typing import Any

import gradio as gr

from ddpo.app import asked, pictures
from ddpo.app.shelf import Opened, Shelf
from ddpo.figures import comparisons


def build(shelf: Shelf) -> None:
    """Name the endpoints. What is asked for and not there is a gr.Error that says what there is."""

    def runs() -> list[dict[str, Any]]:
        """Every run folder, newest first: name, objective, algorithm, model, status, started, seconds, iteration, result."""
        return [
            {
                "name": row.name, "objective": row.objective, "algorithm": row.algorithm, "model": row.model,
                "status": row.status, "started": row.started.isoformat() if row.started else None, "seconds": row.seconds,
                "iteration": row.iteration, "result": _comparison(row.result) if row.result else None,
            }
            for row in shelf.rows()
        ]  # fmt: skip

    def run(run: str) -> dict[str, Any]:
        """A run's facts, its last comparison of every scorer, what was sampled, its alarms, and what of it is damaged."""
        found = _open(shelf, run)
        last = found.evaluations[-1] if found.evaluations else {}
        return {
            "facts": found.facts, "status": found.status, "notes": found.notes, "iterations": found.iterations,
            "pairs": [{"prompt": prompt, "seed": seed} for prompt, seed in found.places], "trained": found.trained,
            "evaluated": last.get("iteration"), "comparisons": [_comparison(c) for c in comparisons(last)],
            "alarms": [{"iteration": m["iteration"], **alarm} for m in found.metrics for alarm in m.get("alarms", [])],
        }  # fmt: skip

    def pair(run: str, iteration: int, prompt: str, seed: int) -> dict[str, Any]:
        """Base and tuned of one prompt and seed at a sampled iteration: pictures as data URIs, and every scorer's verdict."""
        found = _open(shelf, run)
        try:
            place = (asked.text(prompt, "the prompt"), asked.whole(seed, "the seed"))
            k = asked.whole(iteration, "the iteration")
        except ValueError as error:
            raise gr.Error(f"{error}", print_exception=False) from None
        of = found.by_place.get(place, {})
        if k not in of:
            held = f"sampled iterations: {sorted(of)}" if of else f"{len(found.places)} prompts and seeds; see /run"
            raise gr.Error(f"no picture of this prompt and seed at iteration {k}; the run has {held}", print_exception=False)
        sides = {"base": of.get(0), "tuned": of[k]}
        shown = {side: pictures.whole(found.folder, sample) for side, sample in sides.items()}
        scores = {
            name: {side: sample.scores.get(name) if sample else None for side, sample in sides.items()}
            | {"difference": found.gain(place, k, name)}
            for name in found.scorers
        }
        images = {side: picture.source if picture else None for side, picture in shown.items()}
        return {"run": run, "iteration": k, "prompt": place[0], "seed": place[1], "scores": scores, **images}

    for endpoint in (runs, run, pair):
        gr.api(endpoint, api_name=endpoint.__name__)


def _open(shelf: Shelf, name: Any) -> Opened:
    try:
        return shelf.open(asked.text(name, "the run"))
    except ValueError as error:
        raise gr.Error(f"{error}", print_exception=False) from None


def _comparison(c: Any) -> dict[str, Any]:
    """NaN is null in JSON."""
    numbers = {key: getattr(c, key) for key in ("base", "tuned", "delta", "low", "high")}
    return {"scorer": c.scorer, "verdict": c.verdict} | {k: None if v != v else v for k, v in numbers.items()}
