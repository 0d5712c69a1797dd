"""Flow matching: the schedule and the Euler step against diffusers' own scheduler, the SDE solvers against their papers' formulas."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ddpo import diffusion as d
from ddpo.schedule import FlowMatching, VariancePreserving

STEPS, SHIFTS = [1, 2, 10, 28, 40], [0.5, 1.0, 1.15, 3.0]
SOLVERS = [d.DDIM(0.5), d.DDIM(1.0), d.CPS(0.8), d.FlowSDE(0.7), d.DanceSDE(0.3)]
SILENT = [d.DDIM(0.0), d.CPS(0.0), d.FlowSDE(0.0), d.DanceSDE(0.0)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(schedule, num_steps):
    """(level now, level next) of every step, the last one included."""
    for t, t_next in itertools.pairwise(schedule.times(num_steps)):
        yield schedule.level(t.expand(2)), schedule.level(t_next.expand(2))


# ----------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_times_and_levels_are_those_of_diffusers(num_steps, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    ours = FlowMatching(shift)
    times = ours.times(num_steps)
    torch.testing.assert_close(times[:-1], theirs.timesteps.double(), rtol=1e-6, atol=0)
    assert times[0] == 1000 and times[-1] == 0 and (times.diff() < 0).all()
    torch.testing.assert_close(ours.level(times).sigma, theirs.sigmas.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.level(times).alpha, 1 - theirs.sigmas.double(), rtol=0, atol=1e-6)


def test_noise_is_added_as_diffusers_adds_it():
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatching(3.0)
    x0, eps, t = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1), theirs.timesteps[[0, 400, 999]]
    torch.testing.assert_close(ours.level(t).noise(x0, eps), theirs.scale_noise(x0, t, eps), rtol=1e-6, atol=1e-6)


def test_training_draws_from_the_networks_own_training_times():
    """Shares k / 1000 are diffusers' table of training times, whose first is the least that is ever drawn."""
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps.flip(0)  # at 1 / 1000, 2 / 1000, ... 1
    drawn = FlowMatching(3.0).at(torch.arange(1, 1001) / 1000)
    torch.testing.assert_close(drawn, table.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(FlowMatching(3.0).at(torch.zeros(1)), drawn[:1])


def test_a_number_of_steps_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        FlowMatching().times(0)


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def test_a_velocity_is_consistent_with_the_latent_it_is_of():
    x0, eps = draw(4, 4, 8, 8), draw(4, 4, 8, 8, seed=1)
    level = FlowMatching().level(torch.tensor([1000.0, 913.7, 400.0, 0.0]))
    x = level.noise(x0, eps)
    pred = d.from_velocity(eps - x0, x, level)
    torch.testing.assert_close(pred.x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred.eps, eps, rtol=1e-12, atol=1e-12)
    in_float32 = d.from_velocity((eps - x0).float(), x.float(), level)
    assert {v.dtype for v in in_float32} == {torch.float32}
    torch.testing.assert_close(in_float32.x0.double(), x0, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def flow_grpo(x, v, t, s, second, a):
    """Mean and std as Liu et al. 2025 print them; `second` is the trajectory's second sigma."""
    dt = s - t
    sigma_t = a * math.sqrt(t / (1 - (second if t == 1 else t)))
    return x + (v + sigma_t**2 / (2 * t) * (x + (1 - t) * v)) * dt, sigma_t * math.sqrt(-dt)


def dance_grpo(x, v, t, s, second, eta):
    """Xue et al. 2025: the SDE with the score of the predicted picture."""
    score = -(x - (x - t * v) * (1 - t)) / t**2
    return x + (s - t) * v - 0.5 * eta**2 * score * (s - t), eta * math.sqrt(t - s)


def flow_cps(x, v, t, s, second, eta):
    """Wang & Yu 2025: predicted picture and predicted noise, of which a part is replaced."""
    std = s * math.sin(eta * math.pi / 2)
    return (1 - s) * (x - t * v) + math.sqrt(s**2 - std**2) * (x + (1 - t) * v), std


def ddim(x, v, t, s, second, eta):
    """Song et al. 2021, eq. 16, in a variance-preserving chain that is the flow rescaled to alpha^2 + sigma^2 = 1."""
    scale, scale_s = math.hypot(1 - t, t), math.hypot(1 - s, s)
    abar, abar_s = ((1 - t) / scale) ** 2, ((1 - s) / scale_s) ** 2
    std = eta * math.sqrt((1 - abar_s) / (1 - abar)) * math.sqrt(1 - abar / abar_s)
    mean = math.sqrt(abar_s) * (x - t * v) + math.sqrt(max(0.0, 1 - abar_s - std**2)) * (x + (1 - t) * v)
    return mean * scale_s, std * scale_s


PUBLISHED = [(d.FlowSDE, flow_grpo), (d.DanceSDE, dance_grpo), (d.CPS, flow_cps), (d.DDIM, ddim)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("solver, published", PUBLISHED)
def test_every_step_is_the_published_one(solver, published, amount, shift):
    schedule = FlowMatching(shift)
    x, v = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1)
    steps = list(pairs(schedule, 10))
    second = steps[0][1].sigma[0].item()
    for now, then in steps[:-1]:
        mean, std = d.step_mean(d.from_velocity(v, x, now), now, then, solver(amount))
        expected, noise = published(x, v, now.sigma[0].item(), then.sigma[0].item(), second, amount)
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(std.flatten(), torch.full((2,), noise, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SILENT)
def test_without_noise_every_step_is_diffusers_euler_step(solver):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(12)
    assert not solver.stochastic
    for i, (now, then) in enumerate(pairs(FlowMatching(3.0), 12)):
        x, v = draw(2, 4, 8, 8, seed=i).float(), draw(2, 4, 8, 8, seed=100 + i).float()
        mean, std = d.step_mean(d.from_velocity(v, x, now), now, then, solver)
        expected = theirs.step(v, theirs.timesteps[i], x).prev_sample
        assert (std == 0).all()
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_goes_to_the_picture_and_all_others_have_a_normal_density(solver):
    assert solver.stochastic
    *steps, last = pairs(FlowMatching(), 10)
    x, v, noise = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1), draw(2, 4, 8, 8, seed=2)
    for now, then in steps:
        mean, std = d.step_mean(d.from_velocity(v, x, now), now, then, solver)
        x_next = mean + std * noise
        assert torch.isfinite(mean).all() and (std > 0).all()
        expected = torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2, 3))
        torch.testing.assert_close(d.log_prob(x_next, mean, std), expected, rtol=1e-12, atol=1e-12)
    pred = d.from_velocity(v, x, last[0])
    mean, std = d.step_mean(pred, *last, solver)
    assert (std == 0).all()
    torch.testing.assert_close(mean, pred.x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_float32_step_equals_the_same_step_in_float64(solver):
    for i, (now, then) in enumerate(pairs(FlowMatching(), 10)):
        x, v = draw(2, 4, 8, 8, seed=i), draw(2, 4, 8, 8, seed=100 + i)
        exact, _ = d.step_mean(d.from_velocity(v, x, now), now, then, solver)
        mean, std = d.step_mean(d.from_velocity(v.float(), x.float(), now), now, then, solver)
        assert mean.dtype == std.dtype == torch.float32
        torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# What the steps add up to


@pytest.mark.parametrize("solver", [d.DDIM(0.0), d.DDIM(0.6), d.DDIM(1.0), d.CPS(0.8), d.CPS(1.0)])
def test_coefficients_are_preserved(solver):
    """From x_t ~ Normal(alpha_t x0, sigma_t) a step with the true x0 and noise leads to Normal(alpha_s x0, sigma_s)."""
    for now, then in pairs(FlowMatching(), 10):
        c, std = solver(now, then)
        torch.testing.assert_close(c**2 + std**2, then.sigma**2, rtol=1e-12, atol=1e-15)


def drawn_variance(solver, num_steps, variance):
    """Of the samples where the data is Normal(0, variance) and the network is exact: each step is affine and all is known."""
    schedule, drawn = FlowMatching(1.0), 1.0
    levels = schedule.level(schedule.times(num_steps))
    now, then = d.Level(*(v[:-1] for v in levels)), d.Level(*(v[1:] for v in levels))
    c, std = solver(now, then)
    total = now.alpha**2 * variance + now.sigma**2
    factors = (then.alpha * now.alpha * variance + c * now.sigma) / total  # E[x0 | x] and E[eps | x] are linear in x
    for factor, new in zip(factors.tolist(), std.tolist(), strict=True):
        drawn = factor**2 * drawn + new**2
    return drawn


TRUE = [d.DDIM(0.0), d.DDIM(0.5), d.DDIM(1.0), d.FlowSDE(0.7), d.FlowSDE(math.sqrt(2)), d.DanceSDE(0.3)]


@pytest.mark.parametrize("solver", TRUE)
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_more_steps_lead_to_the_data_distribution(solver, variance):
    few, many, most = (abs(drawn_variance(solver, n, variance) / variance - 1) for n in (500, 5_000, 50_000))
    # Flow-SDE is singular at its start: its error falls as 1 / sqrt(steps), or is hardly there; that of the others as 1 / steps
    assert few < 0.02 and (most < 0.5 * many < 0.25 * few or max(few, many, most) < 1e-4)


def test_cps_draws_less_variance_than_the_data_has_however_many_the_steps():
    for variance in (0.25, 1.0, 4.0):
        few, many = (drawn_variance(d.CPS(0.8), n, variance) / variance for n in (500, 5_000))
        assert many == pytest.approx(few, rel=0.02) == pytest.approx(0.65, abs=0.02)


def test_the_score_that_an_sde_adds_back_is_what_keeps_the_marginal():
    """Without the correction of the mean, the same noise leaves too much variance."""
    sde = d.FlowSDE(0.7)

    def uncorrected(now, then):
        return then.sigma, sde(now, then)[1]

    assert drawn_variance(uncorrected, 1000, 1.0) > 1.2 > abs(drawn_variance(sde, 1000, 1.0) - 1) + 1


# ----------------------------------------------------------------------------------------------------------------------
# Where they do not belong


@pytest.mark.parametrize("solver", [d.FlowSDE(), d.DanceSDE()])
def test_an_sde_of_the_flow_is_refused_on_another_schedule(solver):
    noise = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = VariancePreserving(noise.alphas_cumprod, 1.0)
    with pytest.raises(ValueError, match=r"rollout\.solver.*flow.*diffusion:DDIM"):
        next(solver(now, then) for now, then in pairs(schedule, 10))


def test_cps_holds_for_any_schedule():
    noise = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for now, then in pairs(VariancePreserving(noise.alphas_cumprod, 1.0), 10):
        c, std = d.CPS(0.8)(now, then)
        torch.testing.assert_close(c**2 + std**2, then.sigma**2)
