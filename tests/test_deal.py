"""Who draws what: `pytest tests/test_deal.py`."""

import json
from dataclasses import replace

import torch

from ddpo.deal import Deal, Shuffled, VarianceAdaptive
from ddpo.prompts import Prompt

DEAL = Deal([Prompt(f"prompt {i}", {}) for i in range(5)], Shuffled(), groups=8, group_size=3, updates=2, processes=1, seed=0)


def test_prompts_are_all_seen_before_any_comes_again():
    rows = [row for iteration in range(5) for row in DEAL.rows(iteration, 0, 0) if row.member == 0]
    seen = [row.prompt.text for row in rows]
    assert all(sorted(seen[i : i + 5]) == [f"prompt {n}" for n in range(5)] for i in range(0, 40, 5))
    assert seen[:5] != seen[5:10]
    assert [r.prompt for r in replace(DEAL, seed=1).rows(0, 0, 0)] != [r.prompt for r in DEAL.rows(0, 0, 0)]
    assert [r.prompt for r in DEAL.rows(0, 1, 0)] != [r.prompt for r in DEAL.rows(0, 0, 0)]


def test_an_update_sees_the_same_groups_on_any_number_of_processes_and_a_group_stays_whole():
    two = replace(DEAL, processes=2)
    alone, pair = DEAL.rows(3, 0, 0), [two.rows(3, 0, process) for process in range(2)]
    for update in (0, 1):
        whole = alone[12 * update : 12 * (update + 1)]
        shared = [row for rows in pair for row in rows[6 * update : 6 * (update + 1)]]
        assert sorted(shared, key=lambda r: r[:2]) == sorted(whole, key=lambda r: r[:2])
    for rows in (alone, *pair):
        assert all([r.member for r in rows[i : i + 3]] == [0, 1, 2] and len({r.group for r in rows[i : i + 3]}) == 1
                   for i in range(0, len(rows), 3))  # fmt: skip
    assert two.all_rows(3, 0) == pair[0] + pair[1]


def test_prompts_whose_rewards_differ_come_more_often_and_once_an_iteration():
    choice, prompts = VarianceAdaptive(uniform=0.2), [Prompt(p, {}) for p in "abcdefgh"]
    for _ in range(20):  # "a" differs, the others do not
        choice.learn(list("aabbccddeeffgg"), torch.tensor([0.0, 1.0] + [0.5] * 12, dtype=torch.float64))
    drawn = [[p.text for p in choice(prompts, 2, i, (0, 0))] for i in range(400)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    often = {p: sum(p in pair for pair in drawn) / 400 for p in "abcdefgh"}
    # "h" was never seen and counts as the average: a variance of 1/28; that of "a" is 1/4
    assert often["a"] > 0.75 and 0.2 < often["h"] < 0.8 and all(0.01 < often[p] < 0.3 for p in "bcdefg")
    assert len(choice(prompts, 20, 0, (0, 0))) == 20  # more groups than prompts


def test_a_choice_goes_on_from_its_state_and_ignores_what_was_not_scored():
    one, two, prompts = VarianceAdaptive(), VarianceAdaptive(), [Prompt(p, {}) for p in "abcd"]
    one.learn(list("aaabbb"), torch.tensor([0.0, 1.0, torch.nan, 3.0, torch.nan, torch.nan], dtype=torch.float64))
    assert one.state() == {"variance": {"a": 0.25}}
    two.load_state(json.loads(json.dumps(one.state())))
    assert one(prompts, 3, 7, (0, 0)) == two(prompts, 3, 7, (0, 0))
    one.learn(["a", "a"], torch.tensor([0.0, 0.0], dtype=torch.float64))
    assert one.state() == {"variance": {"a": 0.125}} and two.state() == {"variance": {"a": 0.25}}
