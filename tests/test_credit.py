"""Credit of single steps: gains add up, cost no bias at lambda 1, are of the pictures that the network predicts, and are paid once."""

from dataclasses import replace

import pytest
import torch

from ddpo.advantage import GroupRelative, PerPrompt
from ddpo.algorithms.ddpo import DDPO, ScoreFunction
from ddpo.algorithms.dpok import DPOK
from ddpo.config import Component, ConfigError
from ddpo.credit import Gain, by_step
from ddpo.diffusion import DDIM
from ddpo.experiment import read
from ddpo.models.sd import StableDiffusion
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from rewards import RewardError
from tests.test_algorithms import Gaussian, fast_rollout, gradients
from tests.test_dpok import learner_of
from tests.test_trainer import PROBE, Brightness, lines, trainer_of, weights

N, TARGET = 40_000, 0.7
CREDIT = Component("credit:Gain", Gain, {})


def unchanged(rewards, prompts):
    """An advantage that is the reward itself."""
    return rewards


def paid(policy, rollout):
    """(N, K) rewards of the predictions and (N,) of the ends, of the Gaussian policy: nearness to TARGET."""

    def reward(x):
        return -((x[:, 0, 0, 0] - TARGET) ** 2)

    times = rollout.times
    with torch.no_grad():
        beliefs = [policy(rollout.latents[:, k], times[k].expand(len(rollout)), {}).x0 for k in rollout.stochastic]
    return torch.stack([reward(x) for x in beliefs], 1), reward(rollout.latents[:, -1])


def test_gains_add_up_to_what_the_first_prediction_did_not_foresee():
    policy = Gaussian()
    values, outcome = paid(policy, fast_rollout(policy, 64))
    gains = Gain(trace=0.0)(values, outcome, unchanged, ["a"] * 64)
    torch.testing.assert_close(gains.sum(1), outcome - values[:, 0])
    torch.testing.assert_close(gains[:, 1], values[:, 2] - values[:, 1])
    torch.testing.assert_close(Gain(trace=1.0)(values, outcome, unchanged, ["a"] * 64), outcome[:, None] - values)


def test_the_prediction_is_a_baseline_that_leaves_the_gradient_and_takes_its_variance():
    policy = Gaussian()
    rollout = fast_rollout(policy, N)
    values, outcome = paid(policy, rollout)
    slope = policy.end_mean()
    analytic = (-2 * (slope * policy.theta.item() - TARGET) * slope).item()
    algorithm = ScoreFunction(max_advantage=1e9)
    without = gradients(algorithm, policy, replace(rollout, advantages=outcome - outcome.mean()))
    found, gained = (
        gradients(algorithm, policy, replace(rollout, advantages=Gain(trace)(values, outcome, unchanged, ["a"] * N)))
        for trace in (1.0, 0.0)
    )
    error = (found.std() / N**0.5).item()
    print("analytic", analytic, "found", found.mean().item(), "+-", error, "variance", (found.var() / without.var()).item())
    assert error < 0.05 * abs(analytic) and abs(found.mean().item() - analytic) < 3 * error
    assert found.var() < 0.2 * without.var() and gained.var() < 0.9 * found.var()


@pytest.mark.parametrize("trace", [0.0, 1.0])
def test_it_finds_the_optimum_from_three_seeds(trace):
    for seed in range(3):
        policy = Gaussian(theta=0.0)
        policy.weights = {"theta": torch.nn.Parameter(policy.theta.detach().clone())}
        policy.theta = policy.weights["theta"]
        learner = learner_of(policy, DDPO(clip=0.2), lr=0.02)
        for iteration in range(16):
            rollout = fast_rollout(policy, 256, 1000 * seed + iteration)
            values, outcome = paid(policy, rollout)
            rollout.advantages = Gain(trace)(values.double(), outcome.double(), GroupRelative(), rollout.prompts)
            learner.improve(rollout, (seed, iteration), 256, lambda rows: None)
        assert abs((policy.end_mean() * policy.theta).item() - TARGET) < 0.2, seed


def test_a_step_that_tells_nothing_adds_nothing_and_a_picture_without_a_score_is_left_out():
    values = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    outcome = torch.tensor([1.0, 2.0, torch.nan, 3.0], dtype=torch.float64)
    found = Gain(trace=0.0)(values, outcome, GroupRelative(scale="none"), ["a"] * 4)
    assert torch.equal(found[:, 1].isnan(), torch.tensor([False, False, True, False])) and found[2].isnan().all()
    assert (found[[0, 1, 3], 1] == 0).all()  # the last step changed no picture's reward
    assert found[3, 0] > found[1, 0] > found[0, 0]
    spread = by_step(found, [1, 3], 5)
    assert torch.equal(spread[0, [1, 3]], found[0]) and (spread[0, [0, 2, 4]] == 0).all() and spread[2].isnan().all()


def test_predictions_are_what_the_network_believes_in_before_each_noisy_step(tiny):
    policy = Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4), 2.0)
    prompts, addresses = ["a cat", "a dog", "a cat"], [(0, i) for i in range(3)]
    solver = DDIM(1.0, min_sigma=0.5)
    rollout = collect(policy, prompts, addresses, solver, 6, 2, True, keep_beliefs=True)
    assert rollout.beliefs.shape[:2] == (3, len(rollout.stochastic)) and 1 < len(rollout.stochastic) < 6
    cond = {k: v[rollout.cond_rows] for k, v in rollout.cond.items()}
    for k, step in enumerate(rollout.stochastic):
        with torch.no_grad():
            belief = policy(rollout.latents[:, step], rollout.times[step].expand(3), cond).x0
            expected = policy.family.decode(belief) * 255
        assert (rollout.beliefs[:, k] - expected).abs().max() < 1  # rounded, and drawn in other batches
    assert torch.equal(rollout[torch.tensor([2, 0])].beliefs, rollout.beliefs[[2, 0]])
    plain = collect(policy, prompts, addresses, solver, 6, 2, True)
    assert plain.beliefs is None and torch.equal(plain.images, rollout.images)


def test_predictions_are_scored_once_and_a_resumed_run_does_not_pay_again(tiny, tmp_path):
    once = Brightness()
    whole = trainer_of(tmp_path / "whole", tiny, once, iterations=2, credit=CREDIT)
    whole.run()
    steps = 4
    assert once.asked == PROBE + 2 * 12 * (1 + steps) + 2
    stopped = Brightness(breaks_at=PROBE + 12 * (1 + steps) + 2 + 12 + 7)  # among the second iteration's predictions
    with pytest.raises(RewardError):
        trainer_of(tmp_path / "cut", tiny, stopped, iterations=2, credit=CREDIT).run()
    again = Brightness()
    resumed = trainer_of(tmp_path / "cut", tiny, again, iterations=2, credit=CREDIT)
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))
    assert again.asked == 12 * steps - 6 + 2  # what was not written down yet, and the last probe
    plain = trainer_of(tmp_path / "plain", tiny, iterations=2)
    plain.run()
    assert not torch.equal(weights(plain), weights(whole))
    assert "credit/explained_variance" in lines(tmp_path / "whole")[1]


@pytest.mark.parametrize(
    "words, told",
    [
        (["algorithm={name: 'dpok:DPOK'}"], "rollout.credit: dpok:DPOK gives a step no advantage of its own"),
        (["advantage={name: 'advantage:PerPrompt'}"], "advantage: advantage:PerPrompt remembers rewards"),
        (["objective.normalise=group"], "objective.normalise: gives each step's pictures a unit of their own"),
        (["rollout.credit.trace=2"], "trace"),
    ],
)
def test_what_cannot_be_paid_by_the_step_is_refused(words, told):
    base = "configs/menagerie_alignment.yaml"
    credit = "rollout.credit={name: 'credit:Gain', trace: 0.5}"
    assert read(base, [credit], 1).recipe.rollout.credit.build() == Gain(0.5)
    with pytest.raises(ConfigError) as caught:
        read(base, [credit, *words], 1)
    assert told in str(caught.value)


def test_dpok_brings_a_value_of_its_own():
    assert DDPO().credits_steps and not DPOK().credits_steps and PerPrompt().state()
