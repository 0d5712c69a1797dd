"""Preferences and best-of-n: against the published formulas in float64, which pictures are compared, and tasks whose optimum is known.

pytest tests/test_dpo.py
"""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from ddpo import diffusion as d
from ddpo.algorithms.dpo import D3PO, DiffusionDPO, _pairs
from ddpo.algorithms.forward import RAFT, RWR
from ddpo.learner import Learner
from ddpo.rollout import Rollout, collect
from ddpo.schedule import FlowMatching
from ddpo.sections import Learning
from ddpo.views import Noised, Pair, Transition
from tests.test_algorithms import STEPS, TARGET
from tests.test_forward import Located
from tests.test_grpo import Learnt
from tests.test_rollout import policy_of, stir
from tests.tiny import DDPM

B, SHAPE, D = 5, (2, 3, 3), 18
COLOURS = ["red", "blue", "green", "black"]
KINDS = {"eps": (DDPM, d.from_eps), "v": (DDPM, d.from_v), "flow": (FlowMatching(), d.from_velocity)}


def draw(seed, rows=2 * B):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Selves:
    """A policy whose selves predict fixed outputs for the 2 B rows; "now" carries a gradient."""

    def __init__(self, kind):
        self.kind, self.me = kind, "now"
        schedule, interpret = KINDS[kind]
        self.family = SimpleNamespace(schedule=schedule, interpret=interpret)
        self.x0, self.eps = draw(0), draw(1, B).repeat(2, 1, 1, 1)
        self.t = torch.tensor([5, 300, 500, 800, 990]).repeat(2)
        level = schedule.level(self.t)
        self.alpha, self.sigma = (v.view(-1, 1, 1, 1) for v in level)
        self.x = self.alpha * self.x0 + self.sigma * self.eps
        self.outs = {"now": (self.target() + 0.3 * draw(2)).requires_grad_(), "reference": self.target() + 0.3 * draw(3)}

    def target(self):
        """What such a network is pretrained to predict."""
        if self.kind == "eps":
            return self.eps
        return self.alpha * self.eps - self.sigma * self.x0 if self.kind == "v" else self.eps - self.x0

    def noised(self):
        return Noised(self.x0, self.x, self.t, self.sigma.flatten(), {}, torch.zeros(2 * B))

    def __call__(self, x, t, cond, guidance=1.0):
        assert guidance == 1.0
        return self.family.interpret(self.outs[self.me], x, self.family.schedule.level(t))

    @contextmanager
    def acting_as(self, name):
        self.me = name
        with torch.no_grad():
            yield
        self.me = "now"


def agree(loss, wanted, by):
    """Losses and their gradient."""
    torch.testing.assert_close(loss, wanted, rtol=1e-7, atol=1e-9)
    ours, theirs = (torch.autograd.grad(v.sum(), by, retain_graph=True)[0] for v in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_is_the_published_loss(kind):
    """Wallace et al. 2023, eq. 14 as their code has it: means over the latent, -beta / 2, in the network's own output."""
    selves, beta = Selves(kind), 7.0
    loss, metrics = DiffusionDPO(beta=beta).loss(selves, Pair(selves.noised(), torch.ones(B)))
    wanted, right = [], 0
    for w in range(B):
        now, ref, target = selves.outs["now"], selves.outs["reference"], selves.target()
        model_diff = ((now[w] - target[w]) ** 2).mean() - ((now[w + B] - target[w + B]) ** 2).mean()
        ref_diff = ((ref[w] - target[w]) ** 2).mean() - ((ref[w + B] - target[w + B]) ** 2).mean()
        inside = -0.5 * beta * (model_diff - ref_diff)
        wanted.append(-torch.log(1 / (1 + torch.exp(-inside))))
        right += inside.item() > 0
    agree(loss, torch.stack(wanted), selves.outs["now"])
    assert metrics["dpo/accuracy"].sum() == right and 0 < right < B


def step_of(selves, actor="reference"):
    """A step that this self took, its mean and density under each self, and std: the published ones of DDIM at eta 1."""
    then = selves.family.schedule.level(selves.t_next)
    a, s = (v.view(-1, 1, 1, 1) for v in then)
    std = s / selves.sigma * (selves.sigma**2 - (selves.alpha * s / a) ** 2).sqrt()

    def mean(out):
        if selves.kind == "eps":
            eps, x0 = out, (selves.x - selves.sigma * out) / selves.alpha
        elif selves.kind == "v":
            x0 = selves.alpha * selves.x - selves.sigma * out
            eps = (selves.x - selves.alpha * x0) / selves.sigma
        else:
            x0 = selves.x - selves.sigma * out
            eps = x0 + out
        return a * x0 + (s**2 - std**2).sqrt() * eps

    x_next = (mean(selves.outs[actor]) + std * draw(4)).detach()
    means = {name: mean(out) for name, out in selves.outs.items()}
    log_probs = {name: torch.distributions.Normal(mu, std).log_prob(x_next).mean((1, 2, 3)) for name, mu in means.items()}
    view = Transition(selves.x, x_next, selves.t, selves.t_next, log_probs[actor] - 0.5, d.DDIM(1.0), {}, torch.zeros(2 * B))
    return view, log_probs, means, std


@pytest.mark.parametrize("kind", KINDS)
def test_d3po_is_the_published_loss(kind):
    """Yang et al. 2023, as their code has it: log-probabilities averaged over the latent, ratios to the base model clipped."""
    selves, beta = Selves(kind), 3.0
    selves.t_next = selves.t - 4
    selves.outs["now"] = (selves.outs["reference"] + 0.02 * draw(5)).requires_grad_()
    view, log_probs, *_ = step_of(selves)
    ratio = (log_probs["now"] - log_probs["reference"]).exp()
    clip = (ratio - 1).abs().median().item() * 1.001
    loss, metrics = D3PO(beta=beta, clip=clip).loss(selves, Pair(view, torch.ones(B)))
    logs = ratio.clamp(1 - clip, 1 + clip).log()
    agree(loss, -torch.sigmoid(beta * (logs[:B] - logs[B:])).log(), selves.outs["now"])
    assert torch.equal(metrics["clip_fraction"], ((ratio - 1).abs() > clip).float())
    assert 0 < metrics["clip_fraction"].mean() < 1
    torch.testing.assert_close(metrics["log_ratio"], log_probs["now"].detach() - view.log_prob)  # to the policy that acted


def test_at_the_base_model_the_better_picture_is_learned_and_the_worse_unlearned_alike():
    selves = Selves("eps")
    selves.outs["reference"] = selves.outs["now"].detach()
    loss, _ = DiffusionDPO(beta=8.0).loss(selves, Pair(selves.noised(), torch.ones(B)))
    torch.testing.assert_close(loss, torch.full((B,), math.log(2), dtype=torch.float64))
    (got,) = torch.autograd.grad(loss.sum(), selves.outs["now"])
    fine_tuning = 2 * (selves.outs["now"] - selves.eps).detach() / D  # what lowers the error
    torch.testing.assert_close(got, 8.0 / 4 * torch.cat([fine_tuning[:B], -fine_tuning[B:]]), rtol=1e-6, atol=1e-9)

    selves.t_next = selves.t - 4
    view, log_probs, *_ = step_of(selves)
    view.log_prob = log_probs["now"].detach()
    loss, metrics = D3PO(beta=8.0).loss(selves, Pair(view, torch.ones(B)))
    assert metrics["log_ratio"].abs().max() < 1e-12 and (metrics["clip_fraction"] == 0).all()
    (got,) = torch.autograd.grad(loss.sum(), selves.outs["now"])
    (likelier,) = torch.autograd.grad(log_probs["now"].sum(), selves.outs["now"])
    torch.testing.assert_close(got, 8.0 / 2 * torch.cat([-likelier[:B], likelier[B:]]), rtol=1e-6, atol=1e-9)


def test_a_pair_that_is_not_decided_teaches_nothing():
    selves = Selves("v")
    decided = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    loss, metrics = DiffusionDPO().loss(selves, Pair(selves.noised(), decided))
    (gradient,) = torch.autograd.grad(loss.sum(), selves.outs["now"])
    assert torch.equal(gradient.flatten(1).any(1), decided.bool().repeat(2))
    assert (metrics["dpo/accuracy"][decided == 0] == 0.5).all() and (loss[decided == 0] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Which pictures are compared


def drawn(policy, groups, size, trajectory=False, seed=0):
    """A rollout of groups, rewarded for being near TARGET on average."""
    addresses = [(seed, g, m) for g in range(groups) for m in range(size)]
    prompts = [f"a cat on a {COLOURS[g % 4]} background" for g in range(groups) for _ in range(size)]
    solver = d.DDIM(1.0 if trajectory else 0.0)
    rollout = collect(policy, prompts, addresses, solver, STEPS, groups * size, trajectory)
    rollout.rewards = -((rollout.latents[:, -1].flatten(1).mean(1) - TARGET) ** 2)
    rollout.advantages = (rollout.rewards - rollout.rewards.mean()) / rollout.rewards.std()
    return rollout


def test_a_groups_best_meets_its_worst_or_all_meet():
    rollout = drawn(Located(), 3, 3)
    nan = math.nan
    rollout.rewards = torch.tensor([0.1, 0.3, 0.2, 5.0, 5.0, 5.0, nan, 2.0, 1.0])
    winners, losers, decided = _pairs(rollout, "extremes")
    assert winners.tolist() == [1, 3, 7] and losers.tolist() == [0, 5, 8] and decided.tolist() == [True, False, True]
    winners, losers, decided = _pairs(rollout, "all")
    met = {(w, s) for w, s, yes in zip(winners.tolist(), losers.tolist(), decided.tolist(), strict=True) if yes}
    assert met == {(1, 2), (1, 0), (2, 0), (7, 8)} and len(winners) == 9
    rollout.rewards = torch.full((9,), nan)
    lone = rollout[torch.tensor([0, 3])]  # of groups that lost the others
    assert len(_pairs(lone, "all")[0]) == 0 and list(D3PO(pairs="all").views(lone, 4, torch.Generator())) == []
    for pairs, number in (("extremes", 3), ("all", 9)):
        winners, losers, decided = _pairs(rollout, pairs)
        assert len(winners) == number and not decided.any()


def test_both_of_a_pair_are_noised_alike_and_groups_differ():
    rollout = drawn(Located(), 4, 3)
    views = list(DiffusionDPO(times=2).views(rollout, 4, torch.Generator().manual_seed(0)))
    assert [len(v) for v in views] == [2, 2, 2, 2]
    times = set()
    for view in views:
        level = DDPM.level(view.both.t)
        alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in level)
        winner, loser = ((view.both.x - alpha * view.both.x0) / sigma).chunk(2)
        torch.testing.assert_close(winner, loser, atol=1e-4, rtol=1e-4)
        assert torch.equal(*view.both.t.chunk(2)) and not torch.allclose(winner[0], winner[1], atol=0.1)
        times |= set(view.both.t.tolist())
    assert len(times) == 8 and sum(t < 500 for t in times) == 4  # one of each half, for each of four groups
    better = torch.cat([v.both.x0.flatten(1).mean(1) for v in views[::2]]).view(2, 2, 2)
    assert ((better[:, 0] - TARGET).abs() < (better[:, 1] - TARGET).abs()).all()


def test_best_of_n_keeps_the_best_of_every_group():
    rollout = drawn(Located(), 2, 4)
    rollout.rewards = torch.tensor([0.1, 0.9, 0.5, 0.4, math.nan, math.nan, -3.0, math.nan])

    def kept(best):
        return [(v.x0, v.advantage) for v in RAFT(best=best, times=1).views(rollout, 8, torch.Generator())]

    one, two = ([1, 6], [1, 1]), ([1, 2, 4, 6], [1, 1, 0, 1])
    for best, (rows, counts) in [(1, one), (0.25, one), (2, two), (0.5, two)]:
        ((x0, weight),) = kept(best)
        assert torch.equal(x0, rollout.latents[rows, -1]) and weight.tolist() == counts
    assert len(kept(9)[0][0]) == 8


def test_all_of_n_is_plain_fine_tuning():
    """The diffusion loss, which is that of reward-weighted regression where all weights are one."""
    rollout = drawn(Located(), 2, 4)
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    raft, plain = RAFT(best=1.0), RWR()
    ours = list(raft.views(rollout, 4, draws[0]))
    rollout.advantages = torch.zeros(8)
    theirs = list(plain.views(rollout, 4, draws[1]))
    policy = Located()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.t, b.t)
        (loss, _), (wanted, _) = raft.loss(policy, a), plain.loss(policy, b)
        assert torch.equal(loss, wanted)
        written = ((a.belief(policy, 1.0) - a.x0) / a.sigma.view(-1, 1, 1, 1)).square().flatten(1).mean(1)
        torch.testing.assert_close(loss, written)


# ----------------------------------------------------------------------------------------------------------------------
# They learn


class Guided(Located):
    """The forward toy as a family that says how its output is read."""

    def __init__(self):
        super().__init__()
        self.family.interpret = d.from_eps


class Stepping(Learnt):
    """The toy of trajectories."""

    def end(self):
        return (self.end_mean() * self.theta).item()


def improve(policy, algorithm, seed, iterations, lr, trajectory=False):
    learner = Learner(policy, algorithm, Learning(lr=lr, micro_batch=128, weight_decay=0.0), Accelerator(cpu=True))
    for iteration in range(iterations):
        rollout = drawn(policy, 16, 4, trajectory, seed * 1000 + iteration)
        metrics = learner.improve(rollout, (seed, iteration), 128, lambda n: None)
    return metrics


@pytest.mark.parametrize(
    ("algorithm", "near"), [(DiffusionDPO(beta=20.0), 0.15), (RAFT(), 0.25)], ids=lambda a: type(a).__name__
)
def test_it_finds_the_optimum_from_three_seeds_without_noise_in_acting(algorithm, near):
    for seed in range(3):
        policy = Guided()
        metrics = improve(policy, algorithm, seed, 25, 0.05)
        end = drawn(policy, 100, 4, seed=9).latents.mean().item()
        assert abs(end - TARGET) < near, (seed, end)
        assert metrics["kl/step_nats"] > 0


def test_d3po_finds_the_optimum_from_three_seeds():
    for seed in range(3):
        policy = Stepping()
        metrics = improve(policy, D3PO(clip=0.9), seed, 25, 0.015, trajectory=True)
        assert abs(policy.end() - TARGET) < 0.2, (seed, policy.end())
        assert abs(metrics["ratio/mean"] - 1) < 0.1 and metrics["kl/step_nats"] > 0


def test_a_dear_distance_from_the_base_model_holds_it_back():
    ends = []
    for beta in (20.0, 20000.0):
        policy = Guided()
        improve(policy, DiffusionDPO(beta=beta), 0, 15, 0.05)
        ends.append(drawn(policy, 100, 4, seed=9).latents.mean().item())
    assert abs(ends[1]) < 0.5 * abs(ends[0]), ends


# ----------------------------------------------------------------------------------------------------------------------
# On a pipeline

ALGORITHMS = pytest.mark.parametrize("algorithm", [DiffusionDPO(beta=50.0), D3PO(), RAFT()], ids=["DPO", "D3PO", "RAFT"])


def change(folder, algorithm, micro_batch, dtype="float32"):
    """What one update makes of the weights, by micro-batch; the first ratio is checked."""
    policy = stir(policy_of(folder, dtype=dtype))
    policy.remember("reference")
    stir(policy, 0.02, seed=1)
    rollout = drawn(policy, 2, 4, algorithm.needs_trajectory)
    before = [w.detach().clone() for w in policy.weights.values()]
    learner = Learner(policy, algorithm, Learning(lr=1e-2, micro_batch=micro_batch, weight_decay=0.0), Accelerator(cpu=True))
    learner.optimizer = torch.optim.SGD(learner.weights, 1.0)
    learner.improve(rollout, (0, 0), 8, lambda n: None)
    return [w.detach() - b for w, b in zip(policy.weights.values(), before, strict=True)]


@ALGORITHMS
def test_gradients_reach_every_weight_whatever_the_micro_batch(algorithm, tiny):
    whole, parts = change(tiny, algorithm, 8), change(tiny, algorithm, 2)
    assert all(w.any() for w in whole)
    a, b = (torch.cat([w.flatten() for w in c]) for c in (whole, parts))
    assert (a - b).norm() <= 1e-4 * a.norm()


def test_log_probabilities_are_recomputed_in_the_batch_shape_of_every_view(tiny, monkeypatch):
    """In half precision another shape is another kernel, and the first ratio would not be one."""
    policy = policy_of(tiny)
    rollout = drawn(policy, 3, 4, True)
    for size, rows in [(12, 6), (8, 6), (4, 2), (1, 2)]:
        assert {len(part) for part in D3PO().together(rollout, size)} == {rows}
        assert {len(view.both) for view in D3PO().views(rollout, size, torch.Generator())} == {rows}
    shapes, replay = [], Transition.replay
    monkeypatch.setattr(Transition, "replay", lambda view, policy: shapes.append(len(view)) or replay(view, policy))
    before = rollout.log_probs.clone()
    rollout.recompute_log_probs(policy, D3PO().together(rollout, 4))
    assert set(shapes) == {2}
    torch.testing.assert_close(rollout.log_probs, before, atol=1e-5, rtol=1e-5)


def test_in_half_precision_too_the_first_ratio_is_one(tiny, monkeypatch):
    sizes, recompute = [], Rollout.recompute_log_probs
    monkeypatch.setattr(
        Rollout,
        "recompute_log_probs",
        lambda r, policy, together: sizes.extend(map(len, together)) or recompute(r, policy, together),
    )
    monkeypatch.setattr("ddpo.learner.LARGEST_LOG_RATIO", 0.0)
    change(tiny, D3PO(), 8, "bfloat16")
    assert set(sizes) == {4}


def test_what_it_cannot_use_is_refused_with_the_option_to_change():
    assert "rollout.solver" in D3PO().refusal(d.DDIM(0.0)) and D3PO().refusal(d.DDIM(1.0)) is None
    assert DiffusionDPO().refusal(d.DDIM(0.0)) is None
    assert D3PO.smallest_group == DiffusionDPO.smallest_group == RAFT.smallest_group == 2
