"""Rewards -> advantages, over all samples of one iteration. Every process computes the same.

Rewards are float64 with NaN where a sample could not be scored: its siblings' baseline is computed without it. An advantage
is NaN where a sample teaches nothing: it was not scored, or nothing told it from its siblings. Learning leaves it out.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge, Interval
from torch import Tensor


class Advantage(Protocol):
    """What turns rewards into advantages."""

    smallest_group: int  # images of one prompt that it needs in an iteration

    @property
    def in_units(self) -> bool:
        """Whether advantages are in the reward's own unit: differences of rewards, not divided by anything."""
        ...

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) rewards -> (N,) float32, NaN for what is to be left out. Samples of one prompt form a group."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers from one iteration to the next, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class _Grouped(ABC):
    """An advantage that compares a prompt's samples of one iteration and remembers nothing. Groups that are all alike are left
    out."""

    smallest_group = 2
    in_units = False

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        advantages = torch.full_like(rewards, math.nan)
        group = _group_numbers(prompts)
        for g in group.unique():
            mine = ((group == g) & rewards.isfinite()).nonzero()[:, 0]
            if len(mine) > 1 and rewards[mine].min() < rewards[mine].max():
                advantages[mine] = self._of_group(rewards[mine])
        return self._of_batch(advantages).float()

    @abstractmethod
    def _of_group(self, rewards: Tensor) -> Tensor:
        """(G,) float64 advantages of one prompt's rewards, which are not all alike."""

    def _of_batch(self, advantages: Tensor) -> Tensor:
        """(N,) of all groups, when each is done."""
        return advantages

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        return


@dataclass(frozen=True)
class GroupRelative(_Grouped):
    """A = (r - mean of the prompt's rewards in this iteration) / std (GRPO, Shao et al. 2024).

    Args:
        scale: whose std: "group" (the prompt's own), "batch" (of all centred rewards: Flow-GRPO's global_std) or "none"
            (Dr. GRPO).
        eps: added to the std.
    """

    scale: Literal["group", "batch", "none"] = "group"
    eps: Annotated[float, Ge(0)] = 1e-4

    @property
    def in_units(self) -> bool:  # type: ignore[override]
        return self.scale == "none"

    def _of_group(self, rewards: Tensor) -> Tensor:
        centred = rewards - rewards.mean()
        return centred / (centred.square().mean().sqrt() + self.eps) if self.scale == "group" else centred

    def _of_batch(self, advantages: Tensor) -> Tensor:
        if self.scale != "batch":
            return advantages
        return advantages / (advantages[advantages.isfinite()].square().mean().sqrt() + self.eps)


@dataclass(frozen=True)
class LeaveOneOut(_Grouped):
    """A = r - mean of the prompt's other rewards: unbiased, in the reward's own unit (Kool et al. 2019; LOOP, Gupta et al. 2025)."""

    in_units = True

    def _of_group(self, rewards: Tensor) -> Tensor:
        others = (rewards.sum() - rewards) / (len(rewards) - 1)
        return rewards - others


@dataclass(frozen=True)
class WinRate(_Grouped):
    """A = (share of the prompt's other samples that it beats, less one half) / std over the group (Pref-GRPO, Wang et al. 2025).

    A tie is half a win. Only the order of rewards counts, so an outlier does not, and neither does the reward's unit.
    """

    def _of_group(self, rewards: Tensor) -> Tensor:
        beats = torch.sign(rewards[:, None] - rewards[None]).sum(1) / (len(rewards) - 1) / 2
        return beats / beats.square().mean().sqrt()


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
    in_units = False
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
        advantages = torch.full_like(rewards, math.nan)
        for i in scored.nonzero()[:, 0].tolist():
            own = self._seen[prompts[i]]
            basis = torch.tensor(list(own), dtype=torch.float64) if len(own) >= self.min_count else batch
            advantages[i] = (rewards[i] - basis.mean()) / (basis.std(correction=0) + self.eps)
        return advantages.float()

    def state(self) -> dict[str, Any]:
        return {"seen": {prompt: list(rewards) for prompt, rewards in self._seen.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self._seen = {prompt: deque(rewards, self.window) for prompt, rewards in state["seen"].items()}


@dataclass
class Standardised:
    """A = (r - mean) / std of all rewards, whatever their prompts, in this iteration and the ones before: for DPOK.

    The iteration's own mean and std would depend on which prompts it drew, so that the same picture had another advantage
    each time, and a learned baseline could not foretell it.

    Args:
        decay: share of its weight that the past keeps in an iteration; 0 is this iteration alone.
        eps: added to the std.
    """

    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    eps: Annotated[float, Ge(0)] = 1e-6
    smallest_group = 1
    in_units = False
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], init=False, repr=False)  # of 1, r and r^2

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        scored = rewards.isfinite()
        batch = rewards[scored].double()
        new = (len(batch), batch.sum().item(), batch.square().sum().item())
        self._sums = [self.decay * old + now for old, now in zip(self._sums, new, strict=True)]
        mean, square = (total / self._sums[0] for total in self._sums[1:])
        std = max(0.0, square - mean**2) ** 0.5
        return ((rewards - mean) / (std + self.eps)).float()  # NaN stays NaN

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums}

    def load_state(self, state: dict[str, Any]) -> None:
        self._sums = state["sums"]


def zero_spread(rewards: Tensor, prompts: Sequence[str]) -> float:
    """The share of prompts whose samples all score alike: they teach a group-relative algorithm nothing.

    A prompt with one sample says nothing of that kind. Where no prompt has two, all are one group.
    """
    group = _group_numbers(prompts)
    if len(set(prompts)) == len(prompts):
        group = torch.zeros_like(group)
    rows = [group == g for g in range(int(group.max()) + 1)]
    groups = [rewards[r & rewards.isfinite()] for r in rows if len(rewards) == 1 or r.sum() > 1]
    return sum(float(len(r) == 0 or bool(r.min() == r.max())) for r in groups) / len(groups)


def _group_numbers(prompts: Sequence[str]) -> Tensor:
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([numbers[p] for p in prompts])
