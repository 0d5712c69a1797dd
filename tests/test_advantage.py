"""Advantages against their formulas, and what a missing score may not do."""

import math

import pytest
import torch

from ddpo.advantage import GroupRelative, LeaveOneOut, PerPrompt, WinRate, zero_spread

NAN = float("nan")
PROMPTS = ["a", "a", "a", "b", "b", "b"]
REWARDS = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 13.0], dtype=torch.float64)


def test_group_relative_is_centred_and_scaled_in_each_group():
    a = GroupRelative(eps=0.0)(REWARDS, PROMPTS)
    for rows in (a[:3], a[3:]):
        assert math.isclose(rows.mean(), 0, abs_tol=1e-6) and math.isclose(rows.std(correction=0), 1, rel_tol=1e-6)
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    assert torch.equal(GroupRelative(eps=0.0)(REWARDS[order], [PROMPTS[i] for i in order]), a[order])


def test_the_batch_scale_and_no_scale():
    centred = torch.tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0])
    torch.testing.assert_close(GroupRelative("none")(REWARDS, PROMPTS), centred)
    torch.testing.assert_close(GroupRelative("batch", 0.0)(REWARDS, PROMPTS), centred / centred.square().mean().sqrt())


def test_leave_one_out_is_against_the_others_and_win_rate_sees_the_order_alone():
    torch.testing.assert_close(LeaveOneOut()(REWARDS, PROMPTS), torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))
    wins = WinRate()(REWARDS, PROMPTS)
    # "a" beats 0, 1, 2 of two others; in "b" two tie and lose to the third: shares 1/4, 1/4, 1
    torch.testing.assert_close(wins[:3], torch.tensor([-1.0, 0.0, 1.0]) / (2 / 3) ** 0.5)
    torch.testing.assert_close(wins[3:], torch.tensor([-1.0, -1.0, 2.0]) / 2**0.5)
    assert torch.equal(WinRate()(REWARDS**3, PROMPTS), wins)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1e6 / 3])
def test_a_group_without_spread_is_left_out(scale, value):
    rewards = torch.tensor([value] * 3 + [1.0, 2.0, 3.0], dtype=torch.float64)
    a = GroupRelative(scale)(rewards, PROMPTS)
    assert a[:3].isnan().all() and a[3:].isfinite().all()
    assert zero_spread(rewards, PROMPTS) == 0.5


@pytest.mark.parametrize("advantage", [GroupRelative(), GroupRelative("batch"), LeaveOneOut(), WinRate(), PerPrompt()])
def test_a_missing_score_is_masked_and_not_in_its_siblings_baseline(advantage):
    with_gap = REWARDS.clone()
    with_gap[1] = NAN
    a = advantage(with_gap, PROMPTS)
    rest = [0, 2, 3, 4, 5]
    assert a[1].isnan() and a[rest].isfinite().all()
    fresh = type(advantage)() if isinstance(advantage, PerPrompt) else advantage
    torch.testing.assert_close(a[rest], fresh(REWARDS[rest], [PROMPTS[i] for i in rest]))


def test_a_group_with_one_or_no_score_teaches_nothing():
    a = GroupRelative()(torch.tensor([NAN, NAN, 6.0, NAN, NAN, NAN], dtype=torch.float64), PROMPTS)
    assert a.isnan().all()


def test_integer_like_rewards_are_not_truncated():
    assert PerPrompt()(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), ["a", "b", "c"]).frac().abs().sum() > 0


def test_per_prompt_uses_the_batch_until_the_prompt_is_known_and_then_its_own_window():
    running = PerPrompt(window=4, min_count=4, eps=0.0)
    a = running(REWARDS, PROMPTS)
    torch.testing.assert_close(a, ((REWARDS - REWARDS.mean()) / REWARDS.std(correction=0)).float())
    b = running(torch.tensor([3.0, 5.0], dtype=torch.float64), ["a", "a"])
    own = torch.tensor([2.0, 6.0, 3.0, 5.0], dtype=torch.float64)  # the newest four
    torch.testing.assert_close(b, ((own[2:] - own.mean()) / own.std(correction=0)).float())


def test_per_prompt_goes_on_from_its_state():
    import json

    one, two = PerPrompt(window=4, min_count=2), PerPrompt(window=4, min_count=2)
    one(REWARDS, PROMPTS)
    two.load_state(json.loads(json.dumps(one.state())))
    assert torch.equal(one(REWARDS * 2, PROMPTS), two(REWARDS * 2, PROMPTS))


def test_a_window_smaller_than_its_minimum_is_refused():
    with pytest.raises(ValueError, match=r"min_count is 16.*window, which is 8"):
        PerPrompt(window=8)
