"""Statistics of the comparison against their definitions."""

import json
import math

import pytest
import torch

from ddpo import drift, evaluate
from ddpo.diffusion import DDIM
from ddpo.evaluate import Baseline
from ddpo.noise import generator
from ddpo.rollout import collect
from rewards import Part, Rubric
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of, stir


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for trial in range(300):
        g = generator("coverage", trial)
        effect = torch.randn(40, generator=g).repeat_interleave(2)  # two pictures a prompt share its effect
        differences = 0.5 + effect + 0.3 * torch.randn(80, generator=g)
        mean, low, high = evaluate.paired_interval(differences, [str(i // 2) for i in range(80)], resamples=500)
        assert low <= mean <= high
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 300 <= 0.98
    # Resampling pictures as if they were independent would be wrong here, and this test would tell:
    naive = sum(
        (lambda i: i.low <= 0.5 <= i.high)(evaluate.paired_interval(_correlated(t), [str(i) for i in range(80)], 500))
        for t in range(300)
    )
    assert naive / 300 < 0.90


def _correlated(trial):
    g = generator("coverage", trial)
    effect = torch.randn(40, generator=g).repeat_interleave(2)
    return 0.5 + effect + 0.3 * torch.randn(80, generator=g)


def test_missing_scores_are_left_out():
    nan = float("nan")
    mean, _, _ = evaluate.paired_interval(torch.tensor([1.0, nan, 3.0]), ["a", "a", "b"])
    assert mean == 2.0
    assert math.isnan(evaluate.paired_interval(torch.tensor([nan]), ["a"]).mean)
    assert evaluate.win_rate(torch.tensor([1.0, nan, 2.0, 3.0]), torch.tensor([2.0, 5.0, 2.0, 1.0])) == 0.5


def test_diversity_is_zero_for_copies_and_compares_within_prompts_only():
    image = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    black, white = torch.zeros_like(image), torch.full_like(image, 255)
    assert evaluate.diversity(torch.cat([image, image]), ["a", "a"]) == 0
    assert evaluate.diversity(torch.cat([black, white]), ["a", "a"]) == pytest.approx(1)
    assert evaluate.diversity(torch.cat([black, black, white, white]), ["a", "a", "b", "b"]) == 0
    assert math.isnan(evaluate.diversity(image, ["a"]))


def test_the_kl_is_that_of_the_two_policies_steps(tiny):
    policy = policy_of(tiny)
    rollout = collect(policy, PROMPTS, ADDRESSES, DDIM(1.0), 3, 4, True)
    rollout.advantages = torch.zeros(4)
    assert drift.step_kl(policy, rollout, 2) == (0, 0, 3)
    stir(policy)
    expected = []
    for step in rollout.stochastic:
        view = rollout.transition(step)
        with torch.no_grad():
            mean, std = view.replay(policy)
        with policy.acting_as("reference"):
            base, _ = view.replay(policy)
        normal = torch.distributions.Normal
        expected.append(
            torch.distributions.kl_divergence(normal(mean.double(), std.double()), normal(base.double(), std.double()))
            .flatten(1)
            .sum(1)
        )
    assert drift.step_kl(policy, rollout, 4).kl == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


def test_compare_reports_every_scorer_against_base():
    base, tuned = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([2.0, 4.0])}
    metrics = evaluate.compare(base, tuned, (base["a"], tuned["a"]), ["x", "y"])
    assert metrics["eval/a/base"] == 1.5 and metrics["eval/a/tuned"] == 3.0 and metrics["eval/a/delta"] == 1.5
    assert metrics["eval/win_rate"] == 1.0 and metrics["eval/a/delta_low"] >= 1.0 and metrics["eval/a/delta_high"] <= 2.0


def test_the_best_is_the_highest_gain_that_keeps_its_floors_and_a_resumed_baseline_goes_on():
    prompts = ["a", "a", "b", "b"]
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    base = {"size": torch.zeros(4, dtype=torch.float64), "clip": torch.tensor([0.1, 0.1, 0.3, 0.3], dtype=torch.float64)}

    def baseline():
        def named(name):
            return type(name, (), {"name": name, "__call__": lambda *a: []})()

        return Baseline(Rubric.of([Part(named("size"), 1.0), Part(named("clip"), 0.0, 1.0)]))  # the mean's error is 0.1

    made = baseline()
    first = made.compare(0, base, images, prompts)
    assert first["eval/size/delta"] == 0 and first["floor/clip/margin"] == pytest.approx(1.0) and made.best == 0
    for iteration, gain, fall in ((1, 1.0, 0.05), (2, 3.0, 0.15), (3, 2.0, 0.09), (4, 1.5, 0.0)):
        tuned = {"size": base["size"] + gain, "clip": base["clip"] - fall, "watched": base["clip"]}
        made.scores.setdefault("watched", base["clip"])
        line = made.compare(iteration, tuned, images, prompts)
        assert line["eval/size/delta"] == gain and line["floor/clip/margin"] == pytest.approx(1 - fall / 0.1)
    assert made.best == 3  # the second gains most, and breaks the floor
    again = baseline()
    again.load_state(json.loads(json.dumps(made.state())))
    assert again.state() == made.state() and torch.equal(again.total(base), made.total(base))
    assert baseline().state()["gain"] is None
