"""Config sections `rewards`, `held_out_rewards` and `objective`: which scorers, how each is run, and how they become one number."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from ddpo.config import Component, In
from rewards import Part, Rubric
from rewards._isolated import Isolated


@dataclass(frozen=True)
class Scoring:
    """What a reward's entry takes beside the scorer's own options.

    Args:
        weight: what it counts in the sum. One that is only watched is guarded against over-optimisation, unless its weight is 0.
        floor: how many standard errors its held-out mean may fall below the base model's. A multiplier holds it there.
        device: where it computes, such as "cpu" or "cuda:1"; None is where the pictures are made.
        offload: keep it in the CPU's memory between uses.
        isolate: in a process of its own, so that what hangs or crashes there cannot harm the run; None is for code from
            outside of this package only. No gradient passes between processes.
        timeout: seconds for a batch there, before the process is killed and started again.
        memory_gb: what that process may allocate; None is all of the machine's.
        environment: environment variables that it needs beside the usual ones. Tokens are not passed on unasked.
    """

    weight: float = 1.0
    floor: Annotated[float, Ge(0)] | None = None
    device: str | None = None
    offload: bool = False
    isolate: bool | None = None
    timeout: Annotated[float, Gt(0)] = 60.0
    memory_gb: Annotated[float, Gt(0)] | None = None
    environment: list[str] = field(default_factory=list)


Scorer = Annotated[Component, In("rewards", extra=Scoring, called_with=("images", "prompts", "metadata"))]


@dataclass(frozen=True)
class Objective:
    """Config section `objective`: how several rewards become one number.

    Args:
        normalise: "none" adds weighted scores as they are; "group" first gives each scorer mean 0 and standard deviation 1
            in each prompt group, so that none drowns another by its unit (GDPO, Liu et al. 2026).
        max_missing: the share of an iteration's pictures that may go unscored before the run stops.
    """

    normalise: Literal["none", "group"] = "none"
    max_missing: Annotated[float, Ge(0), Le(1)] = 0.1


def rubrics(trained: Sequence[Component], watched: Sequence[Component], objective: Objective) -> tuple[Rubric, Rubric]:
    """What is trained on and what is only watched. All names differ: a watched scorer never passes for a trained one.

    Entries that ask for the same scorer with the same options share it, and its weights.
    """
    made: dict[str, Part] = {}
    parts = []
    for component in (*trained, *watched):
        how: Scoring = component.extra
        same = repr((component.factory, component.options, replace(how, weight=1.0, floor=None)))
        if same not in made:
            made[same] = part(component)
        parts.append(replace(made[same], weight=how.weight, floor=how.floor))
    named = list(Rubric.of(parts).parts.items())
    return Rubric(dict(named[: len(trained)]), objective.normalise), Rubric(dict(named[len(trained) :]))


def part(component: Component) -> Part:
    """A scorer as the config wants it: in this process, or in one of its own. Nothing is loaded or started yet.

    Raises:
        ValueError, OSError, ImportError: what the scorer says of its options.
    """
    how: Scoring = component.extra
    outside = not component.factory.__module__.startswith("rewards.")
    if outside if how.isolate is None else how.isolate:
        reward: Any = Isolated(component.factory, component.options, how.timeout, how.memory_gb, how.environment)
    else:
        reward = component.build()
    return Part(reward, how.weight, how.floor, how.device, how.offload)


def lack_of_gradient(component: Component, reward: Any) -> str | None:
    """Why pictures cannot be learned from through this scorer's gradient, one by one, and the fix; None if they can."""
    if isinstance(reward, Isolated) and getattr(component.factory, "differentiable", False):
        return "runs in a process of its own, out of which no gradient comes: set isolate: false on it"
    if not getattr(reward, "differentiable", False):
        return "has none: use a reward that has (`ddpo rewards list` says which)"
    if getattr(reward, "groupwise", False):
        return "compares the pictures of a group, which are not all there in a micro-batch: move it to held_out_rewards"
    return None
