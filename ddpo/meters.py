"""What is measured while training: time by phase, and the averages of what each backward pass saw."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Seconds since the start, and by phase since they were last read."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - start

    def total(self) -> float:
        return time.monotonic() - self._started

    def resume(self, seconds: float) -> None:
        """Go on from this many seconds, those that the interrupted run had taken."""
        self._started = time.monotonic() - seconds

    def read(self) -> dict[str, float]:
        """{"seconds": total, "seconds/<phase>": since the last reading}."""
        line = {"seconds": self.total()} | {f"seconds/{phase}": taken for phase, taken in self._phases.items()}
        self._phases = {}
        return {name: round(value, 3) for name, value in line.items()}


class Seen:
    """Metrics of an iteration's views, collected without waiting for the device."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32).flatten())

    def averages(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        everywhere = {name: gather(torch.cat(values)) for name, values in self.values.items()}
        if "log_ratio" in everywhere:
            ratio = everywhere.pop("log_ratio").exp()
            everywhere |= {"ratio/mean": ratio}
            largest = {"ratio/max": ratio.max().item()}
        else:
            largest = {}
        return {name: v.mean().item() for name, v in everywhere.items()} | largest


def to_json(score: float) -> float | None:
    return None if score != score else score


def to_float(score: float | None) -> float:
    return float("nan") if score is None else score
