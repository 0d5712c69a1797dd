"""Trust regions of a denoising step: the published formulas in float64, the first update, and what each is for."""

import pytest
import torch
from accelerate import Accelerator

from ddpo import diffusion as d
from ddpo.algorithms import Replay
from ddpo.algorithms.ddpo import DDPO, ScoreFunction
from ddpo.algorithms.grpo import GRPO, FlowDPPO, GRPOGuard
from ddpo.learner import Learner
from ddpo.rollout import collect
from ddpo.schedule import FlowMatching
from ddpo.sections import Learning
from ddpo.views import Transition
from tests.test_algorithms import TARGET, Gaussian, fast_rollout, gradients
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of, stir

SHAPE = (4, 4, 4)
FLOW = FlowMatching(3.0)
ANCHORED = [GRPOGuard(), FlowDPPO()]


class Learnt(Gaussian):
    """The toy, with a weight that an optimizer may move."""

    def __init__(self):
        super().__init__(theta=0.0)
        self.theta = torch.nn.Parameter(self.theta.detach().clone())
        self.weights = {"theta": self.theta}


def taken(schedule=None, solver=None, rows=64, times=(801, 601), shift=0.02, dtype=torch.float64):
    """(policy, transition): a step that its self "old" took before its parameter, here a whole latent, was shifted."""
    g = torch.Generator().manual_seed(0)
    policy = Learnt()
    policy.family.schedule = schedule or policy.family.schedule
    old, step = torch.randn(2, *SHAPE, generator=g, dtype=dtype)
    policy.selves["old"] = policy.theta = old
    x, z = torch.randn(2, rows, *SHAPE, generator=g, dtype=dtype)
    t, t_next = (torch.full((rows,), v) for v in times)
    view = Transition(
        x, x, t, t_next, torch.zeros(rows), solver or d.DDIM(1.0), {}, torch.randn(rows, generator=g, dtype=dtype)
    )
    mean, std = view.replay(policy)
    view.x_next = mean + std * z
    view.log_prob = d.log_prob(view.x_next, mean, std)
    policy.theta = (old + shift * step).requires_grad_()
    return policy, view


def written_out(policy, view):
    """(log rho, |dmu|^2 / (2 std^2), std) of a step, from the papers' own formulas, element by element."""
    (a, s), (a_next, s_next) = (
        [v.double().view(-1, 1, 1, 1) for v in policy.family.schedule.level(t)] for t in (view.t, view.t_next)
    )
    std = s_next / s * (s**2 - a**2 * s_next**2 / a_next**2).sqrt()  # DDIM's at eta 1 (algorithms.md 2.0, primitive B)
    if isinstance(view.solver, d.FlowSDE):
        std = view.solver.noise_level * (s / (1 - s) * (s - s_next)).sqrt()

    def mean(theta):
        eps = s * view.x.double() + theta.double()
        x0 = (view.x.double() - s * eps) / a
        if isinstance(view.solver, d.FlowSDE):  # mu = x + [v + g^2 / (2 t) (x + (1 - t) v)] dt (algorithms.md 2.2)
            v, dt = eps - x0, s_next - s
            return view.x + (v + std**2 / -dt / (2 * s) * (view.x + (1 - s) * v)) * dt
        return a_next * x0 + (s_next**2 - std**2).sqrt() * eps

    new, old = mean(policy.theta), mean(policy.selves["old"])
    density = torch.distributions.Normal
    log_rho = (density(new, std).log_prob(view.x_next) - density(old, std).log_prob(view.x_next)).mean((1, 2, 3))
    return log_rho, ((new - old) ** 2 / (2 * std**2)).mean((1, 2, 3)), std.flatten()


CASES = pytest.mark.parametrize(
    "schedule, solver, times", [(None, d.DDIM(1.0), (801, 601)), (FLOW, d.FlowSDE(0.7), (900.0, 750.0))], ids=["ddpm", "flow"]
)


def half(ratio):
    """A clip that half of the ratios are outside of, and none on."""
    return (ratio - 1).abs().median().item() * 1.0001


def agree(algorithm, policy, view, expected):
    """Losses and their gradient."""
    loss, metrics = algorithm.loss(policy, view)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(v.sum(), policy.theta, retain_graph=True)[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10 * float(theirs.abs().max()))
    return metrics


@CASES
def test_guard_is_its_published_formula(schedule, solver, times):
    policy, view = taken(schedule, solver, times=times)
    log_rho, kl, std = written_out(policy, view)
    ratio = (std * (log_rho + kl)).exp()
    clip = half(ratio)
    level = policy.family.schedule.level
    now, then = level(view.t), level(view.t_next)
    dt = now.sigma / (now.alpha + now.sigma) - then.sigma / (then.alpha + then.sigma)
    if schedule is FLOW:
        torch.testing.assert_close(dt, (view.t - view.t_next).double() / 1000)
    gain = torch.minimum(view.advantage * ratio, view.advantage * ratio.clamp(1 - clip, 1 + clip))
    metrics = agree(GRPOGuard(clip=clip), policy, view, -gain / dt)
    assert metrics["clip_fraction"].mean() == 0.5
    torch.testing.assert_close(metrics["log_ratio"], log_rho.detach(), rtol=1e-9, atol=1e-12)


@CASES
def test_dppo_is_its_published_formula(schedule, solver, times):
    policy, view = taken(schedule, solver, times=times)
    log_rho, kl, _ = written_out(policy, view)
    for delta in (kl.max().item() * 1.01, kl.min().item() * 0.99):
        keep = ~((view.advantage * (log_rho.exp() - 1) > 0) & (kl > delta))
        metrics = agree(FlowDPPO(delta=delta), policy, view, -(keep * view.advantage * log_rho.exp()))
        assert torch.equal(metrics["clip_fraction"], (~keep).float())
        assert bool(keep.all()) == (delta > kl.max())  # inside nothing is stopped; outside what leads back is not
    assert keep.any()


def test_ppo_is_its_published_formula():
    policy, view = taken()
    log_rho, _, _ = written_out(policy, view)
    ratio, clip = log_rho.exp(), half(log_rho.exp())
    gain = torch.minimum(view.advantage * ratio, view.advantage * ratio.clamp(1 - clip, 1 + clip))
    for algorithm in (DDPO(clip=clip), GRPO(clip=clip, kl=0.0)):
        agree(algorithm, policy, view, -gain)


def test_the_kl_to_the_base_model_is_added_to_each():
    policy, view = taken()
    policy.selves["reference"] = policy.selves["old"]
    _, kl, _ = written_out(policy, view)
    for algorithm in (GRPO, GRPOGuard, FlowDPPO):
        with_kl, without = (algorithm(kl=k).loss(policy, view)[0] for k in (0.3, 0.0))
        torch.testing.assert_close(with_kl - without, 0.3 * kl, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("algorithm", [GRPO(kl=0.0), *ANCHORED], ids=lambda a: type(a).__name__)
def test_before_the_first_update_the_ratio_is_one_and_no_pass_is_spent_on_it(algorithm, monkeypatch):
    policy, view = taken(shift=0.0, dtype=torch.float32)
    calls = count_calls(policy, monkeypatch)
    loss, metrics = algorithm.loss(policy, view)
    assert (metrics["log_ratio"] == 0).all() and (metrics["clip_fraction"] == 0).all() and len(calls) == 1
    ratio = loss / -view.advantage
    torch.testing.assert_close(ratio, ratio[:1].expand(len(ratio)) if type(algorithm) is GRPOGuard else torch.ones_like(ratio))


def test_the_policy_that_acted_is_asked_again_once_there_was_an_update(monkeypatch):
    policy, view = taken()
    calls = count_calls(policy, monkeypatch)
    for algorithm, expected in [(GRPO(kl=0.0), 1), (GRPO(), 2), *((a, 2) for a in ANCHORED)]:
        calls.clear()
        algorithm.loss(policy, view)
        assert len(calls) == expected, algorithm


def count_calls(policy, monkeypatch):
    calls, call = [], type(policy).__call__
    monkeypatch.setattr(type(policy), "__call__", lambda self, *args: calls.append(1) or call(self, *args))
    return calls


def acted(policy, rows, seed=0):
    rollout = fast_rollout(policy, rows, seed)
    reward = -((rollout.latents[:, -1, 0, 0, 0] - TARGET) ** 2)
    rollout.advantages = (reward - reward.mean()) / reward.std()
    return rollout


def test_at_the_first_update_each_gradient_is_the_score_functions():
    policy = Learnt()
    rollout = acted(policy, 64)
    for algorithm in (GRPO(kl=0.0), FlowDPPO()):
        algorithm.start(policy, 0)
        torch.testing.assert_close(gradients(algorithm, policy, rollout), gradients(ScoreFunction(), policy, rollout))


def test_guard_weighs_the_score_functions_steps_alike():
    """By std over length, which makes the gradient by the network's velocity nearly the same at all noise levels."""
    policy = Learnt()
    rollout = collect(policy, ["a"] * 4, [(i,) for i in range(4)], d.DDIM(1.0), 50, 4, True)
    rollout.advantages = torch.tensor([1.0, -1.0, 2.0, 0.5])
    plain, guarded = [], []
    for view in GRPOGuard().views(rollout, 4, torch.Generator()):
        now, then = (d.Level(*(v[0] for v in policy.family.schedule.level(t))) for t in (view.t, view.t_next))
        c, std = view.solver(now, then)
        dt = now.sigma / (now.alpha + now.sigma) - then.sigma / (then.alpha + then.sigma)
        a, b = (torch.autograd.grad(a.loss(policy, view)[0].sum(), policy.theta)[0] for a in (ScoreFunction(), GRPOGuard()))
        torch.testing.assert_close(b, a * (std / dt).float(), rtol=1e-3, atol=1e-3)
        slope = (then.alpha * now.sigma / now.alpha - c) * now.alpha / (now.alpha + now.sigma)  # |d mean / d velocity|
        plain.append(slope / std)
        guarded.append(slope / dt)
    plain, guarded = torch.stack(plain), torch.stack(guarded)
    assert plain.max() / plain.min() > 50 and guarded.max() / guarded.min() < 2.1


def test_the_ratio_is_low_on_average_and_the_normalised_one_is_not():
    """The bias that GRPO-Guard is for: under the policy that acted, E[log rho] = -KL, and E[log r] = 0."""
    policy, view = taken(rows=20_000, shift=0.2)
    view.advantage = torch.full_like(view.advantage, -1.0)
    with torch.no_grad():
        log_rho, kl, std = written_out(policy, view)
        level = policy.family.schedule.level
        now, then = level(view.t), level(view.t_next)
        dt = now.sigma / (now.alpha + now.sigma) - then.sigma / (then.alpha + then.sigma)
        log_r = (GRPOGuard(clip=1e9).loss(policy, view)[0] * dt).log()
    error = log_rho.std() / len(view) ** 0.5
    assert kl.mean() > 10 * error
    assert abs(log_rho.mean() + kl.mean()) < 4 * error
    assert abs(log_r.mean()) < 4 * error * std[0]


@pytest.mark.parametrize("algorithm", ANCHORED, ids=lambda a: type(a).__name__)
def test_old_is_the_policy_that_acted_and_the_present_one_still_learns(algorithm, tiny):
    policy = stir(policy_of(tiny))
    algorithm.start(policy, 0)
    rollout = collect(policy, PROMPTS, ADDRESSES, d.DDIM(1.0), 3, 4, True)
    rollout.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    view = rollout.transition(1)
    with torch.no_grad():
        was, _ = view.replay(policy)
    assert (Replay(policy, view).log_ratio == 0).all()
    stir(policy, 0.02, seed=1)
    step = Replay(policy, view)
    assert torch.equal(step.mean_of("old"), was) and not torch.equal(step.mean, was)
    loss, metrics = wide(algorithm).loss(policy, view)
    assert (metrics["log_ratio"] != 0).all()
    loss.sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in policy.weights.values())


def wide(algorithm):
    return GRPOGuard(clip=1e9) if isinstance(algorithm, GRPOGuard) else FlowDPPO(delta=1e9)


@pytest.mark.parametrize("algorithm", [GRPO(), *ANCHORED], ids=lambda a: type(a).__name__)
def test_a_deterministic_solver_is_refused_with_the_option_to_change(algorithm):
    assert algorithm.refusal(d.CPS(0.8)) is None
    assert "rollout.solver" in algorithm.refusal(d.CPS(0.0)) and type(algorithm).__name__ in algorithm.refusal(d.CPS(0.0))


def learn(algorithm, seed, iterations=20, rows=128):
    """Where the mean of what the policy draws ends, when it is paid for drawing near TARGET; and the last metrics."""
    policy = Learnt()
    settings = Learning(lr=0.02, updates=2, epochs=2, micro_batch=rows, weight_decay=0.0)
    learner = Learner(policy, algorithm, settings, Accelerator(cpu=True))
    for iteration in range(iterations):
        algorithm.start(policy, iteration)
        rollout = acted(policy, rows, 1000 * seed + iteration)
        metrics = learner.improve(rollout, (seed, iteration), rows, lambda n: None)
    return (policy.end_mean() * policy.theta).item(), metrics


@pytest.mark.parametrize(
    "algorithm", [GRPO(clip=0.2), GRPOGuard(clip=0.05), FlowDPPO(delta=1e-2)], ids=lambda a: type(a).__name__
)
def test_it_finds_the_optimum_from_three_seeds(algorithm):
    """With four updates a rollout, so that the trust region has something to do."""
    for seed in range(3):
        mean, metrics = learn(algorithm, seed)
        assert abs(mean - TARGET) < 0.2, (seed, mean)
        assert metrics["kl/step_nats"] > 0


@pytest.mark.parametrize("narrow", [GRPOGuard(clip=1e-4), FlowDPPO(delta=1e-9)], ids=lambda a: type(a).__name__)
def test_a_narrow_trust_region_holds_the_updates_of_a_rollout_together(narrow):
    def distance(algorithm):
        policy = Learnt()
        learner = Learner(
            policy, algorithm, Learning(lr=0.01, epochs=8, micro_batch=256, weight_decay=0.0), Accelerator(cpu=True)
        )
        algorithm.start(policy, 0)
        metrics = learner.improve(acted(policy, 256), (0, 0), 256, lambda n: None)
        return (policy.theta - policy.selves["old"]).abs().item(), metrics["clip_fraction"]

    (held, stopped), (free, never) = distance(narrow), distance(wide(narrow))
    assert held < 0.8 * free and stopped > 0.2 and never == 0


def test_grpo_asks_for_groups():
    assert GRPO().smallest_group == 2 and DDPO().smallest_group == 1
