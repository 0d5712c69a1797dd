"""Tuned against base: the same held-out prompts, the same noise, every time.

The base model's pictures are drawn once, at iteration 0. A difference is therefore paired, and its interval is that of
the prompts: they are what a new user would bring other ones of.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpo.diffusion import DDIM, gaussian_kl, step_mean
from ddpo.meters import to_float, to_json
from ddpo.noise import generator, normal
from ddpo.policy import Policy
from ddpo.prompts import Prompt
from ddpo.rollout import Rollout, collect
from ddpo.sections import Evaluating
from rewards import Rubric


class Probe:
    """What every evaluation draws: held-out prompts, spread evenly over their list, each with every seed."""

    def __init__(self, held_out: Sequence[Prompt], evaluating: Evaluating, num_steps: int, seed: int):
        number = min(evaluating.prompts, len(held_out))
        chosen = [held_out[i * len(held_out) // number] for i in range(number)]
        self.rows = [(prompt, s) for prompt in chosen for s in range(evaluating.seeds)]
        self.seeds, self.num_steps, self.seed = evaluating.seeds, evaluating.num_steps or num_steps, seed

    def share(self, process: int, processes: int) -> list[tuple[Prompt, int]]:
        """A process's rows, as many as any other's, whole prompts: the last is repeated where they do not divide."""
        prompts = len(self.rows) // self.seeds
        size = -(-prompts // processes)
        chosen = [min(i, prompts - 1) for i in range(process * size, (process + 1) * size)]
        return [row for i in chosen for row in self.rows[i * self.seeds : (i + 1) * self.seeds]]

    def draw(self, policy: Policy, rows: list[tuple[Prompt, int]], batch_size: int, advance: Callable[[int], None]) -> Tensor:
        """(N, 3, H, W) uint8 pictures by the deterministic sampler, which adds no noise of its own."""
        texts, addresses = [p.text for p, _ in rows], [(self.seed, "probe", p.text, s) for p, s in rows]
        return collect(policy, texts, addresses, DDIM(eta=0.0), self.num_steps, batch_size, False, advance).images


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Tensor, prompts: Sequence[str], resamples: int = 4000) -> Interval:
    """Mean of (N,) paired differences, and its 95 % percentile-bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Prompts are resampled, not pictures: those of one prompt are not independent. NaN differences are left out.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt, difference in zip(prompts, differences.tolist(), strict=True):
        if difference == difference:  # not NaN
            by_prompt.setdefault(prompt, []).append(difference)
    if not by_prompt:
        return Interval(float("nan"), float("nan"), float("nan"))
    means = torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
    draws = torch.randint(len(means), (resamples, len(means)), generator=generator("bootstrap", len(means)))
    low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(means.mean().item(), low, high)


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """How different the pictures of one prompt are: root mean square pixel distance in [0, 1], averaged over all pairs.

    Pictures are compared at 32 x 32, so that fine noise does not pass for variety. NaN if no prompt has two pictures.

    Args:
        images: (N, 3, H, W) uint8.
    """
    small = F.adaptive_avg_pool2d(images.float() / 255, 32).flatten(1)
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    distances = [torch.pdist(small[group]) / small.shape[1] ** 0.5 for group in rows.values() if len(group) > 1]
    return torch.cat(distances).mean().item() if distances else float("nan")


def win_rate(base: Tensor, tuned: Tensor) -> float:
    """The share of pairs in which the tuned picture scores higher; a tie is half a win. NaN pairs are left out."""
    both = base.isfinite() & tuned.isfinite()
    return ((tuned > base).double() + 0.5 * (tuned == base).double())[both].mean().item()


@torch.no_grad()
def step_kl(policy: Policy, rollout: Rollout, size: int) -> float:
    """Mean KL of the policy to the base model in nats a denoising step, exact, over every stochastic step of the rollout.

    Args:
        size: rows that go through the network at a time.
    """
    per_step: list[Tensor] = []
    for chunk in rollout.chunks(size):
        for step in rollout.stochastic:
            view = chunk.transition(step)
            mean, std = view.replay(policy)
            with policy.acting_as("reference"):
                reference, _ = view.replay(policy)
            per_step.append(gaussian_kl(mean, reference, std))
    return torch.cat(per_step).mean().item()


@torch.no_grad()
def posterior_kl(policy: Policy, rollout: Rollout, size: int) -> float:
    """The same for a sampler that adds no noise: of DDPM's steps (DDIM, eta 1), from the rollout's pictures noised anew."""
    level, solver = policy.family.schedule.level, DDIM(eta=1.0)
    per_step: list[Tensor] = []
    for chunk in rollout.chunks(size):
        for step, (t, t_next) in enumerate(itertools.pairwise(rollout.times.to(chunk.latents.device))):
            now, then = level(t.expand(len(chunk))), level(t_next.expand(len(chunk)))
            if not solver(now, then)[1].all():
                continue
            x0 = chunk.latents[:, -1]
            x = now.noise(x0, normal([(*a, "kl", step) for a in chunk.addresses], x0.shape[1:], x0.device))
            cond = {k: v[chunk.cond_rows] for k, v in chunk.cond.items()}
            mean, std = step_mean(policy(x, t.expand(len(chunk)), cond), now, then, solver)
            with policy.acting_as("reference"):
                reference, _ = step_mean(policy(x, t.expand(len(chunk)), cond), now, then, solver)
            per_step.append(gaussian_kl(mean, reference, std))
    return torch.cat(per_step).mean().item()


def compare(
    base: dict[str, Tensor], tuned: dict[str, Tensor], objective: tuple[Tensor, Tensor], prompts: Sequence[str]
) -> dict[str, float]:
    """The evaluation's share of a line of metrics.jsonl.

    Args:
        base, tuned: (N,) scores of each scorer on the same prompts and noise.
        objective: (N,) the weighted total that training maximises, of base and tuned.
    """
    metrics = {"eval/win_rate": win_rate(*objective)}
    for name, before in base.items():
        change = paired_interval(tuned[name] - before, prompts)
        metrics |= {
            f"eval/{name}/base": before.nanmean().item(),
            f"eval/{name}/tuned": tuned[name].nanmean().item(),
            f"eval/{name}/delta": change.mean,
            f"eval/{name}/delta_low": change.low,
            f"eval/{name}/delta_high": change.high,
        }
    return metrics


class Baseline:
    """What the base model made of the probe, and which iteration has made the most of it since.

    Args:
        rubric: what is trained on. Its floors move with each comparison.
    """

    def __init__(self, rubric: Rubric):
        self.rubric = rubric
        self.scores: dict[str, Tensor] = {}  # (N,) of every scorer
        self.diversity = math.nan
        self.best, self._gain = 0, -math.inf

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """(N,) the weighted sum, each scorer in its unit, which the base model's scores give."""
        return self.rubric.total(scores, self.rubric.scales(self.scores))

    def compare(self, iteration: int, scores: dict[str, Tensor], images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The evaluation's share of a line of metrics.jsonl. At iteration 0 these are the base model's own.

        Args:
            scores: (N,) of every scorer, trained on or watched.
            images: (N, 3, H, W) uint8.
        """
        variety = diversity(images, prompts)
        if iteration == 0:
            self.scores, self.diversity = dict(scores), variety
        base = {name: self.scores[name] for name in scores}
        objective = (self.total(base), self.total(scores))
        margins = self.rubric.margins(base, scores, prompts)
        if iteration:
            self.rubric.adjust(margins)
        gain = (objective[1] - objective[0]).nanmean().item()
        if gain > self._gain and all(margin >= 0 for margin in margins.values()):
            self.best, self._gain = iteration, gain
        return {
            **compare(base, scores, objective, prompts),
            "eval/diversity/base": self.diversity,
            "eval/diversity/tuned": variety,
            **{f"floor/{name}/margin": margin for name, margin in margins.items()},
        }

    def state(self) -> dict[str, Any]:
        scores = {name: [to_json(x) for x in v.tolist()] for name, v in self.scores.items()}
        gain = self._gain if math.isfinite(self._gain) else None
        return {"scores": scores, "diversity": to_json(self.diversity), "best": self.best, "gain": gain}

    def load_state(self, state: dict[str, Any]) -> None:
        self.scores = {name: torch.tensor([to_float(x) for x in v], dtype=torch.float64) for name, v in state["scores"].items()}
        self.diversity, self.best = to_float(state["diversity"]), state["best"]
        self._gain = -math.inf if state["gain"] is None else state["gain"]
