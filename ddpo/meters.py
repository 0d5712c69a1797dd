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

    def extend(self, other: "Seen") -> None:
        """Add all that another has collected."""
        for name, values in other.values.items():
            self.values.setdefault(name, []).extend(values)

    def averages(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the rows of all processes, and the largest importance ratio. Processes may have seen other numbers of
        rows, or none.

        Args:
            gather: (n, ...) of each process -> (processes x n, ...) of all.
        """
        if "log_ratio" in self.values:
            self.values["ratio/mean"] = [v.exp() for v in self.values.pop("log_ratio")]
        if "step" in self.values:  # where in the schedule each ratio is from, as a share of its steps
            quarter, ratio = (4 * torch.cat(self.values.pop("step"))).int(), torch.cat(self.values["ratio/mean"])
            self.values |= {f"ratio/quarter_{q}": [ratio[quarter == q]] for q in quarter.unique().tolist()}
        names = _union(list(self.values), gather)
        mine = [torch.cat(self.values.get(name, [torch.empty(0)])).double().cpu() for name in names]
        rows = [[v.sum(), len(v), v.max() if len(v) else -torch.inf] for v in mine]
        total, count, most = gather(torch.tensor(rows, dtype=torch.float32)[None]).double().unbind(-1)
        means = dict(zip(names, (total.sum(0) / count.sum(0)).tolist(), strict=True))
        if "ratio/mean" in means:
            means["ratio/max"] = most.amax(0)[names.index("ratio/mean")].item()
        return means


NAMES = 4096  # bytes


def _union(names: list[str], gather: Callable[[Tensor], Tensor]) -> list[str]:
    """The names that any process knows, sorted."""
    said = "\n".join(names).encode().ljust(NAMES)
    everywhere = gather(torch.tensor(list(said), dtype=torch.uint8)[None])
    return sorted({name for row in everywhere.tolist() for name in bytes(row).decode().split()})


def to_json(score: float) -> float | None:
    return None if score != score else score


def to_float(score: float | None) -> float:
    return float("nan") if score is None else score
