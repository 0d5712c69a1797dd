"""One scorer of a rubric: where it computes, and how many pictures it can hold."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards._contract import Reward, RewardError, score


@dataclass
class Part:
    """One scorer of a rubric.

    Args:
        reward: the scorer.
        weight: what it counts in the sum.
        floor: how many standard errors its held-out mean may fall below the base model's; None is any number.
        device: where it computes; None is where the pictures are.
        offload: keep it in the CPU's memory between uses.

    Attributes:
        most: pictures a call; None is no limit. It is found when the memory does not hold more.
    """

    reward: Reward
    weight: float = 1.0
    floor: float | None = None
    device: str | None = None
    offload: bool = False
    most: int | None = field(default=None, init=False)
    _home: torch.device = field(default_factory=lambda: torch.device("cpu"), init=False, repr=False)
    _scored: int = field(default=0, init=False, repr=False)
    _seconds: float = field(default=0.0, init=False, repr=False)

    def to(self, device: torch.device | str) -> None:
        self._home = torch.device(self.device or device)
        if not self.offload:
            optional(self.reward, "to", self._home)

    def score(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        """(B,) through the gate; in halves where the device's memory does not hold the whole."""
        start = time.perf_counter()
        if self.offload:
            optional(self.reward, "to", self._home)
        try:
            scores = self._in_pieces(name, images.to(self._home) if self.device else images, prompts, metadata)
        finally:
            graph = torch.is_grad_enabled() and images.requires_grad
            if self.offload and not graph:  # which holds on to the weights where they are
                optional(self.reward, "to", torch.device("cpu"))
        self._seconds += time.perf_counter() - start
        self._scored += len(prompts)
        return scores

    def _in_pieces(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        if self.most and len(prompts) > self.most:
            pieces = [slice(i, i + self.most) for i in range(0, len(prompts), self.most)]
            return torch.cat([self._in_pieces(name, images[p], prompts[p], metadata[p]) for p in pieces])
        try:
            return score(name, self.reward, images, prompts, metadata)
        except RewardError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            if len(prompts) == 1 or self.groupwise:
                remedy = "set device: cpu, another GPU, or offload: true on it"
                raise RewardError(f"reward {name!r} does not fit in memory with {len(prompts)} pictures: {remedy}") from error
        self.most = len(prompts) // 2  # outside the handler: its traceback would keep the failed batch in memory
        return self._in_pieces(name, images, prompts, metadata)

    @property
    def groupwise(self) -> bool:
        """Whether each call must bring one whole prompt group."""
        return bool(getattr(self.reward, "groupwise", False))

    @property
    def images_per_second(self) -> float:
        return self._scored / self._seconds if self._seconds else math.nan


def optional(reward: Reward, method: str, *arguments: Any) -> Any:
    """A method that a scorer may have or not."""
    found: Callable[..., Any] | None = getattr(reward, method, None)
    return found(*arguments) if callable(found) else None
