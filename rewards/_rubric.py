"""What a run is rewarded for: named scorers, what each counts, and how far each may fall."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rewards._contract import Reward, RewardError, name_of
from rewards._part import Part, optional

HORIZON = 3  # evaluations that a floor looks ahead


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
            trend = margin - held.margin
            if margin < 0:  # while broken, a rise is no promise
                trend = min(0.0, trend)
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
                optional(part.reward, "load")
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
        tensors = {f"{n}.{k}": v for n, p in self.parts.items() for k, v in (optional(p.reward, "state") or {}).items()}
        most = {name: part.most for name, part in self.parts.items()}
        return {"floors": {name: list(held) for name, held in self._held.items()}, "most": most}, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._held = {name: _Held(*held) for name, held in state["floors"].items()}
        for name, part in self.parts.items():
            part.most = state["most"][name]
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            if own:
                optional(part.reward, "load_state", own)

    def _each(self, method: str, *arguments: Any) -> None:
        for part in self.parts.values():
            optional(part.reward, method, *arguments)


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
