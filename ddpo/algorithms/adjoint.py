"""Adjoint matching: reinforcement learning as a sampler, for rewards that can be differentiated (Domingo-Enrich et al. 2025).

Of all chains x_s = m_theta(x_t) + std z, the one with the largest  E[r(x0)] / lambda - KL(chain || base's chain)  is wanted. The KL
is a sum over steps of |m_theta - m|^2 / (2 std^2), with m the base model's mean. Let J_s be the value of the best chain from s on;

    J_t(x_t) = max over u of  E[J_s(m(x_t) + u + std z)] - |u|^2 / (2 std^2),    hence    u = std^2 E[grad J_s(x_s) | x_t],

and, as u is the best, grad J_t = (d m / d x_t)^T E[grad J_s | x_t] (envelope theorem). So the lean adjoint, carried back along a path,

    a_0 = grad r(x0) / lambda,        a_t = (d m / d x_t)^T a_s,

is grad J_t on average under the best chain, and that chain is the fixed point of regressing each step on it:

    loss of a step = | (m_theta(x_t) - m(x_t)) / std - std a_s |^2,    averaged over the latent's elements.

No step need be small: among chains of Gaussian steps with these std this is exact. With m = x + h b, std^2 = g^2 h and
m_theta - m = 2 h (v_theta - v), which on a flow FlowSDE's steps are, a_t is an Euler step of the paper's lean adjoint ODE
da/dt = -(d b / d x)^T a  and the loss is h times its |(2 / g) (v_theta - v) + g a|^2. There a is minus this one, v leads to the data,
and lambda multiplies the reward; here lambda divides it.

The best chain ends in p_base(x0) exp(r(x0) / lambda) / Z if the end does not depend on the start, which is not tilted: the path must be
memoryless. DDIM with eta 1 is, on any schedule that ends in noise alone (Stable Diffusion's leaves about 0.5 % of the signal's
variance); on a flow it and FlowSDE with noise sqrt(2) are two discretisations of one SDE, g^2 = 2 sigma / (1 - sigma), and DDIM keeps
the marginals. p_base is what the base model draws with these very steps. What is left of an error: long steps, where the best step is no
Gaussian of this std; and u is that of the step's end, (sigma_s / alpha_s)^2 grad V in the belief, where the tilted density's own belief,
which the ODE needs, has the square of sigma_t / alpha_t: with few steps, pictures drawn without noise are tilted too little.

A step without noise, as the last one mostly is, has no u: the adjoint goes through the base model's, and it is not learned from.
Steps are drawn evenly, and nothing but optimizer.max_grad_norm bounds what a single path can do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from ddpo.algorithms import Algorithm, how_many, some_steps
from ddpo.diffusion import DDIM, FlowSDE, Solver
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.views import Transition

ROOT_TWO = 2**0.5


class Adjoints:
    """What the base model says of a micro-batch's trajectories. Worked out when the first step is learned from, and kept.

    Attributes:
        steps: those to keep, rising. Nothing before the first of them is looked at.
    """

    def __init__(self, chunk: Rollout, temperature: float, steps: Sequence[int]):
        self.chunk, self.temperature, self.steps = chunk, temperature, steps
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, policy: Policy, step: int) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) each: the mean of the base model's step, and the lean adjoint where the step ends."""
        if not self._known:
            self._carry_back(policy)
        return self._known[step]

    def _carry_back(self, policy: Policy) -> None:
        """Gradients go to latents alone: weights get none, and each step's graph is gone before the next."""
        chunk, first = self.chunk, self.steps[0]
        with policy.acting_as("reference"), torch.enable_grad():
            x = chunk.latents[:, -1].detach().requires_grad_()
            reward = chunk.tail(1).graded(policy, x) / self.temperature
            (adjoint,) = torch.autograd.grad(reward.sum(), x)
            for step in reversed(range(first, len(chunk.times) - 1)):
                view = chunk.transition(step)
                x = view.x.detach().requires_grad_()
                mean, _ = replace(view, x=x).replay(policy)
                if step in self.steps:
                    self._known[step] = mean.detach(), adjoint
                if step > first:
                    (adjoint,) = torch.autograd.grad(mean, x, adjoint.to(mean))


@dataclass
class Steered(Transition):
    """A step that was taken, and what the reward at the end wants of it."""

    step: int
    adjoints: Adjoints = field(repr=False)


@dataclass(frozen=True)
class AdjointMatching(Algorithm[Transition]):
    """Regression of each step on the lean adjoint: a sampler of p_base(x0) exp(r(x0) / temperature).

    Advantages are not used, and one picture a prompt is enough. Several updates a rollout are allowed: the fixed point is the
    same, only the targets are those of the chain that acted. Rewards count in the units of the objective, weights included.

    A picture costs, for each of its steps, a pass of the base model forward and back to the latent, and for each step that is learned
    from a pass forward and backward; and once a pass through decoder and scorers, forward and backward. The memory is that of
    one such pass for optimizer.micro_batch pictures, and of two latents a step. Half precision should be bfloat16: adjoints are
    small, and float16 has no room for them.

    Args:
        temperature: lambda, in units of the reward: small ones tilt more, and need more steps and more iterations.
        steps: share of the stochastic steps that an update learns from, drawn anew for each update. The base model's passes
            are saved only before the first of them.
    """

    needs_trajectory = True
    needs_density = True
    needs_gradient = True
    memoryless = True

    temperature: Annotated[float, Gt(0)] = 1.0
    steps: Annotated[float, Interval(gt=0, le=1)] = 1.0

    def refusal(self, solver: Solver) -> str | None:
        if (usual := super().refusal(solver)) or (fix := _remembers(solver)) is None:
            return usual
        return (
            f"{type(self).__name__} tilts the end of a path that has forgotten its start, and with {solver} it has not; {fix}"
        )

    def passes(self, stochastic_steps: int) -> int:
        """The views, and the base model's passes, each of which goes backward too."""
        return how_many(self.steps, stochastic_steps) + stochastic_steps

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Steered]:
        """Every chosen stochastic step of every row that could be scored."""
        steps = some_steps(self.steps, batch, draw)
        scored = batch.scored()
        for chunk in scored.chunks(size) if len(scored) else ():
            adjoints = Adjoints(chunk, self.temperature, steps)
            for step in steps:
                view = chunk.transition(step)
                yield Steered(**{f.name: getattr(view, f.name) for f in fields(view)}, step=step, adjoints=adjoints)

    def loss(self, policy: Policy, view: Transition) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(view, Steered), "adjoint matching learns from its own views"
        base, adjoint = view.adjoints.at(policy, view.step)
        mean, std = view.replay(policy)
        control, target = (mean - base) / std, std * adjoint.to(mean)
        return _mean_square(control - target), {"control": _mean_square(control.detach()), "adjoint": _mean_square(target)}


def _remembers(solver: Solver) -> str | None:
    """What to set, where a path by this solver does not forget its start."""
    if isinstance(solver, DDIM):
        wrong = ["rollout.solver.eta=1"] * (solver.eta < 1) + ["rollout.solver.min_sigma=0"] * (solver.min_sigma > 0)
        return f"set {' and '.join(wrong)}" if wrong else None
    if isinstance(solver, FlowSDE):
        return None if abs(solver.noise_level - ROOT_TWO) < 1e-3 else f"set rollout.solver.noise_level={ROOT_TWO:.6f}"
    return "set rollout.solver={name: diffusion:DDIM, eta: 1.0} and rollout.window=null"


def _mean_square(v: Tensor) -> Tensor:
    return v.square().flatten(1).mean(1)
