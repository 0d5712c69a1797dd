"""Several rewards as one: weights, units, floors, and how scorers are called. `pytest tests/test_rewards_rubric.py`"""

import pytest
import torch
from torch import Tensor

from rewards import Part, RewardError, Rubric
from rewards.jpeg import Compressibility

PROMPTS = ["a cat", "two owls", "a fox"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
EMPTY: list[dict] = [{}, {}, {}]
GROUPS = ["a", "b", "c"]
TEXTS = [g for g in GROUPS for _ in range(4)]


def returning(value):
    return lambda images, prompts, metadata: value


def named(name, value=None):
    class Scorer:
        def __call__(self, images, prompts, metadata):
            return value

    scorer = Scorer()
    scorer.name = name
    return scorer


def two(normalise="none", floor=None, weights=(1.0, 1.0)) -> Rubric:
    return Rubric.of([Part(named("size"), weights[0]), Part(named("clip"), weights[1], floor)], normalise)


def scores(seed=0) -> dict[str, Tensor]:
    """Sizes in the tens, similarities in the hundredths; prompts differ more than the pictures of one."""
    draw = torch.Generator().manual_seed(seed)
    easy = torch.randn(3, generator=draw, dtype=torch.float64).repeat_interleave(4)
    size, clip = torch.randn(2, 12, generator=draw, dtype=torch.float64)
    return {"size": -80 + 20 * easy + 5 * size, "clip": 0.3 + 0.05 * easy + 0.01 * clip}


def standardised(values: Tensor) -> Tensor:
    groups = values.view(3, 4)
    return ((groups - groups.mean(1, keepdim=True)) / groups.std(1, correction=0, keepdim=True)).flatten()


def test_it_keeps_the_parts_and_adds_them_weighted():
    rubric = Rubric.of([(returning([1.0, 2.0, 3.0]), 2.0), (returning([1.0, None, 1.0]), -1.0), (Compressibility(), 0.0)])
    assert {n: p.weight for n, p in rubric.parts.items()} == {"lambda": 2.0, "lambda_2": -1.0, "compressibility": 0.0}
    parts = rubric.score(IMAGES, PROMPTS, EMPTY)
    assert parts["lambda"].tolist() == [1, 2, 3] and list(parts) == list(rubric.parts)
    total = rubric.total(parts)
    assert total.dtype == torch.float64 and total[[0, 2]].tolist() == [1, 5] and total[1].isnan()
    wanted = rubric.objective(parts, PROMPTS)
    assert torch.equal(wanted.nan_to_num(7), total.nan_to_num(7))


def test_an_empty_rubric_scores_nothing():
    assert Rubric.of([]).score(IMAGES, PROMPTS, EMPTY) == {}


def test_a_gradient_goes_through_gate_and_rubric():
    images = IMAGES.clone().requires_grad_()
    rubric = Rubric.of([(lambda i, p, m: i.mean((1, 2, 3)), 2.0), (lambda i, p, m: i.amax((1, 2, 3)), 0.0)])
    rubric.total(rubric.score(images, PROMPTS, EMPTY)).sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 2 / images[0].numel()))


def test_it_names_the_scorer_that_failed():
    rubric = Rubric.of([(returning([1, 2, 3]), 1.0), (returning([1, 2]), 1.0)])
    with pytest.raises(RewardError, match="'lambda_2'"):
        rubric.score(IMAGES, PROMPTS, EMPTY)


def test_it_refuses_a_weight_that_means_nothing():
    with pytest.raises(ValueError, match=r"'compressibility' is nan"):
        Rubric.of([(Compressibility(), float("nan"))])


class Network:
    """Remembers where it has been, and breaks where more pictures come than its memory holds."""

    name = "network"

    def __init__(self, holds=100):
        self.holds, self.places, self.batches = holds, [], []

    def to(self, device):
        self.places.append(str(device))

    def __call__(self, images, prompts, metadata):
        self.batches.append(len(images))
        if len(images) > self.holds:
            raise torch.OutOfMemoryError("not today")
        return images[:, 0, 0, 0]


def test_scorers_are_moved_where_they_are_wanted():
    here, there, between = Network(), Network(), Network()
    rubric = Rubric.of([Part(here), Part(there, device="cpu"), Part(between, offload=True), Part(Compressibility())])
    assert rubric.to("meta") is rubric
    assert (here.places, there.places, between.places) == (["meta"], ["cpu"], [])
    Rubric.of([Part(between, device="cpu", offload=True)]).to("meta").score(IMAGES, PROMPTS, EMPTY)
    assert between.places == ["cpu", "cpu"]


def test_a_batch_too_large_for_the_memory_is_scored_in_halves():
    small = Network(holds=1)
    assert torch.equal(Rubric.of([(small, 1.0)]).score(IMAGES, PROMPTS, EMPTY)["network"], IMAGES[:, 0, 0, 0].double())
    assert small.batches == [3, 1, 1, 1]
    with pytest.raises(RewardError, match="does not fit in memory with 1 pictures"):
        Rubric.of([(Network(holds=0), 1.0)]).score(IMAGES, PROMPTS, EMPTY)
    group = Network(holds=1)
    group.groupwise = True  # halves of a group would be other groups
    with pytest.raises(RewardError, match="does not fit in memory with 3 pictures"):
        Rubric.of([(group, 1.0)]).score(IMAGES, PROMPTS, EMPTY)


# ----------------------------------------------------------------------------------------------------------------------
# Units


def test_normalising_gives_each_scorer_mean_0_and_spread_1_in_each_group():
    """GDPO, Liu et al. 2026: the advantage of each reward by itself, then their weighted sum."""
    s = scores()
    wanted = 1.0 * standardised(s["size"]) + 3.0 * standardised(s["clip"])
    assert torch.allclose(two("group", weights=(1.0, 3.0)).objective(s, TEXTS), wanted, rtol=0.1, atol=0.05)
    size_alone = torch.corrcoef(torch.stack([two().objective(s, TEXTS), s["size"]]))[0, 1]
    assert size_alone > 0.999  # as they are, the one of large numbers drowns the other


def test_normalising_takes_the_unit_away():
    s, grams = scores(), scores()
    grams["size"] = grams["size"] * 1000
    assert torch.allclose(two("group").objective(s, TEXTS), two("group").objective(grams, TEXTS), atol=0.02)


def test_a_group_that_scores_alike_stays_silent_and_a_gap_a_gap():
    s = scores()
    s["clip"][:4] = 0.3
    s["size"][5] = float("nan")
    wanted = two("group").objective(s, TEXTS)
    assert wanted.isnan().tolist() == [i == 5 for i in range(12)]
    assert torch.allclose(wanted[:4], standardised(s["size"])[:4], atol=0.01)


def test_units_of_the_total_come_from_the_base_model():
    base = scores(1)
    assert two().scales(base) == {}
    rubric = two("group")
    scales = rubric.scales(base)
    assert scales == pytest.approx({name: v.std(correction=0).item() for name, v in base.items()})
    assert torch.allclose(rubric.total(base, scales), base["size"] / scales["size"] + base["clip"] / scales["clip"])


# ----------------------------------------------------------------------------------------------------------------------
# Floors


def test_a_margin_is_counted_in_standard_errors_of_the_base_models_mean():
    base, rubric = scores(), two(floor=2.0)
    means = base["clip"].view(3, 4).mean(1)
    error = means.std() / 3**0.5
    tuned = base | {"clip": base["clip"] - 3 * error}
    assert rubric.margins(base, base, TEXTS) == pytest.approx({"clip": 2.0})
    assert rubric.margins(base, tuned, TEXTS) == pytest.approx({"clip": -1.0})
    assert two().margins(base, tuned, TEXTS) == {}


@pytest.mark.parametrize("normalise", ["none", "group"])
def test_a_floor_counts_as_much_as_the_sum_times_its_multiplier(normalise):
    s, rubric = scores(), two(normalise, floor=1.0, weights=(1.0, 0.0))
    for multiplier in (1.0, 4.0):
        rubric._held["clip"] = rubric._held["clip"]._replace(multiplier=multiplier)
        got = standardised(rubric.objective(s, TEXTS))
        size, clip = (s[n] - s[n].view(3, 4).mean(1).repeat_interleave(4) for n in ("size", "clip"))
        if normalise == "group":
            size, clip = standardised(size), standardised(clip)
        wanted = standardised(size / size.square().mean().sqrt() + multiplier * clip / clip.square().mean().sqrt())
        assert torch.allclose(got, wanted, atol=0.05)


def after(*margins, floor=1.0) -> float:
    """The multiplier when these margins have been seen, one after the other."""
    rubric = two(floor=floor)
    for margin in margins:
        rubric.adjust({"clip": margin})
    return rubric.multipliers["clip"]


def test_a_multiplier_rises_below_its_floor_and_falls_far_above():
    assert after(0.5, 0.5) < after(0.5, -0.5) and after(1.0) == pytest.approx(1 / 8) and after(-10.0) == 8
    steady = [0.5] * 20
    assert after(-1.0, *steady) == after(-1.0, *steady[1:])  # at its aim it stays
    assert after(0.5, 0.4) > after(0.5, 0.5) > after(0.5, 0.6)  # what falls towards the floor is caught before it is there
    assert after(0.25, float("nan")) == after(0.25)
    assert after(-2.0, -1.0) > after(-2.0)  # while it is broken, a rise does not loosen it
    assert after(*[-10.0] * 50) == 4e3 and after(*[10.0] * 50) == 1e-3 / 4


def test_a_floor_holds_while_the_other_reward_rises():
    """A policy of two numbers: x earns size and costs clip, y earns clip and costs itself. Gradient ascent, 300 steps."""
    held, free = (_ascend(floor=floor) for floor in (1.0, None))
    print(held, free)
    assert min(held["margins"]) > 0 and held["size"] > 1
    assert free["size"] > held["size"] and free["clip"] < -5


def _ascend(floor: float | None) -> dict:
    """With momentum, as Adam has, and an evaluation every second step."""
    rubric = two(floor=floor, weights=(1.0, 0.0))
    place, speed = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    base = {"size": torch.zeros(12, dtype=torch.float64), "clip": scores()["clip"]}
    error = base["clip"].view(3, 4).mean(1).std().item() / 3**0.5

    def judged(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"size": base["size"] + x, "clip": base["clip"] + error * (y - x - 0.1 * y**2)}

    margins = []
    for step in range(300):
        draw = torch.randn(2, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        advantage = standardised(rubric.objective(judged(*(place[:, None] + draw)), TEXTS))
        speed = 0.9 * speed + 0.1 * (advantage * draw).mean(1)
        place = place + 0.03 * speed
        if step % 2:
            now = rubric.margins(base, judged(*place), TEXTS)
            rubric.adjust(now)
            margins += now.values()
    return {"size": place[0].item(), "clip": (place[1] - place[0] - 0.1 * place[1] ** 2).item(), "margins": margins}


def test_what_it_learned_survives_a_checkpoint():
    class Learner:
        name = "learner"

        def __init__(self):
            self.seen = torch.zeros(1)

        def __call__(self, images, prompts, metadata):
            return [0.0] * len(images)

        def refresh(self, images, prompts, metadata):
            self.seen = self.seen + len(images)

        def state(self):
            return {"seen": self.seen}

        def load_state(self, state):
            self.seen = state["seen"]

    made = [Rubric.of([Part(Learner(), 1.0), Part(named("clip"), 0.0, 1.0)]) for _ in range(2)]
    assert made[0].learns and not two().learns
    made[0].refresh(IMAGES, PROMPTS, EMPTY)
    made[0].adjust({"clip": -3.0})
    made[1].load_state(*made[0].state())
    assert (
        made[1].parts["learner"].reward.seen.item() == 3
        and made[1].multipliers == {"clip": 8.0}
        and made[1].state()[0] == made[0].state()[0]
    )
