"""DDPO: every denoising step is an action, and the picture's reward is shared by all of them (Black et al. 2023).

Two estimators of the policy gradient:

    ScoreFunction (DDPO-SF, eq. 4)   grad log p(x_s | x_t, prompt) * A; justified for one update a rollout
    DDPO (DDPO-IS, eq. 5)            PPO's clipped importance ratio on each step; allows several updates

With a KL term to the base model either is DPOK (Fan et al. 2023) without its value baseline. Group-relative advantages and
the KL term make DDPO the loss of Flow-GRPO: ddpo/algorithms/grpo.py, which has other trust regions too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from ddpo.algorithms import Algorithm, Replay, clipped_surrogate, how_many, some_steps
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.views import Transition


@dataclass(frozen=True)
class ScoreFunction(Algorithm[Transition]):
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
    needs_density = True
    credits_steps = True
    on_policy = True

    def passes(self, stochastic_steps: int) -> int:
        return how_many(self.steps, stochastic_steps)

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Transition]:
        """Every chosen stochastic step of every row. A deterministic step has no density, hence nothing to learn from."""
        chosen = some_steps(self.steps, batch, draw)
        for chunk in batch.chunks(size):
            for step in chosen:
                yield chunk.transition(step)

    def loss(self, policy: Policy, view: Transition) -> tuple[Tensor, dict[str, Tensor]]:
        step = Replay(policy, view)
        loss, metrics = self._surrogate(step, view.advantage.clamp(-self.max_advantage, self.max_advantage))
        metrics["log_ratio"] = step.log_ratio.detach()
        if self.kl:
            loss = loss + self.kl * step.kl(step.mean_of("reference"))
        return loss, metrics

    def _surrogate(self, step: Replay, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses whose gradient is the policy's, and (B,) metrics. `advantage` is clipped."""
        return -advantage * step.log_ratio, {}  # the gradient of the log-probability itself: the old one is a constant


@dataclass(frozen=True)
class DDPO(ScoreFunction):
    """PPO's clipped surrogate on each denoising step.

    Args:
        clip: how far a step's importance ratio may move from one. The log-probability is an average over the latent's
            elements: 1e-4 at 4 x 64 x 64 is 1.6 nats of the step's own density; smaller latents bear larger clips.
    """

    clip: Annotated[float, Gt(0)] = 1e-4
    on_policy = False

    def _surrogate(self, step: Replay, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return clipped_surrogate(step.log_ratio.exp(), advantage, self.clip)
