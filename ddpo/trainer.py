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
from ddpo.diffusion import DDIM, Solver
from ddpo.journal import Journal, Key
from ddpo.noise import Address, generator, permutation
from ddpo.policy import Policy
from ddpo.meters import Clock, Seen, to_float, to_json
from ddpo.progress import Display
from ddpo.prompts import Prompt
from ddpo.recipe import Acting, Evaluating, Learning
from ddpo.rollout import Rollout, collect
from rewards import Rubric

LARGEST_LOG_RATIO = 1e-4  # before the first update, averaged over a latent's elements


class TrainingError(RuntimeError):
    """Training cannot go on. Nothing was updated; everything up to the last checkpoint is kept."""


@dataclass(frozen=True)
class Plan:
    """How long, and what is written down when."""

    seed: int
    iterations: int
    eval_every: int
    save_every: int


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
        self, policy: Policy, algorithm: Algorithm, advantage: Advantage, task: Task, plan: Plan, acting: Acting,
        learning: Learning, evaluating: Evaluating, folder: Path, identity: dict[str, Any], accelerator: Accelerator, display: Display,
    ):  # fmt: skip
        self.policy, self.algorithm, self.advantage, self.task, self.plan = policy, algorithm, advantage, task, plan
        self.acting, self.learning, self.evaluating = acting, learning, evaluating
        self.folder, self.identity, self.accelerator, self.display = folder, identity, accelerator, display
        self.solver: Solver = acting.solver.build()
        policy.to(accelerator.device)
        for rubric in (task.rewards, task.held_out_rewards):
            rubric.to(accelerator.device)
        self.optimizer = learning.build(list(policy.weights.values()))
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=policy.family.dtype == torch.float16)
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
        while self.iteration < self.plan.iterations:
            metrics = self._iterate()
            due = self.iteration == self.plan.iterations or self.iteration % self.plan.eval_every == 0
            if due:
                metrics |= self._evaluate()
            metrics = self._record(metrics, due)
            last = metrics if due else last
            if due or self.iteration % self.plan.save_every == 0:
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
        with self.clock.measure("update"):
            learned = self._improve(rollout)
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
            "lr": self.learning.lr,
        }

    # ------------------------------------------------------------------------------------------------------------------
    # Act and score

    def _groups(self, process: int) -> list[int]:
        """The groups of this iteration that a process owns, those of the first update first."""
        share = self.acting.prompts // self.learning.updates
        own = share // self.accelerator.num_processes
        starts = [update * share + process * own for update in range(self.learning.updates)]
        return [g for start in starts for g in range(start, start + own)]

    def _prompt(self, group: int) -> Prompt:
        """Prompts come in an order that is shuffled anew each time all have been seen."""
        turn, place = divmod(self.iteration * self.acting.prompts + group, len(self.task.prompts))
        return self.task.prompts[permutation(len(self.task.prompts), self.plan.seed, self.salt, "prompts", turn)[place]]

    def _texts(self, processes: range) -> list[str]:
        return [self._prompt(g).text for p in processes for g in self._groups(p) for _ in range(self.acting.group_size)]

    def _act(self) -> Rollout:
        groups = self._groups(self.accelerator.process_index)
        rows = [(g, member) for g in groups for member in range(self.acting.group_size)]
        addresses: list[Address] = [(self.plan.seed, self.salt, self.iteration, g, member) for g, member in rows]
        self._rows, self._prompts = rows, [self._prompt(g) for g, _ in rows]
        name = f"iteration {self.iteration + 1}/{self.plan.iterations} · sampling"
        with self.clock.measure("rollout"), self.policy.acting_as(self.algorithm.actor):
            with self.display.phase(name, len(rows) * self.acting.num_steps) as advance:
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
    # Improve

    def _improve(self, rollout: Rollout) -> dict[str, float]:
        """A batch is one optimizer step; a view is one backward pass."""
        learning, seen = self.learning, Seen()
        rows = torch.arange(len(rollout)).chunk(learning.updates)
        size = min(learning.micro_batch, len(rows[0]))
        if self.policy.family.dtype != torch.float32 and size != self.acting.batch_size and self.algorithm.needs_trajectory:
            rollout.recompute_log_probs(self.policy, size)
        total = learning.epochs * learning.updates * len(rows[0])
        name = f"iteration {self.iteration + 1}/{self.plan.iterations} · learning"
        with self.display.phase(name, total) as advance:
            for epoch in range(learning.epochs):
                for update, batch in enumerate(rows):
                    draw = generator(self.plan.seed, self.salt, self.iteration, epoch, update, "views")
                    count = self._accumulate(rollout[batch], size, draw, seen, first=epoch == update == 0)
                    seen.add({"grad_norm": self._step(count / len(batch))})
                    advance(len(batch))
        averages = seen.averages(self._gather)
        averages["kl/step_nats"] = self._gather(torch.tensor([self._measure_kl(rollout)], dtype=torch.float64)).mean().item()
        return averages

    def _accumulate(self, batch: Rollout, size: int, draw: torch.Generator, seen: Seen, first: bool) -> int:
        """Gradients of the summed loss over len(batch); returns how many rows of views they were summed over."""
        count = 0
        for view in self.algorithm.views(batch, size, draw):
            loss, metrics = self.algorithm.loss(self.policy, view)
            self.scaler.scale(loss.sum() / len(batch)).backward()
            count += len(view)
            if first and "log_ratio" in metrics:
                self._demand_ratio_one(metrics["log_ratio"])
            seen.add(metrics)
        return count

    def _demand_ratio_one(self, log_ratio: Tensor) -> None:
        worst = log_ratio.abs().max().item()
        if not worst <= LARGEST_LOG_RATIO:
            raise TrainingError(
                f"before the first update of iteration {self.iteration + 1} the policy should be the one that acted, but a log "
                f"importance ratio is {worst:.2g} (at most {LARGEST_LOG_RATIO:g} is allowed). Acting and learning disagree: "
                "check custom families and solvers for randomness, and that nothing changes the network between the two"
            )

    def _step(self, weight: float) -> float:
        """Add up all processes' gradients, divide by the global count, and take one optimizer step."""
        weights = [p for p in self.policy.weights.values()]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights])
        everywhere = self.accelerator.reduce(torch.cat([flat, flat.new_tensor([weight])]), "sum")
        flat = everywhere[:-1] / everywhere[-1]
        if not self.scaler.is_enabled() and not flat.isfinite().all():
            raise TrainingError(
                f"the gradient in iteration {self.iteration + 1} is not finite; nothing was updated. Lower optimizer.lr, or use "
                "model.dtype=float32 to see whether half precision is the cause, and run the same command again"
            )
        for p, grad in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
            p.grad = grad.view_as(p)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(weights, self.learning.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm.item()

    def _measure_kl(self, rollout: Rollout) -> float:
        """On a sixteenth of the pictures, one group at least."""
        if not rollout.stochastic:
            return 0.0
        few = max(min(self.acting.group_size, len(rollout)), len(rollout) // 16)
        return evaluate.step_kl(self.policy, rollout[torch.arange(few)], self.learning.micro_batch)

    # ------------------------------------------------------------------------------------------------------------------
    # Compare

    def _probe(self) -> list[tuple[Prompt, int]]:
        """The held-out prompts and seeds of every evaluation: spread evenly over the list, each with every seed."""
        held_out, number = self.task.held_out, min(self.evaluating.prompts, len(self.task.held_out))
        chosen = [held_out[i * len(held_out) // number] for i in range(number)]
        return [(prompt, seed) for prompt in chosen for seed in range(self.evaluating.seeds)]

    def _evaluate(self) -> dict[str, float]:
        """The policy as it is now, on the probe, against what the base model made of it."""
        probe = self._probe()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(probe) // world)
        mine = [probe[min(i, len(probe) - 1)] for i in range(rank * share, (rank + 1) * share)]  # the last is padded
        prompts = [prompt for prompt, _ in mine]
        with self.clock.measure("eval"), torch.no_grad():
            steps = self.evaluating.num_steps or self.acting.num_steps
            with self.display.phase(f"evaluating after iteration {self.iteration}", len(mine) * steps) as advance:
                rollout = collect(
                    self.policy, [p.text for p in prompts], [(self.plan.seed, "probe", p.text, seed) for p, seed in mine],
                    DDIM(eta=0.0), steps, self.acting.batch_size, False, advance,
                )  # fmt: skip
            chunks = [slice(i, i + self.acting.batch_size) for i in range(0, len(mine), self.acting.batch_size)]
            rubrics = (self.task.rewards, self.task.held_out_rewards)
            parts = [{k: v for r in rubrics for k, v in self._apply(r, rollout.images[c], prompts[c]).items()} for c in chunks]
        scores = {name: self._gather(torch.cat([p[name] for p in parts]))[: len(probe)] for name in parts[0]}
        images = self.accelerator.gather(rollout.images.to(self.accelerator.device))[: len(probe)].cpu()
        return self._compare(probe, scores, images)

    def _compare(self, probe: list[tuple[Prompt, int]], scores: dict[str, Tensor], images: Tensor) -> dict[str, float]:
        texts = [prompt.text for prompt, _ in probe]
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
            report.save_samples(self.folder, self.iteration, images.float() / 255, texts, [s for _, s in probe], listed)
        return metrics

    # ------------------------------------------------------------------------------------------------------------------
    # Write down and resume

    def _record(self, metrics: dict[str, Any], evaluated: bool) -> dict[str, Any]:
        line = {"iteration": self.iteration, "images": self.images, **metrics, **self.clock.read()}
        if self.accelerator.is_main_process:
            report.append(self.folder / "metrics.jsonl", line)
        if self.iteration:
            self.display.iteration(line, self.plan.iterations)
        if evaluated:
            self.display.evaluation(line)
        return line

    def _save(self) -> None:
        optimizer, scalars = checkpoint.pack_optimizer(self.optimizer, list(self.policy.weights))
        state = {
            "iteration": self.iteration, "images": self.images, "salt": self.salt, "optimizer": scalars,
            "base": {name: [to_json(x) for x in values] for name, values in self.base.items()},
            "best": self.best, "advantage": self.advantage.state(), "scaler": self.scaler.state_dict(), "seconds": self.clock.total(),
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
            checkpoint.unpack_optimizer(self.optimizer, list(self.policy.weights), saved.tensors["optimizer"], state["optimizer"])
            self.advantage.load_state(state["advantage"])
            self.scaler.load_state_dict(state["scaler"])
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
