"""Improve: from a rollout with advantages to optimizer steps on the LoRA weights."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpo import drift
from ddpo.algorithms import Algorithm
from ddpo.credit import explained_variance
from ddpo.critic import Critic, Lesson, with_advantages
from ddpo.meeting import Meeting, TrainingError
from ddpo.memory import Batch
from ddpo.meters import Seen
from ddpo.noise import Address, generator
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.sections import Learning
from ddpo.updates import Updates
from ddpo.views import Transition

LARGEST_LOG_RATIO = 1e-4  # before the first update, averaged over a latent's elements
QUARTERS = 4  # of the denoising steps, by which importance ratios are averaged


class BadNumbers(TrainingError):
    """A weight is not finite. The checkpoints are: none is written with such a weight."""


class Skip(NamedTuple):
    """An optimizer step that was not taken."""

    update: int  # of the iteration, from 0
    why: str
    weights: list[str]  # whose gradients are not finite
    rows: list[int]  # of all processes' pictures, one process after the other: those that gave rise to it, where that is known


class Learner:
    """The optimizer and what feeds it. All processes hold the same weights and take the same steps.

    Args:
        seed: of the first weights of the algorithm's critic, if it has one.
        meeting: where the processes meet.
        updates: which steps are not to be taken.
        say: told what a user should know.

    Attributes:
        batch: rows of one backward pass.
        skipped: the steps of the last rollout that were not taken.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        settings: Learning,
        accelerator: Accelerator,
        seed: int = 0,
        meeting: Meeting | None = None,
        updates: Updates | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.policy, self.algorithm, self.settings, self.accelerator = policy, algorithm, settings, accelerator
        self.meeting, self.updates = meeting or Meeting(accelerator), updates or Updates(math.inf)
        self.weights = list(policy.weights.values())
        self.optimizer = settings.build(self.weights)
        self.critic = algorithm.critic(policy.family, seed)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=policy.family.dtype == torch.float16)
        advice = "set model.gradient_checkpointing=true where the model has it, or lower lora.rank or the resolution"
        self.batch = Batch(settings.micro_batch, "learning", advice, say)
        self.skipped: list[Skip] = []

    def rows(self, images: int) -> int:
        """How often `improve` goes through a picture, all in all."""
        return self.settings.epochs * images

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def improve(self, rollout: Rollout, address: Address, acted_in: int, advance: Callable[[int], None]) -> dict[str, float]:
        """A batch is one optimizer step; a view is one backward pass. Returns averages over all processes.

        Args:
            address: of the random choices of views.
            acted_in: the batch size that the rollout was collected in; 0 where it was not the same throughout.
            advance: told the number of pictures after each optimizer step.

        Raises:
            BadNumbers, TrainingError, ddpo.memory.NoMemory, ddpo.meeting.Stop.
        """
        everything = torch.arange(len(rollout)).chunk(self.settings.updates)
        self.batch.size = min(self.batch.size, len(everything[0]))
        batches = [rows[self._teaches(rollout)[rows]] for rows in everything]
        self._prepare(rollout, batches, acted_in)
        seen, self.skipped = Seen(), []
        lesson = None
        if self.critic is not None:  # it judges before it has seen how these pictures were rewarded
            lesson = self.critic.study(rollout)
            rollout = with_advantages(rollout, lesson)
        for epoch in range(self.settings.epochs):
            for update, rows in enumerate(batches):
                draw = (*address, epoch, update)
                first, share = epoch == update == 0, len(everything[update])
                count, lost, attempt = self.batch.fitted(
                    lambda rows=rows, draw=draw, first=first, share=share: self._accumulate(rollout[rows], share, draw, first),  # type: ignore[misc]
                    lambda first=first: self._undo(rollout, batches if first else []),  # type: ignore[misc]
                )
                seen.extend(attempt)
                norm, why = self._step(count / share, lost)
                seen.add({"grad_norm": norm})
                if why:
                    self._note(epoch * len(batches) + update, why, rollout, rows, draw)
                self.optimizer.zero_grad()
                advance(share)
        if self.critic is not None and lesson is not None:
            seen.add(self._teach(self.critic, lesson))
        far = self.batch.fitted(lambda: self._measure_kl(rollout), lambda: None)
        seen.add({"kl/step_nats": far.kl, "kl/image_nats": far.kl * far.steps, "norm_inflation": far.inflation})
        return _with_lowest_ratio(seen.averages(self.meeting.gather))

    def _teaches(self, rollout: Rollout) -> Tensor:
        """(N,) bool: the rows to learn from. Those of groups that were all alike would only pull towards what is."""
        assert rollout.advantages is not None
        finite = rollout.advantages.isfinite().cpu()
        return (finite if finite.ndim == 1 else finite.all(1)) | self.algorithm.needs_gradient

    def _prepare(self, rollout: Rollout, batches: list[Tensor], acted_in: int) -> None:
        """Where learning uses other batches than acting did, half precision needs the log-probabilities of these."""
        if self.policy.family.dtype == torch.float32 or not self.algorithm.needs_density:
            return
        together = [rows[part] for rows in batches for part in self.algorithm.together(rollout[rows], self.batch.size)]
        if any(len(rows) != acted_in for rows in together):
            rollout.recompute_log_probs(self.policy, together)

    def _undo(self, rollout: Rollout, batches: list[Tensor]) -> None:
        """Forget half an update, the memory not having held it; before the first one, the ratio must still be one."""
        self.optimizer.zero_grad()
        self._prepare(rollout, batches, 0)

    def _accumulate(self, batch: Rollout, share: int, draw: Address, first: bool) -> tuple[int, Tensor, Seen]:
        """Gradients of the summed loss over `share`. Returns how many rows of views they were summed over, how many losses are not
        finite, and what was measured."""
        count, lost, seen = 0, torch.zeros((), device=self.accelerator.device), Seen()
        for view in self._views(batch, draw):
            self.meeting.raise_if_told()
            loss, metrics = self.algorithm.loss(self.policy, view)
            if first and "log_ratio" in metrics:
                _demand_ratio_one(metrics["log_ratio"])
            self.scaler.scale(loss.sum() / share).backward()
            count += len(view)
            lost += (~loss.detach().isfinite()).sum()
            seen.add(metrics)
            if "log_ratio" in metrics and isinstance(view, Transition):
                seen.add({"step": (batch.times.to(view.t)[None] - view.t[:, None]).abs().argmin(1) / (len(batch.times) - 1)})
        return count, lost, seen

    def _views(self, batch: Rollout, draw: Address) -> Iterator:
        if len(batch):
            yield from self.algorithm.views(batch, self.batch.size, generator(*draw))

    def _step(self, weight: float, lost: Tensor) -> tuple[float, str | None]:
        """One optimizer step on the LoRA weights, with all processes' gradients; none where there is nothing to learn from.
        Returns the norm, and why the step was not taken, if so: on all processes alike."""
        flat, anywhere = self._average(self.weights, weight, lost)
        if not anywhere and not flat.any():
            return 0.0, None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm).item()
        overflow = self.scaler.is_enabled() and not anywhere and not math.isfinite(norm)  # float16's own: the scaler skips it
        why = None if overflow else self.updates.refuse(norm, bool(anywhere))
        if why is None:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            self.updates.note_scaler(overflow, self.scaler.get_scale())
        if not torch.nn.utils.get_total_norm(self.weights).isfinite():
            names = [name for name, w in self.policy.weights.items() if not w.isfinite().all()]
            raise BadNumbers(f"after an update {_few(names)} of the LoRA is not finite; lower optimizer.lr")
        return norm, why

    def _note(self, update: int, why: str, rollout: Rollout, rows: Tensor, draw: Address) -> None:
        """Write down a step that was not taken, with the pictures that gave rise to it: the losses are computed again to find them."""
        names = [name for name, w in self.policy.weights.items() if w.grad is not None and not w.grad.isfinite().all()]
        mask = torch.zeros(len(rollout))
        numbers = torch.cat([rollout.latents.flatten(1), rollout.log_probs[:, rollout.stochastic].flatten(1)], 1)
        mask[rows] = (~numbers.isfinite().all(1)).float().cpu()[rows]
        if not self.algorithm.needs_gradient:
            batch = rollout[rows]
            with torch.no_grad():
                for view in self._views(batch, draw):
                    loss, _ = self.algorithm.loss(self.policy, view)
                    mask[[int(rows[i]) for i in _rows_of(batch, view, ~loss.isfinite())]] = 1
        everywhere = self.meeting.gather(mask)
        self.skipped.append(Skip(update, why, names, everywhere.nonzero()[:, 0].tolist()))

    def _average(self, weights: list[torch.nn.Parameter], weight: float, lost: Tensor | float = 0.0) -> tuple[Tensor, float]:
        """Add up all processes' gradients and divide by the global count. Returns them flat, and the sum of `lost`."""
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights])
        told = flat.new_tensor([weight, float(lost)])
        everywhere = self.meeting.add_up(torch.cat([flat, told]))
        flat = everywhere[:-2] / everywhere[-2].clamp(min=1e-12)  # zero where no process has a row to learn from
        for p, grad in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
            p.grad = grad.view_as(p)
        return flat, everywhere[-1].item()

    def _teach(self, critic: Critic, lesson: Lesson) -> dict[str, float]:
        """Fit the critic in the policy's batches. Returns what is to be said of its judgement before."""

        def accumulate(rows: Tensor) -> None:
            for part in rows.split(self.batch.size):
                (critic.loss(lesson[part]).sum() / len(rows)).backward()

        for _ in range(critic.epochs):
            for rows in torch.arange(len(lesson)).chunk(self.settings.updates):
                self.batch.fitted(lambda rows=rows: accumulate(rows), critic.optimizer.zero_grad)  # type: ignore[misc]
                if not self._average(critic.weights, 1.0)[0].isfinite().all():
                    raise TrainingError(
                        "the critic's gradient is not finite; lower algorithm.critic_lr and run the same command again"
                    )
                torch.nn.utils.clip_grad_norm_(critic.weights, self.settings.max_grad_norm)
                critic.optimizer.step()
                critic.optimizer.zero_grad()
        values, targets, outcome = (self.meeting.gather(v) for v in (lesson.values, lesson.targets, lesson.outcome))
        return {
            "critic/loss": (targets - values).square().nanmean().item(),
            "critic/explained_variance": explained_variance(values, outcome),
        }

    def _measure_kl(self, rollout: Rollout) -> drift.Drift:
        """On a sixteenth of the pictures, eight at least."""
        few = min(len(rollout), max(8, len(rollout) // 16))
        measure = drift.step_kl if rollout.stochastic else drift.posterior_kl
        return measure(self.policy, rollout[torch.arange(few)], self.batch.size)


def _demand_ratio_one(log_ratio: Tensor) -> None:
    known = log_ratio[log_ratio.isfinite()]  # another is no sign of a disagreement: the loss is not finite either
    worst = known.abs().max().item() if len(known) else 0.0
    if worst > LARGEST_LOG_RATIO:
        raise TrainingError(
            f"before the first update the policy should be the one that acted, but a log importance ratio is {worst:.2g} (at most "
            f"{LARGEST_LOG_RATIO:g} is allowed). Acting and learning disagree: check custom families and solvers for randomness, "
            "and that nothing changes the network between the two"
        )


def _rows_of(batch: Rollout, view: object, wanted: Tensor) -> list[int]:
    """Which rows of the batch these rows of a view are: those whose latents are in it to the bit. Views of pairs are not told apart."""
    seen = getattr(view, "x0", getattr(view, "x", None))
    if seen is None or len(seen) != len(wanted):
        return []
    found = [(batch.latents == seen[i]).flatten(2).all(2).any(1).nonzero()[:, 0].tolist() for i in wanted.nonzero()[:, 0]]
    return sorted({row for rows in found for row in rows})


def _with_lowest_ratio(metrics: dict[str, float]) -> dict[str, float]:
    quarters = [metrics.pop(f"ratio/quarter_{q}") for q in range(QUARTERS) if f"ratio/quarter_{q}" in metrics]
    known = [ratio for ratio in quarters if math.isfinite(ratio)]
    return metrics | ({"ratio/lowest": min(known)} if known else {})


def _few(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} others)" if len(names) > 1 else "")
