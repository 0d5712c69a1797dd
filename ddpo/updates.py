"""Which optimizer steps are taken, and when too many were not.

A single spike of the gradient's norm is no illness, for such norms have heavy tails: it costs that update, and three in ten
are an alarm. So it is with a number that is not finite.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

NUMBERS_CODE, ALARM_CODE = 3, 4  # of the process that an alarm ends
NORMS, FEWEST_NORMS, LEAST_SPREAD = 128, 64, 0.05  # the window, from when on it judges, and the least spread of a log-norm
RECENT, TOO_MANY = 10, 3  # updates, of which so many are too many
SCALED, TOO_MANY_SCALED = 200, 10  # the same of the gradient scaler's skips: 5 %


@dataclass(frozen=True)
class Alarm:
    """What was seen, since when, and what people do about it, in one sentence."""

    name: str
    level: Literal["warn", "stop"]
    text: str
    code: int = ALARM_CODE

    def line(self) -> dict[str, str]:
        """Its entry in metrics.jsonl."""
        return {"name": self.name, "level": self.level, "text": self.text}


class Updates:
    """Which optimizer steps are taken.

    Args:
        limit: z-score of the gradient's log-norm, by median and median absolute deviation of the last 128; beyond it, a spike.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.norms: deque[float] = deque(maxlen=NORMS)  # their logarithms
        self.bad: deque[bool] = deque(maxlen=RECENT)  # not finite
        self.spikes: deque[bool] = deque(maxlen=RECENT)
        self.scaled: deque[bool] = deque(maxlen=SCALED)  # skipped by the gradient scaler
        self.scale = math.inf

    def refuse(self, norm: float, lost: bool) -> str | None:
        """Why this update is not to be taken, or None.

        Args:
            norm: of the gradient, above zero.
            lost: some loss is not finite.
        """
        finite = math.isfinite(norm) and not lost
        z = self._z(math.log(norm)) if finite else 0.0
        self.bad.append(not finite)
        self.spikes.append(z > self.limit)
        if finite:
            self.norms.append(math.log(norm))
        if not finite:
            return "a loss is not finite" if lost else "the gradient is not finite"
        if z > self.limit:
            usual = math.exp(statistics.median(list(self.norms)[:-1]))
            return f"the gradient's norm is {norm:.3g}, where {usual:.3g} is usual ({z:.1f} robust standard deviations)"
        return None

    def note_scaler(self, skipped: bool, scale: float) -> None:
        """What the gradient scaler of float16 did at this update."""
        self.scaled.append(skipped)
        self.scale = scale

    def alarms(self, iteration: int) -> Iterator[Alarm]:
        last = f"of the {RECENT} updates up to iteration {iteration}"
        if sum(self.bad) >= TOO_MANY:
            advice = "people lower optimizer.lr, or try model.dtype=float32 to see whether half precision is the cause"
            yield Alarm(
                "bad numbers",
                "stop",
                f"{sum(self.bad)} {last} had a loss or gradient that is not finite: {advice}",
                NUMBERS_CODE,
            )
        if sum(self.spikes) >= TOO_MANY:
            advice = "people lower optimizer.lr, or go on from an earlier checkpoint with other noise (run.on_alarm=rollback)"
            yield Alarm(
                "gradient spikes", "stop", f"{sum(self.spikes)} {last} had a gradient far above its usual norm: {advice}"
            )
        if sum(self.scaled) > TOO_MANY_SCALED or self.scale < 1:
            what = f"the gradient scaler skipped {sum(self.scaled)} of the last {len(self.scaled)} updates and stands at {self.scale:g}"
            yield Alarm("float16", "stop", f"up to iteration {iteration} {what}: people use model.dtype=bfloat16")

    def _z(self, log_norm: float) -> float:
        if len(self.norms) < FEWEST_NORMS:
            return 0.0
        middle = statistics.median(self.norms)
        spread = 1.4826 * statistics.median(abs(v - middle) for v in self.norms)
        return (log_norm - middle) / max(spread, LEAST_SPREAD)

    def forget(self) -> None:
        """Begin to count anew; what norms are usual stays known."""
        for counted in (self.bad, self.spikes, self.scaled):
            counted.clear()

    def state(self) -> dict[str, Any]:
        scale = self.scale if math.isfinite(self.scale) else None
        return {name: list(getattr(self, name)) for name in ("norms", "bad", "spikes", "scaled")} | {"scale": scale}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in ("norms", "bad", "spikes", "scaled"):
            getattr(self, name).clear()
            getattr(self, name).extend(state[name])
        self.scale = math.inf if state["scale"] is None else state["scale"]
