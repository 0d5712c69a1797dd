"""Reward scorers: one scorer a file, and one gate that every score passes on its way into training.

A reward is any callable `reward(images, prompts, metadata) -> scores`; `Reward` says what it is given and what it owes,
and `check(my_reward)` tries that on a scorer of your own. This package imports nothing of ddpo, so a scorer can be
tried in a notebook.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class RewardError(RuntimeError):
    """A scorer broke its contract. The message names the scorer, the prompt and the fix."""


class Reward(Protocol):
    """What a scorer is: higher is better, and an image's score depends on that image, its prompt and its metadata alone.

    Args of a call:
        images: float32 (B, 3, H, W) in [0, 1], not to be changed in place.
        prompts: B strings, as written in the prompt file.
        metadata: B dicts, whatever else the prompt file says of each prompt.

    Returns:
        B finite numbers: a (B,) tensor or array, or a list in which None stands for an image that cannot be scored.
        Such an image is left out of training; it never counts as a zero. A tensor may carry a gradient.

    A scorer may have a `name` (of its log columns) and, if it holds a network, `to(device)`.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor | Sequence[float | None]: ...


def score(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    """The gate: the scores of one scorer, float64 (B,) on the CPU, NaN where the scorer said None.

    A gradient that the scorer's tensor carries is kept: call it under `torch.no_grad()` where none is wanted.

    Raises:
        RewardError: the scorer raised (its exception is the cause), returned the wrong type or number of scores or a
            score that is not finite, or changed the images.
    """
    before = _version(images)
    try:
        scores = reward(images, prompts, metadata)
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error}\n"
            f"while it scored {len(prompts)} images for the prompts {_short(list(prompts))}. Fix the scorer; "
            "where it is a single image that cannot be scored, return None for it."
        ) from error
    if _version(images) != before:
        raise RewardError(f"reward {name!r} changed the images it was given. Let it work on images.clone().")
    return _numbers(name, scores, prompts)


def check(reward: Reward, prompts: Sequence[str] | None = None, metadata: Sequence[dict] | None = None) -> None:
    """Try the contract on a scorer: run this on your own before you train on it.

    It scores small random pictures and looks that there is one finite number (or None) for each, that the same picture
    scores the same twice and without its neighbours, and that nothing it was given has changed.

    Args:
        reward: the scorer.
        prompts: what to score them against, if the scorer cannot take any text.
        metadata: one dict a prompt, if the scorer reads them.

    Raises:
        RewardError: says which part of the contract is broken, and how to mend it.
    """
    name = name_of(reward)
    prompts = list(prompts or ["a cat on a blue background", "two dogs, oil painting", ""])
    metadata = list(metadata or [{} for _ in prompts])
    images = torch.rand(len(prompts), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given, kept = (images, prompts, metadata), (images.clone(), list(prompts), copy.deepcopy(metadata))
    with torch.no_grad():
        first = score(name, reward, *given)
        if not torch.equal(images, kept[0]) or (prompts, metadata) != kept[1:]:
            raise RewardError(f"reward {name!r} changed the images, prompts or metadata it was given. Let it work on a copy.")
        if first.isnan().all():
            raise RewardError(
                f"reward {name!r} could score none of {prompts}: give check() prompts (and metadata) that it can."
            )
        again = score(name, reward, *given)
        alone = torch.cat(
            [score(name, reward, images[i : i + 1], [p], [m]) for i, (p, m) in enumerate(zip(*kept[1:], strict=True))]
        )
    _same(name, first, again, 1e-4, "the same images again", "Switch off what is random in it (dropout: call .eval()).")
    # Kernels differ by batch shape: a network in half precision is right to about a hundredth.
    _same(name, first, alone, 1e-2, "each image alone", "Its score must not depend on the batch: do not normalise over it.")


def name_of(reward: Reward) -> str:
    """What log columns call a scorer: its `name`, or else its class or function, in lower case.

    What a column's name cannot hold becomes "_".
    """
    name = getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__).lower()
    return re.sub(r"[^\w.-]+", "_", str(name)).strip("_") or "reward"


@dataclass(frozen=True)
class Rubric:
    """What a run is rewarded for: named scorers and what each counts."""

    rewards: dict[str, Reward]
    weights: dict[str, float]

    def __post_init__(self) -> None:
        if self.rewards.keys() != self.weights.keys():
            raise ValueError(f"a rubric needs one weight a reward, got {list(self.rewards)} and {list(self.weights)}")
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight}; it must be a finite number")

    @classmethod
    def of(cls, pairs: Sequence[tuple[Reward, float]]) -> "Rubric":
        """From (scorer, weight) pairs. Scorers of one name are told apart by a number: clip, clip_2."""
        rewards: dict[str, Reward] = {}
        weights: dict[str, float] = {}
        for reward, weight in pairs:
            name, number = name_of(reward), 1
            while (unique := name if number == 1 else f"{name}_{number}") in rewards:
                number += 1
            rewards[unique], weights[unique] = reward, float(weight)
        return cls(rewards, weights)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[str, Tensor]:
        """Each scorer's unweighted scores, float64 (B,), through the gate `rewards.score`."""
        return {name: score(name, reward, images, prompts, metadata) for name, reward in self.rewards.items()}

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """(B,) the weighted sum of what `score` returned; NaN where any part is."""
        return torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum(0)

    def to(self, device: torch.device | str) -> "Rubric":
        """Move the scorers that hold a network."""
        for reward in self.rewards.values():
            if callable(move := getattr(reward, "to", None)):
                move(device)
        return self


def _numbers(name: str, scores: object, prompts: Sequence[str]) -> Tensor:
    """What a scorer returned as float64 (B,) on the CPU, or the reason why it is no reward."""
    wanted = f"it must return {len(prompts)} numbers, one an image, as a tensor of shape ({len(prompts)},) or a list"
    if isinstance(scores, np.ndarray):
        scores = scores.tolist()
    if isinstance(scores, Tensor):
        if scores.shape != (len(prompts),) or scores.dtype == torch.bool or scores.is_complex():
            raise RewardError(f"reward {name!r} returned a tensor of shape {tuple(scores.shape)}, {scores.dtype}; {wanted}.")
        return _finite(name, scores.to("cpu", torch.float64), set(), prompts)
    if not isinstance(scores, list | tuple):
        raise RewardError(f"reward {name!r} returned {_short(scores)} ({type(scores).__name__}); {wanted}.")
    if len(scores) != len(prompts):
        raise RewardError(f"reward {name!r} returned {len(scores)} scores for {len(prompts)} images; {wanted}.")
    numbers = torch.tensor([_number(name, s, i, wanted) for i, s in enumerate(scores)], dtype=torch.float64)
    return _finite(name, numbers, {i for i, s in enumerate(scores) if s is None}, prompts)


def _finite(name: str, numbers: Tensor, missing: set[int], prompts: Sequence[str]) -> Tensor:
    """The numbers as they are, if all but those at the missing places are finite."""
    for i, value in enumerate(numbers.tolist()):
        if not math.isfinite(value) and i not in missing:
            raise RewardError(
                f"reward {name!r}: score {i} is {value} for the prompt {_short(prompts[i])}; "
                "return None for an image that cannot be scored."
            )
    return numbers


def _number(name: str, value: object, place: int, wanted: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RewardError(
            f"reward {name!r}: score {place} is {_short(value)} ({type(value).__name__}), not a number; {wanted}."
        )
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return math.inf


def _version(images: Tensor) -> int:
    """Counts the changes made in place. PyTorch does not count them on tensors made in inference mode."""
    return 0 if images.is_inference() else images._version


def _same(name: str, first: Tensor, other: Tensor, tolerance: float, treatment: str, fix: str) -> None:
    if not torch.allclose(first, other, rtol=tolerance, atol=tolerance / 10, equal_nan=True):
        raise RewardError(f"reward {name!r} scored {first.tolist()}, but {other.tolist()} when given {treatment}. {fix}")


def _short(value: object) -> str:
    """On one line, with control characters shown as escapes, cut at 80 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."
