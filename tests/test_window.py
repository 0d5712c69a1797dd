"""A window's steps are the solver's, all others the ODE's; the rollout, the replay and the algorithm need not know."""

import pytest
import torch

from ddpo import diffusion as d
from ddpo.algorithms.ddpo import DDPO
from ddpo.config import ConfigError
from ddpo.experiment import read
from ddpo.noise import generator
from ddpo.rollout import collect, stochastic_steps
from ddpo.schedule import FlowMatching
from ddpo.window import First, Random, Sliding, Within, within
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of, stir
from tests.tiny import DDPM

CASES = pytest.mark.parametrize(
    "schedule, solver", [(DDPM, d.DDIM(1.0)), (DDPM, d.DDIM(1.0, min_sigma=0.8)), (FlowMatching(3.0), d.FlowSDE(0.7))]
)


@CASES
@pytest.mark.parametrize("window", [First(3), Sliding(3, every=2), Random(2), First(99)])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_noise_is_added_in_the_window_and_nowhere_else(schedule, solver, window, num_steps):
    all_steps = stochastic_steps(schedule, solver, num_steps)
    for iteration in range(7):
        inside = within(window, solver, schedule, num_steps, iteration, generator("window", iteration))
        chosen = stochastic_steps(schedule, inside, num_steps)
        start = window.first(len(all_steps), iteration, generator("window", iteration))
        assert chosen == all_steps[start : start + window.length] and chosen
        levels = schedule.level(schedule.times(num_steps))
        now, then = (d.Level(*(v[part] for v in levels)) for part in (slice(None, -1), slice(1, None)))
        mine = torch.zeros(num_steps, dtype=torch.bool)
        mine[chosen] = True
        ode = torch.stack([then.sigma, torch.zeros_like(then.sigma)])
        assert torch.equal(torch.stack(inside(now, then)), torch.where(mine, torch.stack(solver(now, then)), ode))


def test_a_window_on_a_sampler_without_noise_is_refused():
    words = ["algorithm={name: 'forward:NFT'}", "rollout.solver={name: 'diffusion:DDIM', eta: 0}"]
    with pytest.raises(ConfigError, match=r"rollout\.window: says where .* set rollout\.window=null"):
        read("configs/menagerie_alignment.yaml", [*words, "rollout.window={name: 'window:First'}"], 1)


def test_where_the_windows_are():
    draw = generator("window")
    assert [Sliding(4, every=2, stride=3).first(10, i, draw) for i in range(8)] == [0, 0, 3, 3, 6, 6, 6, 6]
    assert {Random(2).first(10, i, generator("window", i)) for i in range(60)} == {0, 1, 2, 3, 4}
    assert {Random(4, among=1.0).first(5, i, generator("window", i)) for i in range(60)} == {0, 1}


def test_an_ode_has_no_window():
    assert not Within(d.DDIM(0.0), 0.2, 0.8).stochastic and DDPO().refusal(Within(d.DDIM(0.0), 0.2, 0.8))


def test_acting_replay_and_learning_follow(tiny):
    policy = stir(policy_of(tiny))
    solver = within(First(2), d.DDIM(1.0), policy.family.schedule, 5, 0, generator("window"))
    rollout = collect(policy, PROMPTS, ADDRESSES, solver, 5, 4, True)
    rollout.advantages = torch.ones(4)
    assert rollout.stochastic == [0, 1]
    views = list(DDPO().views(rollout, 4, torch.Generator()))
    assert len(views) == DDPO().passes(2) == 2
    for view in views:
        assert (DDPO().loss(policy, view)[1]["log_ratio"] == 0).all()
    with torch.no_grad():  # the steps after the window are the ODE's
        view = rollout.transition(3)
        level = policy.family.schedule.level
        mean, _ = d.step_mean(policy(view.x, view.t, view.cond), level(view.t), level(view.t_next), d.DDIM(0.0))
    torch.testing.assert_close(mean, view.x_next)
