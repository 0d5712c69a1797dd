"""Forward-process algorithms: against the published formulas in float64, their identities, and a task whose optimum is known.

pytest tests/test_forward.py
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from ddpo import diffusion as d
from ddpo.algorithms.forward import AWM, NFT, RWR
from ddpo.learner import Learner
from ddpo.noise import normal
from ddpo.rollout import collect
from ddpo.schedule import VariancePreserving
from ddpo.sections import Learning
from ddpo.views import Noised
from tests.test_algorithms import STEPS, TARGET
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of

B, SHAPE = 6, (2, 3, 3)
SIGMA = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
ALPHA = (1 - SIGMA**2).sqrt()


def draw(seed: int) -> torch.Tensor:
    return torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Selves:
    """A policy whose selves believe in fixed clean latents; "now" carries a gradient."""

    def __init__(self):
        self.x0, eps = draw(0), draw(1)
        self.beliefs = {name: self.x0 + 0.3 * draw(i) for i, name in enumerate(("now", "old", "ema", "reference"), 2)}
        self.beliefs["now"].requires_grad_()
        self.me = "now"
        x = ALPHA.view(-1, 1, 1, 1) * self.x0 + SIGMA.view(-1, 1, 1, 1) * eps
        advantage = torch.tensor([1.0, -2.0, 0.5, 7.0, -7.0, 0.0], dtype=torch.float64)
        self.view = Noised(self.x0, x, torch.zeros(B), SIGMA, {}, advantage)
        self.v = self.velocity(self.x0)

    def velocity(self, x0):
        """v = alpha eps - sigma x0 of a belief about x0 at this x_t."""
        s, a = SIGMA.view(-1, 1, 1, 1), ALPHA.view(-1, 1, 1, 1)
        return a * (self.view.x - a * x0) / s - s * x0

    def __call__(self, x, t, cond, guidance):
        assert guidance == 1.0
        return d.Prediction(self.beliefs[self.me], None)

    def acting_as(self, name):
        policy = self

        class As:
            def __enter__(self):
                policy.me = name

            def __exit__(self, *exc):
                policy.me = "now"

        return As()


def mean(v):
    return v.flatten(1).mean(1)


def test_nft_is_the_published_loss():
    """Zheng et al. 2025 with the authors' weighting: errors in x0, each over its own mean size, times A_max / beta."""
    selves, beta = Selves(), 0.5
    loss, _ = NFT(beta=beta, kl=0.2).loss(selves, selves.view)
    r = (selves.view.advantage.clamp(-5, 5) / 5 / 2 + 0.5).tolist()
    for i in range(B):
        now, old, x0 = (v[i].detach() for v in (selves.beliefs["now"], selves.beliefs["old"], selves.x0))
        positive, negative = (1 - beta) * old + beta * now, (1 + beta) * old - beta * now
        terms = [((b - x0) ** 2).mean() / (b - x0).abs().mean() for b in (positive, negative)]
        dv = (selves.velocity(selves.beliefs["now"]) - selves.velocity(selves.beliefs["reference"]))[i]
        wanted = 5 / beta * (r[i] * terms[0] + (1 - r[i]) * terms[1]) + 0.2 * (dv**2).mean()
        assert loss[i].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_awm_is_the_published_loss_and_its_gradient_is_that_of_the_weighted_likelihood():
    selves = Selves()
    loss, _ = AWM(kl=0.0, proximal=0.0).loss(selves, selves.view)
    (got,) = torch.autograd.grad(loss.sum(), selves.beliefs["now"])
    now = selves.beliefs["now"].detach().requires_grad_()
    error = mean((selves.velocity(now) - selves.v) ** 2)
    likelihood = -(SIGMA / 0.25) * ((error + 1e-10) ** 0.25 - 1e-10**0.25)
    (wanted,) = torch.autograd.grad(-(selves.view.advantage.clamp(-5, 5) / 5 * likelihood).sum(), now)
    assert torch.allclose(got, wanted, rtol=1e-6)
    held, _ = AWM(kl=0.1, proximal=2.0).loss(selves, selves.view)
    dv = {
        n: mean((selves.velocity(selves.beliefs["now"]) - selves.velocity(selves.beliefs[n])) ** 2)
        for n in ("ema", "reference")
    }
    assert torch.allclose(held, loss + 2.0 * dv["ema"] + 0.1 * dv["reference"], rtol=1e-6)


def test_a_teacher_needs_the_term_that_it_teaches_by():
    with pytest.raises(ValueError, match="set kl"):
        RWR(teacher=5.0)
    assert NFT(teacher=5.0).teacher == 5.0


def test_rwr_is_the_weighted_diffusion_loss():
    selves = Selves()
    loss, _ = RWR(temperature=2.0, max_weight=3.0).loss(selves, selves.view)
    weight = (selves.view.advantage.clamp(-5, 5) / 2).exp().clamp(max=3)
    assert torch.allclose(loss, weight * mean((selves.velocity(selves.beliefs["now"]) - selves.v) ** 2), rtol=1e-6)


def test_nft_and_awm_have_one_policy_gradient():
    """At the old policy, without weights over noise levels, both point along A (x0_old - x0): algorithms.md, checked."""
    selves = Selves()
    selves.beliefs["old"] = selves.beliefs["now"].detach().clone()
    loss, _ = NFT(kl=0.0).loss(selves, selves.view)
    (gradient,) = torch.autograd.grad(loss.sum(), selves.beliefs["now"])
    error = selves.beliefs["now"].detach() - selves.x0
    size = error.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    advantage = selves.view.advantage.clamp(-5, 5).view(-1, 1, 1, 1)
    assert torch.allclose(gradient, 2 * advantage * error / size / error[0].numel(), rtol=1e-6)


def test_the_velocity_is_the_one_of_both_parameterisations():
    selves = Selves()
    now = selves.beliefs["now"].detach()
    one = selves.view.velocity_distance(now, selves.x0)
    assert torch.allclose(one, mean((selves.velocity(now) - selves.v) ** 2))
    eps = (selves.view.x - ALPHA.view(-1, 1, 1, 1) * now) / SIGMA.view(-1, 1, 1, 1)
    true = (selves.view.x - ALPHA.view(-1, 1, 1, 1) * selves.x0) / SIGMA.view(-1, 1, 1, 1)
    assert torch.allclose(one, mean((eps - true) ** 2) / ALPHA**2)


def test_noise_has_an_address_and_levels_are_stratified(tiny):
    addresses = [(0, 0, 0, g, m) for g in range(2) for m in range(2)]
    rollout = collect(policy_of(tiny), PROMPTS, addresses, d.DDIM(0.0), 3, 4, False)
    rollout.advantages = torch.zeros(4)
    whole, half = rollout.noised(7, 1, 4, False), rollout[torch.tensor([2, 3])].noised(7, 1, 4, False)
    assert torch.equal(whole.x[2:], half.x) and torch.equal(whole.t[2:], half.t)
    assert all(250 <= t < 500 for t in whole.t.tolist()) and len(set(whole.t.tolist())) > 1
    shared = rollout.noised(7, 1, 4, True)
    assert shared.t[0] == shared.t[1] != shared.t[2]
    level = rollout.schedule.level(shared.t)
    noise = (shared.x - level.alpha.float().view(-1, 1, 1, 1) * shared.x0) / level.sigma.float().view(-1, 1, 1, 1)
    assert torch.allclose(noise[0], noise[1], atol=1e-4) and not torch.allclose(noise[0], noise[2], atol=0.1)
    assert not torch.equal(rollout.noised(8, 1, 4, False).x, whole.x)
    high = [v.t for v in RWR(times=2, lowest=0.6).views(rollout, 4, torch.Generator())]
    assert all(600 <= t < 800 for t in high[0].tolist()) and all(800 <= t < 1000 for t in high[1].tolist())


def test_an_unguided_belief_is_the_conditional_one(tiny):
    policy = policy_of(tiny)
    policy.guidance = 3.0
    x, t, cond = normal(ADDRESSES, policy.family.latent_shape), torch.full((4,), 500), policy.family.encode(PROMPTS)
    guided, unguided = policy(x, t, cond), policy(x, t, cond, guidance=1.0)
    policy.guidance = 1.0
    assert torch.equal(unguided.x0, policy(x, t, cond).x0) and not torch.allclose(guided.x0, unguided.x0)


def test_a_teacher_is_the_guided_base_model(tiny):
    """With no advantage RWR's own term aside, the distance is to where the base model's guidance leads."""
    policy = policy_of(tiny)
    rollout = collect(policy, PROMPTS, ADDRESSES, d.DDIM(0.0), 3, 4, False)
    rollout.advantages = torch.zeros(4)
    (view,) = RWR(times=1).views(rollout, 4, torch.Generator())
    with torch.no_grad():
        plain, taught, alone = (
            RWR(times=1, kl=kl, teacher=g).loss(policy, view)[0] for kl, g in ((0.0, None), (0.5, 3.0), (0.5, None))
        )
        guided = RWR(times=1, kl=0.5, guidance=3.0).loss(policy, view)[1]["kl/velocity"]
        apart = policy(view.x, view.t, view.cond, 3.0).x0 - policy(view.x, view.t, view.cond, 1.0).x0
    torch.testing.assert_close(taught - plain, 0.5 * apart.square().flatten(1).mean(1) / view.sigma**2, rtol=1e-3, atol=1e-6)
    assert torch.equal(alone, plain) and (taught > plain).all()  # before the first update the base model is the policy
    assert not guided.any()  # with guidance too


class Located:
    """Draws sixteen numbers from Normal(m, 1): the exact denoiser of that, so its own pictures teach it nothing new."""

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.m = torch.nn.Parameter(torch.zeros(()))
        self.weights, self.kept = {"m": self.m}, {"reference": torch.zeros(())}
        self.family = SimpleNamespace(
            schedule=VariancePreserving((1 - betas).cumprod(0), float(1 - betas[0])), latent_shape=(1, 4, 4), device=torch.device("cpu"),
            dtype=torch.float32, encode=lambda prompts: {"none": torch.zeros(len(prompts), 1)}, decode=lambda z: z.expand(-1, 3, 4, 4),
            interpret=d.from_eps,
        )  # fmt: skip

    def __call__(self, x, t, cond, guidance=None):
        level = self.family.schedule.level(t)
        alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in level)
        return d.from_eps(sigma * (x - alpha * self.m), x, level)

    def remember(self, name, decay=0.0):
        now = self.weights["m"].detach()
        self.kept[name] = torch.lerp(self.kept.get(name, now), now, 1 - decay).clone()

    @contextmanager
    def acting_as(self, name):
        self.m = self.kept[name] if name != "now" else self.weights["m"]
        with torch.no_grad():
            yield
        self.m = self.weights["m"]


def improve(algorithm, seed, iterations=60, rows=128):
    """Where the mean of what the policy draws ends, when it is paid for drawing near TARGET. It acts without noise."""
    policy = Located()
    learner = Learner(policy, algorithm, Learning(lr=0.03, micro_batch=rows, weight_decay=0.0), Accelerator(cpu=True))
    for iteration in range(iterations):
        algorithm.start(policy, iteration)
        with policy.acting_as(algorithm.actor):
            addresses = [(seed, iteration, i) for i in range(rows)]
            rollout = collect(policy, ["a"] * rows, addresses, d.DDIM(0.0), STEPS, rows, False)
        reward = -((rollout.latents.flatten(1).mean(1) - TARGET) ** 2)
        rollout.advantages = (reward - reward.mean()) / reward.std()
        metrics = learner.improve(rollout, (seed, iteration), rows, lambda n: None)
        algorithm.finish(policy, iteration)
    with torch.no_grad():
        end = collect(policy, ["a"] * 500, [(9, i) for i in range(500)], d.DDIM(0.0), STEPS, 500, False).latents
    return end.mean().item(), metrics


# RWR fits what was drawn, and four deterministic steps draw 0.83 m: each fit pulls it back by that.
@pytest.mark.parametrize(("algorithm", "near"), [(NFT(), 0.1), (AWM(), 0.1), (RWR(), 0.4)], ids=["NFT", "AWM", "RWR"])
def test_it_finds_the_optimum_from_three_seeds_without_noise_in_acting(algorithm, near):
    for seed in range(3):
        end, metrics = improve(algorithm, seed, iterations=40)
        assert abs(end - TARGET) < near, (seed, end)
        assert metrics["kl/step_nats"] > 0 and "grad_norm" in metrics


def test_a_strong_kl_term_holds_it_back():
    free, _ = improve(NFT(kl=0.0), 0, iterations=30)
    held, _ = improve(NFT(kl=100.0), 0, iterations=30)
    assert abs(held) < 0.5 * abs(free)
