"""Which of a sampler's stochastic steps add noise, and so are learned from, in an iteration. All others follow the ODE.

Every picture of an iteration has the same window: a group whose members differ in where they were random compares windows,
not pictures. So `rollout.window` belongs to the iteration, and an algorithm learns from whatever steps have a density.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from ddpo.diffusion import Level, Solver
from ddpo.rollout import stochastic_steps
from ddpo.schedule import Schedule


class Window(Protocol):
    length: int  # steps, at most

    def first(self, steps: int, iteration: int, draw: torch.Generator) -> int:
        """Where among the stochastic steps, 0 the noisiest of `steps`, the window begins."""
        ...


@dataclass(frozen=True)
class First:
    """The noisiest steps, where a picture's layout is settled."""

    length: Annotated[int, Ge(1)] = 4

    def first(self, steps: int, iteration: int, draw: torch.Generator) -> int:
        return 0


@dataclass(frozen=True)
class Sliding:
    """From the noisiest steps towards the clean end, where it stays (MixGRPO's progressive window).

    Args:
        length: steps.
        every: iterations until it moves.
        stride: steps it moves by.
    """

    length: Annotated[int, Ge(1)] = 4
    every: Annotated[int, Ge(1)] = 25
    stride: Annotated[int, Ge(1)] = 1

    def first(self, steps: int, iteration: int, draw: torch.Generator) -> int:
        return min(iteration // self.every * self.stride, max(0, steps - self.length))


@dataclass(frozen=True)
class Random:
    """Anywhere in the noisier part of the way, drawn anew each iteration (Flow-GRPO-Fast).

    Args:
        length: steps.
        among: share of the stochastic steps, the noisiest, in which it begins.
    """

    length: Annotated[int, Ge(1)] = 2
    among: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def first(self, steps: int, iteration: int, draw: torch.Generator) -> int:
        last = min(max(1, round(self.among * steps)) - 1, max(0, steps - self.length))
        return int(torch.randint(last + 1, (), generator=draw))


@dataclass(frozen=True)
class Within:
    """A solver inside a window of noise levels, and the ODE outside, which adds no noise (Li et al. 2025, "MixGRPO").

    Args:
        solver: any.
        lowest, highest: a step that starts at a noise level in (lowest, highest] is the solver's.
    """

    solver: Solver
    lowest: float
    highest: float

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        c, std = self.solver(now, then)
        inside = (now.sigma > self.lowest) & (now.sigma <= self.highest)
        return torch.where(inside, c, then.sigma), torch.where(inside, std, 0.0)


def within(window: Window, solver: Solver, schedule: Schedule, num_steps: int, iteration: int, draw: torch.Generator) -> Solver:
    """The solver, with noise in this iteration's window alone. Bounds lie halfway between the noise levels of two steps."""
    steps = stochastic_steps(schedule, solver, num_steps)
    first = window.first(len(steps), iteration, draw)
    chosen = steps[first : first + window.length]
    sigma = schedule.level(schedule.times(num_steps)).sigma.tolist()
    above = sigma[chosen[0] - 1] if chosen[0] else sigma[0] + 1.0
    lowest, highest = ((a + b) / 2 for a, b in ((sigma[chosen[-1]], sigma[chosen[-1] + 1]), (sigma[chosen[0]], above)))
    return Within(solver, lowest, highest)
