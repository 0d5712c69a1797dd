"""An algorithm says which views of a rollout it learns from, and what each costs. One file an algorithm.

It owns no loop, no optimizer and no device: the trainer improves them all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from ddpo.critic import Critic
from ddpo.diffusion import DPMSolver, Solver, gaussian_kl, log_prob
from ddpo.models import Family
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.views import Noised, Pair, Tail, Transition

View = TypeVar("View", Transition, Noised, Tail, Pair[Noised], Pair[Transition])


class Algorithm(ABC, Generic[View]):
    """The base of every algorithm. Constructor arguments are the hyperparameters.

    `loss` returns one number a row, so that the trainer can divide the sum by the global count, whatever the number of
    processes and micro-batches.
    """

    needs_trajectory = False  # True: it looks at latents on the way, not only at what was drawn
    needs_density = False  # True: it learns from steps that add noise
    needs_gradient = False  # True: it differentiates the reward; rollouts then have `reward`
    needs_units = False  # True: advantages must be in the reward's own unit
    credits_steps = False  # True: each step may have an advantage of its own (`rollout.credit`)
    memoryless = False  # True: its trajectories must forget where they started, so that all noise is in every step
    on_policy = False  # True: only the first update of a rollout is justified
    actor = "now"  # which self of the policy collects the rollouts
    smallest_group = 1  # images of one prompt that it needs in an iteration, whatever the advantage asks for

    @property
    def last_steps(self) -> int:
        """How many steps before the end of a trajectory it looks at; 0 where it takes what there is."""
        return 0

    def refusal(self, solver: Solver) -> str | None:
        """Why this algorithm cannot learn from what this solver draws, or None if it can."""
        if isinstance(solver, DPMSolver) and self.needs_trajectory:
            return (
                f"{type(self).__name__} takes steps of a trajectory again, and a step of {solver} depends on the one before it; "
                "set rollout.solver to a one-step sampler, such as {name: diffusion:DDIM}"
            )
        if solver.stochastic or not self.needs_density:
            return None
        return (
            f"{type(self).__name__} learns from the noise that a sampler adds, and {solver} adds none; "
            "set rollout.solver to a stochastic one, such as {name: diffusion:DDIM, eta: 1.0}"
        )

    def critic(self, family: Family, seed: int) -> Critic | None:
        """A learned baseline with weights of its own, made once a run. The learner lets it turn each rollout's advantages into
        advantages of steps, and trains it."""
        return None

    def scheduled(self, iteration: int) -> Self:
        """The same algorithm with the hyperparameters of this iteration, counted from 0: itself, where none changes."""
        return self

    def start(self, policy: Policy, iteration: int) -> None:
        """Before each iteration, counted from 0."""

    @abstractmethod
    def passes(self, stochastic_steps: int) -> int:
        """What a picture costs: how many views of it an epoch learns from, each a forward pass with its backward pass.

        Forward passes without gradient, as an earlier self's, come on top.

        Args:
            stochastic_steps: of its trajectory.
        """

    def together(self, batch: Rollout, size: int) -> Sequence[Tensor]:
        """Which rows of this batch go through the network at a time: half precision tells one batch shape from another."""
        return torch.arange(len(batch)).split(size)

    @abstractmethod
    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[View]:
        """What each backward pass sees: views of at most `size` rows. Random choices come from `draw`."""

    @abstractmethod
    def loss(self, policy: Policy, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses with gradients, and (B,) metrics without, by name."""

    def finish(self, policy: Policy, iteration: int) -> None:
        """After each iteration."""


def how_many(share: float, stochastic_steps: int) -> int:
    """Steps that an update learns from, where it learns from a share of them: one at least."""
    return max(1, round(share * stochastic_steps))


def some_steps(share: float, batch: Rollout, draw: torch.Generator) -> list[int]:
    """So many of the rollout's stochastic steps, drawn without replacement, in their order."""
    chosen = torch.randperm(len(batch.stochastic), generator=draw)[: how_many(share, len(batch.stochastic))]
    return [batch.stochastic[i] for i in sorted(chosen.tolist())]


class Replay:
    """A step that was taken, as the policy would take it now: what algorithms on trajectories compare.

    Attributes:
        mean, std: (B, C, H, W) and (B, 1, 1, 1), of the next latent.
        log_ratio: (B,) log importance ratio to the policy that acted, averaged over the latent's elements.
    """

    def __init__(self, policy: Policy, view: Transition):
        self.policy, self.view = policy, view
        self.mean, self.std = view.replay(policy)
        self.log_ratio = log_prob(view.x_next, self.mean, self.std) - view.log_prob

    def log_ratio_to(self, earlier: str) -> Tensor:
        """(B,) log importance ratio to an earlier self, averaged likewise, for one more forward pass."""
        x, other = self.view.x_next, self.mean_of(earlier)
        return log_prob(x, self.mean, self.std) - log_prob(x, other, self.std)

    def mean_of(self, earlier: str) -> Tensor:
        """(B, C, H, W) the mean of an earlier self's step, without gradient, for one more forward pass."""
        with self.policy.acting_as(earlier):
            return self.view.replay(self.policy)[0]

    def kl(self, other: Tensor) -> Tensor:
        """(B,) KL to the same step with another mean, in nats, averaged over the latent's elements as the log-ratio is."""
        return gaussian_kl(self.mean, other, self.std) / self.mean[0].numel()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) PPO's loss (Schulman et al. 2017, eq. 7), and whether each ratio is outside of 1 +- clip."""
    loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss, {"clip_fraction": ((ratio - 1).abs() > clip).float().detach()}
