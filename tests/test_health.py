"""Alarms on simulated runs: silent where a run is healthy, in time where it is not. `pytest tests/test_health.py`"""

import json
import math
from dataclasses import replace

import pytest
import torch

from ddpo.evaluate import Look
from ddpo.health import Measured, Monitor, Probed
from ddpo.noise import generator
from ddpo.sections import Health
from ddpo.updates import NUMBERS_CODE, Updates

PROMPTS, PROBES = 32, 50
NOTHING = torch.zeros(PROMPTS, dtype=torch.float64)
SOUND = Measured(0, kl=1.0, ratio=1.0, clipped=0.1, zero_spread=0.1, inflation=0.0)


def noise(*address, scale=1.0):
    """(PROBES, PROMPTS): what one evaluation says of a prompt is half of what the one before said (rho 0.5)."""
    fresh = torch.randn(PROBES, PROMPTS, generator=generator(*address), dtype=torch.float64)
    rows = [fresh[0]]
    for row in fresh[1:]:
        rows.append(0.5 * rows[-1] + 0.75**0.5 * row)
    return scale * torch.stack(rows)


def run_of(seed, fall=NOTHING[:1], variety=NOTHING[:1]):
    """50 evaluations of a run whose trained reward rises. `fall` and `variety`: (PROBES,) means of what is not noise."""
    trained, watched, other, spread, ends = (noise("run", seed, part) for part in range(5))
    for i in range(PROBES):
        yield Probed(
            i + 1, trained[i] + 0.1 * i, {"watched": watched[i] - fall[i % len(fall)], "other": other[i]},
            0.1 * spread[i] + variety[i % len(variety)], 0.01 * ends[i], (0, i % 2, 2 * PROMPTS),
        )  # fmt: skip


def alarms_of(probes):
    monitor = Monitor(Health(), 1024)
    return [(probed.iteration, alarm) for probed in probes for alarm in monitor.evaluation(probed)]


def test_twenty_healthy_runs_of_fifty_probes_raise_at_most_one_alarm():
    assert sum(len(alarms_of(run_of(seed))) for seed in range(20)) <= 1


STANDARD_ERROR = 1 / PROMPTS**0.5
DECLINE = torch.cat([torch.zeros(20), torch.arange(1, PROBES - 19)]).double() * STANDARD_ERROR  # one a probe, from the 20th on
CROSSING = int((DECLINE > 3 * STANDARD_ERROR).nonzero()[0]) + 1


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_hack_is_found_within_three_probes_of_the_true_crossing(seed):
    (at, alarm), *_ = (found for found in alarms_of(run_of(seed, fall=DECLINE)) if found[1].name == "over-optimisation")
    assert CROSSING - 3 <= at <= CROSSING + 3 and alarm.level == "stop"
    assert "watched, which is not trained on, is down" in alarm.text and f"since iteration {at - 1}" in alarm.text


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_collapse_is_found(seed):
    shrinking = -0.05 * torch.arange(PROBES).double()  # of the logarithm: at 70 % after 8 probes, at 50 % after 14
    found = {alarm.name: at for at, alarm in alarms_of(run_of(seed, variety=shrinking))}
    assert found.keys() == {"collapse", "lost diversity"} and 8 <= found["collapse"] <= 12 < found["lost diversity"] <= 18


def test_the_best_so_far_is_not_the_reference():
    """A rise that is lost again is no harm done to the base model."""
    there_and_back = -torch.cat([torch.arange(25), torch.arange(25, 0, -1)]).double() * STANDARD_ERROR
    assert alarms_of(run_of(0, fall=there_and_back)) == []


def test_what_falls_while_the_trained_reward_falls_too_is_no_over_optimisation():
    probes = [replace(probed, trained=-1.0 - probed.trained) for probed in run_of(0, fall=DECLINE)]
    assert "over-optimisation" not in {alarm.name for _, alarm in alarms_of(probes)}


def test_too_few_prompts_say_nothing():
    few = torch.full((7,), -1.0, dtype=torch.float64) + torch.arange(7) / 100
    monitor = Monitor(Health(), 1024)
    for i in range(4):
        assert monitor.evaluation(Probed(i, -few, {"watched": few}, few, few, (0, 0, 14))) == []


def test_black_white_and_flat_pictures_are_told_from_others():
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (3, 3, 32, 32), generator=g, dtype=torch.uint8)
    flat = torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 32, 32)
    red = torch.tensor([200, 10, 10], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    look = Look.at(torch.cat([drawn, flat, red]), list("aaabbbc"))
    assert look.blank.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert look.saturated[3:].tolist() == [1, 1, 0, 0] and look.saturated[:3].max() < 0.02
    assert math.isnan(look.spread[2]) and look.spread[1] > look.spread[0] > 0
    monitor = Monitor(Health(), 1024)
    for number, expected in ((3, []), (4, ["blank pictures"])):  # 5 % of 64 pictures is 3.2
        found = monitor.evaluation(Probed(1, NOTHING, {}, NOTHING, NOTHING, (0, number, 64)))
        assert [alarm.name for alarm in found] == expected


def iterations(monitor, number, **values):
    return [
        alarm for i in range(number) for alarm in monitor.iteration(Measured(**vars(SOUND) | {"iteration": i + 1} | values))
    ]


@pytest.mark.parametrize(
    "name, level, times, values",
    [
        ("no gradient", "stop", 3, {"zero_spread": 0.81}),
        ("drift", "warn", 5, {"ratio": 0.97}),
        ("drift", "warn", 5, {"clipped": 0.51}),
        ("saturated reward", "warn", 3, {"at_limit": {"count": 0.6}}),
        ("norm inflation", "warn", 3, {"inflation": 0.06}),
        ("strong norm inflation", "warn", 3, {"inflation": 0.16}),
        ("kl budget", "warn", 1, {"kl": 60.0}),
    ],
)
def test_what_lasts_is_said_once_and_what_passes_is_not(name, level, times, values):
    assert iterations(Monitor(Health(), 1024), 20) == []
    monitor = Monitor(Health(), 1024)
    for _ in range(2):
        assert iterations(monitor, times - 1, **values) == [] and iterations(monitor, 1) == []
    (alarm,) = iterations(monitor, 20, **values)
    assert (alarm.name, alarm.level) == (name, level) and alarm.text.startswith("since iteration 1 ") and ": " in alarm.text


def test_a_budget_of_ones_own_stops():
    (alarm,) = iterations(Monitor(Health(kl_budget=0.5), 1024), 3)
    assert alarm.level == "stop" and "more than 0.5" in alarm.text


def test_numbers_that_were_not_measured_raise_nothing():
    nan = math.nan
    assert iterations(Monitor(Health(), 1024), 9, kl=nan, ratio=nan, clipped=nan, inflation=nan, at_limit={"a": nan}) == []


def norms(seed, number, tails=False):
    g = generator("norms", seed)
    draws = torch.randn(number, generator=g, dtype=torch.float64)
    if tails:  # Student's t with 5 degrees of freedom
        draws = draws / (torch.randn(5, number, generator=g, dtype=torch.float64).square().mean(0)).sqrt()
    return (0.3 * draws).exp().tolist()


@pytest.mark.parametrize("tails", [False, True])
def test_healthy_gradients_never_alarm_and_lose_few_updates(tails):
    for seed in range(10):
        updates = Updates(6.0)
        refused = [updates.refuse(norm, lost=False) for norm in norms(seed, 1000, tails)]
        assert sum(r is not None for r in refused) <= (5 if tails else 0) and not list(updates.alarms(1))


def test_one_spike_costs_its_update_and_three_in_ten_are_an_alarm():
    updates = Updates(6.0)
    assert all(updates.refuse(norm, lost=False) is None for norm in norms(0, 100))
    assert "usual" in updates.refuse(1e3, lost=False) and not list(updates.alarms(1))
    assert updates.refuse(1.0, lost=False) is None and updates.refuse(1e3, lost=False) and not list(updates.alarms(1))
    assert updates.refuse(1e3, lost=False)
    assert [a.name for a in updates.alarms(1)] == ["gradient spikes"]
    assert all(updates.refuse(1.0, lost=False) is None for _ in range(10)) and not list(updates.alarms(1))


def test_numbers_that_are_not_finite_are_refused_from_the_first_update_on():
    updates = Updates(6.0)
    assert updates.refuse(math.nan, lost=False) == "the gradient is not finite"
    assert updates.refuse(1.0, lost=True) == "a loss is not finite" and not list(updates.alarms(7))
    assert updates.refuse(math.inf, lost=False)
    (alarm,) = updates.alarms(7)
    assert alarm.code == NUMBERS_CODE and "3 of the 10 updates up to iteration 7" in alarm.text


def test_a_gradient_scaler_that_skips_too_often_is_told_of():
    updates = Updates(6.0)
    for i in range(200):
        updates.note_scaler(i % 20 == 0, 1024.0)
    assert not list(updates.alarms(1))  # 5 %
    updates.note_scaler(True, 512.0)
    updates.note_scaler(True, 256.0)
    assert "bfloat16" in next(updates.alarms(1)).text
    small = Updates(6.0)
    small.note_scaler(False, 0.5)
    assert "stands at 0.5" in next(small.alarms(1)).text


def test_what_a_monitor_remembers_comes_back_from_json():
    whole, parts = Monitor(Health(), 1024), Monitor(Health(), 1024)
    probes, said = list(run_of(0, fall=DECLINE)), {whole: [], parts: []}
    for i, probed in enumerate(probes):
        for monitor in (whole, parts):
            monitor.updates.refuse(norms(0, PROBES)[i] * (1e3 if i > 60 else 1), lost=i == 5)
            said[monitor] += [*monitor.evaluation(probed), *monitor.iteration(Measured(**vars(SOUND) | {"zero_spread": 1.0}))]
        again = Monitor(Health(), 1024)
        again.load_state(json.loads(json.dumps(parts.state())))
        said[again], parts = said.pop(parts), again
    assert said[whole] == said[parts] and len(said[whole]) >= 2 and whole.state() == parts.state()
