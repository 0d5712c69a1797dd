"""Reward gradients: against finite differences, diffusers' own steps, the papers' loops, and a task whose optimum is known.

pytest tests/test_draft.py
"""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import nn

from ddpo import diffusion as d
from ddpo import estimate
from ddpo.advantage import PerPrompt
from ddpo.algorithms.draft import AlignProp, DRaFT, DRaFTLV, ReFL
from ddpo.config import ConfigError
from ddpo.experiment import read
from ddpo.learner import Learner
from ddpo.models._common import _visit
from ddpo.models.flux import Flux
from ddpo.models.sd import StableDiffusion
from ddpo.models.sd3 import StableDiffusion3
from ddpo.noise import normal
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from ddpo.schedule import FlowMatching
from ddpo.sections import Learning
from rewards import Part, RewardError, Rubric
from rewards.pixels import Brightness, Contrast
from tests.test_algorithms import STEPS, TARGET
from tests.test_forward import Located
from tests.test_rollout import ADDRESSES, PROMPTS, stir
from tests.test_trainer import ODE, lines, trainer_of, weights
from tests.tiny import DDPM, save_flux, save_sd3

ROOT = Path(__file__).parent.parent
KINDS = {"eps": (DDPM, d.from_eps), "v": (DDPM, d.from_v), "flow": (FlowMatching(), d.from_velocity)}
SOLVERS = {"ode": d.DDIM(0.0), "ddim": d.DDIM(1.0), "cps": d.CPS()}


class Small:
    """A network of a few float64 weights, nonlinear in all that it is given, and a decoder that is nonlinear too."""

    def __init__(self, kind="eps", seed=0):
        g = torch.Generator().manual_seed(seed)
        shapes = {"enter": (6, 2), "time": (6,), "text": (6,), "leave": (2, 6)}
        self.weights = {k: nn.Parameter(0.5 * torch.randn(s, generator=g, dtype=torch.float64)) for k, s in shapes.items()}
        schedule, self.interpret = KINDS[kind]
        self.family = SimpleNamespace(
            schedule=schedule, latent_shape=(2, 3, 3), device=torch.device("cpu"), dtype=torch.float32,
            encode=lambda prompts: {"text": torch.tensor([[float(len(p))] for p in prompts])}, decode=self.decode,
            interpret=self.interpret,
        )  # fmt: skip

    def output(self, x, t, text):
        w = self.weights
        inner = torch.einsum("hc,bcij->bhij", w["enter"], x.double())
        inner = inner + (w["time"] * t.double()[:, None] / 1000 + w["text"] * text.double() / 20)[:, :, None, None]
        return torch.einsum("ch,bhij->bcij", w["leave"], inner.tanh())

    def __call__(self, x, t, cond, guidance=None):
        return self.interpret(self.output(x, t, cond["text"]), x.double(), self.family.schedule.level(t))

    @staticmethod
    def decode(latents):
        return latents[:, [0, 1, 0]].div(3).sigmoid()


def reward(images, prompts, metadata):
    """Smooth, and of prompt and metadata too."""
    wanted = torch.tensor([len(p) / 40 + m.get("more", 0.0) for p, m in zip(prompts, metadata, strict=True)])
    return -((images.flatten(1).cos().mean(1) - wanted) ** 2)


def rollout_of(policy, solver=SOLVERS["ode"], steps=5):
    rollout = collect(policy, PROMPTS, ADDRESSES, solver, steps, 4, True)
    rollout.reward, rollout.metadata = reward, [{"more": 0.1 * i} for i in range(4)]
    rollout.rewards, rollout.advantages = torch.zeros(4), torch.zeros(4)
    return rollout


def gradient(algorithm, policy, rollout, size=4, seed=0):
    """{weight: gradient} of the sum over all views and rows, and how many rows there were."""
    rows = 0
    for w in policy.weights.values():
        w.grad = None
    for view in algorithm.views(rollout, size, torch.Generator().manual_seed(seed)):
        loss, metrics = algorithm.loss(policy, view)
        assert loss.shape == (len(view),) and not metrics["reward/graded"].requires_grad
        loss.sum().backward()
        rows += len(view)
    return {name: w.grad.clone() for name, w in policy.weights.items()}, rows


def same(got, wanted, rtol=1e-6):
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=rtol, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The view


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_taken_again_end_where_they_ended(kind, solver):
    policy = Small(kind)
    rollout = rollout_of(policy, SOLVERS[solver])
    for steps in range(1, 6):
        end = rollout.tail(steps).end(policy)
        assert end.requires_grad
        torch.testing.assert_close(end, rollout.latents[:, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("solver", "steps"), [("ode", 1), ("cps", 1), ("ode", 3), ("cps", 3)])
def test_the_gradient_is_that_of_finite_differences(kind, solver, steps):
    policy = Small(kind)
    rollout = rollout_of(policy, SOLVERS[solver])
    got, _ = gradient(DRaFT(steps), policy, rollout)

    def value():
        view = rollout.tail(steps)
        return -view.graded(policy, view.end(policy)).sum()

    for name, weight in policy.weights.items():
        way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            weight += 1e-5 * way
            above = value()
            weight -= 2e-5 * way
            slope = (above - value()) / 2e-5
            weight += 1e-5 * way
        assert (got[name] * way).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-10)


def scheduler_of(policy, steps, prediction="epsilon"):
    """diffusers' own, in float64."""
    made = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type=prediction,
    )  # fmt: skip
    made.alphas_cumprod = policy.family.schedule.alphas_cumprod
    made.final_alpha_cumprod = torch.tensor(policy.family.schedule.final_alpha_cumprod, dtype=torch.float64)
    made.set_timesteps(steps)
    return made


def slow_gradient(policy, ends):
    loss = -sum(reward(policy.decode(x), PROMPTS, [{"more": 0.1 * i} for i in range(4)]).sum() for x in ends)
    return dict(zip(policy.weights, torch.autograd.grad(loss, list(policy.weights.values())), strict=True))


@pytest.mark.parametrize(("kind", "prediction"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_draft_is_autograd_through_a_loop_over_diffusers_own_steps(kind, prediction, eta, steps):
    policy = Small(kind)
    got, _ = gradient(DRaFT(steps), policy, rollout_of(policy, d.DDIM(eta)))
    scheduler, text = scheduler_of(policy, 5, prediction), policy.family.encode(PROMPTS)["text"]
    x = normal([(*a, "start") for a in ADDRESSES], (2, 3, 3)).double()
    for i, t in enumerate(scheduler.timesteps):
        x = x.detach() if i == 5 - steps else x
        noise = normal([(*a, "step", i) for a in ADDRESSES], (2, 3, 3)).double()
        x = scheduler.step(
            policy.output(x, t.expand(4), text), t, x, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
    same(got, slow_gradient(policy, [x]))


@pytest.mark.parametrize("steps", [1, 3])
def test_draft_on_a_flow_is_autograd_through_eulers_steps(steps):
    policy = Small("flow")
    got, _ = gradient(DRaFT(steps), policy, rollout_of(policy))
    text, times = policy.family.encode(PROMPTS)["text"], policy.family.schedule.times(5)
    x = normal([(*a, "start") for a in ADDRESSES], (2, 3, 3)).double()
    for i in range(5):
        x = x.detach() if i == 5 - steps else x
        x = x + (times[i + 1] - times[i]) / 1000 * policy.output(x, times[i].expand(4), text)
    same(got, slow_gradient(policy, [x]))


@pytest.mark.parametrize("kind", KINDS)
def test_draft_lv_is_the_last_step_from_renoised_pictures(kind):
    policy, algorithm = Small(kind), DRaFTLV(renoises=3)
    rollout = rollout_of(policy, SOLVERS["cps"])
    got, rows = gradient(algorithm, policy, rollout)
    assert rows == 3 * 4 and algorithm.passes(5) == 3
    key = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    t, s = policy.family.schedule.times(5)[-2:]
    (a, sigma), (a_s, sigma_s) = policy.family.schedule.level(t), policy.family.schedule.level(s)
    x0, ends = rollout.latents[:, -1], []
    for draw in range(3):
        x = a * x0 + sigma * normal([(*at, "renoise", key, draw) for at in ADDRESSES], (2, 3, 3)).double()
        out = policy.output(x, t.expand(4), policy.family.encode(PROMPTS)["text"])
        clean = {"eps": (x - sigma * out) / a, "v": a * x - sigma * out, "flow": x - sigma * out}[kind]
        ends.append(a_s * clean + sigma_s * (x - a * clean) / sigma)
    assert not torch.allclose(ends[0], ends[1])
    same(got, slow_gradient(policy, ends))


@pytest.mark.parametrize("kind", KINDS)
def test_refl_is_the_reward_of_the_believed_picture_under_its_ceiling(kind):
    policy = Small(kind)
    rollout = rollout_of(policy, SOLVERS["cps"])
    seen = set()
    for seed in range(12):
        (view,) = ReFL(steps=3).views(rollout, 4, torch.Generator().manual_seed(seed))
        at = 5 - len(view.noise)
        seen.add(at)
        t = policy.family.schedule.times(5)[at]
        believed = policy(rollout.latents[:, at], t.expand(4), policy.family.encode(PROMPTS)).x0
        got, _ = gradient(ReFL(steps=3), policy, rollout, seed=seed)
        same(got, slow_gradient(policy, [believed]))
    assert seen == {2, 3, 4}
    graded = view.graded(policy, view.belief(policy)).detach()
    ceiling = graded.sort().values[1:3].mean().item()
    loss, _ = ReFL(steps=3, ceiling=ceiling).loss(policy, view)
    torch.testing.assert_close(loss.detach(), (ceiling - graded).clamp(min=0))
    for row in range(4):
        slope = torch.autograd.grad(loss[row], policy.weights["leave"], retain_graph=True)[0]
        assert bool(slope.any()) == bool(graded[row] < ceiling)


# ----------------------------------------------------------------------------------------------------------------------
# What an update sees


@pytest.mark.parametrize("algorithm", [DRaFT(2), DRaFTLV(), AlignProp(5), ReFL(5)], ids=lambda a: type(a).__name__)
def test_micro_batches_do_not_change_the_gradient(algorithm):
    policy = Small()
    rollout = rollout_of(policy, SOLVERS["ddim"])
    whole, halves = gradient(algorithm, policy, rollout), gradient(algorithm, policy, rollout, size=1)
    assert whole[1] == halves[1]
    same(halves[0], whole[0], rtol=1e-9)


def test_alignprop_draws_every_depth_and_one_an_update():
    policy = Small()
    rollout = rollout_of(policy)
    depths = []
    for seed in range(400):
        views = list(AlignProp(5).views(rollout, 2, torch.Generator().manual_seed(seed)))
        assert len({len(v.noise) for v in views}) == 1
        depths.append(len(views[0].noise))
    assert set(depths) == {1, 2, 3, 4, 5} and abs(sum(depths) / 400 - 3) < 4 * math.sqrt(2 / 400)
    assert AlignProp(5).passes(0) == 3 and DRaFT(4).passes(0) == 4


def test_a_picture_that_could_not_be_scored_is_left_out():
    policy, others = Small(), torch.tensor([0, 2, 3])
    rollout = rollout_of(policy)
    wanted, _ = gradient(DRaFT(), policy, rollout[others])
    rollout.rewards = torch.tensor([0.0, float("nan"), 0.0, 0.0])
    got, rows = gradient(DRaFT(), policy, rollout)
    same(got, wanted)
    assert rows == 3
    rollout.rewards = torch.full((4,), float("nan"))
    assert list(DRaFT().views(rollout, 2, torch.Generator())) == []


FAMILIES = {
    "tiny": StableDiffusion, "tiny_v": StableDiffusion, "tiny_sd3": partial(StableDiffusion3, text_encoder_3=False), "tiny_flux": Flux
}  # fmt: skip


@pytest.mark.parametrize("which", FAMILIES)
def test_the_gradient_reaches_every_lora_weight_and_checkpoints_do_not_change_it(which, request):
    folder = request.getfixturevalue(which)
    got = []
    for again in (False, True):
        family = FAMILIES[which](str(folder), dtype="float32", gradient_checkpointing=again)
        assert family.vae.decoder.gradient_checkpointing == again
        policy = stir(Policy(family, LoRA(rank=4), 3.0), 0.05)
        rollout = rollout_of(policy, d.DDIM(1.0), 3)
        rollout.reward = partial(Rubric.of([(Brightness(), 1.0)]).graded, {"brightness": 1.0})
        got.append(gradient(DRaFT(2), policy, rollout)[0])
        assert all(g.any() and g.isfinite().all() for g in got[-1].values())
    size = max(g.abs().max() for g in got[0].values())
    assert all((a - b).abs().max() < 1e-3 * size for a, b in zip(got[0].values(), got[1].values(), strict=True))


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("tiny_sd3"), t5=False)


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("tiny_flux"))


# ----------------------------------------------------------------------------------------------------------------------
# Learning


def improve(algorithm, solver, seed, iterations=35, rows=32):
    """Where the mean of what the policy draws ends, when it is paid for drawing near TARGET."""
    policy = Located()
    learner = Learner(policy, algorithm, Learning(lr=0.04, micro_batch=rows, weight_decay=0.0), Accelerator(cpu=True))
    for iteration in range(iterations):
        addresses = [(seed, iteration, i) for i in range(rows)]
        rollout = collect(policy, ["a"] * rows, addresses, solver, STEPS, rows, True)
        rollout.reward = lambda images, prompts, metadata: -((images.mean((1, 2, 3)) - TARGET) ** 2)
        rollout.rewards = rollout.advantages = torch.zeros(rows)
        metrics = learner.improve(rollout, (seed, iteration), rows, lambda n: None)
    with torch.no_grad():
        end = collect(policy, ["a"] * 200, [(9, i) for i in range(200)], solver, STEPS, 200, False).latents
    return end.mean().item(), metrics


# The believed picture of a late step lies between what was drawn and the data's: four steps draw 0.83 m, and m is ReFL's aim.
@pytest.mark.parametrize(
    ("algorithm", "solver", "near"),
    [
        (DRaFT(), "ode", 0.1),
        (DRaFT(2), "ddim", 0.2),
        (DRaFTLV(), "ode", 0.1),
        (AlignProp(4), "ode", 0.1),
        (ReFL(2), "ode", 0.15),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str | float) else str(v),
)
def test_it_finds_the_optimum_from_three_seeds(algorithm, solver, near):
    for seed in range(3):
        end, metrics = improve(algorithm, SOLVERS[solver], seed)
        assert abs(end - TARGET) < near, (seed, end)
        assert metrics["kl/step_nats"] > 0 and metrics["reward/graded"] < 0


class Interrupted(Contrast):
    """Contrast, until there is a power cut."""

    name, calls = "contrast", 0

    def __call__(self, images, prompts, metadata):
        Interrupted.calls += 1
        if Interrupted.calls == 10:
            raise RuntimeError("power cut")
        return super().__call__(images, prompts, metadata)


def test_a_run_with_one_picture_a_prompt_learns_and_a_resumed_run_is_the_run(tiny, tmp_path):
    """Groups of one teach a comparison nothing, and a gradient all: no alarm about flat rewards."""

    def run(folder, scorer):
        advantage = PerPrompt(window=8, min_count=4)
        options = dict(prompts=4, group_size=1, batch_size=4, micro_batch=4, updates=1, guidance=1.0, lr=0.03)
        made = trainer_of(folder, tiny, scorer, 4, AlignProp(4), advantage, solver=ODE, **options)
        made.run()
        return weights(made)

    whole = run(tmp_path / "whole", Contrast())
    with pytest.raises(RewardError, match="power cut"):
        run(tmp_path / "parts", Interrupted())
    assert len(list((tmp_path / "parts" / "checkpoints").glob("step-*"))) > 1
    assert torch.equal(run(tmp_path / "parts", Contrast()), whole)
    told = lines(tmp_path / "whole")
    error = told[1]["reward/graded"] - told[1]["reward/mean"]
    assert 0 < abs(error) < 1 / 255  # what is differentiated is what is scored, but for its rounding to bytes
    assert told[-1]["eval/contrast/delta"] > 0.01 * told[-1]["eval/contrast/base"], told[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The way from a scorer's gradient to the loss


def test_the_graded_sum_is_the_objective_with_its_floors():
    rubric = Rubric.of([Part(Brightness(), 2.0), Part(Contrast(), 0.0, 1.0)])
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = {name: v.detach() for name, v in rubric.score(images, PROMPTS, [{}] * 4).items()}
    rates = rubric.rates(scores, PROMPTS)
    graded = rubric.graded(rates, images, PROMPTS, [{}] * 4)
    torch.testing.assert_close(graded, rubric.objective(scores, PROMPTS))
    assert rates["brightness"] == 2.0 and rates["contrast"] > 0 and graded.dtype == torch.float64
    graded.sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


class Narrow(Brightness):
    """Has memory for one picture."""

    def __call__(self, images, prompts, metadata):
        if len(images) > 1:
            raise torch.OutOfMemoryError("of one picture only")
        return super().__call__(images, prompts, metadata)


def test_scores_in_halves_keep_their_gradient():
    images = torch.rand(3, 3, 8, 8).requires_grad_()
    Part(Narrow()).score("narrow", images, ["a"] * 3, [{}] * 3).sum().backward()
    wanted = torch.autograd.grad(Brightness()(images, [], []).sum(), images)[0]
    torch.testing.assert_close(images.grad, wanted)


class Moved(Brightness):
    def __init__(self):
        object.__setattr__(self, "places", [])

    def to(self, device):
        self.places.append(str(device))


def test_what_is_offloaded_stays_while_a_graph_needs_it():
    images, part, module = torch.rand(2, 3, 8, 8).requires_grad_(), Part(Moved(), offload=True), nn.Linear(1, 1)
    part.to("meta")
    part.score("moved", images, ["a"] * 2, [{}] * 2)
    assert part.reward.places == ["meta"]
    with _visit(module.to("meta"), offload=True):
        pass
    assert module.weight.is_meta
    with torch.no_grad():
        part.score("moved", images, ["a"] * 2, [{}] * 2)
    assert part.reward.places == ["meta", "meta", "cpu"]


def test_the_plan_counts_the_decoder(tiny):
    policy = Policy(StableDiffusion.outline(str(tiny)), LoRA(), 1.0)
    plain, through = estimate.need(policy, 2, 2), estimate.need(policy, 2, 2, through_decoder=True)
    assert through.learning > 1.2 * plain.learning and through.learn_flops > plain.learn_flops
    assert (through.acting, through.act_flops) == (plain.acting, plain.act_flops)


CLIP = "name: clip, model: menagerie"
REFUSED = {
    "a reward without gradient": (
        ["rewards=[{name: 'jpeg:Compressibility'}]"],
        "rewards.0: draft:DRaFT learns from the reward's gradient",
    ),
    "one in a process of its own": ([f"rewards=[{{{CLIP}, isolate: true}}]"], "set isolate: false"),
    "one that compares": (["rewards=[{name: diversity, model: menagerie}]"], "move it to held_out_rewards"),
    "scores made alike": (["objective.normalise=group"], "objective.normalise: draft:DRaFT follows"),
    "more steps than there are": (["algorithm.steps=51"], "algorithm.steps: is 51; it can be rollout.num_steps="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_is_refused_with_the_fix(name):
    words, expected = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        read(str(ROOT / "configs" / "menagerie_draft.yaml"), words, 1)
    assert expected in str(caught.value)


def test_the_noise_of_a_tail_is_each_rows_own():
    rollout = rollout_of(Small("flow"), SOLVERS["cps"])
    noise = rollout.tail(3).noise
    assert torch.equal(rollout[torch.tensor([3, 1])].tail(3).noise, noise[:, [3, 1]])
    assert noise[:2].any() and not noise[2].any()  # a flow's last step adds none
