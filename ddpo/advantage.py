"""Rewards -> advantages, over all samples of one iteration. Every process computes the same.

Rewards are float64 with NaN where a sample could not be scored: such a sample has advantage zero and its siblings'
baseline is computed without it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge
from torch import Tensor


class Advantage(Protocol):
    """What turns rewards into advantages."""

    smallest_group: int  # images of one prompt that it needs in an iteration

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) rewards -> (N,) float32. Samples of one prompt form a group."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers from one iteration to the next, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class GroupRelative:
    """A = (r - mean of the prompt's rewards in this iteration) / std (GRPO, Shao et al. 2024).

    Args:
        scale: whose std: "group" (the prompt's own), "batch" (of all centred rewards: Flow-GRPO's global_std) or "none"
            (Dr. GRPO).
        eps: added to the std. A group whose rewards are all alike has advantage zero whatever it is.
    """

    scale: Literal["group", "batch", "none"] = "group"
    eps: Annotated[float, Ge(0)] = 1e-4
    smallest_group = 2

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        scored = rewards.isfinite()
        group = _group_numbers(prompts)
        centred = torch.zeros_like(rewards)
        centred[scored] = rewards[scored] - _group_mean(rewards[scored], group[scored])
        if self.scale == "group":
            centred[scored] /= _group_mean(centred[scored] ** 2, group[scored]).sqrt() + self.eps
        elif self.scale == "batch":
            centred /= centred[scored].square().mean().sqrt() + self.eps
        return centred.float()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class PerPrompt:
    """DDPO's running statistics: a prompt's last `window` rewards are its baseline and scale (Black et al. 2023, 4.3).

    Right where the prompts are few and come again often; the batch's own statistics stand in until a prompt has been
    seen `min_count` times.
    """

    window: Annotated[int, Ge(2)] = 32
    min_count: Annotated[int, Ge(2)] = 16
    eps: Annotated[float, Ge(0)] = 1e-6
    smallest_group = 1
    _seen: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.min_count > self.window:
            raise ValueError(f"min_count is {self.min_count}; it cannot exceed window, which is {self.window}")

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        scored = rewards.isfinite()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            if reward == reward:  # not NaN
                self._seen.setdefault(prompt, deque(maxlen=self.window)).append(reward)
        batch = rewards[scored]
        advantages = torch.zeros_like(rewards)
        for i in scored.nonzero()[:, 0].tolist():
            own = self._seen[prompts[i]]
            basis = torch.tensor(list(own), dtype=torch.float64) if len(own) >= self.min_count else batch
            advantages[i] = (rewards[i] - basis.mean()) / (basis.std(correction=0) + self.eps)
        return advantages.float()

    def state(self) -> dict[str, Any]:
        return {"seen": {prompt: list(rewards) for prompt, rewards in self._seen.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self._seen = {prompt: deque(rewards, self.window) for prompt, rewards in state["seen"].items()}


def zero_spread(rewards: Tensor, prompts: Sequence[str]) -> float:
    """The share of prompts whose samples all score alike: they teach a group-relative algorithm nothing."""
    group = _group_numbers(prompts)
    groups = [rewards[(group == g) & rewards.isfinite()] for g in range(int(group.max()) + 1)]
    return sum(float(len(r) == 0 or bool(r.min() == r.max())) for r in groups) / len(groups)


def _group_numbers(prompts: Sequence[str]) -> Tensor:
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([numbers[p] for p in prompts])


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    """(N,) each row's group's mean, exact where all of a group's values are equal."""
    means = torch.empty_like(values)
    for g in group.unique():
        mine = values[group == g]
        means[group == g] = mine[0] if bool((mine == mine[0]).all()) else mine.mean()
    return means
