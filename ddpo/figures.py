"""How a run's numbers are shown: evaluations read from metrics, numbers in print, curves as inline SVG."""

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float, float, float]  # x, y, and the low and high end of the band around y


@dataclass(frozen=True)
class Comparison:
    """One scorer on the held-out prompts: means, and the paired difference with its 95 % interval. NaN: not measured."""

    scorer: str
    base: float
    tuned: float
    delta: float
    low: float
    high: float

    @property
    def whole(self) -> bool:
        """All of it was measured."""
        return all(math.isfinite(v) for v in (self.base, self.tuned, self.delta, self.low, self.high))

    @property
    def change(self) -> str:
        """ "+0.243 [+0.190, +0.296]" """
        digits = places(self.delta, self.low, self.high)
        low, high = number(self.low, digits, "+"), number(self.high, digits, "+")
        return f"{number(self.delta, digits, '+')} [{low}, {high}]"

    @property
    def verdict(self) -> str:
        """What the interval allows to be said."""
        if not self.whole:
            return "not measured"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "no clear change"


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `style` is a class of the page's style sheet; a point whose low is its high has no band."""

    name: str
    style: str
    points: Sequence[Point]


def comparisons(metrics: dict) -> list[Comparison]:
    """The scorers of an evaluation line of metrics.jsonl, in its order; empty where nothing was evaluated."""
    scorers = [key[len("eval/") : -len("/delta")] for key in metrics if key.startswith("eval/") and key.endswith("/delta")]
    fields = ("base", "tuned", "delta", "delta_low", "delta_high")
    return [Comparison(s, *(_measured(metrics.get(f"eval/{s}/{field}")) for field in fields)) for s in scorers]


def _measured(value: float | None) -> float:
    return math.nan if value is None else value


def places(*values: float | None) -> int:
    """How many decimals show three significant digits of the largest of these, 0 to 8."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return min(max(2 - math.floor(math.log10(largest)), 0), 8) if largest else 0


def number(value: float | None, digits: int | None = None, sign: str = "") -> str:
    """A number in print: three significant digits, or this many decimals; sign "+" shows the plus. None and NaN: "n/a"."""
    if value is None or math.isnan(value):
        return "n/a"
    if digits is None and 0 < abs(value) < 1e-4:
        return f"{value:{sign}.2e}"
    return f"{value:{sign}.{places(value) if digits is None else digits}f}"


def means(base: float | None, tuned: float | None) -> str:
    """ "0.412 → 0.655" """
    digits = places(base, tuned)
    return f"{number(base, digits)} → {number(tuned, digits)}"


def percent(share: float | None) -> str:
    """0.031 -> "3.1 %" """
    return "n/a" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """ "8.2 s", "3 min 20 s", "2 h 05 min" """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 180, 42, 8, 8, 24
MOST_POINTS = 240  # of a curve: what a chart of this width can show
MOST_DOTS = 40  # beyond these a curve is a line without dots


@dataclass(frozen=True)
class _Axes:
    """Where a number lies in the chart: iterations across, values up."""

    first: float
    last: float
    ticks: Sequence[float]

    def across(self, x: float) -> float:
        share = (x - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        share = (y - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in points)


@dataclass(frozen=True)
class Alarm:
    """What a run warned of, or stopped for: one sentence, said at these iterations, in the words of the last time."""

    name: str
    level: str  # "warn" or "stop"
    text: str
    iterations: Sequence[int]


def alarms(metrics: Iterable[dict]) -> list[Alarm]:
    """The alarms of the lines of metrics.jsonl, one a name and level, in the order in which they first fired."""
    found: dict[tuple[str, str], Alarm] = {}
    for line in metrics:
        for told in line.get("alarms") or []:
            key = (str(told.get("name", "alarm")), "stop" if told.get("level") == "stop" else "warn")
            earlier = found[key].iterations if key in found else []
            found[key] = Alarm(*key, str(told.get("text", "")), [*earlier, line["iteration"]])
    return list(found.values())


def chart(label: str, curves: Sequence[Curve], marks: Sequence[Alarm] = ()) -> str:
    """An SVG element of these curves over the iterations; the page's style sheet colours it. At least one point is needed.

    A curve of more than MOST_POINTS points is drawn as the means of equal stretches of it. Iterations within reach of the curves
    at which alarms fired are marked, each once.
    """
    drawn = [Curve(c.name, c.style, _thin(c.points)) for c in curves if c.points]
    points = [p for c in drawn for p in c.points]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    axes = _Axes(first, last, _ticks(min(p[2] for p in points), max(p[3] for p in points)))
    feet = [x for x in _ticks(first, last) if first <= x <= last and x == round(x)] if last > first else [first]
    body = "".join(
        [
            *(_rule(y, axes) for y in axes.ticks),
            *(_foot(x, axes) for x in feet),
            *_marks(marks, axes),
            *(_line(c, axes) for c in drawn),
        ]
    )
    spoken = html.escape(f"{label}. " + " ".join([*map(_spoken, drawn), *map(_heard, marks)]))
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{body}</svg>'


def forest(c: Comparison) -> str:
    """An SVG element: where the interval lies beside zero. All of it must have been measured."""
    left, right = min(0.0, c.low), max(0.0, c.high)
    zero, low, middle, high = (4 + 132 * (v - left) / (right - left or 1.0) for v in (0.0, c.low, c.delta, c.high))
    drawing = (
        f'<path class="rule" d="M{zero:.1f} 0V16"/><path class="line tuned" d="M{low:.1f} 8H{high:.1f}"/>'
        f'<circle class="dot tuned" cx="{middle:.1f}" cy="8" r="3.5"/>'
    )
    return f'<svg class="forest" viewBox="0 0 140 16" aria-hidden="true">{drawing}</svg>'


def _line(curve: Curve, axes: _Axes) -> str:
    line = axes.path((x, y) for x, y, _, _ in curve.points)
    band = axes.path([(x, high) for x, _, _, high in curve.points] + [(x, low) for x, _, low, _ in reversed(curve.points)])
    wide = any(low < high for _, _, low, high in curve.points)
    shade = f'<polygon class="band {curve.style}" points="{band}"/>' if wide else ""
    dots = "".join(_dot(curve, p, axes) for p in curve.points) if len(curve.points) <= MOST_DOTS else ""
    return f'{shade}<polyline class="line {curve.style}" points="{line}"/>{dots}'


def _dot(curve: Curve, point: Point, axes: _Axes) -> str:
    x, y, low, high = point
    digits = places(y, low, high)
    band = f" ({number(low, digits)} to {number(high, digits)})" if low < high else ""
    tip = html.escape(f"iteration {x:g}: {curve.name} {number(y, digits)}{band}")
    place = f'cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}"'
    return f'<circle class="dot {curve.style}" {place} r="2.5"><title>{tip}</title></circle>'


def _marks(marks: Sequence[Alarm], axes: _Axes) -> Iterable[str]:
    """A line and a flag at each iteration at which alarms fired; one that stops is drawn over one that warns."""
    fired = {x: alarm for alarm in sorted(marks, key=lambda alarm: alarm.level == "stop") for x in alarm.iterations}
    for x, alarm in sorted(fired.items()):
        if axes.first <= x <= axes.last:
            place, tip = f"{axes.across(x):.1f}", html.escape(f"iteration {x}: {alarm.text}")
            flag = f"M{place} {HEIGHT - BOTTOM}V{TOP}M{place} {TOP}l-4 -6h8z"
            yield f'<path class="mark {alarm.level}" d="{flag}"><title>{tip}</title></path>'


def _heard(alarm: Alarm) -> str:
    return f"Alarm at iteration {alarm.iterations[0]}: {alarm.text}"


def _rule(y: float, axes: _Axes) -> str:
    height = axes.down(y)
    text = f'<text class="side" x="{LEFT - 6}" y="{height + 4:.1f}">{y:.6g}</text>'
    return f'<path class="rule" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>{text}'


def _foot(x: float, axes: _Axes) -> str:
    return f'<text class="foot" x="{axes.across(x):.1f}" y="{HEIGHT - 6}">{x:g}</text>'


def _spoken(curve: Curve) -> str:
    first, last = curve.points[0], curve.points[-1]
    return f"{curve.name}: {number(first[1])} at iteration {first[0]:g}, {number(last[1])} at iteration {last[0]:g}."


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers; the first is not above `low` and the last not below `high`."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all the same, but for rounding
        low, high = min(low, 0.0), max(high, 0.0) or (1.0 if low == 0 else 0.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= MOST_POINTS:
        return points
    edges = [len(points) * i // MOST_POINTS for i in range(MOST_POINTS + 1)]
    stretches = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [tuple(sum(column) / len(s) for column in zip(*s, strict=True)) for s in stretches]  # type: ignore[misc]
