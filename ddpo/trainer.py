"""The loop: act, score, compare, improve. The only file that knows devices and ranks.

The batch is global (`ddpo.deal`), and gradients are sums divided by the global count.
All trained state is the same on every process; the main one writes it down.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpo import checkpoint, evaluate, offline, report
from ddpo.actor import Actor
from ddpo.advantage import Advantage, zero_spread
from ddpo.algorithms import Algorithm
from ddpo.deal import Deal, Row, Shuffled
from ddpo.journal import Journal
from ddpo.judge import Hearing, Judge
from ddpo.learner import Learner, TrainingError
from ddpo.meters import Clock, to_json
from ddpo.noise import Address
from ddpo.policy import Policy
from ddpo.progress import Display
from ddpo.prompts import Prompt
from ddpo.rollout import Rollout
from ddpo.sections import Acting, Evaluating, Learning, Run
from rewards import Rubric


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

    Raises:
        TrainingError, checkpoint.CheckpointError, rewards.RewardError: before any update that would have used them.
    """

    def __init__(
        self, policy: Policy, algorithm: Algorithm, advantage: Advantage, task: Task, run: Run, acting: Acting,
        learning: Learning, evaluating: Evaluating, folder: Path, identity: dict[str, Any], accelerator: Accelerator, display: Display,
    ):  # fmt: skip
        self.policy, self.algorithm, self.advantage, self.task, self.settings = policy, algorithm, advantage, task, run
        self.acting = acting
        self.folder, self.identity, self.accelerator, self.display = folder, identity, accelerator, display
        self.actor = Actor(policy, algorithm, acting)
        choice = acting.choice.build() if acting.choice else Shuffled()
        self.deal = Deal(
            task.prompts, choice, acting.prompts, acting.group_size, learning.updates, accelerator.num_processes, run.seed
        )
        self.probe = evaluate.Probe(task.held_out, evaluating, acting.num_steps, run.seed)
        policy.to(accelerator.device)
        self.learner = Learner(policy, algorithm, learning, accelerator, run.seed)
        journal = Journal(folder, accelerator.process_index)
        self.judge = Judge(
            task.rewards, task.held_out_rewards, journal, accelerator.device, acting.batch_size, task.max_missing
        )
        self.iteration, self.images, self.salt = 0, 0, 0
        self.baseline = evaluate.Baseline(task.rewards)
        self.clock = Clock()

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last line of metrics that holds an evaluation."""
        self._resume()
        last: dict[str, Any] = {}
        if self.iteration == 0:
            last = self._record({"iteration": 0, **self._evaluate()}, evaluated=True)
        while self.iteration < self.settings.iterations:
            metrics = self._iterate()
            due = self.iteration == self.settings.iterations or self.iteration % self.settings.eval_every == 0
            if due:
                metrics |= self._evaluate()
            metrics = self._record(metrics, due)
            last = metrics if due else last
            if due or self.iteration % self.settings.save_every == 0:
                self._save()
        return last or self._last_evaluation()

    def _iterate(self) -> dict[str, Any]:
        self.algorithm.start(self.policy, self.iteration)
        rows = self.deal.rows(self.iteration, self.salt, self.accelerator.process_index)
        everyones = self.deal.all_rows(self.iteration, self.salt)
        texts = [row.prompt.text for row in everyones]
        parts: dict[str, Tensor] = {}
        if self.acting.pictures:
            rollout = self._read(rows)
            total = wanted = offline.scores(everyones, self._address)
        else:
            hearing = self.judge.hear(rows, self.iteration, self.salt, self.acting.group_size)
            rollout = self._act(hearing)
            parts = self._score(hearing)
            total, wanted = self.baseline.total(parts), self.task.rewards.objective(parts, texts)
        if warning := self.judge.check(wanted, texts):
            self.display.say(warning)
        advantages = self.advantage(wanted, texts)
        mine = len(rollout) * self.accelerator.process_index
        own = slice(mine, mine + len(rollout))
        rollout.advantages, rollout.rewards = (v[own].float().to(self.accelerator.device) for v in (advantages, wanted))
        rollout.metadata = [row.prompt.metadata for row in rows]
        if self.algorithm.needs_gradient:
            rollout.reward = functools.partial(self.task.rewards.graded, self.task.rewards.rates(parts, texts))
        with (
            self.clock.measure("update"),
            self.display.phase(self._phase("learning"), self.learner.rows(len(rollout))) as advance,
        ):
            learned = self.learner.improve(rollout, (*self._address, "views"), self.acting.batch_size, advance)
        self.algorithm.finish(self.policy, self.iteration)
        self._refresh(rollout)
        self.deal.choice.learn(texts, wanted)
        self.iteration += 1
        self.images += self.acting.images
        return {
            "iteration": self.iteration,
            "reward/mean": total.nanmean().item(),
            "reward/std": total[total.isfinite()].std(correction=0).item(),
            **{f"reward/{name}/mean": scores.nanmean().item() for name, scores in parts.items()},
            **{f"floor/{name}/multiplier": value for name, value in self.task.rewards.multipliers.items()},
            "advantage/zero_std_fraction": zero_spread(wanted, texts),
            **learned,
            "lr": self.learner.settings.lr,
        }

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
                return self.actor.draw(hearing.rows, self._address, advance, hearing.add)

    def _read(self, rows: list[Row]) -> Rollout:
        """Pictures that exist, in the place of drawn ones."""
        with self.clock.measure("rollout"), self.display.phase(self._phase("reading"), len(rows)) as advance:
            return self.actor.read(rows, self._address, advance)

    def _score(self, hearing: Hearing) -> dict[str, Tensor]:
        """Scores of all processes' pictures, by scorer, (images,) float64 in the order of `Deal.all_rows`."""
        with self.clock.measure("reward"):  # what is left to wait for
            mine = hearing.scores()
        return {name: self._gather(v) for name, v in mine.items()}

    def _refresh(self, rollout: Rollout) -> None:
        """Show the iteration's pictures, in the order of their groups, to the scorers that learn from them."""
        if not self.task.rewards.learns or self.acting.pictures:
            return
        with self.clock.measure("reward"):
            rows = self.deal.all_rows(self.iteration, self.salt)
            order = sorted(range(len(rows)), key=lambda i: rows[i][:2])
            self.judge.refresh(self._gather(rollout.images)[order], [rows[i].prompt for i in order])

    # ------------------------------------------------------------------------------------------------------------------
    # Compare

    def _evaluate(self) -> dict[str, float]:
        """The policy as it is now, on the probe, against what the base model made of it."""
        mine = self.probe.share(self.accelerator.process_index, self.accelerator.num_processes)
        prompts = [prompt for prompt, _ in mine]
        with self.clock.measure("eval"), torch.no_grad():
            with self.display.phase(
                f"evaluating after iteration {self.iteration}", len(mine) * self.probe.num_steps
            ) as advance:
                images = self.probe.draw(self.policy, mine, self.acting.batch_size, advance)
            scored = self.judge.probe(images, prompts, self.probe.seeds)
            if self.task.rewards.learns and self.iteration:
                # What learns has another opinion now: it must give it of the base model's pictures too.
                with self.policy.acting_as("reference"):
                    base = self.probe.draw(self.policy, mine, self.acting.batch_size, lambda rows: None)
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
        return self.baseline.compare(self.iteration, scores, pictures, texts)

    # ------------------------------------------------------------------------------------------------------------------
    # Write down and resume

    def _record(self, metrics: dict[str, Any], evaluated: bool) -> dict[str, Any]:
        line = {"iteration": self.iteration, "images": self.images, **metrics, **self.clock.read()}
        if self.accelerator.is_main_process:
            report.append(self.folder / "metrics.jsonl", line)
        if self.iteration:
            self.display.iteration(line, self.settings.iterations)
        if evaluated:
            self.display.evaluation(line)
        return line

    def _save(self) -> None:
        optimizer, scalars = checkpoint.pack_optimizer(self.learner.optimizer, list(self.policy.weights))
        multipliers, learned = self.task.rewards.state()
        state = {
            "iteration": self.iteration, "images": self.images, "salt": self.salt, "optimizer": scalars,
            "baseline": self.baseline.state(), "flat": self.judge.flat, "rewards": multipliers, "advantage": self.advantage.state(),
            "choice": self.deal.choice.state(),
            "scaler": self.learner.scaler.state_dict(),
            "seconds": self.clock.total(),
        }  # fmt: skip
        tensors = {"lora": {k: w.detach() for k, w in self.policy.weights.items()}, "optimizer": optimizer, "rewards": learned}
        tensors["selves"] = self.policy.selves()
        if (critic := self.learner.critic) is not None:
            tensors["critic"], tensors["critic_optimizer"], state["critic"] = critic.state()
        best = self.baseline.best

        def write() -> None:
            checkpoint.save(self.folder / "checkpoints", self.iteration, tensors, state, self.identity, pin=(best,))
            (self.folder / "checkpoints" / "best").write_text(f"step-{best:08d}\n")

        self._on_main(write)

    def _on_main(self, act: Callable[[], None]) -> None:
        """The main process acts; if it fails, every process raises: none goes on alone."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                act()
            except Exception as e:  # told to the others first, then raised
                failure = e
        failed = self.accelerator.reduce(torch.tensor([float(failure is not None)], device=self.accelerator.device), "sum")
        if failure is not None:
            raise failure
        if failed.item():
            raise TrainingError("the main process could not write to the run folder; its message says why")

    def _resume(self) -> None:
        root = self.folder / "checkpoints"
        self._on_main(lambda: checkpoint.sweep(root))
        found = checkpoint.latest(root, self.display.say)
        if found is not None:
            saved = checkpoint.load(found, self.identity)
            state = saved.state
            self.iteration, self.images, self.salt = state["iteration"], state["images"], state["salt"]
            self.baseline.load_state(state["baseline"])
            self.judge.flat = state["flat"]
            self.task.rewards.load_state(state["rewards"], saved.tensors["rewards"])
            self.policy.load(saved.tensors["lora"])
            self.policy.load_selves(saved.tensors["selves"])
            checkpoint.unpack_optimizer(
                self.learner.optimizer, list(self.policy.weights), saved.tensors["optimizer"], state["optimizer"]
            )
            if (critic := self.learner.critic) is not None:
                critic.load_state(saved.tensors["critic"], saved.tensors["critic_optimizer"], state["critic"])
            self.advantage.load_state(state["advantage"])
            self.deal.choice.load_state(state["choice"])
            self.learner.scaler.load_state_dict(state["scaler"])
            self.clock.resume(state["seconds"])
            self.display.say(f"resuming after iteration {self.iteration} from {found}")
        done = self.iteration if found is not None else -1
        self._on_main(lambda: report.truncate(self.folder / "metrics.jsonl", lambda line: line["iteration"] <= done))
        self._on_main(lambda: report.truncate(self.folder / "samples" / "index.jsonl", lambda line: line["iteration"] <= done))

    def _last_evaluation(self) -> dict[str, Any]:
        lines = [line for line in report.read(self.folder / "metrics.jsonl") if "eval/win_rate" in line]
        return lines[-1] if lines else {}

    def _gather(self, values: Tensor) -> Tensor:
        """All processes' values, in the order of the processes, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _whole(self, values: Tensor) -> Tensor:
        """The probe's rows of all processes, without what was repeated to make the shares equal."""
        return self._gather(values)[: len(self.probe.rows)]
