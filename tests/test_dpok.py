"""The actor-critic: its targets are the textbook's, its baseline costs no bias and saves variance, and it goes on where it stopped."""

import itertools
import sys
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ddpo import diffusion as d
from ddpo.advantage import Standardised, zero_spread
from ddpo.algorithms.ddpo import DDPO
from ddpo.algorithms.dpok import DPOK
from ddpo.credit import explained_variance, lambda_returns
from ddpo.critic import Critic, with_advantages
from ddpo.learner import Learner, TrainingError
from ddpo.models.sd3 import StableDiffusion3
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from ddpo.sections import Learning
from rewards import RewardError
from tests.command import CONFIG, finish
from tests.test_algorithms import STEPS, Gaussian, gradients
from tests.test_trainer import PROBE, Brightness, lines, trainer_of
from tests.tiny import save_sd3

TARGETS = {"low": -0.4, "high": 1.0}  # the reward of a picture is its squared distance from its prompt's, negative
TEXTS = {"": [0.0, 0.0], "low": [1.0, 0.0], "high": [0.0, 1.0]}


class Prompted(Gaussian):
    """The Gaussian policy, of two prompts that are rewarded differently."""

    def __init__(self, theta=0.3):
        super().__init__(theta)
        self.family.encode = lambda prompts: {"text": torch.tensor([[TEXTS[p]] for p in prompts])}
        self.weights = {"theta": torch.nn.Parameter(self.theta.detach().clone())}
        self.theta = self.weights["theta"]

    def gradient(self):
        """d E[reward] / d theta."""
        slope = self.end_mean()
        return sum(-2 * (slope * self.theta.item() - target) * slope for target in TARGETS.values()).item() / len(TARGETS)

    @torch.no_grad()
    def value(self, x, step, target):
        """E[reward | x at this step]: the end is Normal(m x + c, v), for every step is linear in x."""
        level, times = self.family.schedule.level, self.family.schedule.times(STEPS)
        m, c, v = 1.0, 0.0, 0.0
        for t, t_next in list(itertools.pairwise(times))[step:][::-1]:
            now, then = level(t), level(t_next)
            eps, std = d.DDIM(1.0)(now, then)
            v += m**2 * std**2
            c += m * (eps - then.alpha * now.sigma / now.alpha) * self.theta.double()
            m *= then.alpha * now.alpha + eps * now.sigma
        return -((m * x.double() + c - target) ** 2 + v)


def acted(policy, rows, seed=0):
    """A rollout of both prompts with its rewards, and these, standardised, as advantages."""
    g = torch.Generator().manual_seed(seed)
    prompts = list(TARGETS) * (rows // 2)
    with patch("ddpo.rollout.normal", lambda addresses, shape, device: torch.randn(len(addresses), *shape, generator=g)):
        rollout = collect(policy, prompts, [(0,)] * rows, d.DDIM(1.0), STEPS, rows, True)
    rollout.rewards = -((rollout.latents[:, -1, 0, 0, 0] - torch.tensor([TARGETS[p] for p in prompts])) ** 2)
    rollout.advantages = (rollout.rewards - rollout.rewards.mean()) / rollout.rewards.std()
    return rollout


def learner_of(policy, algorithm, rows=256, **options):
    settings = Learning(**dict(lr=0.01, updates=2, micro_batch=rows, weight_decay=0.0) | options)
    return Learner(policy, algorithm, settings, Accelerator(cpu=True), seed=0)


@pytest.fixture(scope="module")
def taught():
    """(policy, critic, scale, centre): V of the policy as it stands, learned from the rewards of 16 rollouts."""
    policy = Prompted()
    rollout = acted(policy, 40_000, seed=99)
    learner = learner_of(policy, DPOK(critic_epochs=1, critic_lr=1e-2), rows=512, updates=1)
    for part in rollout.chunks(512):
        learner._teach(learner.critic, learner.critic.study(part))
    return policy, learner.critic, rollout.rewards.std().item(), rollout.rewards.mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Targets and losses


@pytest.mark.parametrize("trace", [0.0, 0.3, 0.95, 1.0])
def test_targets_are_the_textbooks(trace):
    """The mixture of n-step returns, written out (Sutton & Barto 2018, eq. 12.3), in float64."""
    g = torch.Generator().manual_seed(0)
    values, outcome = torch.randn(5, 7, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64)
    found = lambda_returns(values, outcome, trace)
    for row, k in itertools.product(range(5), range(7)):
        steps = [values[row, k + n] for n in range(1, 7 - k)]
        expected = (1 - trace) * sum(trace**n * v for n, v in enumerate(steps)) + trace ** len(steps) * outcome[row]
        assert abs(found[row, k] - expected) < 1e-12


@pytest.mark.parametrize("options", [{}, {"clip": 0.02}, {"kl": 0.0}])
def test_the_loss_is_ppos_on_target_less_value_with_the_exact_kl(options, taught):
    policy, critic, *_ = taught
    algorithm, rollout = DPOK(**{"clip": 0.01, "trace": 0.7} | options), acted(policy, 32)
    critic.trace = 0.7
    lesson = critic.study(rollout)
    critic.trace = 1.0
    with torch.no_grad():
        policy.theta += 0.02
    for step, view in enumerate(algorithm.views(with_advantages(rollout, lesson), 32, torch.Generator())):
        loss, _ = algorithm.loss(policy, view)
        (mean, std), base = view.replay(policy), _base_mean(policy, view)
        normal = torch.distributions.Normal(mean.flatten().double(), std.flatten().double())
        ratio = (normal.log_prob(view.x_next.flatten()) - view.log_prob).exp()
        advantage = (lambda_returns(lesson.values.double(), rollout.advantages.double(), 0.7) - lesson.values)[:, step]
        expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - algorithm.clip, 1 + algorithm.clip))
        expected += algorithm.kl * ((mean - base) ** 2 / (2 * std**2)).flatten().double()
        torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)  # the log-probability is a float32
    with torch.no_grad():
        policy.theta -= 0.02


def _base_mean(policy, view):
    with policy.acting_as("reference"):
        return view.replay(policy)[0]


def test_before_it_learns_and_without_kl_it_is_ddpo():
    policy = Prompted()
    rollout = acted(policy, 32)
    critic = DPOK().critic(policy.family, 0)
    ours = with_advantages(rollout, critic.study(rollout))
    for mine, theirs in zip(
        DPOK(kl=0.0).views(ours, 8, torch.Generator()), DDPO().views(rollout, 8, torch.Generator()), strict=True
    ):
        assert torch.equal(DPOK(kl=0.0).loss(policy, mine)[0], DDPO().loss(policy, theirs)[0])


def test_a_picture_without_a_score_teaches_neither():
    policy = Prompted()
    rollout = acted(policy, 8)
    rollout.rewards[3] = torch.nan
    rollout.advantages[3] = 0.0  # as all advantages have it
    critic = Critic(policy.family, 1e-2, 1, 0.5, 0)
    torch.nn.init.ones_(critic.network.head.weight)
    lesson = critic.study(rollout)
    assert (lesson.values[3] != 0).all() and (lesson.advantages[3] == 0).all() and (lesson.advantages[2] != 0).all()
    loss = critic.loss(lesson)
    assert loss[3] == 0 and (loss[[0, 1, 2]] > 0).all()
    loss.sum().backward()
    assert all(w.grad.isfinite().all() for w in critic.weights)


def test_steps_without_noise_are_no_decisions():
    policy = Prompted()
    rollout = acted(policy, 8)
    rollout.stochastic = [1, 2]  # as in a window
    lesson = Critic(policy.family, 1e-2, 1, 0.5, 0).study(rollout)
    assert torch.equal(lesson.latents, rollout.latents[:, 1:3])
    advantages = with_advantages(rollout, lesson).advantages
    assert (advantages[:, [0, 3]] == 0).all()
    for view in DPOK().views(with_advantages(rollout, lesson), 8, torch.Generator()):
        step = rollout.times.tolist().index(view.t[0])
        assert torch.equal(view.x, rollout.latents[:, step]) and torch.equal(view.advantage, lesson.advantages[:, step - 1])


# ----------------------------------------------------------------------------------------------------------------------
# The value


def test_it_learns_the_conditional_mean_of_latent_noise_level_and_prompt(taught):
    policy, critic, scale, centre = taught
    rollout = acted(policy, 4000, seed=5)
    lesson = critic.study(rollout)
    for step, (row, target) in itertools.product(range(STEPS), enumerate(TARGETS.values())):
        true = (policy.value(rollout.latents[row::2, step, 0, 0, 0], step, target) - centre) / scale
        missed = (lesson.values[row::2, step] - true).square().mean() / true.var()
        assert missed < 0.25, (step, target, missed)  # 1 is a constant a step and prompt
    assert 0.3 < explained_variance(lesson.values, lesson.outcome) < 1


def test_the_baseline_leaves_the_gradient_and_takes_its_variance(taught):
    policy, critic, *_ = taught
    rollout = acted(policy, 40_000, seed=7)
    algorithm = DPOK(kl=0.0, clip=1e9, max_advantage=1e9)
    without = gradients(algorithm, policy, rollout)
    lesson = critic.study(rollout)
    found = gradients(algorithm, policy, with_advantages(rollout, lesson))
    error = (found.std() / len(found) ** 0.5).item()
    analytic = policy.gradient() / rollout.rewards.std().item()
    print("analytic", analytic, "found", found.mean().item(), "+-", error, "variance", (found.var() / without.var()).item())
    assert error < 0.05 * abs(analytic) and abs(found.mean().item() - analytic) < 3 * error
    assert found.var() < 0.2 * without.var()
    lesson.targets = lambda_returns(lesson.values, lesson.outcome, 0.0)  # all on V: each step pays for its own noise alone
    bootstrapped = gradients(algorithm, policy, with_advantages(rollout, lesson))
    print("bootstrapped", bootstrapped.mean().item(), "variance", (bootstrapped.var() / without.var()).item())
    assert bootstrapped.var() < 0.7 * found.var()


def test_actor_and_critic_do_not_reach_each_other():
    policy = Prompted()
    learner = learner_of(policy, DPOK())
    rollout = acted(policy, 8)
    lesson = learner.critic.study(rollout)
    view = with_advantages(rollout, lesson).transition(0)
    DPOK().loss(policy, view)[0].sum().backward()
    assert policy.theta.grad != 0 and all(w.grad is None for w in learner.critic.weights)
    policy.theta.grad = None
    learner.critic.loss(lesson).sum().backward()
    assert policy.theta.grad is None and learner.critic.network.head.weight.grad.abs().sum() > 0
    assert not {id(w) for w in learner.critic.weights} & {
        id(w) for group in learner.optimizer.param_groups for w in group["params"]
    }


def mean_of(policy):
    return (policy.end_mean() * policy.theta).item()


@pytest.mark.parametrize("trace", [1.0, 0.8])
def test_it_finds_the_optimum_from_three_seeds(trace):
    best = sum(TARGETS.values()) / 2
    for seed in range(3):
        policy = Prompted(theta=-0.3)
        learner = learner_of(policy, DPOK(clip=0.2, kl=0.0, trace=trace, critic_lr=1e-2), lr=0.02)
        for iteration in range(16):
            rollout = acted(policy, 128, 1000 * seed + iteration)
            metrics = learner.improve(rollout, (seed, iteration), 128, lambda n: None)
        mean = mean_of(policy)
        assert abs(mean - best) < 0.2, (seed, mean)
        assert metrics["critic/explained_variance"] > 0.3 and metrics["critic/loss"] < 0.7


def test_the_first_weights_are_the_seeds_and_the_global_stream_is_left_alone():
    family = Prompted().family
    torch.manual_seed(3)
    one = Critic(family, 1e-3, 1, 1.0, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    same, other = Critic(family, 1e-3, 1, 1.0, seed=1), Critic(family, 1e-3, 1, 1.0, seed=2)
    assert all(map(torch.equal, one.weights, same.weights))
    assert not torch.equal(one.weights[0], other.weights[0])


def test_micro_batches_do_not_change_what_it_learns():
    ends = []
    for size in (64, 8):
        policy = Prompted()
        learner = learner_of(policy, DPOK(), rows=size)
        for iteration in range(2):
            learner.improve(acted(policy, 64, iteration), (0, iteration), size, lambda n: None)
            assert all(w.grad is None for w in learner.critic.weights)  # no step sees the gradient of another
        ends.append(torch.cat([w.detach().flatten() for w in learner.critic.weights]))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)


def test_a_critic_that_diverges_stops_the_run_and_names_its_learning_rate():
    policy = Prompted()
    learner = learner_of(policy, DPOK())
    learner.critic.weights[0].register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainingError, match=r"algorithm\.critic_lr"):
        learner.improve(acted(policy, 8), (0, 0), 8, lambda n: None)


def test_a_transformer_of_another_shape_and_text_has_a_value_too(tmp_path):
    policy = Policy(StableDiffusion3(str(save_sd3(tmp_path)), dtype="bfloat16"), LoRA(4))
    rollout = collect(policy, ["a cat", "a dog"], [(0,), (1,)], d.FlowSDE(), 3, 2, True)
    rollout.advantages = torch.tensor([1.0, -1.0])
    critic = Critic(policy.family, 1e-2, 1, 1.0, 0)
    for _ in range(2):  # at first the head is zero, and nothing below it learns
        loss = critic.loss(critic.study(rollout))
        loss.sum().backward()
        critic.optimizer.step()
    assert loss.dtype == torch.float32 and all(w.grad.abs().sum() > 0 for w in critic.weights)
    assert sum(w.numel() for w in critic.weights) < 50_000


# ----------------------------------------------------------------------------------------------------------------------
# In the loop


def weights_of(trainer):
    held = [*trainer.policy.weights.values(), *trainer.learner.critic.weights]
    return torch.cat([w.detach().flatten() for w in held])


def test_a_run_that_was_stopped_and_resumed_ends_bit_identical(tiny, tmp_path):
    def fresh(name, breaks_at=None):
        algorithm = DPOK(clip=0.1, trace=0.9, critic_lr=1e-2)
        options = dict(prompts=12, group_size=1, algorithm=algorithm, advantage=Standardised())
        return trainer_of(tmp_path / name, tiny, Brightness(breaks_at), **options)

    whole = fresh("whole")
    whole.run()
    with pytest.raises(RewardError):
        fresh("parts", breaks_at=PROBE + 12 + 12 + 2 + 9).run()  # in the third iteration
    resumed = fresh("parts")
    resumed.run()
    assert torch.equal(weights_of(resumed), weights_of(whole))
    a, b = ([{k: v for k, v in r.items() if "seconds" not in k} for r in lines(tmp_path / name)] for name in ("whole", "parts"))
    assert a == b and a[1]["critic/explained_variance"] == 0 and a[2]["critic/explained_variance"] != 0
    assert a[1]["critic/loss"] > 0 and abs(a[1]["ratio/mean"] - 1) < 0.05


@pytest.mark.slow
def test_two_processes_agree_with_one(tiny, tmp_path):
    config = tmp_path / "run.yaml"
    ours = CONFIG.format(model=tiny).replace('"ddpo:DDPO", clip: 0.1', '"dpok:DPOK", clip: 0.1, trace: 0.9, critic_lr: 0.01')
    assert "DPOK" in ours
    config.write_text(ours.replace('"advantage:PerPrompt", window: 8, min_count: 2', '"advantage:Standardised"'))
    finish(config, tmp_path / "one")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finish(config, tmp_path / "two", launcher)
    for part in ("lora", "critic"):
        start, one, two = (
            torch.cat([v.flatten() for v in load_file(folder / f"{part}.safetensors").values()])
            for folder in [tmp_path / n / "checkpoints" / s for n, s in (("one", FIRST), ("one", LAST), ("two", LAST))]
        )
        assert (one - two).norm() <= 1e-4 * (one - start).norm() > 0, part


FIRST, LAST = "step-00000003", "step-00000006"  # the oldest that is kept, and the last


# ----------------------------------------------------------------------------------------------------------------------
# Its rewards


def test_rewards_are_standardised_over_iterations_whatever_the_prompt():
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, generator=g, dtype=torch.float64) * 3 - 100 for _ in range(3)]
    batches[1][2] = torch.nan
    ours, again = Standardised(decay=0.5), Standardised(decay=0.5)
    for i, batch in enumerate(batches):
        found = ours(batch, ["a", "b"] * 3)
        weights, seen = [], []
        for age, past in enumerate(reversed(batches[: i + 1])):
            seen += [r for r in past.tolist() if r == r]
            weights += [0.5**age] * sum(r == r for r in past.tolist())
        w, r = torch.tensor(weights, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64)
        mean = (w * r).sum() / w.sum()
        std = ((w * (r - mean) ** 2).sum() / w.sum()).sqrt()
        expected = (batch - mean) / (std + 1e-6)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6, equal_nan=True)
        assert torch.equal(again(batch, ["c"] * 6).nan_to_num(9.0), found.nan_to_num(9.0))
        again = Standardised(decay=0.5)
        again.load_state(ours.state())
    assert (Standardised()(torch.full((4,), 0.3, dtype=torch.float64), ["a"] * 4).abs() < 1e-3).all()


def test_groups_of_one_are_not_taken_for_groups_that_score_alike():
    rewards = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert zero_spread(rewards, ["a", "b", "c"]) == 0 and zero_spread(rewards * 0, ["a", "b", "c"]) == 1
    assert zero_spread(rewards, ["a", "a", "c"]) == 0 and zero_spread(rewards * 0, ["a", "a", "c"]) == 1
