"""Reinforce adjoint matching: reinforcement learning as a sampler of the base model's density, tilted by the reward.

The optimum of  E[r] - lambda KL(p || p_base)  is known in advance: p(x0) = p_base(x0) exp(r(x0) / lambda) / Z. In y = x / alpha the
forward process is a Brownian motion whose time is its variance, v = (sigma / alpha)^2. So the optimal policy's belief is

    x0_theta(y_v) - x0_base(y_v) = v grad V(y_v),    V(y_v) = E[ r / lambda - integral of |u|^2 / 2 dSNR | y_v ],

where SNR = 1 / v, the integral runs over the SNRs above that of y_v, u is the left side at those, and E draws by the optimal
policy. V is a value, its second term the path cost: the KL to the base model's process from there on (Domingo-Enrich et al. 2025).
REINFORCE turns the gradient of each conditional mean into a covariance with Brownian bridges, all of which noise supplies:

    target = x0_base + (A / lambda) (x0 - x0_old)
                     - sum of  dSNR / 2 (|u_s|^2 - (v_s / v)^2 |u|^2) (x0 - x0_old + sqrt(v_s v / (v - v_s)) z_s),

with y_s = x0 + (v_s / v) (y - x0) + sqrt(v_s (v - v_s) / v) z_s. The first line is Reinforce Adjoint Matching (Bergmeister et al. 2026,
arXiv 2605.10759); the second is the path cost, less a baseline that has mean zero. The paper has a correction of its own (its
section 5), which was not at hand: this one was derived here, and tests/test_sampler.py checks it where the truth is known.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ddpo.algorithms.forward import ForwardProcess, has_moved
from ddpo.diffusion import Level
from ddpo.noise import generator, normal
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.schedule import Schedule
from ddpo.views import Noised

GRID = 1000  # levels over which the path cost, an integral over all of them, is a sum


@dataclass
class Nearer:
    """The pictures of a view at lower noise levels, on Brownian bridges between x0 and x."""

    view: Noised
    lean: Tensor  # (B, C, H, W) sqrt(v_s v / (v - v_s)) z_s
    half_snr: Tensor  # (B,) half of the interval of SNR that this level stands for
    ratio: Tensor  # (B,) v_s / v


@dataclass
class Bridged(Noised):
    """Pictures noised anew, and points on the ways back."""

    points: list[Nearer]


@dataclass(frozen=True)
class RAM(ForwardProcess):
    """Regression to the belief that is optimal under a KL to the base model.

    What is exact. With `path_cost`, the tilted density is the fixed point, up to the schedule's own levels, if the policy draws what
    it believes in: guidance 1 everywhere, many steps of a solver that leads to the model's distribution (DDIM; not CPS), kl 0.
    Without it, as published, the fixed point is  x0_theta - x0_base = Cov(r, x0 | x_t) / lambda  under the tuned policy, where the
    truth is the mean of that covariance over all tilts from none to 1 / lambda: right to first order in 1 / lambda, and
    exact where the covariance does not change, as for Gaussians under linear rewards. In a mixture it stops short.
    A fixed point is not yet a road to it: a mode that is no longer drawn is not learned about. A strong tilt taken at once may lose
    modes before it has learned how far to go; `anneal` tilts slowly.
    On pictures the path cost has run away, feeding on the noise of the weights (docs/algorithms.md); efm.py has no such loop.

    Rewards are in their own units, so advantages must be too: advantage: {name: "advantage:LeaveOneOut"}. Another scale would move
    as the policy does, and no density be sampled; GroupRelative with scale none samples that of lambda G / (G - 1), G the group's size.

    Args:
        max_advantage: clips what should not be clipped; it is there against outliers.
        temperature: lambda, in units of the reward.
        path_cost: points on the way of each view at which the path cost is estimated, by two more forward passes without
            gradient each; 1 is unbiased, more have less variance. 0 leaves it out, as published.
        anneal: iterations over which 1 / temperature rises evenly to its value; 0 has it whole from the start.
    """

    max_advantage: Annotated[float, Gt(0)] = 1e6
    temperature: Annotated[float, Gt(0)] = 1.0
    path_cost: Annotated[int, Ge(0)] = 0
    anneal: Annotated[int, Ge(0)] = 0
    needs_units = True

    def scheduled(self, iteration: int) -> Self:
        return replace(self, temperature=self.temperature * max(1.0, self.anneal / (iteration + 1)))

    def start(self, policy: Policy, iteration: int) -> None:
        policy.remember("old")

    def _view(self, chunk: Rollout, key: int, stretch: int) -> Bridged:
        view = super()._view(chunk, key, stretch)
        points = [_nearer(view, chunk, (key, stretch), i, self.path_cost) for i in range(self.path_cost)]
        return Bridged(**{f.name: getattr(view, f.name) for f in fields(Noised)}, points=points)

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(view, Bridged), "RAM learns from its own views"
        old = self._belief_of("old", policy, view) if has_moved(policy, "old") else now.detach()
        base = self._belief_of("reference", policy, view)
        weight = self._clipped(view.advantage) / self.temperature
        target = base + _spread(weight) * (view.x0 - old)
        cost = torch.zeros_like(weight)
        for point in view.points:
            gap = self._belief_of("old", policy, point.view) - self._belief_of("reference", policy, point.view)
            here = point.half_snr * _square(gap)
            target = target - _spread(here - point.half_snr * point.ratio**2 * _square(old - base)) * (
                view.x0 - old + point.lean
            )
            cost += here
        metrics = {"path_cost": cost} if view.points else {}
        return view.velocity_distance(now, target), metrics


def _nearer(view: Noised, chunk: Rollout, key: tuple[int, int], stratum: int, strata: int) -> Nearer:
    """A point at a level that is drawn from one of equal strata of those below the view's."""
    device, addresses = view.x0.device, [(*a, "bridge", *key, stratum) for a in chunk.addresses]
    share = torch.stack([torch.rand((), generator=generator(*a)) for a in addresses]).double().to(device)
    t, half_snr = _below(chunk.schedule, view.t, (stratum + share) / strata)
    far, near = chunk.schedule.level(view.t), chunk.schedule.level(t)
    ratio = (_snr(far) / _snr(near)).clamp(max=1 - 1e-6)  # 1 where nothing is below; it has no weight
    z = normal(addresses, view.x0.shape[1:], device)
    slope = far.alpha / (_snr(near) * far.sigma**2)  # v_s / (v alpha), and finite where alpha is zero
    y = view.x0 + _spread(slope.to(z)) * (view.x - _spread(far.alpha.to(z)) * view.x0)
    y = y + _spread(((1 - ratio) / _snr(near)).sqrt().to(z)) * z
    nearer = Noised(view.x0, _spread(near.alpha.to(z)) * y, t, near.sigma.to(z), view.cond, view.advantage)
    return Nearer(nearer, _spread((1 / (_snr(near) * (1 - ratio))).sqrt().to(z)) * z, (half_snr / strata).to(z), ratio.to(z))


def _below(schedule: Schedule, t: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The times at these shares of the way from clean to t, and half of the SNR's interval there over their density."""
    grid = schedule.at((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID).to(t.device)
    number = torch.searchsorted(grid, t)
    index = torch.minimum((number * share).long(), (number - 1).clamp(min=0))
    after = torch.minimum(grid[(index + 1).clamp(max=GRID - 1)], t)
    interval = _snr(schedule.level(grid[index])) - _snr(schedule.level(after))
    return grid[index], torch.where(number > 0, number * interval / 2, 0.0)


def _snr(level: Level) -> Tensor:
    return (level.alpha / level.sigma) ** 2


def _square(v: Tensor) -> Tensor:
    """(B,) summed, not averaged: a path cost is in nats, as r / lambda is."""
    return v.square().flatten(1).sum(1)


def _spread(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)
