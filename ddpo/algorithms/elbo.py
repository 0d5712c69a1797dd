"""ELBO-based policy gradients: three links between advantages and an estimate of the picture's likelihood (arXiv 2602.04663).

    log pi = -sigma |dv|^2 / sg|dv|_1,    dv = v_theta - v,    rho = pi / pi_old,    sg: no gradient

    EPG     -sg(rho) A log pi                       importance-weighted policy gradient
    PEPG    -sg(rho) (A - sg log rho) log pi        the same, less a KL to the policy that acted
    PAR     1/2 sg(rho) (A - log rho)^2             regression of the log-ratio to the advantage

and each plus `kl` times the squared distance to the base model's velocity. The policy that acted is remembered as "old", and asked
once more only where the policy has moved since.

Units: |dv|^2 is the mean over the latent's elements and |dv|_1 the mean absolute value, as everywhere in this project, where
the paper's log pi is a sum. A sum grows with the number of elements N, and rho = exp(a sum) overflows or vanishes after one
update of a large latent; a mean is alike at 4 x 16 x 16 and 16 x 128 x 128. EPG's gradient before the first update is the
paper's over N, which Adam does not see. In PEPG and PAR it also decides how strongly log rho holds A back: `temperature`.

PAR's gradient is PEPG's, exactly: -sg(rho) (A - log rho) grad log pi. Their losses differ in value alone.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ddpo.algorithms.forward import ForwardProcess, has_moved
from ddpo.policy import Policy
from ddpo.views import Noised


@dataclass(frozen=True)
class _Link(ForwardProcess):
    """What the links share: the likelihood and its ratio to that of the policy that acted.

    Args:
        kl: the paper's eta.
    """

    times: Annotated[int, Ge(1)] = 1
    kl: Annotated[float, Ge(0)] = 1e-4

    def start(self, policy: Policy, iteration: int) -> None:
        policy.remember("old")

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        likelihood = _likelihood(view, now)
        with torch.no_grad():
            old = _likelihood(view, self._belief_of("old", policy, view)) if has_moved(policy, "old") else likelihood
        log_ratio = likelihood - old.detach()
        loss = self._link(likelihood, log_ratio, self._clipped(view.advantage))
        return loss, {"log_ratio": log_ratio.detach()}

    @abstractmethod
    def _link(self, likelihood: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """(B,) losses from (B,) log pi, log rho and clipped advantages."""


@dataclass(frozen=True)
class EPG(_Link):
    """The policy gradient, with an importance weight that is not clipped."""

    def _link(self, likelihood: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return -log_ratio.detach().exp() * advantage * likelihood


@dataclass(frozen=True)
class PEPG(_Link):
    """EPG with the log-ratio as a penalty: the gradient of  E[A] - temperature * KL(pi || pi_old).

    Args:
        temperature: weight of the log-ratio, which is an average over the latent's elements. 1 is the paper's formula in
            these units; the paper's own units, a sum over N elements, are N.
    """

    temperature: Annotated[float, Ge(0)] = 1.0

    def _link(self, likelihood: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        held = advantage - self.temperature * log_ratio.detach()
        return -log_ratio.detach().exp() * held * likelihood


@dataclass(frozen=True)
class PAR(_Link):
    """The log-ratio is regressed to the advantage.

    Args:
        temperature: the log-ratio is regressed to A / temperature; in units as PEPG's.
    """

    temperature: Annotated[float, Gt(0)] = 1.0

    def _link(self, likelihood: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return log_ratio.detach().exp() * (advantage - self.temperature * log_ratio) ** 2 / (2 * self.temperature)


def _likelihood(view: Noised, belief: Tensor) -> Tensor:
    """(B,) -sigma mean(dv^2) / sg mean|dv|, with dv = (x0 - belief) / sigma."""
    error = (belief - view.x0).flatten(1)
    return -error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)
