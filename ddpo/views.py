"""How a loss may look at a rollout: a view is what one backward pass sees, and all that an algorithm sees.

Transition   one denoising step that was taken: DDPO, GRPO, adjoint matching
Noised       what was drawn, noised anew: NFT, AWM, RWR
Tail         the last steps, the picture they end in and its reward, all with a gradient: DRaFT, AlignProp, ReFL
Pair         two pictures of one prompt in either of these, the better one first: DPO, D3PO
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddpo.diffusion import Solver, step_mean
from ddpo.models import Cond
from ddpo.policy import Policy

# The reward of (B, 3, H, W) float32 pictures in [0, 1], their prompts and metadata: (B,), with a gradient to the pictures.
Differentiable = Callable[[Tensor, list[str], list[dict]], Tensor]


@dataclass
class Transition:
    """One step of a trajectory that was taken, x -> x_next, with the solver it was taken by. Rows are samples."""

    x: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    log_prob: Tensor  # (B,) when it was taken
    solver: Solver
    cond: Cond
    advantage: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.x)

    def replay(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """(mean, std) of x_next under the policy as it is now."""
        level = policy.family.schedule.level
        return step_mean(policy(self.x, self.t, self.cond), level(self.t), level(self.t_next), self.solver)


@dataclass
class Noised:
    """Pictures that were drawn, noised anew: what forward-process algorithms see. Rows are samples."""

    x0: Tensor  # (B, C, H, W) the latent that was drawn
    x: Tensor  # (B, C, H, W) at time t
    t: Tensor
    sigma: Tensor  # (B,) the noise level of t
    cond: Cond
    advantage: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.x)

    def belief(self, policy: Policy, guidance: float | None) -> Tensor:
        """(B, C, H, W) the clean latent, as the policy sees it now; `guidance` as in `Policy`."""
        return policy(self.x, self.t, self.cond, guidance).x0

    def velocity_distance(self, one: Tensor, other: Tensor) -> Tensor:
        """(B,) the mean square distance in velocity of two beliefs about the clean latent: dv = -dx0 / sigma."""
        return (one - other).square().flatten(1).mean(1) / self.sigma**2

    def output_error(self, policy: Policy, guidance: float | None) -> Tensor:
        """(B,) the mean square error of what the network itself predicts: of the noise for networks that predict eps, of the
        velocity for those that predict it. It is the loss that such networks are pretrained with.
        """
        zero = torch.zeros_like(self.x)
        per_output = policy.family.interpret(torch.ones_like(zero), zero, policy.family.schedule.level(self.t)).x0
        return ((self.belief(policy, guidance) - self.x0) / per_output).square().flatten(1).mean(1)


@dataclass
class Tail:
    """The last steps of trajectories that were taken, to be taken again with a gradient. Rows are samples.

    With the noise that was added, a step is a function of the network alone: the reparameterisation trick. So these hold for
    stochastic solvers as they do for the ODE.
    """

    x: Tensor  # (B, C, H, W) where the steps begin; a constant, so that nothing before them has a gradient
    times: Tensor  # (K + 1,)
    noise: Tensor  # (K, B, C, H, W) that was added, in units of each step's standard deviation
    solver: Solver
    cond: Cond
    reward: Differentiable
    prompts: list[str]
    metadata: list[dict]

    def __len__(self) -> int:
        return len(self.x)

    def end(self, policy: Policy) -> Tensor:
        """(B, C, H, W) where the policy, as it is now, takes them.

        Several steps are checkpointed (Chen et al. 2016): they need the memory of one, for one more forward pass each. As they
        are computed again in the backward pass, the policy must be the same self there.
        """
        x, steps = self.x, len(self.noise)
        for k in range(steps):
            if steps == 1:
                x = self._step(policy, x, k)
            else:
                x = checkpoint(self._step, policy, x, k, use_reentrant=False, preserve_rng_state=False)
        return x

    def _step(self, policy: Policy, x: Tensor, k: int) -> Tensor:
        t, t_next = (v.expand(len(x)) for v in self.times[k : k + 2].to(x.device))
        level = policy.family.schedule.level
        mean, std = step_mean(policy(x, t, self.cond), level(t), level(t_next), self.solver)
        return mean + std * self.noise[k]

    def belief(self, policy: Policy) -> Tensor:
        """(B, C, H, W) the clean latent as the policy sees it from where the steps begin: one step to the end."""
        return policy(self.x, self.times[:1].to(self.x.device).expand(len(self)), self.cond).x0

    def graded(self, policy: Policy, latents: Tensor) -> Tensor:
        """(B,) the rewards of clean latents as pictures, with a gradient through scorers and decoder.

        The activations of both are held until the backward pass; at 512 pixels those of the decoder are larger than the UNet's.
        """
        return self.reward(policy.family.decode(latents), self.prompts, self.metadata).to(latents)


Seen = TypeVar("Seen", Transition, Noised)


@dataclass
class Pair(Generic[Seen]):
    """Pictures of one prompt, two and two, one of each two the better. Rows are pairs."""

    both: Seen  # 2 B rows: all that won, then those that lost to them, in the same order
    decided: Tensor  # (B,) 1, or 0 where neither is known to be better

    def __len__(self) -> int:
        return len(self.decided)
