"""The losses against their papers' formulas in what the network itself says, for eps, v and a flow's velocity.

tests/test_forward.py, test_elbo.py and test_sampler.py look at beliefs, test_grpo.py at one parameterisation. Here nothing is taken from
the code under test: a network's output is turned into the paper's velocity, or into the mean of a step, by the parameterisation's own
identity, in float64, and the gradient is the output's.
"""

from dataclasses import replace

import pytest
import torch

from ddpo.algorithms.ddpo import DDPO, ScoreFunction
from ddpo.algorithms.dpok import DPOK
from ddpo.algorithms.efm import EFM
from ddpo.algorithms.elbo import EPG
from ddpo.algorithms.forward import AWM, NFT, RAFT, RWR
from ddpo.algorithms.grpo import FlowDPPO, GRPOGuard
from ddpo.algorithms.ram import RAM, Bridged
from tests import test_dpo
from tests.test_dpo import KINDS, agree, draw, step_of
from tests.test_forward import mean

ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, 7.0, -7.0, 0.0, 3.0, -0.1, 1.5, -4.0], dtype=torch.float64)


class Selves(test_dpo.Selves):
    """Four selves, by their outputs."""

    def __init__(self, kind):
        super().__init__(kind)
        self.outs |= {name: self.outs["now"].detach() + 0.02 * draw(i) for i, name in ((4, "old"), (5, "ema"))}
        self.weights = {"w": torch.ones(1)}
        view = self.noised()
        self.view = Bridged(view.x0, view.x, view.t, view.sigma, {}, ADVANTAGE, points=[])

    def selves(self):
        return {"old/w": torch.zeros(1)}  # another than now

    def x0_of(self, name):
        out, a, s = self.outs[name], self.alpha, self.sigma
        return {"eps": (self.x - s * out) / a, "v": a * self.x - s * out, "flow": self.x - s * out}[self.kind]

    def v_of(self, name):
        out = self.outs[name]
        return self.alpha * out - self.sigma * self.x0_of(name) if self.kind == "eps" else out

    @property
    def v(self):
        return self.eps - self.x0 if self.kind == "flow" else self.alpha * self.eps - self.sigma * self.x0


def nft(s, a):
    beta, share = 0.5, (a.clamp(-5, 5) / 5 / 2 + 0.5).view(-1, 1, 1, 1)
    now, old = s.v_of("now"), s.v_of("old")
    sides = [(r, (1 - sign * beta) * old + sign * beta * now) for sign, r in ((1, share), (-1, 1 - share))]
    losses = []
    for r, v in sides:  # the paper's |v - target|^2 in x0, over the error's own mean size, as its code has it
        error = s.sigma * (s.v - v)
        losses.append(r.flatten() * mean(error**2) / mean(error.detach().abs()))
    return 5 / beta * (losses[0] + losses[1]) + 0.2 * mean((now - s.v_of("reference")) ** 2)


def awm(s, a):
    likelihood = -(s.sigma.flatten() / 0.25) * (mean((s.v_of("now") - s.v) ** 2) + 1e-10) ** 0.25
    return -a.clamp(-5, 5) / 5 * likelihood + 2 * mean((s.v_of("now") - s.v_of("ema")) ** 2)


def rwr(s, a):
    return (a.clamp(-5, 5) / 2).exp().clamp(max=3) * mean((s.v_of("now") - s.v) ** 2)


def raft(s, a):
    return a * mean((s.v_of("now") - s.v) ** 2)


def epg(s, a):
    def log_pi(name):
        error = s.v_of(name) - s.v
        return -s.sigma.flatten() * mean(error**2) / mean(error.detach().abs())

    rho = (log_pi("now") - log_pi("old")).exp().detach()
    return -rho * a.clamp(-5, 5) * log_pi("now") + 0.3 * mean((s.v_of("now") - s.v_of("reference")) ** 2)


def ram(s, a):
    target = s.v_of("reference") + (a / 3).view(-1, 1, 1, 1) * (s.v - s.v_of("old"))
    return mean((s.v_of("now") - target) ** 2)


def efm(s, a):
    return (a / 3).exp() * mean((s.v_of("now") - s.v) ** 2)


PUBLISHED = {
    "NFT": (NFT(beta=0.5, kl=0.2), nft), "AWM": (AWM(kl=0.0, proximal=2.0), awm), "RWR": (RWR(temperature=2.0, max_weight=3.0), rwr),
    "RAFT": (RAFT(), raft), "EPG": (EPG(kl=0.3), epg), "RAM": (RAM(temperature=3.0), ram),
    "EFM": (EFM(temperature=3.0), efm),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_is_the_papers_in_the_networks_own_output(name, kind):
    selves = Selves(kind)
    algorithm, formula = PUBLISHED[name]
    loss, _ = algorithm.loss(selves, selves.view)
    agree(loss, formula(selves, ADVANTAGE), selves.outs["now"])


# ----------------------------------------------------------------------------------------------------------------------
# The same for what looks at steps


class Step:
    """One that was taken by the self "old", from which the present one has moved a little, in the papers' quantities."""

    def __init__(self, kind):
        self.selves = Selves(kind)
        self.selves.t_next = self.selves.t - 4
        outs = self.selves.outs
        outs["now"] = (outs["old"] + 0.02 * draw(6)).requires_grad_()
        self.view, logs, self.means, self.std = step_of(self.selves, "old")
        self.view.log_prob, self.view.advantage = logs["old"].detach(), ADVANTAGE
        self.log_rho, self.a = logs["now"] - logs["old"], ADVANTAGE.clamp(-5, 5)
        s, s_next = self.flow_time(self.selves.t), self.flow_time(self.selves.t_next)
        self.dt = s - s_next

    def flow_time(self, t):
        level = self.selves.family.schedule.level(t)
        return level.sigma / (level.alpha + level.sigma)

    def kl(self, name):
        return ((self.means["now"] - self.means[name]) ** 2 / (2 * self.std**2)).mean((1, 2, 3))


def score_function(s):
    return ScoreFunction(kl=0.3), -s.a * s.log_rho + 0.3 * s.kl("reference")


def ppo(s, algorithm, ratio):
    clip = (ratio - 1).abs().median().item() * 1.0001  # some ratios are outside of it
    return algorithm(clip=clip), -torch.minimum(s.a * ratio, s.a * ratio.clamp(1 - clip, 1 + clip))


def ddpo(s):
    return ppo(s, DDPO, s.log_rho.exp())


def dpok(s):
    algorithm, loss = ppo(s, DPOK, s.log_rho.exp())
    return replace(algorithm, kl=0.2), loss + 0.2 * s.kl("reference")


def guard(s):
    algorithm, loss = ppo(s, GRPOGuard, (s.std.flatten() * (s.log_rho + s.kl("old"))).exp())
    return algorithm, loss / s.dt


def dppo(s):
    delta = s.kl("old").median().item() * 1.0001
    stopped = (s.a * (s.log_rho.exp() - 1) > 0) & (s.kl("old") > delta)
    return FlowDPPO(delta=delta), -s.a * s.log_rho.exp() * ~stopped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("published", [score_function, ddpo, dpok, guard, dppo], ids=lambda f: f.__name__)
def test_the_loss_of_a_step_is_the_papers_in_the_networks_own_output(published, kind):
    step = Step(kind)
    algorithm, wanted = published(step)
    loss, metrics = algorithm.loss(step.selves, step.view)
    agree(loss, wanted, step.selves.outs["now"])
    if published is not score_function:
        assert 0 < metrics["clip_fraction"].mean() < 1
