"""Energy-weighted flow matching: its fixed point is the tilted density, for the mixture of tests/test_sampler.py, and it gets there.

pytest tests/test_efm.py
"""

import re

import pytest
import torch

from ddpo import diffusion as d
from ddpo.advantage import GroupRelative, LeaveOneOut
from ddpo.algorithms.efm import EFM
from ddpo.config import ConfigError
from ddpo.experiment import read
from tests.test_sampler import DDPM, LOGITS, MEANS, REWARD_SPREAD, SCHEDULES, Mixture, drawn, exact, fast, tilted, two_samples

BASE = (LOGITS, MEANS)


class Probed(Mixture):
    """A mixture whose belief may be pushed, to see where a loss would have it go."""

    push = 0.0

    def __call__(self, x, t, cond, guidance=None):
        belief = super().__call__(x, t, cond, guidance)
        return d.Prediction(belief.x0 + self.push, belief.eps)


def pushes(s, schedule, *advantage, believed=None, pictures=BASE, n=20_000):
    """The loss's gradient at a belief, by default the tilt of the pictures' density, against four features of x_t: means and
    standard errors. The base model believes in BASE."""
    policy, g = Probed(BASE, schedule), torch.Generator().manual_seed(0)
    policy.weights = dict(zip(policy.weights, believed or tilted(*pictures, s), strict=True))
    found = []
    with fast(g):
        for view in EFM(temperature=1 / s).views(drawn(exact(n, pictures, g), schedule, *advantage), n, g):
            policy.push = torch.zeros_like(view.x0, requires_grad=True)
            loss, _ = EFM(temperature=1 / s).loss(policy, view)
            (push,) = torch.autograd.grad(loss.sum(), policy.push)
            push = (push[:, 0, 0, 0] * view.sigma**2).detach()
            x = view.x[:, 0, 0, 0] / view.x[:, 0, 0, 0].std()
            for feature in (torch.ones_like(x), x, (x > 0).float(), x**2):
                found.append([(push * feature).mean(), (push * feature).std() / n**0.5])
    return torch.tensor(found).T


@SCHEDULES
@pytest.mark.parametrize("s", [0.4, 0.8])
def test_the_tilted_density_is_the_fixed_point(s, schedule):
    off, error = pushes(s, schedule)
    assert (off.abs() < 3.5 * error).all()
    off, error = pushes(s, schedule, believed=BASE)
    assert (off.abs() > 20 * error).any()


def test_so_it_is_with_the_advantage_of_groups_of_eight():
    """A mean that a reward is part of tilts an eighth too little."""
    off, error = pushes(0.8, DDPM, LeaveOneOut())
    assert (off.abs() < 3.5 * error).all()
    off, error = pushes(0.8, DDPM, GroupRelative(scale="none"))
    assert (off.abs() > 5 * error).any()


@SCHEDULES
def test_what_is_tilted_is_what_the_base_model_draws_not_what_it_believes(schedule):
    """A network is not quite the mean of its pictures. Here it draws 43 % on the right, and believes in 20 %."""
    pictures = (LOGITS + torch.tensor([0.0, 2.0]).log1p(), MEANS)
    off, error = pushes(0.8, schedule, pictures=pictures)
    assert (off.abs() < 3.5 * error).all()
    off, error = pushes(0.8, schedule, pictures=pictures, believed=tilted(*BASE, 0.8))
    assert (off.abs() > 5 * error).any()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [2.0, 1.0])
def test_the_tuned_policy_draws_the_tilted_density(temperature, seed):
    """In units of the reward's spread; learned from what the base model draws, whose self acts."""
    algorithm = EFM(temperature=temperature * REWARD_SPREAD)
    distance, noise = two_samples(algorithm, iterations=150, rows=2048, steps=40, seed=seed)
    assert distance < noise


def test_what_changes_the_rewards_unit_is_refused():
    words = ["algorithm={name: 'efm:EFM'}", "rollout.solver={name: 'diffusion:DDIM', eta: 0}"]
    read("configs/menagerie_alignment.yaml", [*words, "advantage={name: 'advantage:LeaveOneOut'}"], 1)
    with pytest.raises(ConfigError, match=re.escape("LeaveOneOut")):
        read("configs/menagerie_alignment.yaml", [*words, "advantage={name: 'advantage:GroupRelative'}"], 1)
