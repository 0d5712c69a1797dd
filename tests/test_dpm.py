"""DPM-Solver++(2M) against diffusers' own, and against the solution where it is known."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from ddpo.algorithms.ddpo import DDPO
from ddpo.algorithms.draft import DRaFT
from ddpo.algorithms.forward import NFT
from ddpo.diffusion import DDIM, DPMSolver, Prediction
from ddpo.noise import normal
from ddpo.rollout import collect
from ddpo.schedule import FlowMatching, VariancePreserving
from tests.test_rollout import ADDRESSES, PROMPTS, policy_of
from tests.tiny import SIGNAL


@pytest.mark.parametrize("num_steps", [2, 6, 12])
def test_pictures_are_those_of_diffusers(tiny, num_steps):
    policy = policy_of(tiny, 3.0)
    ours = collect(policy, PROMPTS, ADDRESSES, DPMSolver(), num_steps, 4, False).latents[:, -1]
    pipe = StableDiffusionPipeline.from_pretrained(tiny, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
    start = normal([(*a, "start") for a in ADDRESSES], policy.family.latent_shape)
    times = policy.family.schedule.times(num_steps)[:-1].tolist()
    theirs = pipe(PROMPTS, latents=start, timesteps=times, guidance_scale=3.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    plain = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), num_steps, 4, False).latents[:, -1]
    assert num_steps == 2 or (plain - theirs).abs().max() > 10 * (ours - theirs).abs().max()


@pytest.mark.parametrize(
    "schedule, most",
    [(FlowMatching(1.0, even=True), 0.3), (VariancePreserving(SIGNAL, 1.0, trailing=True), 0.9)],
)
def test_it_ends_nearer_to_the_solution_than_ddim_in_as_many_steps(schedule, most):
    """Data Normal(0, 1/4), whose denoiser is linear: x0 = alpha / 4 / (alpha^2 / 4 + sigma^2) x."""

    def policy(x, t, cond):
        a, s = (v.view(-1, 1, 1, 1) for v in schedule.level(t))
        x0 = a / 4 / (a**2 / 4 + s**2) * x.double()
        return Prediction(x0, (x.double() - a * x0) / s)

    family = SimpleNamespace(
        schedule=schedule, latent_shape=(1, 1, 1), device=torch.device("cpu"), encode=lambda p: {"text": torch.zeros(len(p), 1)},
        decode=lambda x: x.expand(-1, 3, 1, 1).float(),
    )  # fmt: skip
    policy.family = family

    def ends(solver, num_steps):
        return collect(policy, ["a"], [(0,)], solver, num_steps, 1, False).latents.double().item()

    exact = ends(DDIM(0.0), 1000)
    first, second = ([abs(ends(solver, n) - exact) for n in (8, 16, 32)] for solver in (DDIM(0.0), DPMSolver()))
    assert all(s < most * f for f, s in zip(first, second, strict=True))


def test_what_takes_steps_again_refuses_it():
    for algorithm in (DDPO(), DRaFT()):
        assert "{name: diffusion:DDIM}" in algorithm.refusal(DPMSolver())
    assert NFT().refusal(DPMSolver()) is None
