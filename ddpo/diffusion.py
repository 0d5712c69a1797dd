"""The mathematics of one denoising step. Nothing here knows a network, a prompt or a reward.

A noisy latent is  x_t = alpha_t * x0 + sigma_t * eps.  Families differ in alpha and sigma (ddpo/schedule.py) and in what
the network predicts; both differences end in a Prediction. Every stochastic solver used for diffusion RL then is

    x_s  ~  Normal(alpha_s * x0 + c * eps,  std)            (*)

and solvers differ only in the two numbers (c, std).

Shapes: x is (B, C, H, W), float32; times and levels are (B,). Levels are float64: an error of one part in 1e7 in alpha
would be ten times that in x0 where alpha is small.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

import torch
from annotated_types import Ge, Interval
from torch import Tensor


class Prediction(NamedTuple):
    """What a network believes about x_t: the clean latent and the noise in it, each (B, C, H, W) float32."""

    x0: Tensor
    eps: Tensor


class Level(NamedTuple):
    """Signal and noise at one time, (B,) float64 each: x_t = alpha * x0 + sigma * eps."""

    alpha: Tensor
    sigma: Tensor

    @property
    def flow_time(self) -> Tensor:
        """(B,) between 0 (clean) and 1 (noise): on any schedule, a latent over alpha + sigma is a flow's latent at this time."""
        return self.sigma / (self.alpha + self.sigma)

    def noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        return _spread(self.alpha, x0) * x0 + _spread(self.sigma, x0) * eps


def _spread(v: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the precision of `like`."""
    return v.to(like).reshape(-1, *[1] * (like.ndim - 1))


# ----------------------------------------------------------------------------------------------------------------------
# What the network predicts -> (x0, eps)


def from_eps(out: Tensor, x: Tensor, level: Level) -> Prediction:
    """The network predicts the noise (Ho et al. 2020)."""
    return Prediction((x - _spread(level.sigma, x) * out) / _spread(level.alpha, x), out)


def from_v(out: Tensor, x: Tensor, level: Level) -> Prediction:
    """The network predicts v = alpha * eps - sigma * x0 (Salimans & Ho 2022, appendix D)."""
    a, s = _spread(level.alpha, x), _spread(level.sigma, x)
    return Prediction(a * x - s * out, a * out + s * x)


def from_velocity(out: Tensor, x: Tensor, level: Level) -> Prediction:
    """The network predicts the flow's velocity, v = eps - x0, where alpha + sigma = 1 (Esser et al. 2024, eq. 13)."""
    return Prediction(x - _spread(level.sigma, x) * out, x + _spread(level.alpha, x) * out)


# ----------------------------------------------------------------------------------------------------------------------
# Solvers: (level now, level next) -> (c, std) of (*)


class Solver(Protocol):
    @property
    def stochastic(self) -> bool:
        """Whether its steps have a density to learn from."""
        ...

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, eq. 12 and 16, written with the SNR so that it holds for any schedule.

    Args:
        eta: 1 is the DDPM posterior, 0 the deterministic ODE sampler, which has no density to learn from.
        min_sigma: steps that start below this noise level (sigma, 0 to 1) add no noise, and are not learned from. The
            layout of a picture is settled above; below, log-probability gradients grow as 1 / std while they move the
            reward less and less. At 0 every step adds noise, as published.
    """

    eta: Annotated[float, Interval(ge=0, le=1)] = 1.0
    min_sigma: Annotated[float, Interval(ge=0, lt=1)] = 0.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        kept = now.alpha * then.sigma / (then.alpha * now.sigma)
        std = self.eta * then.sigma * (1 - kept**2).clamp(min=0).sqrt()
        std = torch.where(now.sigma >= self.min_sigma, std, 0.0)
        return (then.sigma**2 - std**2).clamp(min=0).sqrt(), std


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", alg. 2): the ODE at second order, in as few as eight to fifteen steps.

    A step of it is the ODE's from a belief that is extrapolated from the last two; the first and the last step are of first
    order. As a step depends on the one before it, it cannot be taken again by itself: algorithms on trajectories refuse it.
    """

    stochastic = False

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        return then.sigma, torch.zeros_like(then.sigma)

    def lean(self, pred: Prediction, now: Level, then: Level, last: tuple[Prediction, Level] | None) -> Prediction:
        """The belief to take a step from.

        Args:
            pred: at `now`.
            last: what was believed a step before, and at which level; None for a step of first order.
        """
        if last is None:
            return pred
        before, level = last
        rate = (_log_snr(then) - _log_snr(now)) / (_log_snr(now) - _log_snr(level)) / 2
        change = _spread(rate, pred.x0) * (pred.x0 - before.x0)
        return Prediction(pred.x0 + change, pred.eps - _spread(now.alpha / now.sigma, pred.x0) * change)  # the same x_t


def _log_snr(level: Level) -> Tensor:
    """Half of it: log(alpha / sigma)."""
    return level.alpha.log() - level.sigma.log()


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (Wang & Yu 2025, Flow-CPS): a fixed share of each next level's noise is new.

    Like DDIM's, and unlike an SDE's, its latents hold as much noise as their level says, for any schedule. But as the share
    does not shrink with the step, more steps do not lead to the model's distribution: of Gaussian data, 0.8 draws two thirds
    of the variance.

    Args:
        noise_level: 1 replaces all noise at each step, 0 is the ODE; std = sigma_s * sin(noise_level * pi / 2).
    """

    noise_level: Annotated[float, Interval(ge=0, le=1)] = 0.8

    @property
    def stochastic(self) -> bool:
        return self.noise_level > 0

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        angle = self.noise_level * math.pi / 2
        return then.sigma * math.cos(angle), then.sigma * math.sin(angle)


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's sampler (Liu et al. 2025): the flow's SDE with g = noise_level * sqrt(sigma / (1 - sigma)).

    Where sigma is 1, g would be infinite: there the next level's 1 - sigma stands in, as in the authors' code. Theirs adds
    noise in the last step too, which no other step removes, and does not learn from it; here the last step goes to x0.

    Args:
        noise_level: 0 is the ODE, 0.7 the authors' choice; sqrt(2) makes the path forget its start (Domingo-Enrich et al. 2025).
    """

    noise_level: Annotated[float, Ge(0)] = 0.7

    @property
    def stochastic(self) -> bool:
        return self.noise_level > 0

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        g2 = self.noise_level**2 * now.sigma / torch.where(now.alpha > 0, now.alpha, then.alpha)
        return _sde_step(self, g2, now, then)


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's sampler (Xue et al. 2025): the flow's SDE with g = eta at all levels; the last step goes to x0.

    Args:
        eta: 0 is the ODE, 0.3 the authors' choice.
    """

    eta: Annotated[float, Ge(0)] = 0.3

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def __call__(self, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        return _sde_step(self, torch.full_like(now.sigma, self.eta**2), now, then)


def _sde_step(solver: Solver, g2: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
    """One Euler-Maruyama step of dx = [v + g^2 / (2 sigma) * eps] dsigma + g dw: the ODE's, less some of the old noise.

    Raises ValueError where alpha + sigma is not 1, for then it is not this SDE that keeps the marginals.
    """
    if ((now.alpha + now.sigma - 1).abs() > 1e-6).any():
        raise ValueError(
            f"rollout.solver: {solver} is made for flow models, and this model's noise schedule is not a flow's; "
            "use one that holds for any schedule, such as {name: diffusion:DDIM, eta: 1.0}"
        )
    decrease = now.sigma - then.sigma
    inside = then.sigma > 0
    c = then.sigma - g2 * decrease / (2 * now.sigma)
    return torch.where(inside, c, 0.0), torch.where(inside, (g2 * decrease).sqrt(), 0.0)


def step_mean(pred: Prediction, now: Level, then: Level, solver: Solver) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and standard deviation (B, 1, 1, 1) of the next latent: (*)."""
    c, std = solver(now, then)
    mean = _spread(then.alpha, pred.x0) * pred.x0 + _spread(c, pred.x0) * pred.eps
    return mean, _spread(std, mean)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) log density of x under Normal(mean, std), averaged over the latent's elements.

    The average, not the sum, as in DDPO: it keeps clip ranges independent of the resolution. Times the number of
    elements it is in nats.
    """
    z = (x - mean) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def gaussian_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """(B,) KL(Normal(mean, std) || Normal(reference, std)) in nats, exact: DPOK's term for one step (Fan et al. 2023)."""
    return ((mean - reference) ** 2 / (2 * std**2)).flatten(1).sum(1)
