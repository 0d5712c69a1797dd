"""The loop: act, score, compare, improve. The only file that knows devices and ranks.

The batch is global. An iteration's prompt groups are dealt to (update, process) so that an update sees the same groups
whatever the number of processes, a group never leaves its process, and gradients are sums divided by the global count.
All trained state is the same on every process; the main one writes it down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpo import checkpoint, evaluate, report
from ddpo.advantage import Advantage, zero_spread
from ddpo.algorithms import Algorithm
from ddpo.diffusion import Solver
from ddpo.journal import Journal, Key
from ddpo.learner import Learner, TrainingError
from ddpo.meters import Clock, to_float, to_json
from ddpo.noise import Address, permutation
from ddpo.policy import Policy
from ddpo.progress import Display
from ddpo.prompts import Prompt
from ddpo.recipe import Acting, Evaluating, Learning, Run
from ddpo.rollout import Rollout, collect, stochastic_steps
from rewards import Rubric


@dataclass(frozen=True)
class Task:
    """What is learned from what."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: Rubric
    held_out_rewards: Rubric


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
        self.solver: Solver = acting.solver.build()
        if algorithm.needs_trajectory and not stochastic_steps(policy.family.schedule, self.solver, acting.num_steps):
            raise TrainingError(
                f"{self.solver} adds noise to none of the {acting.num_steps} steps, so there is nothing to learn from: lower "
                "rollout.solver.min_sigma, or raise rollout.num_steps"
            )
        self.probe = evaluate.Probe(task.held_out, evaluating, acting.num_steps, run.seed)
        policy.to(accelerator.device)
        for rubric in (task.rewards, task.held_out_rewards):
            rubric.to(accelerator.device)
        self.learner = Learner(policy, algorithm, learning, accelerator)
        self.journal = Journal(folder, accelerator.process_index)
        self.iteration, self.images, self.salt = 0, 0, 0
        self.base: dict[str, list[float]] = {}  # the base model's scores on the probe, and its diversity
        self.best: dict[str, float] | None = None
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
        self.algorithm.start(self.policy)
        rollout = self._act()
        parts = self._score(rollout)
        total = self.task.rewards.total(parts)
        texts = self._texts(range(self.accelerator.num_processes))
        advantages = self.advantage(total, texts)
        mine = len(rollout) * self.accelerator.process_index
        rollout.advantages = advantages[mine : mine + len(rollout)].to(self.accelerator.device)
        with (
            self.clock.measure("update"),
            self.display.phase(self._phase("learning"), self.learner.rows(len(rollout))) as advance,
        ):
            learned = self.learner.improve(rollout, (*self._address, "views"), self.acting.batch_size, advance)
        self.algorithm.finish(self.policy)
        self.iteration += 1
        self.images += self.acting.images
        return {
            "iteration": self.iteration,
            "reward/mean": total.nanmean().item(),
            "reward/std": total[total.isfinite()].std(correction=0).item(),
            **{f"reward/{name}/mean": scores.nanmean().item() for name, scores in parts.items()},
            "advantage/zero_std_fraction": zero_spread(total, texts),
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

    def _groups(self, process: int) -> list[int]:
        """The groups of this iteration that a process owns, those of the first update first."""
        share = self.acting.prompts // self.learner.settings.updates
        own = share // self.accelerator.num_processes
        starts = [update * share + process * own for update in range(self.learner.settings.updates)]
        return [g for start in starts for g in range(start, start + own)]

    def _prompt(self, group: int) -> Prompt:
        """Prompts come in an order that is shuffled anew each time all have been seen."""
        turn, place = divmod(self.iteration * self.acting.prompts + group, len(self.task.prompts))
        return self.task.prompts[permutation(len(self.task.prompts), self.settings.seed, self.salt, "prompts", turn)[place]]

    def _texts(self, processes: range) -> list[str]:
        return [self._prompt(g).text for p in processes for g in self._groups(p) for _ in range(self.acting.group_size)]

    def _act(self) -> Rollout:
        groups = self._groups(self.accelerator.process_index)
        rows = [(g, member) for g in groups for member in range(self.acting.group_size)]
        addresses: list[Address] = [(*self._address, g, member) for g, member in rows]
        self._rows, self._prompts = rows, [self._prompt(g) for g, _ in rows]
        with self.clock.measure("rollout"), self.policy.acting_as(self.algorithm.actor):
            with self.display.phase(self._phase("sampling"), len(rows) * self.acting.num_steps) as advance:
                return collect(
                    self.policy, [p.text for p in self._prompts], addresses, self.solver, self.acting.num_steps,
                    self.acting.batch_size, self.algorithm.needs_trajectory, advance,
                )  # fmt: skip

    def _score(self, rollout: Rollout) -> dict[str, Tensor]:
        """Scores of all processes' pictures, by scorer, (images,) float64 in the order of `_texts`.

        They are written down before they are used: an interrupted iteration, done again, reads them.
        """
        keys = [
            Key(self.iteration, self.salt, group, member, image)
            for (group, member), image in zip(self._rows, rollout.image_keys(), strict=True)
        ]
        with self.clock.measure("reward"):
            missing = [i for i, key in enumerate(keys) if self.journal.get(key) is None]
            for start in range(0, len(missing), self.acting.batch_size):
                rows = missing[start : start + self.acting.batch_size]
                parts = self._apply(self.task.rewards, rollout.images[rows], [self._prompts[i] for i in rows])
                scores = [{name: to_json(v[n].item()) for name, v in parts.items()} for n in range(len(rows))]
                self.journal.add([(keys[i], self._prompts[i].text, s) for i, s in zip(rows, scores, strict=True)])
        journaled = [self.journal.get(key) or {} for key in keys]
        mine = {
            name: torch.tensor([to_float(scores[name]) for scores in journaled], dtype=torch.float64)
            for name in self.task.rewards.rewards
        }
        return {name: self._gather(v) for name, v in mine.items()}

    def _apply(self, rubric: Rubric, images: Tensor, prompts: list[Prompt]) -> dict[str, Tensor]:
        pictures = images.to(self.accelerator.device).float() / 255
        with torch.no_grad():
            return rubric.score(pictures, [p.text for p in prompts], [p.metadata for p in prompts])

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
            chunks = [slice(i, i + self.acting.batch_size) for i in range(0, len(mine), self.acting.batch_size)]
            rubrics = (self.task.rewards, self.task.held_out_rewards)
            parts = [{k: v for r in rubrics for k, v in self._apply(r, images[c], prompts[c]).items()} for c in chunks]
        number = len(self.probe.rows)
        scores = {name: self._gather(torch.cat([p[name] for p in parts]))[:number] for name in parts[0]}
        return self._compare(scores, self._gather(images)[:number])

    def _compare(self, scores: dict[str, Tensor], images: Tensor) -> dict[str, float]:
        texts = [prompt.text for prompt, _ in self.probe.rows]
        variety = evaluate.diversity(images, texts)
        if self.iteration == 0:
            self.base = {name: v.tolist() for name, v in scores.items()} | {"diversity": [variety]}
        base = {name: torch.tensor(self.base[name], dtype=torch.float64) for name in scores}
        objective = (self.task.rewards.total(base), self.task.rewards.total(scores))
        metrics = evaluate.compare(base, scores, objective, texts)
        metrics |= {"eval/diversity/base": self.base["diversity"][0], "eval/diversity/tuned": variety}
        gain = (objective[1] - objective[0]).nanmean().item()
        if self.best is None or gain > self.best["gain"]:
            self.best = {"iteration": self.iteration, "gain": gain}
        if self.accelerator.is_main_process:
            listed = {name: [to_json(x) for x in v.tolist()] for name, v in scores.items()}
            report.save_samples(
                self.folder, self.iteration, images.float() / 255, texts, [s for _, s in self.probe.rows], listed
            )
        return metrics

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
        state = {
            "iteration": self.iteration, "images": self.images, "salt": self.salt, "optimizer": scalars,
            "base": {name: [to_json(x) for x in values] for name, values in self.base.items()},
            "best": self.best, "advantage": self.advantage.state(), "scaler": self.learner.scaler.state_dict(),
            "seconds": self.clock.total(),
        }  # fmt: skip
        tensors = {"lora": {k: w.detach() for k, w in self.policy.weights.items()}, "optimizer": optimizer}
        best = self.best["iteration"] if self.best else 0

        def write() -> None:
            checkpoint.save(self.folder / "checkpoints", self.iteration, tensors, state, self.identity, pin=(int(best),))
            (self.folder / "checkpoints" / "best").write_text(f"step-{int(best):08d}\n")

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
            self.base = {name: [to_float(x) for x in values] for name, values in state["base"].items()}
            self.best = state["best"]
            self.policy.load(saved.tensors["lora"])
            checkpoint.unpack_optimizer(
                self.learner.optimizer, list(self.policy.weights), saved.tensors["optimizer"], state["optimizer"]
            )
            self.advantage.load_state(state["advantage"])
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
