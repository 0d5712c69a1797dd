"""DDPO: every denoising step is an action, and the picture's reward is shared by all of them (Black et al. 2023).

Two estimators of the policy gradient:

    ScoreFunction (DDPO-SF, eq. 4)   grad log p(x_s | x_t, prompt) * A; justified for one update a rollout
    DDPO (DDPO-IS, eq. 5)            PPO's clipped importance ratio on each step; allows several updates

With a KL term to the base model either is DPOK (Fan et al. 2023); with group-relative advantages and the KL term, DDPO
is the loss of Flow-GRPO (Liu et al. 2025).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from ddpo.algorithms import Algorithm
from ddpo.diffusion import Solver, gaussian_kl, log_prob
from ddpo.policy import Policy
from ddpo.rollout import Rollout, Transition


@dataclass(frozen=True)
class ScoreFunction(Algorithm):
    """REINFORCE on each denoising step.

    Args:
        max_advantage: advantages are clipped to +- this.
        kl: weight of the KL to the base model, in the same units as the log-probability it is added to.
        steps: share of the stochastic steps that an update learns from, drawn anew for each update.
    """

    max_advantage: Annotated[float, Gt(0)] = 5.0
    kl: Annotated[float, Ge(0)] = 0.0
    steps: Annotated[float, Interval(gt=0, le=1)] = 1.0
    needs_trajectory = True
    on_policy = True

    def refusal(self, solver: Solver) -> str | None:
        if solver.stochastic:
            return None
        return (
            f"{type(self).__name__} learns from the noise that a sampler adds, and {solver} adds none; "
            "set rollout.solver to a stochastic one, such as {name: diffusion:DDIM, eta: 1.0}"
        )

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Transition]:
        """Every chosen stochastic step of every row. A deterministic step has no density, hence nothing to learn from."""
        number = max(1, round(self.steps * len(batch.stochastic)))
        chosen = sorted(torch.randperm(len(batch.stochastic), generator=draw)[:number].tolist())
        for chunk in batch.chunks(size):
            for i in chosen:
                yield chunk.transition(batch.stochastic[i])

    def loss(self, policy: Policy, view: Transition) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = view.replay(policy)
        now = log_prob(view.x_next, mean, std)
        loss, metrics = self._gain(now, view)
        metrics["log_ratio"] = (now - view.log_prob).detach()
        if self.kl:
            with policy.acting_as("reference"):
                reference, _ = view.replay(policy)
            loss = loss + self.kl * gaussian_kl(mean, reference, std) / mean[0].numel()
        return loss, metrics

    def _gain(self, now: Tensor, view: Transition) -> tuple[Tensor, dict[str, Tensor]]:
        return -self._clipped(view.advantage) * now, {}

    def _clipped(self, advantage: Tensor) -> Tensor:
        return advantage.clamp(-self.max_advantage, self.max_advantage)


@dataclass(frozen=True)
class DDPO(ScoreFunction):
    """PPO's clipped surrogate on each denoising step.

    Args:
        clip: how far a step's importance ratio may move from one. The log-probability is an average over the latent's
            elements: 1e-4 at 4 x 64 x 64 is 1.6 nats of the step's own density; smaller latents bear larger clips.
    """

    clip: Annotated[float, Gt(0)] = 1e-4
    on_policy = False

    def _gain(self, now: Tensor, view: Transition) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (now - view.log_prob).exp()
        advantage = self._clipped(view.advantage)
        loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - self.clip, 1 + self.clip))
        return loss, {"clip_fraction": ((ratio - 1).abs() > self.clip).float().detach()}
