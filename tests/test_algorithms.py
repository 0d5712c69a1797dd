"""The policy gradient is right: against a closed form, against each other, and in what it ignores."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ddpo import diffusion as d
from ddpo.algorithms.ddpo import DDPO, ScoreFunction
from ddpo.rollout import collect
from ddpo.schedule import VariancePreserving

N, STEPS, TARGET = 40_000, 4, 0.7


class Gaussian:
    """A policy that draws Gaussians: the exact denoiser of Normal(0, 1), moved by one number theta."""

    def __init__(self, theta=0.3):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.theta = torch.tensor(theta, requires_grad=True)
        self.selves = {"reference": torch.tensor(theta)}
        self.family = SimpleNamespace(
            schedule=VariancePreserving((1 - betas).cumprod(0), float(1 - betas[0])), latent_shape=(1, 1, 1), device=torch.device("cpu"),
            dtype=torch.float32, encode=lambda prompts: {"none": torch.zeros(len(prompts), 1)}, decode=lambda z: z.expand(-1, 3, 1, 1),
            interpret=d.from_eps,
        )  # fmt: skip

    def __call__(self, x, t, cond):
        level = self.family.schedule.level(t)
        return d.from_eps(level.sigma.to(x).view(-1, 1, 1, 1) * x + self.theta, x, level)

    def remember(self, name):
        self.selves[name] = self.theta.detach().clone()

    @contextmanager
    def acting_as(self, name):
        now, self.theta = self.theta, self.selves[name]
        with torch.no_grad():
            yield
        self.theta = now

    def end_mean(self):
        """d E[end] / d theta: every step is linear in x and theta."""
        times, level, slope = (
            self.family.schedule.times(STEPS),
            self.family.schedule.level,
            torch.tensor(0.0, dtype=torch.float64),
        )
        for t, t_next in itertools.pairwise(times):
            now, then = level(t), level(t_next)
            c, _ = d.DDIM(1.0)(now, then)
            slope = (then.alpha * now.alpha + c * now.sigma) * slope + c - then.alpha / now.alpha * now.sigma
        return slope


def rollout_of(policy, n=N):
    rollout = (
        collect(policy, ["a"] * n, [(i,) for i in range(n)], d.DDIM(1.0), STEPS, n, True)
        if n < 100
        else fast_rollout(policy, n)
    )
    reward = -((rollout.latents[:, -1, 0, 0, 0] - TARGET) ** 2)
    rollout.advantages = reward - reward.mean()
    return rollout


def fast_rollout(policy, n, seed=0):
    """As `collect`, with all rows' noise from one generator: forty thousand addresses take their time."""
    from unittest.mock import patch

    g = torch.Generator().manual_seed(seed)
    with patch("ddpo.rollout.normal", lambda addresses, shape, device: torch.randn(len(addresses), *shape, generator=g)):
        return collect(policy, ["a"] * n, [(0,)] * n, d.DDIM(1.0), STEPS, n, True)


def gradients(algorithm, policy, rollout):
    """(N,) each sample's own estimate of d J / d theta: the sum over steps of grad log p times advantage."""
    per_row = torch.zeros(len(rollout))
    for view in algorithm.views(rollout, len(rollout), torch.Generator()):
        theta = torch.full((len(rollout),), policy.theta.item(), requires_grad=True)
        kept, policy.theta = policy.theta, theta.view(-1, 1, 1, 1)
        loss, _ = algorithm.loss(policy, view)
        per_row -= torch.autograd.grad(loss.sum(), theta)[0]
        policy.theta = kept
    return per_row


def test_the_averaged_gradient_is_the_analytic_one_within_its_standard_error():
    policy = Gaussian()
    slope = policy.end_mean()
    analytic = (-2 * (slope * policy.theta.item() - TARGET) * slope).item()  # J = -(E x - target)^2 - Var x
    estimates = gradients(ScoreFunction(max_advantage=1e9), policy, rollout_of(policy))
    print("analytic", analytic, "estimated", estimates.mean().item(), "+-", (estimates.std() / N**0.5).item())
    error = (estimates.std() / N**0.5).item()
    assert error < 0.05 * abs(analytic)  # the test could tell
    assert abs(estimates.mean().item() - analytic) < 3 * error


def test_the_clipped_ratio_has_the_same_gradient_at_the_first_update():
    policy = Gaussian()
    rollout = rollout_of(policy)
    torch.testing.assert_close(gradients(DDPO(clip=1e-4), policy, rollout), gradients(ScoreFunction(), policy, rollout))


def test_the_ratio_is_that_of_the_densities_and_the_clip_stops_its_gradient():
    policy = Gaussian()
    rollout = rollout_of(policy, 32)
    rollout.advantages = torch.ones(32)
    with torch.no_grad():
        policy.theta += 0.02
    clipped = []
    for view in DDPO(clip=0.01).views(rollout, 32, torch.Generator()):
        mean, std = view.replay(policy)
        normal = torch.distributions.Normal(mean.flatten().detach(), std.flatten())
        expected = normal.log_prob(view.x_next.flatten()) - view.log_prob
        loss, metrics = DDPO(clip=0.01).loss(policy, view)
        torch.testing.assert_close(metrics["log_ratio"], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(metrics["clip_fraction"], ((metrics["log_ratio"].exp() - 1).abs() > 0.01).float())
        for row, above in enumerate(metrics["log_ratio"].exp() > 1.01):  # where there is nothing more to gain
            (grad,) = torch.autograd.grad(loss[row], policy.theta, retain_graph=True)
            assert bool(grad == 0) == bool(above)
            clipped.append(bool(above))
    assert any(clipped) and not all(clipped)


def test_the_kl_term_is_zero_at_home_and_pulls_back_from_abroad():
    policy = Gaussian()
    rollout = rollout_of(policy, 32)
    rollout.advantages = torch.zeros(32)  # nothing but the KL
    view = next(iter(ScoreFunction(kl=2.0).views(rollout, 32, torch.Generator())))
    assert ScoreFunction(kl=2.0).loss(policy, view)[0].abs().max() == 0
    with torch.no_grad():
        policy.theta += 0.5
    loss, _ = ScoreFunction(kl=2.0).loss(policy, view)
    (mean, std), (base, _) = view.replay(policy), _base(policy, view)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(base, std))
    torch.testing.assert_close(loss, 2 * expected.flatten(1).sum(1))
    loss.sum().backward()
    assert policy.theta.grad > 0  # descending leads home


def _base(policy, view):
    with policy.acting_as("reference"):
        return view.replay(policy)


def test_advantages_are_clipped():
    policy = Gaussian()
    rollout = rollout_of(policy, 8)
    rollout.advantages = torch.full((8,), 100.0)
    far = gradients(ScoreFunction(max_advantage=5.0), policy, rollout)
    rollout.advantages = torch.full((8,), 5.0)
    assert torch.equal(far, gradients(ScoreFunction(max_advantage=5.0), policy, rollout))


def test_a_share_of_the_steps_is_drawn_anew_and_the_deterministic_one_never():
    policy = Gaussian()
    policy.family.schedule = VariancePreserving(policy.family.schedule.alphas_cumprod, 1.0)  # the last step has no noise
    rollout = rollout_of(policy, 8)
    assert rollout.stochastic == [0, 1, 2]
    assert rollout.log_probs[:, :3].isfinite().all()
    drawn = {
        tuple(int(v.t[0]) for v in ScoreFunction(steps=0.34).views(rollout, 8, torch.Generator().manual_seed(i)))
        for i in range(20)
    }
    assert drawn == {(int(t),) for t in rollout.times[:3]}


@pytest.mark.parametrize("steps, expected", [(1.0, 4), (0.5, 2), (0.6, 2), (0.01, 1)])
def test_a_picture_costs_as_many_passes_as_there_are_views_of_it(steps, expected):
    rollout = rollout_of(Gaussian(), 8)
    views = list(DDPO(steps=steps).views(rollout, 4, torch.Generator()))
    assert len(views) == 2 * expected and DDPO(steps=steps).passes(len(rollout.stochastic)) == expected


@pytest.mark.parametrize("algorithm", [DDPO(), ScoreFunction()])
def test_a_deterministic_solver_is_refused_with_the_option_to_change(algorithm):
    assert algorithm.refusal(d.DDIM(0.5)) is None
    assert "rollout.solver" in algorithm.refusal(d.DDIM(0.0))
