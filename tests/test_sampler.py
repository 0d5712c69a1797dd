"""Reinforcement learning as a sampler: RAM against densities that are known, p_base(x) exp(r(x) / lambda) / Z.

The base is a mixture of two Gaussians in the plane and the reward its first coordinate, so that all tilts are mixtures too.

pytest tests/test_sampler.py
"""

import re
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from ddpo import diffusion as d
from ddpo.advantage import GroupRelative, LeaveOneOut
from ddpo.algorithms.ram import RAM, Bridged
from ddpo.config import ConfigError
from ddpo.experiment import read
from ddpo.rollout import Rollout, collect
from ddpo.schedule import FlowMatching, VariancePreserving
from tests.test_forward import ALPHA, SIGMA, Selves, mean
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of, stir

LOGITS, MEANS, SPREAD = torch.tensor([0.8, 0.2]).log(), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.5
GAUSSIAN = (torch.tensor([0.0, -torch.inf]), MEANS)
REWARD_SPREAD = 1.3  # the standard deviation of the first coordinate in the base
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
DDPM = VariancePreserving((1 - BETAS).cumprod(0), 1.0, trailing=True)  # it ends in noise alone


def tilted(logits, means, s):
    """(logits, means) of the mixture times exp(s x_0)."""
    return logits + s * means[:, 0] + (s * SPREAD) ** 2 / 2, means + torch.tensor([s * SPREAD**2, 0.0])


def exact(n, mixture, g):
    logits, means = mixture
    which = torch.multinomial(logits.softmax(0), n, True, generator=g)
    return means[which] + SPREAD * torch.randn(n, 2, generator=g)


class Mixture:
    """The exact denoiser of a mixture whose weights and means are learned."""

    def __init__(self, base=(LOGITS, MEANS), schedule=DDPM):
        self.weights = {k: torch.nn.Parameter(v.clone()) for k, v in zip(("logits", "means"), base, strict=True)}
        self.kept = {"reference": list(base)}
        self.family = SimpleNamespace(
            schedule=schedule, latent_shape=(1, 1, 2), device=torch.device("cpu"), dtype=torch.float32,
            encode=lambda prompts: {"none": torch.zeros(len(prompts), 1)}, decode=lambda z: torch.zeros(len(z), 3, 1, 1),
            interpret=d.from_velocity if schedule is FLOW else d.from_eps,
        )  # fmt: skip

    def __call__(self, x, t, cond, guidance=None):
        alpha, sigma = (v.float().view(-1, 1) for v in self.family.schedule.level(t))
        logits, means = self.weights.values()
        variance = (alpha * SPREAD) ** 2 + sigma**2
        off = x.view(-1, 1, 2) - alpha[:, None] * means
        share = (logits - off.square().sum(2) / (2 * variance)).softmax(1)
        x0 = (share[..., None] * (means + (alpha * SPREAD**2 / variance)[:, None] * off)).sum(1)
        return d.Prediction(x0.view(x.shape), ((x.view(-1, 2) - alpha * x0) / sigma).view(x.shape))

    def remember(self, name):
        self.kept[name] = [w.detach().clone() for w in self.weights.values()]

    def selves(self):
        return {f"{name}/{k}": v for name, kept in self.kept.items() for k, v in zip(self.weights, kept, strict=True)}

    @contextmanager
    def acting_as(self, name):
        now, self.weights = self.weights, dict(zip(self.weights, self.kept[name], strict=True))
        with torch.no_grad():
            yield
        self.weights = now


@contextmanager
def fast(g):
    """All rows' noise from one generator: thousands of addresses take their time."""
    with ExitStack() as stack:
        for room in ("ddpo.rollout", "ddpo.algorithms.ram"):
            stack.enter_context(
                patch(f"{room}.normal", lambda a, shape, device="cpu": torch.randn(len(a), *shape, generator=g))
            )
            stack.enter_context(patch(f"{room}.generator", lambda *address: g))
        yield


def scored(rollout, advantage=lambda rewards, prompts: rewards - rewards.mean()):
    rewards = rollout.latents[:, -1, 0, 0, 0]
    rollout.advantages = advantage(rewards, [str(i // 8) for i in range(len(rewards))])
    return rollout


def drawn(x, schedule, *advantage):
    n = len(x)
    return scored(
        Rollout(
            ["a"] * n, [(0, 0)] * n, schedule, {"none": torch.zeros(1, 1)}, torch.zeros(n, dtype=torch.long), x.view(n, 1, 1, 1, 2),
            torch.zeros(2), torch.zeros(n, 0), [], torch.zeros(n, 3, 1, 1), d.DDIM(0.0),
        ),
        *advantage,
    )  # fmt: skip


def residuals(base, s, schedule, path_cost, *advantage, n=20_000, times=2):
    """How far RAM's target is from the belief of the tilted density, under it: means and standard errors against four features of x_t."""
    policy, g = Mixture(base, schedule), torch.Generator().manual_seed(0)
    policy.weights = dict(zip(policy.weights, tilted(*base, s), strict=True))
    algorithm = RAM(times=times, temperature=1 / s, path_cost=path_cost)
    algorithm.start(policy, 0)
    rollout = drawn(exact(n, tilted(*base, s), g), schedule, *advantage)
    found = []
    with fast(g), torch.no_grad():
        for view in algorithm.views(rollout, n, g):
            with patch.object(type(view), "velocity_distance", lambda self, now, target: (target - now)[:, 0, 0, 0]):
                residual, _ = algorithm.loss(policy, view)
            x = view.x[:, 0, 0, 0] / view.x[:, 0, 0, 0].std()
            for feature in (torch.ones_like(x), x, (x > 0).float(), x**2):
                found.append([(residual * feature).mean(), (residual * feature).std() / n**0.5])
    return torch.tensor(found).T


FLOW = FlowMatching(1.0)
SCHEDULES = pytest.mark.parametrize("schedule", [DDPM, FLOW], ids=["ddpm", "flow"])


@SCHEDULES
def test_with_its_path_cost_the_tilted_density_is_the_fixed_point(schedule):
    """As published it is not, by tens of standard errors."""
    off, error = residuals((LOGITS, MEANS), 0.8, schedule, path_cost=1)
    print("with the path cost", (off / error).abs().max().item(), "standard errors")
    assert (off.abs() < 3.5 * error).all()
    published, error = residuals((LOGITS, MEANS), 0.8, schedule, path_cost=0)
    print("as published", (published / error).abs().max().item(), "standard errors")
    assert (published.abs() > 20 * error).any() and published.abs().max() > 3 * off.abs().max()


def test_so_it_is_with_the_advantage_of_groups_of_eight():
    """A mean that a reward is part of tilts an eighth too little."""
    off, error = residuals((LOGITS, MEANS), 0.8, DDPM, 1, LeaveOneOut())
    assert (off.abs() < 3.5 * error).all()
    off, error = residuals((LOGITS, MEANS), 0.8, DDPM, 1, GroupRelative(scale="none"))
    assert (off.abs() > 5 * error).any()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objective.normalise=group"], "objective.normalise: is group"),
        (["advantage={name: 'advantage:GroupRelative'}"], "LeaveOneOut"),
    ],
)
def test_what_changes_the_rewards_unit_is_refused(words, expected):
    ram = [
        "algorithm={name: 'ram:RAM'}",
        "advantage={name: 'advantage:LeaveOneOut'}",
        "rollout.solver={name: 'diffusion:DDIM', eta: 0}",
    ]
    read("configs/menagerie_alignment.yaml", ram, 1)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        read("configs/menagerie_alignment.yaml", [*ram, *words], 1)


@SCHEDULES
@pytest.mark.parametrize("path_cost", [0, 2])
def test_of_a_gaussian_under_a_linear_reward_the_published_one_is_exact_too(schedule, path_cost):
    off, error = residuals(GAUSSIAN, 0.8, schedule, path_cost)
    assert (off.abs() < 3.5 * error).all()


def tuned(schedule, iterations, rows, steps, seed=0):
    policy, g = Mixture(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.weights.values(), 0.1)
    with fast(g):
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - iteration / iterations)
            algorithm = schedule.scheduled(iteration)
            algorithm.start(policy, iteration)
            with torch.no_grad() if algorithm.actor == "now" else policy.acting_as(algorithm.actor):
                rollout = scored(collect(policy, ["a"] * rows, [(0, 0)] * rows, d.DDIM(0.0), steps, rows, False))
            for view in algorithm.views(rollout, rows, g):
                loss, _ = algorithm.loss(policy, view)
                (loss.mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return collect(policy, ["a"] * 1000, [(0, 0)] * 1000, d.DDIM(0.0), 100, 1000, False).latents.view(-1, 2)


def energy_distance(one, other):
    return (2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean()).item()


def two_samples(algorithm, **settings):
    """Energy distance of what the tuned policy draws to an exact draw, and the largest of twenty between exact draws."""
    truth, g = tilted(LOGITS, MEANS, 1 / algorithm.temperature), torch.Generator().manual_seed(1)
    noise = max(energy_distance(exact(1000, truth, g), exact(1000, truth, g)) for _ in range(20))
    samples = tuned(algorithm, **settings)
    distance = energy_distance(samples, exact(1000, truth, g))
    print(f"{algorithm}: energy distance {distance:.4f}, of exact draws at most {noise:.4f}; right:",
          f"{(samples[:, 0] > 0).float().mean():.3f}, exactly {truth[0].softmax(0)[1]:.3f}")  # fmt: skip
    return distance, noise


def test_the_tuned_policy_draws_the_tilted_density():
    distance, noise = two_samples(RAM(temperature=REWARD_SPREAD, path_cost=1), iterations=50, rows=512, steps=40)
    assert distance < noise


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("temperature", "iterations", "anneal"), [(2.0, 150, 0), (1.0, 150, 0), (0.5, 300, 100)])
def test_so_it_does_at_three_temperatures_in_units_of_the_rewards_spread(temperature, iterations, anneal, seed):
    """A hundred steps, since fewer draw too little variance. The strong tilt comes slowly: at once, training strays on the way,
    loses the left mode, and nothing that is drawn then tells of it."""
    algorithm = RAM(temperature=temperature * REWARD_SPREAD, path_cost=2, anneal=anneal)
    distance, noise = two_samples(algorithm, iterations=iterations, rows=1024, steps=100, seed=seed)
    assert distance < noise


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_published_target_is_far_off_where_the_tilt_is_strong(temperature):
    distance, noise = two_samples(RAM(temperature=temperature * REWARD_SPREAD), iterations=60, rows=512, steps=20)
    assert distance > 5 * noise


def test_annealing_raises_the_tilt_evenly_to_its_value():
    tilts = [1 / RAM(temperature=0.5, anneal=4).scheduled(iteration).temperature for iteration in range(6)]
    assert tilts == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert RAM(temperature=0.5).scheduled(0).temperature == 0.5


def test_the_published_target_is_its_formula_in_eps():
    """eps_base + A / lambda (eps - eps_old), with an error in eps over alpha that in velocity."""
    selves = Selves()
    selves.view.__class__ = type("View", (Bridged,), {})
    selves.view.points = []
    selves.weights, selves.selves = {"w": torch.ones(1)}, lambda: {"old/w": torch.zeros(1)}
    a, s = (v.view(-1, 1, 1, 1) for v in (ALPHA, SIGMA))
    eps = {n: (selves.view.x - a * v.detach()) / s for n, v in {**selves.beliefs, "true": selves.x0}.items()}
    loss, _ = RAM(temperature=3.0).loss(selves, selves.view)
    weight = (selves.view.advantage / 3).view(-1, 1, 1, 1)
    target = eps["reference"] + weight * (eps["true"] - eps["old"])
    torch.testing.assert_close(loss, mean((eps["now"] - target) ** 2) / ALPHA**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path_cost", [0, 2])
def test_every_weight_learns_and_micro_batches_do_not_matter(path_cost, tiny):
    algorithm, gradients = RAM(path_cost=path_cost), []
    policy = stir(policy_of(tiny))
    algorithm.start(policy, 0)
    rollout = collect(policy, PROMPTS, ADDRESSES, d.DDIM(0.0), 3, 4, False)
    rollout.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    for size in (4, 2):
        for view in algorithm.views(rollout, size, torch.Generator().manual_seed(0)):
            algorithm.loss(policy, view)[0].sum().backward()
        gradients.append([w.grad.clone() for w in policy.weights.values()])
        for w in policy.weights.values():
            w.grad = None
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
