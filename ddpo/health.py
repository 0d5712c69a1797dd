"""When a run is ill: over-optimised, collapsed, diverging, saturated. Pure rules on what training measures anyway.

A rule looks at one iteration or at one evaluation and says what it sees; when it sees it so many times running, that is an
alarm. What is drawn is compared with the base model's pictures, paired, on the same prompts and noise, and never with the
best so far: the best of many noisy evaluations is a maximum of noise, and in 95 of 100 healthy runs some later one lies 3
standard errors below it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from ddpo.sections import Health
from ddpo.updates import Alarm, Updates

FEWEST_PROMPTS = 8  # of a probe, for its standard error to mean something
KL_OF_AN_ELEMENT = 0.05  # nats: where no budget is given, a latent's elements times this are worth a word


@dataclass(frozen=True)
class Measured:
    """What an iteration measured. NaN: it did not."""

    iteration: int
    kl: float  # to the base model, nats a picture
    ratio: float  # lowest mean importance ratio of a quarter of the denoising steps
    clipped: float  # share of importance ratios
    zero_spread: float  # share of prompts whose pictures all scored alike
    inflation: float  # norm of the network's output over the base model's, minus 1
    at_limit: dict[str, float] = field(default_factory=dict)  # {scorer: share of pictures with the highest score of all}


@dataclass(frozen=True)
class Probed:
    """What an evaluation measured against the base model: (P,) tensors are means over each prompt's pictures."""

    iteration: int
    trained: Tensor  # (P,) change of what training maximises
    untrained: dict[str, Tensor]  # (P,) change of each scorer that is watched and not trained on
    variety: Tensor  # (P,) log of the within-prompt diversity over the base model's
    saturated: Tensor  # (P,) change of the share of pixel values at 0 or 255
    blank: tuple[int, int, int]  # black, white or flat pictures: the base model's, now, and of how many


Seen = TypeVar("Seen", Measured, Probed)


@dataclass(frozen=True)
class Rule(Generic[Seen]):
    """An illness.

    Args:
        times: running, that make an alarm.
        find: yields (of what, what is seen).
        advice: what people do about it.
    """

    name: str
    level: Literal["warn", "stop"]
    times: int
    find: Callable[[Seen], Iterator[tuple[str, str]]]
    advice: str


@dataclass
class Streak:
    """Since when a rule has seen something, and how often."""

    since: int
    times: int = 0


class Monitor:
    """All rules of a run, and what they remember.

    Args:
        elements: of a latent.
    """

    def __init__(self, settings: Health, elements: int):
        self.iterations, self.evaluations = list(_of_iterations(settings, elements)), list(_of_evaluations(settings))
        self.streaks: dict[str, Streak] = {}
        self.updates = Updates(settings.spike)

    def iteration(self, measured: Measured) -> list[Alarm]:
        return [*_heard(self.iterations, measured, self.streaks), *self.updates.alarms(measured.iteration)]

    def evaluation(self, probed: Probed) -> list[Alarm]:
        return _heard(self.evaluations, probed, self.streaks)

    @property
    def sound(self) -> bool:
        """Whether no rule that stops a run saw anything at the last evaluation."""
        grave = [rule.name for rule in self.evaluations if rule.level == "stop"]
        return not any(key.partition(":")[0] in grave for key in self.streaks)

    def forget(self) -> None:
        """Begin anew, after a stop or a rollback: what is still there will be seen again."""
        self.streaks = {}
        self.updates.forget()

    def state(self) -> dict[str, Any]:
        return {"streaks": {key: asdict(streak) for key, streak in self.streaks.items()}, "updates": self.updates.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.streaks = {key: Streak(**streak) for key, streak in state["streaks"].items()}
        self.updates.load_state(state["updates"])


def _heard(rules: list[Rule[Seen]], seen: Seen, streaks: dict[str, Streak]) -> list[Alarm]:
    """The alarms that begin now: one that lasts is said once."""
    alarms = []
    for rule in rules:
        found = dict(rule.find(seen))
        for key in [key for key in streaks if key.partition(":")[0] == rule.name and key.partition(":")[2] not in found]:
            del streaks[key]
        for subject, what in found.items():
            streak = streaks.setdefault(f"{rule.name}:{subject}", Streak(seen.iteration))
            streak.times += 1
            if streak.times == rule.times:
                alarms.append(Alarm(rule.name, rule.level, f"since iteration {streak.since} {what}: {rule.advice}"))
    return alarms


# ----------------------------------------------------------------------------------------------------------------------
# Of evaluations


def errors_from_zero(changes: Tensor) -> tuple[float, float]:
    """(mean, mean in standard errors) of (P,) paired changes, a number a prompt; NaN where there are too few prompts.

    The standard error is itself an estimate: errors are divided by what Student's t at 3 is to the normal distribution's 3, to
    second order (Abramowitz & Stegun 26.7.5), so that 3 of them are as rare with few prompts as with many.
    """
    known = changes[changes.isfinite()].double()
    if len(known) < FEWEST_PROMPTS:
        return math.nan, math.nan
    mean, error, z, freedom = known.mean().item(), known.std().item() / len(known) ** 0.5, 3.0, len(known) - 1
    error *= 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)
    return mean, mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def _of_evaluations(settings: Health) -> Iterator[Rule[Probed]]:
    errors = settings.standard_errors

    def overoptimised(seen: Probed) -> Iterator[tuple[str, str]]:
        rise, _ = errors_from_zero(seen.trained)
        for name, changes in seen.untrained.items():
            fall, error = errors_from_zero(changes)
            if rise > 0 and error < -errors:
                yield (
                    name,
                    (
                        f"the trained reward is up {rise:.3g} on the base model while {name}, which is not trained on, is down "
                        f"{-fall:.3g} ({-error:.1f} standard errors)"
                    ),
                )

    def collapsed(below: float) -> Callable[[Probed], Iterator[tuple[str, str]]]:
        def find(seen: Probed) -> Iterator[tuple[str, str]]:
            change, error = errors_from_zero(seen.variety)
            if error < -errors and math.exp(change) < below:
                yield "", f"the pictures of one prompt differ only {math.exp(change):.0%} as much as the base model's"

        return find

    def blank(seen: Probed) -> Iterator[tuple[str, str]]:
        base, now, number = seen.blank
        if now - base > max(settings.blank * number, 1):  # a single picture may always be
            yield "", f"{now} of {number} held-out pictures are black, white or flat, and {base} of the base model's"

    def saturated(seen: Probed) -> Iterator[tuple[str, str]]:
        rise, error = errors_from_zero(seen.saturated)
        if error > errors and rise > settings.saturated:
            yield "", f"{rise:.0%} more of the pixels than the base model's are at the end of their range"

    yield Rule(
        "over-optimisation", "stop", 2, overoptimised,
        "people take an earlier checkpoint, lower optimizer.lr, add a KL term (algorithm.kl), or train on both with a floor",
    )  # fmt: skip
    more = "people add a KL term (algorithm.kl) or a diversity reward, lower optimizer.lr, or take an earlier checkpoint"
    yield Rule("collapse", "warn", 2, collapsed(settings.diversity_warn), more)
    yield Rule("lost diversity", "stop", 2, collapsed(settings.diversity_stop), more)
    yield Rule(
        "blank pictures", "stop", 1, blank,
        "people lower optimizer.lr, add a KL term, take an earlier checkpoint, or, in half precision, try model.dtype=float32",
    )  # fmt: skip
    yield Rule(
        "saturated pixels",
        "warn",
        2,
        saturated,
        "people lower rollout.guidance or optimizer.lr, or add a KL term (algorithm.kl)",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Of iterations


def _of_iterations(settings: Health, elements: int) -> Iterator[Rule[Measured]]:
    budget = settings.kl_budget or KL_OF_AN_ELEMENT * elements
    inflation = "people lower optimizer.lr or add a KL term (algorithm.kl)"

    def far(seen: Measured) -> Iterator[tuple[str, str]]:
        if seen.kl > budget:
            yield "", f"the policy is {seen.kl:.3g} nats a picture from the base model, more than {budget:.3g}"

    def drifting(seen: Measured) -> Iterator[tuple[str, str]]:
        if seen.ratio < 0.98:
            yield "ratio", f"the mean importance ratio of some denoising steps is {seen.ratio:.3f}, below 0.98"
        if seen.clipped > 0.5:
            yield "clip", f"{seen.clipped:.0%} of the importance ratios are clipped"

    def alike(seen: Measured) -> Iterator[tuple[str, str]]:
        if seen.zero_spread > settings.zero_spread:
            yield "", f"all pictures of one prompt score alike, in {seen.zero_spread:.0%} of the prompts"

    def limited(seen: Measured) -> Iterator[tuple[str, str]]:
        for name, share in seen.at_limit.items():
            if share > 0.5:
                yield name, f"{share:.0%} of the pictures have the highest score that {name} gives"

    def inflated(above: float, below: float) -> Callable[[Measured], Iterator[tuple[str, str]]]:
        def find(seen: Measured) -> Iterator[tuple[str, str]]:
            if above < seen.inflation <= below:
                yield "", f"the network's output is {seen.inflation:.0%} larger than the base model's, which costs quality"

        return find

    yield Rule(
        "kl budget", "stop" if settings.kl_budget else "warn", 1, far,
        "this is where health.kl_budget asks to stop" if settings.kl_budget else "people set health.kl_budget to what quality bears",
    )  # fmt: skip
    yield Rule("drift", "warn", 5, drifting, "people lower optimizer.lr, optimizer.updates or optimizer.epochs")
    yield Rule(
        "no gradient",
        "stop",
        3,
        alike,
        "people look at rewards.jsonl: the reward is constant, or saturated, and teaches nothing more",
    )
    yield Rule("saturated reward", "warn", 3, limited, "people stop here, or make the reward harder")
    yield Rule("norm inflation", "warn", 3, inflated(0.05, 0.15), inflation)
    yield Rule(
        "strong norm inflation", "warn", 3, inflated(0.15, math.inf), f"stop soon; {inflation}, or take an earlier checkpoint"
    )
