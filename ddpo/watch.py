"""What training measured, as the rules of health see it; and what is said of updates that were not taken."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ddpo.deal import Row
from ddpo.evaluate import LEAST_DISTANCE, Baseline, Look, prompt_means
from ddpo.health import Measured, Probed
from ddpo.learner import Skip
from ddpo.meeting import TrainingError
from ddpo.updates import Alarm

MOST_NAMED = 3  # pictures, in a message


class Alarmed(TrainingError):
    """An alarm ended the run."""

    def __init__(self, alarm: Alarm):
        self.alarm = alarm
        super().__init__(alarm.text)


def measured(iteration: int, metrics: Mapping[str, float], scores: Mapping[str, Tensor]) -> Measured:
    """Of an iteration's line of metrics, and its (N,) scores of each scorer that counts."""
    kl, ratio, clipped = (metrics.get(name, math.nan) for name in ("kl/image_nats", "ratio/lowest", "clip_fraction"))
    limits = {name: _share_of_highest(v) for name, v in scores.items()}
    return Measured(iteration, kl, ratio, clipped, metrics["advantage/zero_std_fraction"], metrics["norm_inflation"], limits)


def _share_of_highest(scores: Tensor) -> float:
    known = scores[scores.isfinite()]
    return (known == known.max()).double().mean().item() if len(known) else math.nan


def probed(iteration: int, baseline: Baseline, scores: dict[str, Tensor], images: Tensor, prompts: Sequence[str]) -> Probed:
    """Of an evaluation's (N,) scores and (N, 3, H, W) uint8 pictures."""
    trained, untrained = baseline.differences(scores)
    base, now = baseline.look or Look.at(images, prompts), Look.at(images, prompts)
    return Probed(
        iteration, prompt_means(trained, prompts), {name: prompt_means(v, prompts) for name, v in untrained.items()},
        now.spread.clamp(min=LEAST_DISTANCE).log() - base.spread.clamp(min=LEAST_DISTANCE).log(),
        prompt_means(now.saturated - base.saturated, prompts),
        (int(base.blank.sum()), int(now.blank.sum()), len(images)),
    )  # fmt: skip


def rollbacks(done: Sequence[dict], iteration: int) -> list[Alarm]:
    """Those that led back to this iteration, as the next line of metrics tells them."""
    return [
        Alarm(
            "rollback",
            "warn",
            f"rolled back to iteration {iteration}, with other noise and half the learning rate: {back['why']}",
        )
        for back in done
        if back["to"] == iteration
    ]


def told(skip: Skip, iteration: int, rows: Sequence[Row]) -> str:
    """A line on an update that was not taken.

    Args:
        rows: of all processes, in the order in which they are gathered.
    """
    text = f"iteration {iteration}: update {skip.update + 1} was skipped, for {skip.why}"
    if skip.weights:
        text += f"; not finite is the gradient of {skip.weights[0]} and {len(skip.weights) - 1} others"
    if skip.rows:
        named = [f"{rows[i].prompt.text!r} (group {rows[i].group}, member {rows[i].member})" for i in skip.rows[:MOST_NAMED]]
        text += f"; it comes from {', '.join(named)}" + (
            f" and {len(skip.rows) - MOST_NAMED} more" if skip.rows[MOST_NAMED:] else ""
        )
    return text
