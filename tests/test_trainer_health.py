"""A run that is ill stops, goes back or goes on; bad numbers and a lack of memory harm nothing. On a tiny pipeline."""

import json

import pytest
import torch
from accelerate import Accelerator

from ddpo import checkpoint, drift
from ddpo.advantage import GroupRelative
from ddpo.algorithms.ddpo import DDPO
from ddpo.algorithms.dpok import DPOK
from ddpo.config import Component
from ddpo.diffusion import DDIM
from ddpo.learner import BadNumbers
from ddpo.memory import NoMemory
from ddpo.models.sd import StableDiffusion
from ddpo.policy import LoRA, Policy
from ddpo.progress import Display
from ddpo.prompts import Prompt
from ddpo.sections import Acting, Evaluating, Health, Learning, Run
from ddpo.trainer import Task, Trainer
from ddpo.updates import ALARM_CODE, NUMBERS_CODE
from ddpo.watch import Alarmed
from rewards import RewardError, Rubric
from tests.test_trainer import Brightness, lines, weights

ANIMALS = ("cat", "dog", "owl", "fox", "bee", "cow", "pig", "hen", "ant", "bat", "rat", "ape")
PROMPTS = [Prompt(f"a {animal} on a red background", {}) for animal in ANIMALS]


class Rising(Brightness):
    """Trained on: the more often it is asked, the more it likes pictures."""

    def __call__(self, images, prompts, metadata):
        return super().__call__(images, prompts, metadata) + 0.1 * self.asked


class Sagging(Brightness):
    """Watched: when it has been asked so many pictures it falls, as a rule does whose reward is gamed."""

    def __call__(self, images, prompts, metadata):
        return super().__call__(images, prompts, metadata) - 10.0 * (self.asked > self.sound)

    def __init__(self, sound):
        super().__init__()
        self.sound = sound


def trainer_of(folder, tiny, watched=(), reward=None, algorithm=None, health=None, say=None, prompts=8, dtype="float32", **run):
    health = health or Health(kl_budget=1e9)  # these steps are large
    run = dict(seed=0, iterations=6, eval_every=1, save_every=1, on_alarm="stop") | run
    display = Display(False, None)
    if say is not None:
        display.say = say.append
    return Trainer(
        Policy(StableDiffusion(str(tiny), dtype=dtype), LoRA(4), 1.0), algorithm or DDPO(clip=0.1), GroupRelative(),
        Task(PROMPTS, PROMPTS[:prompts], Rubric.of([(reward or Brightness(), 1.0)]), Rubric.of([(w, 1.0) for w in watched])),
        Run(**run), Acting(solver=Component("diffusion:DDIM", DDIM, {"eta": 1.0}), num_steps=2, prompts=2, group_size=4, batch_size=8),
        Learning(lr=1e-2, updates=2, micro_batch=4), Evaluating(8, 1), folder, {"model": "tiny"}, Accelerator(cpu=True), display,
        health=health,
    )  # fmt: skip


def saved(folder, step):
    return checkpoint.load(checkpoint.folder_of(folder / "checkpoints", step), {"model": "tiny"}).state


def alarms(folder):
    return [(line["iteration"], alarm["name"]) for line in lines(folder) for alarm in line.get("alarms", [])]


SOUND = 8 + 4 + 8  # pictures that nothing is wrong with: the probe, a part of it again for its noise, and one evaluation more


def hacked(folder, tiny, **options):
    """Its trained reward rises, and what is watched falls at the second evaluation and stays there."""
    return trainer_of(folder, tiny, [Sagging(SOUND)], Rising(), **options)


def test_over_optimisation_stops_the_run_saved_and_told(tiny, tmp_path):
    with pytest.raises(Alarmed) as stopped:
        hacked(tmp_path, tiny).run()
    alarm = stopped.value.alarm
    assert (alarm.name, alarm.code) == ("over-optimisation", ALARM_CODE) and "since iteration 2 " in alarm.text
    assert alarms(tmp_path) == [(3, "over-optimisation")] and lines(tmp_path)[-1]["alarms"] == [alarm.line()]
    state = saved(tmp_path, 3)
    assert state["health"]["streaks"] == {} and state["baseline"]["safe"] in (0, 1)
    assert not checkpoint.folder_of(tmp_path / "checkpoints", 4).exists()


def test_a_warning_only_goes_on_and_is_said_once(tiny, tmp_path):
    hacked(tmp_path, tiny, on_alarm="warn").run()
    assert alarms(tmp_path) == [(3, "over-optimisation")] and lines(tmp_path)[-1]["iteration"] == 6


def test_a_rollback_returns_to_the_safest_weights_with_other_noise_and_half_the_rate_and_the_third_alarm_stops(tiny, tmp_path):
    trainer = hacked(tmp_path, tiny, on_alarm="rollback", say=(said := []))
    with pytest.raises(Alarmed, match="sagging, which is not trained on, is down"):
        trainer.run()
    assert trainer.salt == 2 and trainer.learner.lr == pytest.approx(1e-2 / 4)
    assert [back["to"] for back in trainer.rollbacks] == [trainer.baseline.safe] * 2
    assert sum("rolled back to iteration" in text for text in said) == 2
    assert (tmp_path / "metrics-left-1.jsonl").exists() and (tmp_path / "metrics-left-2.jsonl").exists()
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(trainer.iteration + 1))
    told = [name for _, name in alarms(tmp_path)]
    assert told == ["rollback", "rollback", "over-optimisation"]
    salts = {json.loads(line)["salt"] for line in (tmp_path / "rewards.jsonl").read_text().splitlines()}
    assert salts == {0, 1, 2}  # nothing is read from the journal of the timeline that was left


def test_a_run_that_is_resumed_after_a_rollback_ends_bit_identical(tiny, tmp_path):
    def trainer(name, breaks_at=None):
        return crashing(tmp_path / name, tiny, at=3, times=2, reward=Brightness(breaks_at), on_alarm="rollback", eval_every=2)

    whole = trainer("whole")
    whole.run()
    assert whole.salt == 1 and len(whole.rollbacks) == 1 and lines(tmp_path / "whole")[-1]["lr"] == pytest.approx(5e-3)
    rolled_back = 12 + 5 * 8 + 2 * 8  # the probe and its part, five iterations, two evaluations
    for breaks_at in (rolled_back + 2, 12):  # in the first iteration after the rollback, then in the second
        with pytest.raises(RewardError):
            trainer("parts", breaks_at).run()
        assert saved(tmp_path / "parts", _newest(tmp_path / "parts"))["salt"] == 1
    resumed = trainer("parts")
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))
    a, b = ([{k: v for k, v in x.items() if "seconds" not in k} for x in lines(tmp_path / name)] for name in ("whole", "parts"))
    assert a == b


def _newest(folder):
    return int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))


class Crash:
    """Losses that are not finite in iterations from `at` on, `times` of them, as long as the noise is the first."""

    def __init__(self, at, times=2, row=None):
        self.at, self.times, self.row, self.trainer = at, times, row, None

    def algorithm(self):
        watched = self

        class Crashing(DDPO):
            def loss(self, policy, view):
                loss, metrics = super().loss(policy, view)
                trainer = watched.trainer
                if trainer.salt == 0 and watched.at <= trainer.iteration < watched.at + watched.times:
                    loss = loss * torch.where(torch.arange(len(loss)) == (watched.row or 0), torch.nan, 1.0)
                return loss, metrics

        made = Crashing(clip=0.1)
        object.__setattr__(made, "watched", self)
        return made


def crashing(folder, tiny, at, times, **options):
    made = trainer_of(folder, tiny, algorithm=(crash := Crash(at, times)).algorithm(), **options)
    crash.trainer = made
    return made


def test_a_loss_that_is_not_finite_skips_its_update_and_names_the_picture(tiny, tmp_path):
    trainer = crashing(tmp_path, tiny, at=0, times=1, iterations=1, say=(said := []))
    before = weights(trainer)
    trainer.run()
    assert torch.equal(weights(trainer), before)
    (first, second) = (text for text in said if "skipped" in text)
    row = trainer.deal.rows(0, 0, 0)[0]
    assert "iteration 1: update 1 was skipped, for a loss is not finite" in first and "update 2" in second
    assert repr(row.prompt.text) in first and f"(group {row.group}, member 0)" in first and "lora_" in first
    assert alarms(tmp_path) == []


def test_three_in_ten_stop_with_a_code_of_their_own_even_where_alarms_only_warn(tiny, tmp_path):
    trainer = crashing(tmp_path, tiny, at=1, times=9, on_alarm="warn")
    with pytest.raises(Alarmed) as stopped:
        trainer.run()
    assert stopped.value.alarm.code == NUMBERS_CODE and trainer.iteration == 3
    assert all(torch.equal(w, trainer.policy.weights[name]) for name, w in _lora(tmp_path, 1).items())


def _lora(folder, step):
    return checkpoint.load(checkpoint.folder_of(folder / "checkpoints", step), {"model": "tiny"}).tensors["lora"]


@pytest.mark.slow
def test_a_crash_that_comes_of_the_noise_is_passed_with_a_rollback(tiny, tmp_path):
    trainer = crashing(tmp_path, tiny, at=2, times=9, on_alarm="rollback")
    trainer.run()
    assert trainer.salt == 1 and trainer.iteration == 6
    without = crashing(tmp_path / "again", tiny, at=2, times=9)
    with pytest.raises(Alarmed):
        without.run()
    again = crashing(tmp_path / "again", tiny, at=2, times=9)
    with pytest.raises(Alarmed, match="not finite"):  # the same noise leads to the same crash
        again.run()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing(tiny, tmp_path, value):
    trainer = trainer_of(tmp_path, tiny, iterations=1, say=(said := []))
    name, first = next(iter(trainer.policy.weights.items()))
    first.register_hook(lambda g: g * value)
    before = weights(trainer)
    trainer.run()
    assert torch.equal(weights(trainer), before) and trainer.learner.optimizer.state_dict()["state"] == {}
    assert any(f"not finite is the gradient of {name}" in text for text in said)


def test_a_weight_that_is_not_finite_is_never_saved(tiny, tmp_path):
    trainer = trainer_of(tmp_path, tiny, iterations=2)
    first, step = next(iter(trainer.policy.weights.values())), trainer.learner.optimizer.step

    def overflowing():
        step()
        first.data[0, 0] = torch.inf

    trainer.learner.optimizer.step = overflowing
    with pytest.raises(BadNumbers, match=r"lora_.*is not finite"):
        trainer.run()
    assert all(w.isfinite().all() for w in _lora(tmp_path, 0).values())


# ----------------------------------------------------------------------------------------------------------------------
# Memory: what raises torch.OutOfMemoryError for more than so many rows


def too_many(most, call, rows=lambda args: len(args[0])):
    def refusing(*args, **kwargs):
        if rows(args) > most:
            raise torch.OutOfMemoryError("simulated")
        return call(*args, **kwargs)

    return refusing


def short_of(trainer, phase, most):
    if phase == "sampling":
        trainer.policy.family.denoise = too_many(most, trainer.policy.family.denoise, lambda args: len(args[1]))
    elif phase == "decoding":
        trainer.policy.family.decode = too_many(most, trainer.policy.family.decode)
    elif phase == "reward":
        part = next(iter(trainer.task.rewards.parts.values()))
        part.reward = too_many(most, part.reward)
    else:
        inner = trainer.algorithm.loss

        def loss(policy, view):
            made = inner(policy, view)
            if len(view) > most:
                made[0].sum().backward()  # half a gradient is there already
                raise torch.OutOfMemoryError("simulated")
            return made

        object.__setattr__(trainer.algorithm, "loss", loss)


@pytest.mark.parametrize("phase", ["sampling", "decoding", "reward", "learning"])
def test_what_does_not_fit_is_halved_and_the_update_is_the_same(tiny, tmp_path, phase):
    whole = trainer_of(tmp_path / "whole", tiny, iterations=2)
    whole.run()
    trainer = trainer_of(tmp_path / "short", tiny, iterations=2, say=(said := []))
    start = weights(trainer)
    short_of(trainer, phase, 2)
    trainer.run()
    apart = (weights(trainer) - weights(whole)).norm() / (weights(whole) - start).norm()
    assert apart <= 1e-4, f"relative difference {apart:.2g}"
    assert lines(tmp_path / "short")[-1]["images"] == lines(tmp_path / "whole")[-1]["images"] == 16
    assert trainer.learner.optimizer.state_dict()["state"][0]["step"] == 4  # two updates an iteration, no more
    told = [text for text in said if text.startswith("out of memory")]
    assert len(told) == {"sampling": 3, "decoding": 2, "reward": 0, "learning": 1}[phase]  # 8 -> 4 -> 2, and 4 -> 2 in learning
    state = saved(tmp_path / "short", 2)
    assert 2 in (*state["batches"].values(), *state["rewards"]["most"].values())
    resumed = trainer_of(tmp_path / "short", tiny, iterations=3)
    resumed.run()
    assert (resumed.batch.size, resumed.learner.batch.size) == (state["batches"]["drawing"], state["batches"]["learning"])


@pytest.mark.parametrize("phase", ["critic", "distance"])
def test_what_comes_beside_the_update_is_halved_too(tiny, tmp_path, monkeypatch, phase):
    """Training the critic, and measuring the distance from the base model."""

    def made(name, say=None):
        trainer = trainer_of(tmp_path / name, tiny, algorithm=DPOK(critic_lr=1e-2), iterations=2, say=say)
        for group in trainer.learner.critic.optimizer.param_groups:
            group["eps"] = 1.0  # what it learns from adds up to zero, and Adam would take the rounding of that for a gradient
        return trainer

    def both(trainer):
        return torch.cat([weights(trainer), *(w.detach().flatten() for w in trainer.learner.critic.weights)])

    whole = made("whole")
    start = both(whole)
    whole.run()
    trainer = made("short", say=(said := []))
    if phase == "critic":
        trainer.learner.critic.loss = too_many(2, trainer.learner.critic.loss)
    else:
        monkeypatch.setattr(drift, "step_kl", too_many(2, drift.step_kl, lambda args: args[2]))
    trainer.run()
    assert trainer.learner.batch.size == 2 and sum("out of memory in learning" in text for text in said) == 1
    apart = (both(trainer) - both(whole)).norm() / (both(whole) - start).norm()
    assert apart <= 1e-4, f"relative difference {apart:.2g}"
    for name in ("kl/image_nats", "critic/loss"):
        assert lines(tmp_path / "short")[-1][name] == pytest.approx(lines(tmp_path / "whole")[-1][name], rel=1e-3)


@pytest.mark.parametrize("phase", ["sampling", "learning", "reward"])
def test_where_one_picture_is_too_much_the_options_are_named_and_nothing_is_updated(tiny, tmp_path, phase):
    trainer = trainer_of(tmp_path, tiny, iterations=1)
    before = weights(trainer)
    short_of(trainer, phase, 0)
    with pytest.raises((NoMemory, RewardError), match=r"resolution|lora\.rank|offload: true"):
        trainer.run()
    assert torch.equal(weights(trainer), before)


def test_in_half_precision_the_ratio_is_still_one_after_a_batch_was_halved(tiny, tmp_path):
    trainer = trainer_of(tmp_path, tiny, iterations=1, dtype="bfloat16")
    short_of(trainer, "learning", 1)
    trainer.run()
    assert trainer.learner.batch.size == 1


def test_a_health_of_ones_own_is_heeded(tiny, tmp_path):
    with pytest.raises(Alarmed, match="more than 1e-09"):
        trainer_of(tmp_path, tiny, health=Health(kl_budget=1e-9)).run()
