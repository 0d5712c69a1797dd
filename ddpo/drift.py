"""How far the policy is from the base model: exact KL, and the norm of what the network says."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ddpo.diffusion import DDIM, Solver, gaussian_kl, step_mean
from ddpo.models import Cond
from ddpo.noise import normal
from ddpo.policy import Policy
from ddpo.rollout import Rollout


class Drift(NamedTuple):
    """How far the policy is from the base model, on a rollout."""

    kl: float  # mean, in nats a denoising step, exact
    inflation: float  # mean norm of the network's output over the base model's, minus 1 (NormGuard, arXiv 2606.27771)
    steps: int  # that a picture takes, of those that were looked at


@torch.no_grad()
def step_kl(policy: Policy, rollout: Rollout, size: int) -> Drift:
    """Over every stochastic step of the rollout.

    Args:
        size: rows that go through the network at a time.
    """
    seen = []
    for chunk in rollout.chunks(size):
        for step in rollout.stochastic:
            view = chunk.transition(step)
            seen.append(_drift(policy, view.x, view.t, view.t_next, view.cond, view.solver))
    return _mean(seen, len(rollout.stochastic))


@torch.no_grad()
def posterior_kl(policy: Policy, rollout: Rollout, size: int) -> Drift:
    """The same for a sampler that adds no noise: of DDPM's steps (DDIM, eta 1), from the rollout's pictures noised anew."""
    level, solver = policy.family.schedule.level, DDIM(eta=1.0)
    seen, steps = [], set()
    for chunk in rollout.chunks(size):
        for step, (t, t_next) in enumerate(itertools.pairwise(rollout.times.to(chunk.latents.device))):
            now, then = level(t.expand(len(chunk))), level(t_next.expand(len(chunk)))
            if not solver(now, then)[1].all():
                continue
            x0 = chunk.latents[:, -1]
            x = now.noise(x0, normal([(*a, "kl", step) for a in chunk.addresses], x0.shape[1:], x0.device))
            cond = {k: v[chunk.cond_rows] for k, v in chunk.cond.items()}
            seen.append(_drift(policy, x, t.expand(len(chunk)), t_next.expand(len(chunk)), cond, solver))
            steps.add(step)
    return _mean(seen, len(steps))


def _drift(policy: Policy, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, solver: Solver) -> Tensor:
    """(B, 2) KL and relative norm of the output, from one pass as each self."""
    now, then = policy.family.schedule.level(t), policy.family.schedule.level(t_next)
    belief = policy(x, t, cond)
    with policy.acting_as("reference"):
        reference = policy(x, t, cond)
    (mean, std), (base, _) = (step_mean(b, now, then, solver) for b in (belief, reference))
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    # A belief is affine in the network's output, which is found from it without another pass.
    nothing, unit = policy.family.interpret(zero, x, now).x0, policy.family.interpret(one, zero, now).x0
    norms = [((b.x0 - nothing) / unit).float().flatten(1).norm(dim=1) for b in (belief, reference)]
    return torch.stack([gaussian_kl(mean, base, std), norms[0] / norms[1].clamp(min=1e-12)], 1)


def _mean(seen: list[Tensor], steps: int) -> Drift:
    kl, norm = torch.cat(seen).mean(0).tolist()
    return Drift(kl, norm - 1, steps)
