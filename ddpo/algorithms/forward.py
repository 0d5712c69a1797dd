"""Forward-process policy gradients: noise what was drawn, anew, and move the network's belief about it by its advantage.

No trajectory is kept and no step has a density, so any sampler may act, the deterministic ones too. All are written in the
space of x0, where every parameterisation meets: with v = (eps - x0) for flows and v = alpha eps - sigma x0 for the DDPM
schedule, a difference of beliefs at one x_t is  dv = -dx0 / sigma  for both, so the papers' losses on the velocity hold
for networks that predict eps as they do for flows.

    NFT      Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process"
    AWM      Xue et al. 2025, "Advantage Weighted Matching"
    RWR      Peters & Schaal 2007; the baseline of Black et al. 2023 that DDPO is measured against
    RAFT     Dong et al. 2023, "RAFT: Reward rAnked FineTuning"; best-of-n
    elbo.py  ELBO-PG's links; ram.py: reinforce adjoint matching. Why they are not one loss: docs/algorithms.md

With a = x0_old - x0 and d = x0_theta - x0_old, NFT's loss (times A_max / beta) is  2 A <a, d> + A_max beta |d|^2 + const, and AWM's
2 A <a, d> + (A + kappa) |d|^2 + const: one policy gradient, two curvatures around the old policy. Neither can do without.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from ddpo.algorithms import Algorithm
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.views import Noised


@dataclass(frozen=True)
class ForwardProcess(Algorithm[Noised]):
    """What the forward-process algorithms share.

    Args:
        times: noise levels at which an update looks at each picture, one drawn from each of as many equal stretches.
        shared: whether the pictures of a group are noised alike (Luo et al. 2026, V-GRPO): what differs is then the picture.
        lowest: share of the way from clean to noise, at its clean end, that is not looked at. What a picture shows is settled at
            high noise; below, its details.
        guidance: scale at which the loss sees the network. 1 learns the conditional belief, whatever guidance acts: the rule for
            UNets, whose unguided pictures are poor. None is the scale that acts.
        max_advantage: advantages are clipped to +- this.
        kl: weight of the mean squared distance to the base model's velocity.
        teacher: scale of guidance of the base model in that distance; None is `guidance`. Above 1, with guidance 1, the LoRA learns
            what guidance did, and may act without it, in half the time (as in CRD, arXiv 2603.14128).

    Raises:
        ValueError: a teacher without `kl` would teach nothing.
    """

    times: Annotated[int, Ge(1)] = 2
    shared: bool = False
    lowest: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    guidance: Annotated[float, Ge(0)] | None = 1.0
    max_advantage: Annotated[float, Gt(0)] = 5.0
    kl: Annotated[float, Ge(0)] = 0.0
    teacher: Annotated[float, Ge(0)] | None = None

    def __post_init__(self) -> None:
        if self.teacher is not None and not self.kl:
            raise ValueError(f"teacher is {self.teacher:g} and kl is 0, so it would teach nothing: set kl, such as 0.1")

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Noised]:
        """Every row at every stretch of noise levels."""
        key = int(torch.randint(2**62, (), generator=draw))
        for chunk in batch.chunks(size):
            for stretch in range(self.times):
                yield self._view(chunk, key, stretch)

    def _view(self, chunk: Rollout, key: int, stretch: int) -> Noised:
        return chunk.noised(key, stretch, self.times, self.shared, self.lowest)

    def passes(self, stochastic_steps: int) -> int:
        return self.times

    def loss(self, policy: Policy, view: Noised) -> tuple[Tensor, dict[str, Tensor]]:
        now = view.belief(policy, self.guidance)
        loss, metrics = self._surrogate(policy, view, now)
        if self.kl:
            with policy.acting_as("reference"):
                reference = view.belief(policy, self.guidance if self.teacher is None else self.teacher)
            distance = view.velocity_distance(now, reference)
            loss = loss + self.kl * distance
            metrics["kl/velocity"] = distance.detach()
        return loss, metrics

    @abstractmethod
    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses and metrics; `now` is the present belief about x0."""

    def _belief_of(self, earlier: str, policy: Policy, view: Noised) -> Tensor:
        """(B, C, H, W) what an earlier self believes, without gradient, for one more forward pass."""
        with policy.acting_as(earlier):
            return view.belief(policy, self.guidance)

    def _clipped(self, advantage: Tensor) -> Tensor:
        return advantage.clamp(-self.max_advantage, self.max_advantage)


@dataclass(frozen=True)
class NFT(ForwardProcess):
    """DiffusionNFT: a positive and a negative belief are extrapolated from the old one, and matched as the advantage says.

    The pictures are drawn by an "old" self that follows the policy slowly. Each error is divided by its own mean size, as in
    the authors' code, which weights noise levels alike.

    Args:
        beta: how far the implicit beliefs lie from the old one; smaller moves further.
        decay: the most of itself that the old self keeps in an iteration; it begins at 0 and grows by `growth` a step.
        growth: of that share, an iteration.
    """

    kl: Annotated[float, Ge(0)] = 1e-4
    beta: Annotated[float, Gt(0)] = 1.0
    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    growth: Annotated[float, Ge(0)] = 1e-3
    actor = "old"

    def start(self, policy: Policy, iteration: int) -> None:
        policy.remember("old", decay=1.0)  # only makes it, the first time

    def finish(self, policy: Policy, iteration: int) -> None:
        policy.remember("old", decay=min(self.decay, self.growth * (iteration + 1)))

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        old = self._belief_of("old", policy, view)
        share = self._clipped(view.advantage) / self.max_advantage / 2 + 0.5  # r in [0, 1]
        step = self.beta * (now - old)
        toward, away = (_relative_error(belief - view.x0) for belief in (old + step, old - step))
        loss = (share * toward + (1 - share) * away) * self.max_advantage / self.beta
        return loss, {"old_distance": view.velocity_distance(now, old).detach()}


@dataclass(frozen=True)
class AWM(ForwardProcess):
    """Advantage weighted matching: the advantage times the gain in a robust estimate of the picture's likelihood.

    log pi = -(sigma / p) |dv|^(2 p), p = 1/4, and a term of weight `proximal` holds the velocity near an average of the past,
    without which a negative advantage has no bound. The authors multiply by the importance ratio to the policy that acted, clipped
    so widely that it hardly ever binds; here it counts as one in later updates of a rollout too, which saves a forward pass.

    Args:
        proximal: weight of the squared distance to the averaged self, where the advantage's clipped scale is 1.
        decay: the most that the averaged self keeps in an iteration; begins at 0 and grows by `growth`.
        growth: of that share, an iteration.
    """

    times: Annotated[int, Ge(1)] = 6
    kl: Annotated[float, Ge(0)] = 1e-3
    proximal: Annotated[float, Ge(0)] = 1.0
    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.3
    growth: Annotated[float, Ge(0)] = 1e-3

    def start(self, policy: Policy, iteration: int) -> None:
        policy.remember("ema", decay=1.0)

    def finish(self, policy: Policy, iteration: int) -> None:
        policy.remember("ema", decay=min(self.decay, self.growth * (iteration + 1)))

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        past = self._belief_of("ema", policy, view)
        likelihood = -4 * view.sigma * (view.velocity_distance(now, view.x0) + 1e-10) ** 0.25
        advantage = self._clipped(view.advantage) / self.max_advantage
        distance = view.velocity_distance(now, past)
        return -advantage * likelihood + self.proximal * distance, {"old_distance": distance.detach()}


@dataclass(frozen=True)
class RWR(ForwardProcess):
    """Reward-weighted regression: the diffusion loss on one's own pictures, each with weight exp(A / temperature).

    What every policy gradient must beat. Black et al. weigh by the softmax of the rewards themselves over all pictures, with temperature
    0.2; advantages make a temperature mean the same whatever the reward's unit, and compare pictures of one prompt.

    Args:
        temperature: of the weights; low looks at the best pictures alone.
        max_weight: weights are clipped to this (Peng et al. 2019, "Advantage-Weighted Regression").
    """

    temperature: Annotated[float, Gt(0)] = 1.0
    max_weight: Annotated[float, Gt(0)] = 20.0

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weight = (self._clipped(view.advantage) / self.temperature).exp().clamp(max=self.max_weight)
        return weight * view.velocity_distance(now, view.x0), {"weight": weight}


@dataclass(frozen=True)
class RAFT(ForwardProcess):
    """Best-of-n: the diffusion loss on the best pictures of each prompt group alone, as if they were data.

    Pictures are ranked by their reward within their group; the loss is the mean over those that are kept. One that could not
    be scored teaches nothing, and where its group has too few others, counts as a loss of zero.

    Args:
        best: how many pictures of a group (1, 2, ...), at most all; or what share of it (a fraction above 0; 1.0 is all).
    """

    best: Annotated[int, Ge(1)] | Annotated[float, Interval(gt=0, le=1)] = 1
    smallest_group = 2

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Noised]:
        """The best rows of every group, of which a batch holds whole ones."""
        assert batch.rewards is not None, "rewards come before learning"
        best = batch[torch.tensor([row for group in batch.groups() for row in self._best(group, batch.rewards)])]
        assert best.rewards is not None
        best.advantages = best.rewards.isfinite().to(best.latents)  # the reward has done its work: they count alike
        yield from super().views(best, size, draw)

    def _best(self, group: list[int], rewards: Tensor) -> list[int]:
        """As many rows of every group of one size, whatever is scored."""
        number = self.best if isinstance(self.best, int) else max(1, round(self.best * len(group)))
        order = rewards[group].nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices
        return sorted(group[i] for i in order[:number].tolist())

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = view.velocity_distance(now, view.x0)
        return view.advantage * error, {"error/velocity": error.detach()}


def has_moved(policy: Policy, name: str) -> bool:
    """Whether the policy is another than this earlier self, which then must be asked what it believes."""
    kept = policy.selves()
    return not all(torch.equal(weight, kept[f"{name}/{key}"]) for key, weight in policy.weights.items())


def _relative_error(error: Tensor) -> Tensor:
    """(B,) the mean square of an error over its own mean size, which carries no gradient."""
    size = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return error.square().flatten(1).mean(1) / size
