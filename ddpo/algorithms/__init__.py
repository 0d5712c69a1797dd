"""An algorithm says which views of a rollout it learns from, and what each costs. One file an algorithm.

It owns no loop, no optimizer and no device: the trainer improves them all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpo.diffusion import Solver
from ddpo.policy import Policy
from ddpo.rollout import Rollout, Transition

View = Transition


class Algorithm(ABC):
    """The base of every algorithm. Constructor arguments are the hyperparameters.

    `loss` returns one number a row, so that the trainer can divide the sum by the global count, whatever the number of
    processes and micro-batches.
    """

    needs_trajectory = False
    on_policy = False  # True: only the first update of a rollout is justified
    actor = "now"  # which self of the policy collects the rollouts

    def refusal(self, solver: Solver) -> str | None:
        """Why this algorithm cannot learn from trajectories of this solver, or None if it can."""
        return None

    def start(self, policy: Policy) -> None:  # noqa: B027 (most need nothing here)
        """Before each iteration."""

    @abstractmethod
    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[View]:
        """What each backward pass sees: views of at most `size` rows. Random choices come from `draw`."""

    @abstractmethod
    def loss(self, policy: Policy, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses with gradients, and (B,) metrics without, by name."""

    def finish(self, policy: Policy) -> None:  # noqa: B027
        """After each iteration."""
