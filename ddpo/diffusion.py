"""The mathematics of one denoising step. Nothing here knows a network, a prompt or a reward.

A noisy latent is  x_t = alpha_t * x0 + sigma_t * eps.  Families differ in alpha and sigma (their Schedule) and in what
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
from annotated_types import Interval
from torch import Tensor


class Prediction(NamedTuple):
    """What a network believes about x_t: the clean latent and the noise in it, each (B, C, H, W) float32."""

    x0: Tensor
    eps: Tensor


class Level(NamedTuple):
    """Signal and noise at one time, (B,) float64 each: x_t = alpha * x0 + sigma * eps."""

    alpha: Tensor
    sigma: Tensor

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


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: the levels along the way from noise to image


class Schedule(Protocol):
    def level(self, t: Tensor) -> Level: ...

    def times(self, num_steps: int) -> Tensor:
        """(num_steps + 1,), falling: the times a sampler visits, the last one being the clean end."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """Discrete DDPM schedule (SD 1.x, SD 2.x, SDXL): alpha^2 + sigma^2 = 1.

    Args:
        alphas_cumprod: (T,) alpha^2 at times 0 to T - 1.
        final_alpha_cumprod: alpha^2 past the last time: 1 where the config says `set_alpha_to_one`, else that of time 0.
        offset: `steps_offset` of diffusers' leading spacing.
        trailing: diffusers' `timestep_spacing="trailing"`; else "leading".
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    offset: int = 1
    trailing: bool = False

    def level(self, t: Tensor) -> Level:
        known = self.alphas_cumprod.to(t.device, torch.float64)
        abar = torch.where(t < 0, self.final_alpha_cumprod, known[t.clamp(min=0)])
        return Level(abar.sqrt(), (1 - abar).sqrt())

    def times(self, num_steps: int) -> Tensor:
        length = len(self.alphas_cumprod)
        if not 1 <= num_steps <= length:
            raise ValueError(f"num_steps is {num_steps}; this schedule has 1 to {length} steps")
        if self.trailing:
            visited = torch.arange(num_steps, 0, -1, dtype=torch.float64).mul(length / num_steps).round().long() - 1
        else:
            visited = torch.arange(num_steps - 1, -1, -1) * (length // num_steps) + self.offset
        return torch.cat([visited, visited[-1:] - length // num_steps])


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
