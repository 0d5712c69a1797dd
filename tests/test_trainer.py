"""The loop itself, on a tiny pipeline: what it promises about stopping, resuming, journaling and learning."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator

from ddpo.advantage import GroupRelative, PerPrompt
from ddpo.algorithms.ddpo import DDPO
from ddpo.algorithms.forward import NFT, RWR
from ddpo.algorithms.ram import RAM
from ddpo.checkpoint import MismatchedCheckpoint
from ddpo.config import Component
from ddpo.deal import VarianceAdaptive
from ddpo.diffusion import DDIM, FlowSDE
from ddpo.evaluate import Baseline
from ddpo.judge import Judge
from ddpo.models.sd import StableDiffusion
from ddpo.policy import LoRA, Policy
from ddpo.progress import Display
from ddpo.prompts import Prompt
from ddpo.sections import Acting, Evaluating, Learning, Run
from ddpo.trainer import Task, Trainer, TrainingError
from ddpo.window import Random
from rewards import Part, RewardError, Rubric

PROMPTS = [Prompt(f"a {animal} on a red background", {}) for animal in ("cat", "dog", "owl", "fox", "bee", "cow")]

PROBE = 2 + 2  # pictures that a scorer is asked about before the first iteration: the probe, and again for its noise


class Brightness:
    """How light a picture is; counts the pictures it was asked about, and breaks where it is told to."""

    def __init__(self, breaks_at=None, value=float("nan")):
        self.asked, self.breaks_at, self.value = 0, breaks_at, value

    def __call__(self, images, prompts, metadata):
        scores = images.flatten(1).mean(1).double()
        if self.breaks_at is not None and self.asked <= self.breaks_at < self.asked + len(images):
            scores[self.breaks_at - self.asked] = self.value
        self.asked += len(images)
        return scores


def trainer_of(
    folder, tiny, reward=None, iterations=3, algorithm=None, advantage=None, lr=1e-2, identity=None, lora=None, display=None, **options
):  # fmt: skip
    acting = dict(
        solver=Component("diffusion:DDIM", DDIM, {"eta": 1.0}), num_steps=4, guidance=2.0, prompts=4, group_size=3, batch_size=6,
        window=None, choice=None, credit=None,
    )  # fmt: skip
    acting |= {k: options.pop(k) for k in list(options) if k in acting}
    learning = dict(lr=lr, updates=2, micro_batch=6) | options
    return Trainer(
        Policy(StableDiffusion(str(tiny), dtype="float32"), lora or LoRA(4), acting["guidance"]),
        algorithm or DDPO(clip=0.1), advantage or GroupRelative(),
        Task(PROMPTS[:5], PROMPTS[5:], Rubric.of([(reward or Brightness(), 1.0)]), Rubric.of([])),
        Run(seed=0, iterations=iterations, eval_every=2, save_every=1),
        Acting(**acting), Learning(**learning), Evaluating(1, 2),
        folder, identity or {"model": "tiny"}, Accelerator(cpu=True), display or Display(False, None),
    )  # fmt: skip


def weights(trainer):
    return torch.cat([w.detach().flatten() for w in trainer.policy.weights.values()])


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


ODE = Component("diffusion:DDIM", DDIM, {"eta": 0.0})
FORWARD = {
    "algorithm": NFT(decay=0.9, growth=0.3),
    "solver": ODE,
}  # draws as an earlier self, which a resumed run must be given


MOVING = {
    "window": Component("window:Random", Random, {"length": 1, "among": 1.0}),
    "choice": Component("deal:VarianceAdaptive", VarianceAdaptive, {}),
}


@pytest.mark.parametrize(
    "options", [{}, {"advantage": PerPrompt(window=8, min_count=4)}, {"epochs": 2, "lr_decay": 0.6}, FORWARD, MOVING]
)
def test_a_run_that_was_stopped_and_resumed_ends_bit_identical(tiny, tmp_path, options):
    fresh = lambda: {k: PerPrompt(window=8, min_count=4) if k == "advantage" else v for k, v in options.items()}  # noqa: E731
    whole = trainer_of(tmp_path / "whole", tiny, **fresh())
    whole.run()
    with pytest.raises(RewardError):  # 4 probe pictures (iteration 0), 12, 12 + 4: breaks in the third iteration
        trainer_of(tmp_path / "parts", tiny, Brightness(breaks_at=PROBE + 12 + 12 + 2 + 9), **fresh()).run()
    resumed = trainer_of(tmp_path / "parts", tiny, **fresh())
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))
    a, b = (_without_time(lines(tmp_path / name)) for name in ("whole", "parts"))
    assert a == b and [line["iteration"] for line in a] == [0, 1, 2, 3]


@pytest.mark.parametrize("decay, rates", [(0.0, [1, 1, 1, 1]), (0.5, [1, 1, 1, 0.5]), (1.0, [1, 0.75, 0.5, 0.25])])
def test_the_learning_rate_falls_evenly_towards_zero_over_the_last_share_of_a_run(tiny, tmp_path, decay, rates):
    trainer_of(tmp_path, tiny, iterations=4, lr=1e-2, lr_decay=decay).run()
    assert [line["lr"] for line in lines(tmp_path)[1:]] == pytest.approx([1e-2 * rate for rate in rates])


def _without_time(records):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records]


def test_journaled_rewards_are_read_and_not_asked_for_again(tiny, tmp_path):
    with pytest.raises(RewardError):
        trainer_of(tmp_path, tiny, Brightness(breaks_at=PROBE + 9)).run()  # in the second batch of the first iteration
    again = Brightness()
    trainer_of(tmp_path, tiny, again, iterations=1).run()
    assert again.asked == 6 + 2  # the batch that was lost, the probe at the end
    assert len(lines(tmp_path, "rewards.jsonl")) == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_reward_stops_before_the_update_and_names_scorer_and_prompt(tiny, tmp_path, value):
    trainer = trainer_of(tmp_path, tiny, Brightness(breaks_at=PROBE + 3, value=value))
    before = weights(trainer)
    with pytest.raises(RewardError, match=r"(?s)brightness.*on a red background"):
        trainer.run()
    assert torch.equal(weights(trainer), before)


class Picky(Brightness):
    """Tells only the pictures of some prompts apart."""

    def __init__(self, *known):
        super().__init__()
        self.known = known

    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        return [s if any(k in p for k in self.known) else 0.5 for s, p in zip(scores.tolist(), prompts, strict=True)]


def test_groups_that_are_all_alike_are_left_out_and_said(tiny, tmp_path):
    """RWR gives an advantage of zero the weight one: it would learn from them."""

    class Counting(RWR):
        def views(self, batch, size, draw):
            rows.extend(batch.prompts)
            return super().views(batch, size, draw)

    rows = []
    trainer = trainer_of(tmp_path / "some", tiny, Picky("cat", "owl"), 1, Counting(times=1), solver=ODE, updates=1)
    trainer.run()
    assert len(rows) == 6 and {p.split()[1] for p in rows} == {"cat", "owl"}
    assert lines(tmp_path / "some")[1]["advantage/zero_std_fraction"] == 0.5
    nothing = trainer_of(tmp_path / "none", tiny, Picky(), 1, Counting(times=1), solver=ODE)
    before = weights(nothing)
    nothing.run()
    assert torch.equal(weights(nothing), before) and len(rows) == 6 and lines(tmp_path / "none")[1]["grad_norm"] == 0


def test_each_iteration_learns_by_its_own_hyperparameters(tiny, tmp_path):
    """RAM tilts slowly where it is told to."""
    annealed = trainer_of(
        tmp_path / "a", tiny, algorithm=RAM(anneal=2), advantage=GroupRelative(scale="none"), iterations=3, solver=ODE
    )
    used = []
    improve = annealed.learner.improve
    annealed.learner.improve = lambda *args: used.append(annealed.learner.algorithm.temperature) or improve(*args)
    annealed.run()
    assert used == [2.0, 1.0, 1.0]


def test_every_update_moves_the_weights_and_the_first_ratio_is_one(tiny, tmp_path):
    trainer = trainer_of(tmp_path, tiny, iterations=1)
    before = weights(trainer)
    trainer.run()
    assert not torch.equal(weights(trainer), before)
    line = lines(tmp_path)[1]
    assert abs(line["ratio/mean"] - 1) < 0.05 and line["ratio/max"] > 1 and line["grad_norm"] > 0
    assert line["kl/step_nats"] > 0 and line["images"] == 12


def test_it_refuses_to_train_when_acting_and_learning_disagree(tiny, tmp_path):
    trainer = trainer_of(tmp_path, tiny)
    start, act = trainer.algorithm.start, trainer._act

    def act_then_change(hearing):
        rollout = act(hearing)
        trainer.policy.guidance = 2.5  # pitfall: guidance in acting is not the one in learning
        return rollout

    trainer._act = act_then_change
    before = weights(trainer)
    with pytest.raises(TrainingError, match="log importance ratio"):
        trainer.run()
    assert torch.equal(weights(trainer), before) and start is not None


def test_a_sampler_that_never_adds_noise_is_refused_before_anything_is_drawn(tiny, tmp_path):
    with pytest.raises(TrainingError, match="min_sigma"):
        trainer_of(tmp_path, tiny, solver=Component("diffusion:DDIM", DDIM, {"min_sigma": 0.9999}))


def test_a_solver_for_another_schedule_is_refused_with_the_fix(tiny, tmp_path):
    with pytest.raises(TrainingError, match=r"rollout\.solver"):
        trainer_of(tmp_path, tiny, solver=Component("diffusion:FlowSDE", FlowSDE, {}))


def test_only_the_steps_above_min_sigma_are_learned_from(tiny, tmp_path):
    """The log-probability of the others is not finite, and would be seen in the weights."""
    trainer = trainer_of(tmp_path, tiny, solver=Component("diffusion:DDIM", DDIM, {"min_sigma": 0.9}), iterations=1)
    before = weights(trainer)
    rollout = trainer._act(trainer.judge.hear(trainer.deal.rows(0, 0, 0), 0, 0, 3))
    assert 0 < len(rollout.stochastic) < 4 and torch.isfinite(rollout.log_probs).all(0).tolist() == [
        s in rollout.stochastic for s in range(4)
    ]
    trainer.run()
    assert not torch.equal(weights(trainer), before) and weights(trainer).isfinite().all()


def test_micro_batches_do_not_change_the_update(tiny, tmp_path):
    ends = []
    for size in (6, 3):
        trainer = trainer_of(tmp_path / str(size), tiny, iterations=1, micro_batch=size)
        start = weights(trainer)
        trainer.run()
        ends.append(weights(trainer) - start)
    assert (ends[0] - ends[1]).norm() <= 1e-4 * ends[0].norm()


def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path):
    trainer_of(tmp_path, tiny, iterations=1).run()
    with pytest.raises(MismatchedCheckpoint, match=r"tiny.*other"):
        trainer_of(tmp_path, tiny, iterations=2, identity={"model": "other"}).run()


def test_the_probe_is_the_same_every_time_and_the_base_is_drawn_once(tiny, tmp_path):
    trainer_of(tmp_path, tiny, iterations=2, lr=1e-9).run()
    index = lines(tmp_path / "samples", "index.jsonl")
    assert [s["iteration"] for s in index] == [0, 0, 2, 2] and len({s["seed"] for s in index}) == 2
    last = lines(tmp_path)[-1]
    assert last["eval/brightness/delta"] == pytest.approx(0, abs=1e-3)
    shutil.rmtree(tmp_path / "samples")


class Novelty(Brightness):
    """Learns: how far a picture's brightness is from the mean of all it was shown."""

    def __init__(self, breaks_at=None):
        super().__init__(breaks_at)
        self.mean, self.seen = torch.zeros(1), torch.zeros(1)

    def __call__(self, images, prompts, metadata):
        return (super().__call__(images, prompts, metadata) - self.mean.item()).abs()

    def refresh(self, images, prompts, metadata):
        assert len(images) == 12 and all(len(set(prompts[i : i + 3])) == 1 for i in range(0, 12, 3))  # whole groups
        self.mean = (self.mean * self.seen + images.mean() * len(images)) / (self.seen + len(images))
        self.seen = self.seen + len(images)

    def state(self):
        return {"mean": self.mean, "seen": self.seen}

    def load_state(self, state):
        self.mean, self.seen = state["mean"], state["seen"]


def test_a_reward_that_learns_and_a_floor_go_on_exactly_where_they_were(tiny, tmp_path):
    def trainer(folder, breaks_at=None):
        made = trainer_of(folder, tiny, Novelty(breaks_at), iterations=4)
        rubric = Rubric.of([Part(made.task.rewards.parts["novelty"].reward, 1.0), Part(Brightness(), 0.0, 0.1)])
        made.task = Task(PROMPTS[:5], PROMPTS[5:], rubric, Rubric.of([]))
        made.baseline = Baseline(rubric)
        made.judge = Judge(rubric, Rubric.of([]), made.judge.journal, torch.device("cpu"), 6)
        return made

    whole = trainer(tmp_path / "whole")
    whole.run()
    with pytest.raises(RewardError):
        trainer(tmp_path / "parts", breaks_at=PROBE + 12 + 12 + 4 + 9).run()  # in the third iteration
    resumed = trainer(tmp_path / "parts")
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))
    a, b = (_without_time(lines(tmp_path / name)) for name in ("whole", "parts"))
    assert a == b
    assert a[4]["floor/brightness/multiplier"] != 1 and "floor/brightness/margin" in a[4]
    assert whole.task.rewards.parts["novelty"].reward.seen.item() == 48
    drifted = [line["eval/novelty/base"] for line in a if "eval/novelty/base" in line]
    assert len(set(drifted)) == 3  # the base model's pictures are judged by what it knows now
    assert len({line["eval/brightness/base"] for line in a if "eval/win_rate" in line}) == 1
