"""Every algorithm learns a small task whose optimum is known."""

import pytest
import torch
from accelerate import Accelerator

from ddpo.algorithms.ddpo import DDPO, ScoreFunction
from ddpo.diffusion import DDIM
from ddpo.learner import Learner
from ddpo.rollout import collect
from ddpo.sections import Learning
from tests.test_algorithms import STEPS, TARGET, Gaussian

ROWS = 256


def improve(algorithm, updates, seed, iterations=30):
    """Where the mean of what the policy draws ends, when it is paid for drawing near TARGET."""
    policy = Gaussian(theta=0.0)
    policy.weights = {"theta": torch.nn.Parameter(policy.theta.detach().clone())}
    policy.theta = policy.weights["theta"]
    learner = Learner(
        policy, algorithm, Learning(lr=0.01, updates=updates, micro_batch=ROWS, weight_decay=0.0), Accelerator(cpu=True)
    )
    for iteration in range(iterations):
        addresses = [(seed, iteration, i) for i in range(ROWS)]
        rollout = collect(policy, ["a"] * ROWS, addresses, DDIM(1.0), STEPS, ROWS, True)
        reward = -((rollout.latents[:, -1, 0, 0, 0] - TARGET) ** 2)
        rollout.advantages = (reward - reward.mean()) / reward.std()
        metrics = learner.improve(rollout, (seed, iteration), ROWS, lambda rows: None)
    return (policy.end_mean() * policy.theta).item(), metrics


@pytest.mark.parametrize("algorithm, updates", [(DDPO(clip=0.2), 2), (DDPO(clip=0.2, steps=0.5), 2), (ScoreFunction(), 1)])
def test_it_finds_the_optimum_from_three_seeds(algorithm, updates):
    for seed in range(3):
        mean, metrics = improve(algorithm, updates, seed)
        assert abs(mean - TARGET) < 0.2, (seed, mean)  # from 0; the pictures' own spread is about one
        assert metrics["kl/step_nats"] > 0


def test_a_strong_kl_term_holds_it_back():
    mean, metrics = improve(DDPO(clip=0.2), 2, 0)
    held, held_metrics = improve(DDPO(clip=0.2, kl=10.0), 2, 0)
    assert abs(held) < 0.5 * abs(mean) and held_metrics["kl/step_nats"] < metrics["kl/step_nats"]
