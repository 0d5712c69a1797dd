"""ELBO-PG's links: the published formulas in float64, the ratio, what they have in common with other losses, and the toy.

pytest tests/test_elbo.py
"""

import pytest
import torch

from ddpo import diffusion as d
from ddpo.algorithms.elbo import EPG, PAR, PEPG
from ddpo.algorithms.forward import AWM, NFT, has_moved
from ddpo.rollout import collect
from tests.test_algorithms import TARGET
from tests.test_forward import ALPHA, SIGMA, Located, Selves, draw, improve, mean
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of, stir

LINKS = [EPG(), PEPG(), PAR()]
named = pytest.mark.parametrize("algorithm", LINKS, ids=lambda a: type(a).__name__)


class Moving(Selves):
    """Selves that know whether they have moved; now and then by little, so that no ratio is extreme."""

    def __init__(self, moved=True):
        super().__init__()
        now = self.beliefs["now"].detach()
        self.beliefs["old"] = now + 0.05 * draw(9) * moved
        self.weights = {"w": torch.ones(1)}
        self.selves = lambda: {"old/w": torch.ones(1) - float(moved)}
        self.asked = []

    def acting_as(self, name):
        self.asked.append(name)
        return super().acting_as(name)


def outputs(policy, belief, kind):
    """What a network that predicts eps, v or a flow's velocity says of this clean latent, and what it should say, less that."""
    a, s = (v.view(-1, 1, 1, 1) for v in (ALPHA, SIGMA))
    wrong = belief - policy.x0
    return {"eps": -a / s * wrong, "v": -(a**2 / s + s) * wrong, "flow": -wrong / s}[kind]


def log_pi(policy, belief, kind):
    """-t d |dv|^2 / sg|dv|_1 with mean for sum and t = sigma, from the network's own error (algorithms.md 2.3)."""
    per_velocity = {"eps": 1 / ALPHA, "v": torch.ones_like(ALPHA), "flow": torch.ones_like(ALPHA)}[kind].view(-1, 1, 1, 1)
    error = outputs(policy, belief, kind) * per_velocity
    return -SIGMA * mean(error**2) / mean(error.detach().abs())


def written_out(algorithm, policy, kind):
    now, old = (log_pi(policy, policy.beliefs[n], kind) for n in ("now", "old"))
    advantage, log_rho = policy.view.advantage.clamp(-5, 5), now - old.detach()
    rho, held = log_rho.exp().detach(), log_rho.detach()
    formulas = {EPG: -rho * advantage * now, PEPG: -(advantage - held) * rho * now, PAR: rho * (advantage - log_rho) ** 2 / 2}
    dv = (policy.beliefs["now"] - policy.beliefs["reference"]) / SIGMA.view(-1, 1, 1, 1)
    return formulas[type(algorithm)] + algorithm.kl * mean(dv**2)


@named
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_it_is_the_published_formula(algorithm, kind):
    policy = Moving()
    loss, metrics = algorithm.loss(policy, policy.view)
    assert metrics["log_ratio"].abs().min() > 0
    expected = written_out(algorithm, policy, kind)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    ours, theirs = (torch.autograd.grad(v.sum(), policy.beliefs["now"])[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def gradient(algorithm, policy):
    loss, _ = algorithm.loss(policy, policy.view)
    return torch.autograd.grad(loss.sum(), policy.beliefs["now"])[0]


def test_the_regression_has_the_gradient_of_the_penalised_link_and_at_temperature_zero_that_is_the_plain_one():
    policy = Moving()
    torch.testing.assert_close(gradient(PAR(temperature=3.0), policy), gradient(PEPG(temperature=3.0), policy))
    torch.testing.assert_close(gradient(PEPG(temperature=0.0), policy), gradient(EPG(), policy))
    assert not torch.allclose(gradient(PEPG(), policy), gradient(EPG(), policy))


@named
def test_the_ratio_is_one_and_nobody_is_asked_before_the_first_update(algorithm):
    policy = Moving(moved=False)
    _, metrics = algorithm.loss(policy, policy.view)
    assert (metrics["log_ratio"] == 0).all() and "old" not in policy.asked
    policy = Moving()
    algorithm.loss(policy, policy.view)
    assert "old" in policy.asked


@named
def test_on_a_network_the_ratio_is_to_the_policy_that_acted_and_every_weight_learns(algorithm, tiny):
    policy = stir(policy_of(tiny))
    algorithm.start(policy, 0)
    rollout = collect(policy, PROMPTS, ADDRESSES, d.DDIM(0.0), 3, 4, False)
    rollout.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def learn(size):
        for view in algorithm.views(rollout, size, torch.Generator().manual_seed(0)):
            loss, metrics = algorithm.loss(policy, view)
            loss.sum().backward()
        grads = [w.grad.clone() for w in policy.weights.values()]
        for w in policy.weights.values():
            w.grad = None
        return grads, metrics["log_ratio"]

    assert (learn(4)[1] == 0).all() and not has_moved(policy, "old")
    stir(policy, 0.02, seed=1)
    (whole, ratio), (halves, _) = learn(4), learn(2)
    assert (ratio != 0).all() and has_moved(policy, "old")
    for one, other in zip(whole, halves, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


class Toy(Located):
    def selves(self):
        return {f"{name}/m": m for name, m in self.kept.items()}


@named
def test_it_finds_the_optimum_from_three_seeds(algorithm, monkeypatch):
    monkeypatch.setattr("tests.test_forward.Located", Toy)
    for seed in range(3):
        end, _ = improve(algorithm, seed, iterations=40)
        assert abs(end - TARGET) < 0.15, (seed, end)


# ----------------------------------------------------------------------------------------------------------------------
# One loss? docs/algorithms.md


def quadratic(policy, own=0.0, old=0.0, ema=0.0, reference=0.0):
    """(B,) 2 A <x0_old - x0, d> + (own A + old)|d|^2 + ema |d_ema|^2 + reference |d_reference|^2, as gradients to the belief."""
    a = policy.view.advantage.clamp(-5, 5).view(-1, 1, 1, 1)
    now, x0, kept = policy.beliefs["now"].detach(), policy.x0, policy.beliefs
    pull = 2 * a * (kept["old"] - x0) + 2 * (own * a + old) * (now - kept["old"])
    return pull + 2 * ema * (now - kept["ema"]) + 2 * reference * (now - kept["reference"])


def per_element(policy, gradient):
    return gradient * policy.x0[0].numel()


def test_unweighted_all_four_are_one_quadratic():
    policy, beta, temperature = Moving(), 0.5, 3.0
    now, view = policy.beliefs["now"], policy.view
    a = view.advantage.clamp(-5, 5)
    square = lambda v: mean(v**2)  # noqa: E731
    old, x0, step = policy.beliefs["old"], policy.x0, beta * (now - policy.beliefs["old"])
    share = a / 10 + 0.5
    losses = {
        "nft": (5 / beta * (share * square(old + step - x0) + (1 - share) * square(old - step - x0)), {"old": 5 * beta}),
        "awm": (a * square(now - x0) + 4.0 * square(now - policy.beliefs["ema"]), {"own": 1.0, "ema": 4.0}),
        "epg": (a * square(now - x0) + 0.3 * square(now - policy.beliefs["reference"]), {"own": 1.0, "reference": 0.3}),
    }
    ram = square(now - (policy.beliefs["reference"] + (a / temperature).view(-1, 1, 1, 1) * (x0 - old))) * temperature
    losses["ram"] = (ram, {"reference": temperature})
    for name, (loss, curvatures) in losses.items():
        found = per_element(policy, torch.autograd.grad(loss.sum(), now)[0])
        torch.testing.assert_close(found, quadratic(policy, **curvatures), rtol=1e-9, atol=1e-12, msg=name)


def on_policy_slopes(algorithm):
    """(B,) the gradient at the policy that acted over that of 2 A <x0_old - x0, d>, and (B,) the sample's mean error."""
    policy = Moving(moved=False)
    policy.beliefs["reference"] = policy.beliefs["ema"] = policy.beliefs["old"]
    found = per_element(policy, gradient(algorithm, policy))
    keep = policy.view.advantage != 0
    slope = (found / quadratic(policy)).flatten(1)[keep]
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope))  # a number a sample: the same direction
    return slope[:, 0], (policy.beliefs["old"] - policy.x0).flatten(1)[keep]


def test_with_their_weights_they_agree_in_direction_and_not_in_the_weight_of_a_sample():
    """On policy; NFT's and EPG's weight is one over the sample's mean error, AWM's a power of its mean square."""
    sigma, error = SIGMA[:-1], on_policy_slopes(EPG(kl=0.0))[1]
    size, power = error.abs().mean(1), (error.square().mean(1) / sigma**2 + 1e-10) ** -0.75
    torch.testing.assert_close(on_policy_slopes(NFT(kl=0.0))[0], 1 / size)
    torch.testing.assert_close(on_policy_slopes(EPG(kl=0.0))[0], 1 / size)
    torch.testing.assert_close(on_policy_slopes(AWM(kl=0.0))[0], power / sigma / 5)  # its advantages are scaled to 1


def test_off_policy_self_normalised_weights_bend_nft():
    """Its two errors have weights of their own: along a line from the old belief its gradient is not linear."""
    policy, gradients = Moving(), []
    for share in (0.0, 1.0, 2.0):
        now = (policy.beliefs["old"] + share * draw(11)).requires_grad_()
        policy.beliefs["now"] = now
        gradients.append(gradient(NFT(kl=0.0), policy))
    bend = gradients[2] - 2 * gradients[1] + gradients[0]
    assert bend.abs().max() > 0.05 * gradients[1].abs().max()


def test_a_weight_that_looks_at_the_sample_moves_the_fixed_point():
    """The mean of 1 / |x0 - m| (x0 - m) is zero at the median, not at the mean: such a policy believes in no posterior mean."""
    x = -torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    assert abs(((x - x.mean()) / (x - x.mean()).abs()).mean()) > 0.2
    assert abs(((x - x.median()) / (x - x.median()).abs().clamp(min=1e-9)).mean()) < 0.01
