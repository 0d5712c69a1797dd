"""The one-formula step against diffusers' own scheduler, a closed form and float64."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from ddpo import diffusion as d
from ddpo.schedule import VariancePreserving

INTERPRET = {"epsilon": d.from_eps, "v_prediction": d.from_v}


def schedulers(kind="epsilon", to_one=False, spacing="leading"):
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=to_one,
        steps_offset=1, prediction_type=kind, timestep_spacing=spacing,
    )  # fmt: skip
    ours = VariancePreserving(theirs.alphas_cumprod, float(theirs.final_alpha_cumprod), 1, spacing == "trailing")
    return theirs, ours


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("kind", INTERPRET)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_of_a_trajectory_equals_diffusers(kind, eta, to_one, spacing):
    theirs, ours = schedulers(kind, to_one, spacing)
    theirs.set_timesteps(20)
    times = ours.times(20)
    assert torch.equal(times[:-1], theirs.timesteps)
    g = torch.Generator().manual_seed(0)
    for t, t_next in itertools.pairwise(times):  # the last step included
        x, out, z = torch.randn(3, 2, 4, 8, 8, generator=g)
        now, then = ours.level(t.expand(2)), ours.level(t_next.expand(2))
        mean, std = d.step_mean(INTERPRET[kind](out, x, now), now, then, d.DDIM(eta))
        expected = theirs.step(out, int(t), x, eta=eta, variance_noise=z).prev_sample
        assert (mean + std * z - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", INTERPRET)
def test_a_float32_step_equals_the_same_step_in_float64(kind):
    _, ours = schedulers(kind)
    x, out = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    now, then = ours.level(torch.tensor([999, 700, 300, 1])), ours.level(torch.tensor([951, 651, 251, -49]))
    exact, std = d.step_mean(INTERPRET[kind](out, x, now), now, then, d.DDIM(1.0))
    mean, std32 = d.step_mean(INTERPRET[kind](out.float(), x.float(), now), now, then, d.DDIM(1.0))
    assert mean.dtype == std32.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(std32.double(), std, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", INTERPRET)
def test_a_prediction_is_consistent_with_the_latent_it_is_of(kind):
    _, ours = schedulers(kind)
    x0, eps = torch.randn(2, 3, 4, 8, 8)
    level = ours.level(torch.tensor([1, 500, 999]))
    a, s = (v.float().view(-1, 1, 1, 1) for v in level)
    out = {"epsilon": eps, "v_prediction": a * eps - s * x0}[kind]
    pred = INTERPRET[kind](out, level.noise(x0, eps), level)
    torch.testing.assert_close(pred.x0, x0, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pred.eps, eps, atol=2e-5, rtol=1e-4)


def test_log_prob_is_a_normal_density():
    x, mean, std = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(d.log_prob(x, mean, std), expected, atol=1e-6, rtol=1e-6)


def test_kl_is_that_of_two_normals():
    mean, other, std = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5, 1, 1, 1) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(other, std)).sum((1, 2, 3))
    torch.testing.assert_close(d.gaussian_kl(mean, other, std), expected, rtol=1e-5, atol=1e-5)


def test_eta_zero_takes_no_noise_and_the_last_step_to_a_clean_end_takes_none_either():
    _, ours = schedulers(to_one=True)
    times = ours.times(10)
    now, then = ours.level(times[:-1]), ours.level(times[1:])
    assert (d.DDIM(0.0)(now, then)[1] == 0).all()
    std = d.DDIM(1.0)(now, then)[1]
    assert std[-1] == 0 and (std[:-1] > 0).all()


def test_min_sigma_is_ddpm_above_that_noise_level_and_the_ode_below():
    _, ours = schedulers()
    times = ours.times(10)
    now, then = ours.level(times[:-1]), ours.level(times[1:])
    above = now.sigma >= 0.9
    assert 0 < above.sum() < 10
    mixed, ddpm, ode = (torch.stack(s(now, then)) for s in (d.DDIM(1.0, min_sigma=0.9), d.DDIM(1.0), d.DDIM(0.0)))
    assert torch.equal(mixed, torch.where(above, ddpm, ode))


@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_a_number_of_steps_that_does_not_exist_is_refused(steps):
    """The first time of a thousand would be the offset past the last."""
    schedule = schedulers()[1]
    assert schedule.level(schedule.times(999)).sigma[0] < 1
    with pytest.raises(ValueError, match="1 to 999"):
        schedule.times(steps)
