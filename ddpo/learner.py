"""Improve: from a rollout with advantages to optimizer steps on the LoRA weights."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ddpo import evaluate
from ddpo.algorithms import Algorithm
from ddpo.critic import Critic, Lesson, explained_variance, with_advantages
from ddpo.meters import Seen
from ddpo.noise import Address, generator
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.sections import Learning

LARGEST_LOG_RATIO = 1e-4  # before the first update, averaged over a latent's elements


class TrainingError(RuntimeError):
    """Training cannot go on. Nothing was updated; everything up to the last checkpoint is kept."""


class Learner:
    """The optimizer and what feeds it. All processes hold the same weights and take the same steps.

    Args:
        seed: of the first weights of the algorithm's critic, if it has one.
    """

    def __init__(self, policy: Policy, algorithm: Algorithm, settings: Learning, accelerator: Accelerator, seed: int = 0):
        self.policy, self.algorithm, self.settings, self.accelerator = policy, algorithm, settings, accelerator
        self.weights = list(policy.weights.values())
        self.optimizer = settings.build(self.weights)
        self.critic = algorithm.critic(policy.family, seed)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=policy.family.dtype == torch.float16)

    def rows(self, images: int) -> int:
        """How often `improve` goes through a picture, all in all."""
        return self.settings.epochs * images

    def improve(self, rollout: Rollout, address: Address, acted_in: int, advance: Callable[[int], None]) -> dict[str, float]:
        """A batch is one optimizer step; a view is one backward pass. Returns averages over all processes.

        Args:
            address: of the random choices of views.
            acted_in: the batch size that the rollout was collected in.
            advance: told the number of pictures after each optimizer step.
        """
        everything = torch.arange(len(rollout)).chunk(self.settings.updates)
        size = min(self.settings.micro_batch, len(everything[0]))
        batches = [rows[self._teaches(rollout)[rows]] for rows in everything]
        if self.policy.family.dtype != torch.float32 and self.algorithm.needs_density:
            together = [rows[part] for rows in batches for part in self.algorithm.together(rollout[rows], size)]
            if any(len(rows) != acted_in for rows in together):
                rollout.recompute_log_probs(self.policy, together)
        seen = Seen()
        lesson = None
        if self.critic is not None:  # it judges before it has seen how these pictures were rewarded
            lesson = self.critic.study(rollout)
            rollout = with_advantages(rollout, lesson)
        for epoch in range(self.settings.epochs):
            for update, rows in enumerate(batches):
                draw = generator(*address, epoch, update)
                share = len(everything[update])
                count = self._accumulate(rollout[rows], share, size, draw, seen, first=epoch == update == 0)
                seen.add({"grad_norm": self._step(count / share)})
                advance(share)
        if self.critic is not None and lesson is not None:
            seen.add(self._teach(self.critic, lesson, size))
        seen.add({"kl/step_nats": self._measure_kl(rollout, size)})
        return seen.averages(lambda values: self.accelerator.gather(values.to(self.accelerator.device)).cpu())

    def _teaches(self, rollout: Rollout) -> torch.Tensor:
        """(N,) bool: the rows to learn from. Those of groups that were all alike would only pull towards what is."""
        assert rollout.advantages is not None
        return rollout.advantages.isfinite().cpu() | self.algorithm.needs_gradient

    def _accumulate(self, batch: Rollout, share: int, size: int, draw: torch.Generator, seen: Seen, first: bool) -> int:
        """Gradients of the summed loss over `share`; returns how many rows of views they were summed over."""
        count = 0
        if not len(batch):
            return 0
        for view in self.algorithm.views(batch, size, draw):
            loss, metrics = self.algorithm.loss(self.policy, view)
            if first and "log_ratio" in metrics:
                _demand_ratio_one(metrics["log_ratio"])
            self.scaler.scale(loss.sum() / share).backward()
            count += len(view)
            seen.add(metrics)
        return count

    def _step(self, weight: float) -> float:
        """One optimizer step on the LoRA weights, with all processes' gradients; none where there is nothing to learn from.
        Returns the norm."""
        flat = self._average(self.weights, weight)
        if not flat.any():
            self.optimizer.zero_grad()
            return 0.0
        if not self.scaler.is_enabled() and not flat.isfinite().all():
            raise TrainingError(
                "the gradient is not finite; nothing was updated. Lower optimizer.lr, or use model.dtype=float32 to see whether "
                "half precision is the cause, and run the same command again"
            )
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm.item()

    def _average(self, weights: list[torch.nn.Parameter], weight: float) -> torch.Tensor:
        """Add up all processes' gradients and divide by the global count. Returns them flat."""
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights])
        everywhere = self.accelerator.reduce(torch.cat([flat, flat.new_tensor([weight])]), "sum")
        flat = everywhere[:-1] / everywhere[-1].clamp(min=1e-12)  # zero where no process has a row to learn from
        for p, grad in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
            p.grad = grad.view_as(p)
        return flat

    def _teach(self, critic: Critic, lesson: Lesson, size: int) -> dict[str, float]:
        """Fit the critic in the policy's batches. Returns what is to be said of its judgement before."""
        for _ in range(critic.epochs):
            for rows in torch.arange(len(lesson)).chunk(self.settings.updates):
                for part in rows.split(size):
                    (critic.loss(lesson[part]).sum() / len(rows)).backward()
                if not self._average(critic.weights, 1.0).isfinite().all():
                    raise TrainingError(
                        "the critic's gradient is not finite; lower algorithm.critic_lr and run the same command again"
                    )
                torch.nn.utils.clip_grad_norm_(critic.weights, self.settings.max_grad_norm)
                critic.optimizer.step()
                critic.optimizer.zero_grad()
        values, targets, outcome = (self.accelerator.gather(v) for v in (lesson.values, lesson.targets, lesson.outcome))
        return {
            "critic/loss": (targets - values).square().nanmean().item(),
            "critic/explained_variance": explained_variance(values, outcome),
        }

    def _measure_kl(self, rollout: Rollout, size: int) -> float:
        """On a sixteenth of the pictures, eight at least."""
        few = min(len(rollout), max(8, len(rollout) // 16))
        measure = evaluate.step_kl if rollout.stochastic else evaluate.posterior_kl
        return measure(self.policy, rollout[torch.arange(few)], size)


def _demand_ratio_one(log_ratio: torch.Tensor) -> None:
    worst = log_ratio.abs().max().item()
    if not worst <= LARGEST_LOG_RATIO:
        raise TrainingError(
            f"before the first update the policy should be the one that acted, but a log importance ratio is {worst:.2g} (at most "
            f"{LARGEST_LOG_RATIO:g} is allowed). Acting and learning disagree: check custom families and solvers for randomness, "
            "and that nothing changes the network between the two"
        )
