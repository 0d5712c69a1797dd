"""The loop: act, score, compare, improve. The only file that knows devices and ranks.

The batch is global (`ddpo.deal`), and gradients are sums divided by the global count.
All trained state is the same on every process; the main one writes it down.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpo import checkpoint, evaluate, offline, report, state, watch
from ddpo.actor import Actor
from ddpo.advantage import Advantage, zero_spread
from ddpo.algorithms import Algorithm
from ddpo.credit import by_step, explained_variance
from ddpo.deal import Deal, Row, Shuffled
from ddpo.health import Monitor
from ddpo.journal import Journal
from ddpo.judge import Hearing, Judge
from ddpo.learner import Learner
from ddpo.meeting import Meeting
from ddpo.meeting import TrainingError as TrainingError
from ddpo.memory import Batch
from ddpo.meters import Clock, to_json
from ddpo.noise import Address
from ddpo.policy import Policy
from ddpo.progress import Display
from ddpo.prompts import Prompt
from ddpo.rollout import Rollout
from ddpo.sections import Acting, Evaluating, Health, Learning, Run
from ddpo.trackers import Trackers
from ddpo.updates import NUMBERS_CODE, Alarm
from ddpo.watch import Alarmed
from rewards import Rubric

MOST_ROLLBACKS = 2


@dataclass(frozen=True)
class Task:
    """What is learned from what."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: Rubric
    held_out_rewards: Rubric
    max_missing: float = 0.1  # share of an iteration's pictures that may go unscored


class Trainer:
    """Everything that an iteration needs, put together.

    Args:
        identity: what a checkpoint must match to be resumed from (a flat dict of settings).
        trackers: fed by the main process alone.
        health: when the run is ill; None is by default.
        meeting: where the processes meet; one of its own by default.

    Raises:
        TrainingError, checkpoint.CheckpointError, rewards.RewardError: before any update that would have used them.
    """

    def __init__(
        self, policy: Policy, algorithm: Algorithm, advantage: Advantage, task: Task, run: Run, acting: Acting,
        learning: Learning, evaluating: Evaluating, folder: Path, identity: dict[str, Any], accelerator: Accelerator, display: Display,
        trackers: Trackers | None = None, health: Health | None = None, meeting: Meeting | None = None,
    ):  # fmt: skip
        self.policy, self.algorithm, self.advantage, self.task, self.settings = policy, algorithm, advantage, task, run
        self.acting, self.trackers = acting, trackers
        self.folder, self.identity, self.accelerator, self.display = folder, identity, accelerator, display
        self.actor = Actor(policy, algorithm, acting)
        choice = acting.choice.build() if acting.choice else Shuffled()
        self.deal = Deal(
            task.prompts, choice, acting.prompts, acting.group_size, learning.updates, accelerator.num_processes, run.seed
        )
        self.probe = evaluate.Probe(task.held_out, evaluating, acting.num_steps, run.seed)
        policy.to(accelerator.device)
        self.meeting = meeting or Meeting(accelerator, timeout=run.timeout)
        self.monitor = Monitor(health or Health(), math.prod(policy.family.latent_shape))
        self.learner = Learner(
            policy, algorithm, learning, accelerator, run.seed, self.meeting, self.monitor.updates, display.say
        )
        self.batch = Batch(
            acting.batch_size, "drawing", "lower the resolution, or use a smaller model", display.say, self.meeting.step
        )
        journal = Journal(folder, accelerator.process_index)
        self.judge = Judge(
            task.rewards, task.held_out_rewards, journal, accelerator.device, acting.batch_size, task.max_missing
        )
        self.iteration, self.images, self.salt = 0, 0, 0
        self.rollbacks: list[dict[str, Any]] = []  # {"to": iteration, "why": text} of each
        guarded = [name for name, part in task.held_out_rewards.parts.items() if part.weight]
        self.baseline = evaluate.Baseline(task.rewards, guarded)
        self.clock = Clock()

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last line of metrics that holds an evaluation."""
        state.resume(self)
        last: dict[str, Any] = {}
        if not self.baseline.scores:
            last = self._record({"iteration": 0, **self._evaluate()[0]}, evaluated=True)
            state.save(self)
        while self.iteration < self.settings.iterations:
            metrics, alarms = self._iterate()
            due = self.iteration == self.settings.iterations or self.iteration % self.settings.eval_every == 0
            if due:
                compared, more = self._evaluate()
                metrics, alarms = metrics | compared, alarms + more
            if said := [*watch.rollbacks(self.rollbacks, self.iteration - 1), *alarms]:
                metrics["alarms"] = [alarm.line() for alarm in said]
            metrics = self._record(metrics, due)
            last = metrics if due else last
            self._heed(alarms, due)
        return last or self.last_evaluation()

    def _heed(self, alarms: list[Alarm], due: bool) -> None:
        """Say them, and save; then stop or roll back where one is grave."""
        for alarm in alarms:
            self.display.say(f"{'warning' if alarm.level == 'warn' else 'ALARM'}, {alarm.name}: {alarm.text}")
        grave = [alarm for alarm in alarms if alarm.level == "stop"]
        ends = bool(grave) and (self.settings.on_alarm != "warn" or grave[0].code == NUMBERS_CODE)
        again = ends and self.settings.on_alarm == "rollback" and len(self.rollbacks) < MOST_ROLLBACKS
        if ends:
            self.monitor.forget()  # who goes on is warned anew, not at once
        if again:
            self._roll_back(grave[0])
        elif due or ends or self.iteration % self.settings.save_every == 0:
            state.save(self)
        if ends and not again:
            raise Alarmed(grave[0])

    def _roll_back(self, alarm: Alarm) -> None:
        """Go on from the safest checkpoint, with other noise: the same would lead here again."""
        to, salt, rollbacks = self.baseline.safe, self.salt + 1, list(self.rollbacks)
        rollbacks.append({"to": to, "why": alarm.text})
        if to != self.iteration:
            state.return_to(self, checkpoint.folder_of(self.folder / "checkpoints", to), f"metrics-left-{salt}.jsonl")
        self.rollbacks, self.salt = rollbacks, salt
        self._pace()
        self.monitor.forget()
        state.save(self)
        self.display.say(
            f"rolled back to iteration {to} ({len(rollbacks)} of at most {MOST_ROLLBACKS} times): other noise (salt {salt}) and a "
            f"learning rate of {self.learner.lr:.3g}"
        )

    def _pace(self) -> None:
        """Set this iteration's learning rate, which every rollback halves."""
        done = self.iteration / self.settings.iterations
        self.learner.lr = self.learner.settings.rate(done) * 0.5 ** len(self.rollbacks)

    def _iterate(self) -> tuple[dict[str, Any], list[Alarm]]:
        self._pace()
        self.learner.algorithm = self.algorithm.scheduled(self.iteration)
        self.algorithm.start(self.policy, self.iteration)
        rows = self.deal.rows(self.iteration, self.salt, self.accelerator.process_index)
        everyones = self.deal.all_rows(self.iteration, self.salt)
        texts = [row.prompt.text for row in everyones]
        parts: dict[str, Tensor] = {}
        foresight: dict[str, float] = {}
        acted_in = self.acting.batch_size
        if self.acting.pictures:
            rollout = self._read(rows)
            total = wanted = offline.scores(everyones, self._address)
        else:
            hearing = self.judge.hear(rows, self.iteration, self.salt, self.acting.group_size)
            before = self.batch.size
            rollout = self._act(hearing)
            acted_in = self.batch.size if self.batch.size == before else 0
            parts = self._score(hearing)
            total, wanted = self.baseline.total(parts), self.task.rewards.objective(parts, texts)
        if warning := self.judge.check(wanted, texts):
            self.display.say(warning)
        advantages = self.advantage(wanted, texts)
        if self.algorithm.needs_units:  # a group that scores alike says that the density wants nothing of it but the base
            advantages = advantages.where(advantages.isfinite() | ~wanted.isfinite(), 0.0)
        mine = len(rollout) * self.accelerator.process_index
        own = slice(mine, mine + len(rollout))
        if self.acting.credit and rollout.beliefs is not None:
            values = self._foretold(rollout.beliefs, rows, parts, texts)
            paid = self.acting.credit.build()(values, wanted, self.advantage, texts)
            advantages = by_step(paid, rollout.stochastic, self.acting.num_steps)
            foresight["credit/explained_variance"] = explained_variance(values, wanted)
        rollout.advantages, rollout.rewards = (v[own].float().to(self.accelerator.device) for v in (advantages, wanted))
        rollout.metadata = [row.prompt.metadata for row in rows]
        if self.algorithm.needs_gradient:
            rollout.reward = functools.partial(self.task.rewards.graded, self.task.rewards.rates(parts, texts))
        with (
            self.clock.measure("update"),
            self.display.phase(self._phase("learning"), self.learner.rows(len(rollout))) as advance,
        ):
            learned = self.learner.improve(rollout, (*self._address, "views"), acted_in, advance)
        self.algorithm.finish(self.policy, self.iteration)
        self._refresh(rollout)
        self.deal.choice.learn(texts, wanted)
        self.iteration += 1
        self.images += self.acting.images
        for skip in self.learner.skipped:
            self.display.say(watch.told(skip, self.iteration, everyones))
        metrics = {
            "iteration": self.iteration,
            "reward/mean": total.nanmean().item(),
            "reward/std": total[total.isfinite()].std(correction=0).item(),
            **{f"reward/{name}/mean": scores.nanmean().item() for name, scores in parts.items()},
            **{f"floor/{name}/multiplier": value for name, value in self.task.rewards.multipliers.items()},
            "advantage/zero_std_fraction": zero_spread(wanted, texts),
            **foresight,
            **learned,
            "lr": self.learner.lr,
        }
        return metrics, self.monitor.iteration(watch.measured(self.iteration, metrics, parts))

    # ------------------------------------------------------------------------------------------------------------------
    # Act and score

    @property
    def _address(self) -> Address:
        """Where all randomness of this iteration is drawn from."""
        return (self.settings.seed, self.salt, self.iteration)

    def _phase(self, doing: str) -> str:
        return f"iteration {self.iteration + 1}/{self.settings.iterations} · {doing}"

    def _act(self, hearing: Hearing) -> Rollout:
        with self.clock.measure("rollout"):
            with self.display.phase(self._phase("sampling"), len(hearing.rows) * self.acting.num_steps) as advance:
                return self.actor.draw(hearing.rows, self._address, self.batch, self.meeting.stepwise(advance), hearing.add)

    def _read(self, rows: list[Row]) -> Rollout:
        """Pictures that exist, in the place of drawn ones."""
        with self.clock.measure("rollout"), self.display.phase(self._phase("reading"), len(rows)) as advance:
            return self.actor.read(rows, self._address, self.meeting.stepwise(advance))

    def _score(self, hearing: Hearing) -> dict[str, Tensor]:
        """Scores of all processes' pictures, by scorer, (images,) float64 in the order of `Deal.all_rows`."""
        with self.clock.measure("reward"):  # what is left to wait for
            mine = hearing.scores()
        return {name: self.meeting.gather(v) for name, v in mine.items()}

    def _foretold(self, beliefs: Tensor, rows: list[Row], parts: dict[str, Tensor], texts: list[str]) -> Tensor:
        """(N, K) what all processes' predicted pictures would be paid, in the units of this iteration's pictures."""
        rates, values = self.task.rewards.rates(parts, texts), []
        for step in beliefs.unbind(1):
            hearing = self.judge.hear(rows, self.iteration, self.salt, self.acting.group_size)
            for batch in step.split(self.acting.batch_size):
                hearing.add(batch)
            values.append(torch.stack([rates[name] * scores for name, scores in self._score(hearing).items()]).sum(0))
        return torch.stack(values, 1)

    def _refresh(self, rollout: Rollout) -> None:
        """Show the iteration's pictures, in the order of their groups, to the scorers that learn from them."""
        if not self.task.rewards.learns or self.acting.pictures:
            return
        with self.clock.measure("reward"):
            rows = self.deal.all_rows(self.iteration, self.salt)
            order = sorted(range(len(rows)), key=lambda i: rows[i][:2])
            self.judge.refresh(self.meeting.gather(rollout.images)[order], [rows[i].prompt for i in order])

    # ------------------------------------------------------------------------------------------------------------------
    # Compare

    def _evaluate(self) -> tuple[dict[str, float], list[Alarm]]:
        """The policy as it is now, on the probe, against what the base model made of it."""
        mine = self.probe.share(self.accelerator.process_index, self.accelerator.num_processes)
        prompts = [prompt for prompt, _ in mine]
        with self.clock.measure("eval"), torch.no_grad():
            with self.display.phase(
                f"evaluating after iteration {self.iteration}", len(mine) * self.probe.num_steps
            ) as advance:
                images = self.probe.draw(self.policy, mine, self.batch, self.meeting.stepwise(advance))
            scored = self.judge.probe(images, prompts, self.probe.seeds)
            if self.task.rewards.learns and self.iteration:
                # What learns has another opinion now: it must give it of the base model's pictures too.
                with self.policy.acting_as("reference"):
                    base = self.probe.draw(self.policy, mine, self.batch, self.meeting.stepwise(lambda rows: None))
                again = self.judge.probe(base, prompts, self.probe.seeds)
                self.baseline.scores |= {name: self._whole(v) for name, v in again.items()}
        if self.iteration == 0:
            for line in self.judge.introduction(images, prompts, self.probe.seeds, scored):
                self.display.say(line)
        scores, pictures = {name: self._whole(v) for name, v in scored.items()}, self._whole(images)
        texts = [prompt.text for prompt, _ in self.probe.rows]
        if self.accelerator.is_main_process:
            listed = {name: [to_json(x) for x in v.tolist()] for name, v in scores.items()}
            report.save_samples(
                self.folder, self.iteration, pictures.float() / 255, texts, [s for _, s in self.probe.rows], listed
            )
        compared = self.baseline.compare(self.iteration, scores, pictures, texts)
        alarms = self.monitor.evaluation(watch.probed(self.iteration, self.baseline, scores, pictures, texts))
        if self.monitor.sound:
            self.baseline.rank(self.iteration, scores, texts)
        return compared, alarms

    # ------------------------------------------------------------------------------------------------------------------
    # Write down and resume

    def _record(self, metrics: dict[str, Any], evaluated: bool) -> dict[str, Any]:
        line = {"iteration": self.iteration, "images": self.images, **metrics, **self.clock.read()}
        if self.accelerator.is_main_process:
            report.append(self.folder / "metrics.jsonl", line)
            if self.trackers:
                self.trackers.record(line)
        if self.iteration:
            self.display.iteration(line, self.settings.iterations)
        if evaluated:
            self.display.evaluation(line)
        return line

    def last_evaluation(self) -> dict[str, Any]:
        lines = [line for line in report.read(self.folder / "metrics.jsonl") if "eval/win_rate" in line]
        return lines[-1] if lines else {}

    def _whole(self, values: Tensor) -> Tensor:
        """The probe's rows of all processes, without what was repeated to make the shares equal."""
        return self.meeting.gather(values)[: len(self.probe.rows)]
