"""Learning from preferences: of two pictures of one prompt the better one becomes likelier, and the other less likely.

    DiffusionDPO   Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization": on pictures noised anew
    D3PO           Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model": on the steps
                   that were taken

Both minimise  -log sigmoid(beta * (m_w - m_l)),  where m is how much likelier than to the base model a picture has become to the
policy. The reward only says which picture of a pair is better (a preference); its size is not looked at.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from torch.nn import functional as F

from ddpo.algorithms import Algorithm, Replay, how_many, some_steps
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.views import Noised, Pair, Transition

Pairing = Literal["extremes", "all"]


@dataclass(frozen=True)
class DiffusionDPO(Algorithm[Pair[Noised]]):
    """Eq. 14: -log sigmoid(-beta T omega [(l_w - l_ref_w) - (l_l - l_ref_l)]), l the squared error at one x_t of each picture.

    Both pictures of a pair are noised alike, at one noise level. The error is that of what the network itself predicts: eps
    as published, or v, or a flow's velocity; each is what the network was pretrained with, and the weight of noise levels,
    T omega, is constant then. It is averaged over the latent's elements, not summed, so that beta does not depend on the
    resolution, and T omega is in beta: -beta / 2 times the mean, as in the authors' code.

    A pair is two rows of a micro-batch, which therefore holds two pictures at least.

    Any sampler may act, and the pictures may be anyone's: see `rollout.pictures`.

    Args:
        beta: how dearly distance from the base model is paid, as in the authors' code: theirs is 2000 for Stable Diffusion 1.5
            and 5000 for SDXL. At a mean error of 1e-3 less than the base model's, 2000 is one nat.
        times: noise levels at which an update looks at each pair, one drawn from each of as many equal stretches.
        pairs: "extremes" is the best and the worst picture of each group; "all" is every two that differ in reward, which costs
            group_size - 1 times as much as --dry-run says.
        guidance: scale at which the loss sees both networks. 1 compares conditional beliefs, whatever guidance acts; None is the
            scale that acts.
    """

    beta: Annotated[float, Gt(0)] = 2000.0
    times: Annotated[int, Ge(1)] = 2
    pairs: Pairing = "extremes"
    guidance: Annotated[float, Ge(0)] | None = 1.0
    smallest_group = 2

    def passes(self, stochastic_steps: int) -> int:
        return self.times  # at most, of extremes

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Pair[Noised]]:
        """Every pair at every stretch of noise levels."""
        key = int(torch.randint(2**62, (), generator=draw))
        for both, decided in _paired(batch, self.pairs, max(1, size // 2)):
            for stretch in range(self.times):
                yield Pair(both.noised(key, stretch, self.times, shared=True), decided)

    def loss(self, policy: Policy, view: Pair[Noised]) -> tuple[Tensor, dict[str, Tensor]]:
        now = view.both.output_error(policy, self.guidance)
        with policy.acting_as("reference"):
            reference = view.both.output_error(policy, self.guidance)
        return _preference(-self.beta / 2 * (now - reference), view.decided)


@dataclass(frozen=True)
class D3PO(Algorithm[Pair[Transition]]):
    """On each step: -log sigmoid(beta log rho_w - beta log rho_l), rho = p(x_s | x_t) of the policy over that of the base model.

    The two steps of a pair start at the same time, not at the same latent. Log-probabilities are averaged over the latent's
    elements, as in DDPO and in the authors' code, and beta and clip are theirs for that unit; so the sigmoid hardly leaves the
    middle, and a step's gradient is nearly that of DDPO with the advantages beta / 2 and -beta / 2.

    Args:
        beta: of the log-ratios; times the number of elements it is that of nats.
        clip: ratios are clipped to 1 +- this, where they end to give a gradient, either way.
        pairs: as in DiffusionDPO.
        steps: share of the stochastic steps that an update learns from, drawn anew for each update.
    """

    beta: Annotated[float, Gt(0)] = 0.1
    clip: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    pairs: Pairing = "extremes"
    steps: Annotated[float, Interval(gt=0, le=1)] = 1.0
    needs_trajectory = True
    needs_density = True
    smallest_group = 2

    def passes(self, stochastic_steps: int) -> int:
        return how_many(self.steps, stochastic_steps)  # at most, of extremes

    def together(self, batch: Rollout, size: int) -> Sequence[Tensor]:
        winners, losers, _ = _pairs(batch, self.pairs)
        at_once = self._at_once(len(winners), size)
        return [torch.cat(both) for both in zip(winners.split(at_once), losers.split(at_once), strict=True)]

    def _at_once(self, pairs: int, size: int) -> int:
        """The most pairs, two rows each, that fit into `size` rows and divide their number: of a picture that is in several
        pairs the log-probability is recomputed in one batch shape, so all must have the same."""
        return next(n for n in range(max(1, min(pairs, size // 2)), 0, -1) if pairs % n == 0)

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Pair[Transition]]:
        """Every pair at every chosen stochastic step."""
        chosen = some_steps(self.steps, batch, draw)
        at_once = self._at_once(len(_pairs(batch, self.pairs)[0]), size)
        for both, decided in _paired(batch, self.pairs, at_once):
            for step in chosen:
                yield Pair(both.transition(step), decided)

    def loss(self, policy: Policy, view: Pair[Transition]) -> tuple[Tensor, dict[str, Tensor]]:
        """`log_ratio` among the metrics is to the policy that acted, and one at first; rho is to the base model."""
        step = Replay(policy, view.both)
        log_rho = step.log_ratio_to("reference")
        low, high = math.log(1 - self.clip), math.log(1 + self.clip)
        loss, metrics = _preference(self.beta * log_rho.clamp(low, high), view.decided)
        clipped = ((log_rho < low) | (log_rho > high)).float()
        return loss, metrics | {"log_ratio": step.log_ratio.detach(), "clip_fraction": clipped}


def _preference(likelier: Tensor, decided: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) the logistic loss of winners against losers (Bradley & Terry 1952), 0 where none won.

    Args:
        likelier: (2 B,) how much likelier each picture has become, winners first.

    Metrics are the margin in nats, and the share of pairs that the policy orders as the reward does; a tie is half a pair.
    """
    winner, loser = likelier.chunk(2)
    margin = (winner - loser) * decided
    loss = -F.logsigmoid(margin) * decided
    return loss, {"dpo/margin": margin.detach(), "dpo/accuracy": (margin.detach().sign() + 1) / 2}


def _paired(batch: Rollout, pairs: Pairing, at_once: int) -> Iterator[tuple[Rollout, Tensor]]:
    """(2 B rows, winners first; (B,) whether one won), `at_once` pairs at a time."""
    winners, losers, decided = _pairs(batch, pairs)
    for part in torch.arange(len(winners)).split(at_once):
        yield batch[torch.cat([winners[part], losers[part]])], decided[part].to(batch.latents)


def _pairs(batch: Rollout, pairs: Pairing) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) rows that won, (P,) rows that lost to them, (P,) whether the first scored higher.

    Pairs that scored alike, or of which one was not scored, are there without teaching anything.
    """
    assert batch.rewards is not None, "rewards come before learning"
    rewards = batch.rewards.cpu()
    order = [sorted(group, key=lambda row: _worth(rewards[row].item()), reverse=True) for group in batch.groups()]
    scored = [[row for row in group if rewards[row].isfinite()] or group for group in order]
    ends = [(group[0], group[-1]) for group in scored]
    rows = ends if pairs == "extremes" else [pair for group in order for pair in itertools.combinations(group, 2)]
    winners, losers = torch.tensor(rows, dtype=torch.long).view(-1, 2).T  # none where no group has two
    return winners, losers, rewards[winners] > rewards[losers]  # not of NaN


def _worth(reward: float) -> float:
    return reward if reward == reward else -torch.inf
