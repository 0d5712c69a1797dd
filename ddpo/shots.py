"""What to draw: a prompt, a seed and the sampler's settings, checked; and grids of them. Imports no torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ddpo.prompts import clean

LONGEST = 2000  # characters of a prompt
SEEDS, STEPS, GUIDANCES, SCALES = (0, 2**31 - 1), (1, 200), (0.0, 30.0), (0.0, 1.5)  # least and most
ITERATIONS = (0, 10**8 - 1)
MOST_CELLS = 64  # pictures of a grid


@dataclass(frozen=True)
class Shot:
    """One picture to draw. Whatever it is made of is checked, for it may come from a browser.

    Args:
        prompt: at most LONGEST characters, none of them a control character.
        seed: names the noise; 0 to 2**31 - 1.
        num_steps: denoising steps, 1 to 200.
        guidance: scale of classifier-free guidance, 0 to 30; 1 is none.
        scale: of the LoRA, 0 to 1.5; 0 is the base model and 1 the tuned one.
        iteration: after which the LoRA was saved; 0 is the base model.

    Raises:
        ValueError: says which of them is wrong and what it may be.
    """

    prompt: str
    seed: int
    num_steps: int
    guidance: float
    scale: float = 1.0
    iteration: int = 0

    def __post_init__(self) -> None:
        checked = {
            "prompt": text("the prompt", self.prompt),
            "seed": whole("seed", self.seed, *SEEDS),
            "num_steps": whole("steps", self.num_steps, *STEPS),
            "guidance": number("guidance", self.guidance, *GUIDANCES),
            "scale": number("the LoRA scale", self.scale, *SCALES),
            "iteration": whole("iteration", self.iteration, *ITERATIONS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def base(self) -> "Shot":
        """The same picture by the base model."""
        return replace(self, scale=1.0, iteration=0)


def text(name: str, value: Any) -> str:
    """Raises ValueError where it is no text, blank, too long, or holds control characters or halves of surrogate pairs."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {_shown(value)}")
    if len(value) > LONGEST:
        raise ValueError(f"{name} has {len(value):,} characters; at most {LONGEST:,} are allowed")
    return clean(value.strip())


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Raises ValueError where it is no whole number from `least` to `most`."""
    exact = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # JSON has but one kind of number
    if isinstance(value, bool) or not exact or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {_shown(value)}")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """Raises ValueError where it is no number from `least` to `most`."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, not {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    shown = ascii(value) if not isinstance(value, int) or abs(value) < 10**15 else "one of many digits"
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


# ----------------------------------------------------------------------------------------------------------------------
# Grids


@dataclass(frozen=True)
class Axis:
    """What changes along a side of a grid.

    Args:
        field: of a Shot.
        title: what people call it.
        hint: how its values are written.
        read: values as written -> values as a Shot takes them, one at a time.
    """

    field: str
    title: str
    hint: str
    read: Callable[[str], Iterator[Any]]

    def values(self, written: Any) -> list[Any]:
        """Raises ValueError where there is none, or more than MOST_CELLS."""
        if not isinstance(written, str) or len(written) > MOST_CELLS * (LONGEST + 1):
            raise ValueError(f"the values of {self.title} must be a text of {self.hint}")
        found: list[Any] = []
        for value in self.read(written):
            found.append(value)
            if len(found) > MOST_CELLS:
                raise ValueError(f"{self.title} has more than {MOST_CELLS} values, as many as a whole grid may have pictures")
        if not found:
            raise ValueError(f"{self.title} has no value: write {self.hint}")
        return found


def _lines(written: str) -> Iterator[str]:
    return (line.strip() for line in written.splitlines() if line.strip())


def _numbers(written: str) -> Iterator[float]:
    for word in _words(written):
        try:
            yield float(word)
        except ValueError:
            raise ValueError(f"{_shown(word)} is no number; write numbers with commas between them") from None


def _wholes(written: str) -> Iterator[int]:
    """Also ranges: 0-3 is 0, 1, 2, 3."""
    for word in _words(written):
        first, dash, last = word.partition("-")
        if len(word) > 24 or not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{_shown(word)} is no whole number; write such as 0, 8, 16 or 0-3")
        yield from range(int(first), int(last if dash else first) + 1)


def _words(written: str) -> Iterator[str]:
    return (word.strip() for word in written.replace("\n", ",").split(",") if word.strip())


PROMPT = Axis("prompt", "prompt", "one prompt a line", _lines)
SEED = Axis("seed", "seed", "whole numbers such as 0, 1, 2 or 0-3", _wholes)
GUIDANCE = Axis("guidance", "guidance", "numbers such as 1, 3, 5", _numbers)
SCALE = Axis("scale", "LoRA scale", "numbers such as 0, 0.5, 1, 1.5", _numbers)
ITERATION = Axis("iteration", "iteration", "whole numbers such as 0, 8, 16", _wholes)

GRIDS = {f"{x.title} x {y.title}": (x, y) for x, y in ((SCALE, ITERATION), (PROMPT, SEED), (GUIDANCE, SCALE))}


@dataclass(frozen=True)
class Grid:
    """Shots in rows: `across` changes from column to column, `down` from row to row."""

    across: Axis
    down: Axis
    columns: list[Any]
    rows: list[Any]
    shots: list[Shot]  # row by row

    @classmethod
    def of(cls, shot: Shot, name: Any, across: Any, down: Any) -> "Grid":
        """Args:
            shot: what all pictures have in common.
            name: of GRIDS.
            across, down: the values of its two axes, as written.

        Raises:
            ValueError: no such grid, a value that a Shot refuses, or more than MOST_CELLS pictures.
        """
        if not isinstance(name, str) or name not in GRIDS:
            raise ValueError(f"there is no grid {_shown(name)}; choose one of {', '.join(GRIDS)}")
        x, y = GRIDS[name]
        columns, rows = x.values(across), y.values(down)
        if (cells := len(columns) * len(rows)) > MOST_CELLS:
            raise ValueError(
                f"{len(columns)} x {len(rows)} = {cells} pictures; a grid has at most {MOST_CELLS}: take fewer values"
            )
        return cls(x, y, columns, rows, [replace(shot, **{x.field: c, y.field: r}) for r in rows for c in columns])
