"""What a run is rewarded for: named scorers, what each counts, and how far each may fall."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rewards._contract import Reward, RewardError, name_of, score

HORIZON = 3  # evaluations that a floor looks ahead


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
            _call(self.reward, "to", self._home)

    def score(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        """(B,) through the gate; in halves where the device's memory does not hold the whole."""
        start = time.perf_counter()
        if self.offload:
            _call(self.reward, "to", self._home)
        try:
            scores = self._in_pieces(name, images.to(self._home) if self.device else images, prompts, metadata)
        finally:
            graph = torch.is_grad_enabled() and images.requires_grad
            if self.offload and not graph:  # which holds on to the weights where they are
                _call(self.reward, "to", torch.device("cpu"))
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


class _Held(NamedTuple):
    """Where a floor stands: its last margin, the accumulated multiplier, and the one in use."""

    margin: float
    accumulated: float
    multiplier: float


@dataclass
class Rubric:
    """What a run is rewarded for.

    The multipliers of its floors change as evaluations come in (`adjust`); they belong into a checkpoint (`state`).

    Args:
        parts: scorers by name.
        normalise: "none" adds up weighted scores as they are; "group" first gives each scorer the mean 0 and the standard
            deviation 1 in each prompt group, so that none drowns another by its unit (GDPO, Liu et al. 2026).
    """

    parts: dict[str, Part]
    normalise: Literal["none", "group"] = "none"
    _held: dict[str, _Held] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        floors = {name: part.floor for name, part in self.parts.items() if part.floor is not None}
        self._held = {name: _Held(floor, 1.0, 1.0) for name, floor in floors.items()}
        for name, part in self.parts.items():
            if not math.isfinite(part.weight):
                raise ValueError(f"the weight of reward {name!r} is {part.weight}; it must be a finite number")

    @classmethod
    def of(cls, parts: Sequence[Part | tuple[Reward, float]], normalise: Literal["none", "group"] = "none") -> "Rubric":
        """From parts, or (scorer, weight) pairs. Scorers of one name are told apart by a number: clip, clip_2."""
        named: dict[str, Part] = {}
        for part in (p if isinstance(p, Part) else Part(*p) for p in parts):
            name, number = name_of(part.reward), 1
            while (unique := name if number == 1 else f"{name}_{number}") in named:
                number += 1
            named[unique] = part
        return cls(named, normalise)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[str, Tensor]:
        """Each scorer's unweighted scores, float64 (B,), through the gate `rewards.score`.

        Where a scorer is groupwise, the pictures must be one whole group.
        """
        return {name: part.score(name, images, prompts, metadata) for name, part in self.parts.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # One number a picture

    def total(self, scores: dict[str, Tensor], scales: dict[str, float] | None = None) -> Tensor:
        """(B,) the weighted sum of what `score` returned, each in units of its scale; NaN where any part is."""
        scales = scales or {}
        return _sum([part.weight * scores[name] / scales.get(name, 1.0) for name, part in self.parts.items()])

    def scales(self, base: dict[str, Tensor]) -> dict[str, float]:
        """The unit of each scorer in `total`, from the base model's scores: their spread where scorers are normalised, or 1."""
        if self.normalise == "none":
            return {}
        return {name: _spread(base[name]) or 1.0 for name in self.parts}

    def objective(self, scores: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """(B,) what is learned from: the weighted sum, and each floor's scorer times its multiplier.

        A multiplier of 1 lets the floor's scorer differ between the pictures of a group as much as the weighted sum does.
        """
        group = [_standardised(scores[name], prompts) for name in self.parts] if self.normalise == "group" else None
        ready = dict(zip(self.parts, group, strict=True)) if group else scores
        rates = self.rates(ready, prompts)
        return _sum([rates[name] * ready[name] for name in self.parts])

    def rates(self, scores: dict[str, Tensor], prompts: Sequence[str]) -> dict[str, float]:
        """What a point of each scorer counts in `objective`, where nothing is normalised: its weight, and its floor's share."""
        rates = {name: part.weight for name, part in self.parts.items()}
        spread = _within(_sum([rates[name] * scores[name] for name in rates]), prompts) or 1.0
        for name, multiplier in self.multipliers.items():
            rates[name] += multiplier * spread / (_within(scores[name], prompts) or 1.0)
        return rates

    def graded(self, rates: dict[str, float], images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        """(B,) float64 on the CPU: the sum of the scores times their `rates`, with a gradient to the pictures."""
        scores = self.score(images, prompts, metadata)
        return _sum([rate * scores[name] for name, rate in rates.items()])

    # ------------------------------------------------------------------------------------------------------------------
    # Floors

    @property
    def multipliers(self) -> dict[str, float]:
        """What each floor's scorer counts in the objective, against the weighted sum."""
        return {name: held.multiplier for name, held in self._held.items()}

    def margins(self, base: dict[str, Tensor], tuned: dict[str, Tensor], prompts: Sequence[str]) -> dict[str, float]:
        """How far each floor's scorer is above its floor, in standard errors of the base model's mean. Below zero is broken.

        Args:
            base, tuned: (N,) scores of the same held-out prompts and noise.
        """
        found = {}
        for name in self._held:
            both = base[name].isfinite() & tuned[name].isfinite()
            means = _means(base[name][both], [p for p, b in zip(prompts, both.tolist(), strict=True) if b])
            error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else 0.0
            change = (tuned[name] - base[name])[both].mean().item()
            found[name] = change / max(error, 1e-12) + (self.parts[name].floor or 0.0)
        return found

    def adjust(self, margins: dict[str, float]) -> None:
        """Raise the multiplier of a floor that is near or broken, lower that of one that is far: dual ascent.

        Exponentiated (Kivinen & Warmuth 1997), so that a multiplier stays positive and needs no unit. Beside the accumulated
        term there is a proportional one, and both look ahead along the trend, for an optimizer with momentum goes on falling
        for a while (Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods"). The aim is
        half of what the floor allows.
        """
        for name, margin in margins.items():
            if not math.isfinite(margin):
                continue
            held = self._held[name]
            trend = (
                margin - held.margin if margin >= 0 else min(0.0, margin - held.margin)
            )  # while broken, a rise is no promise
            ahead = margin + HORIZON * trend
            lack = min(1.0, max(-1.0, 2 * (0.5 * (self.parts[name].floor or 0.0) - ahead)))
            accumulated = min(1e3, max(1e-3, held.accumulated * 2.0**lack))
            self._held[name] = _Held(margin, accumulated, accumulated * 4.0**lack)

    # ------------------------------------------------------------------------------------------------------------------
    # Life

    def load(self) -> "Rubric":
        """Read or download all weights, and start what runs beside.

        Raises:
            RewardError: a scorer could not; says which and why.
        """
        for name, part in self.parts.items():
            try:
                _call(part.reward, "load")
            except RewardError:
                raise
            except Exception as error:
                raise RewardError(f"reward {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
        return self

    def to(self, device: torch.device | str) -> "Rubric":
        """Move the scorers that hold a network."""
        for part in self.parts.values():
            part.to(device)
        return self

    def close(self) -> None:
        self._each("close")

    @property
    def learns(self) -> bool:
        """Whether any scorer learns from the pictures."""
        return any(callable(getattr(p.reward, "refresh", None)) for p in self.parts.values())

    def refresh(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> None:
        """Let the scorers that learn see an iteration's pictures, (N, 3, H, W) in [0, 1]."""
        self._each("refresh", images, prompts, metadata)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What changes while training, as JSON and as tensors."""
        tensors = {f"{n}.{k}": v for n, p in self.parts.items() for k, v in (_call(p.reward, "state") or {}).items()}
        most = {name: part.most for name, part in self.parts.items()}
        return {"floors": {name: list(held) for name, held in self._held.items()}, "most": most}, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._held = {name: _Held(*held) for name, held in state["floors"].items()}
        for name, part in self.parts.items():
            part.most = state["most"][name]
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            if own:
                _call(part.reward, "load_state", own)

    def _each(self, method: str, *arguments: Any) -> None:
        for part in self.parts.values():
            _call(part.reward, method, *arguments)


def _call(reward: Reward, method: str, *arguments: Any) -> Any:
    """A method that a scorer may have or not."""
    found: Callable[..., Any] | None = getattr(reward, method, None)
    return found(*arguments) if callable(found) else None


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0)


def _groups(values: Tensor, prompts: Sequence[str]) -> list[Tensor]:
    """For each prompt, the rows that could be scored."""
    rows: dict[str, list[int]] = {}
    for i, (prompt, value) in enumerate(zip(prompts, values.tolist(), strict=True)):
        if math.isfinite(value):
            rows.setdefault(prompt, []).append(i)
    return [torch.tensor(r) for r in rows.values()]


def _means(values: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.stack([values[rows].mean() for rows in _groups(values, prompts)] or [values.new_zeros(())])


def _standardised(values: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean 0 and standard deviation 1 in each prompt group; 0 throughout where all of a group's are alike."""
    result = values - values  # keeps NaN
    for rows in _groups(values, prompts):
        centred = values[rows] - values[rows].mean()
        result[rows] = centred / (_spread(values[rows]) + 1e-4 * (1 + values[rows].abs().mean()))
    return result


def _within(values: Tensor, prompts: Sequence[str]) -> float:
    """The standard deviation within prompt groups."""
    centred = [values[rows] - values[rows].mean() for rows in _groups(values, prompts)]
    return torch.cat(centred).square().mean().sqrt().item() if centred else 0.0


def _spread(values: Tensor) -> float:
    known = values[values.isfinite()]
    return known.std(correction=0).item() if len(known) else 0.0
