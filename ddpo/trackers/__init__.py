"""Trackers: programs that show a run's numbers as it goes. One file a tracker; none is needed, and none can stop a run.

They are fed from the records of metrics.jsonl, under the same keys and at the same iterations, with the grid of pairs of
each evaluation. A config names them: `trackers: [tensorboard, trackio, {name: wandb, mode: online}]`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ddpo.jsonl import read
from ddpo.runs import grid

PAIRS = 24  # of a grid: more make files of many megabytes


@dataclass(frozen=True)
class Session:
    """What one process adds to a run, from its first record on.

    Args:
        folder: of the run.
        settings: the resolved config.
        first: the iteration of the first record. Above 0 the run was resumed; what a tracker holds of this iteration and
            later ones belongs to work that was lost.
    """

    folder: Path
    settings: Mapping[str, Any]
    first: int

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def past(self) -> list[dict]:
        """The records of metrics.jsonl before this session."""
        return [line for line in read(self.folder / "metrics.jsonl") if line["iteration"] < self.first]


class Tracker(ABC):
    """One tracker, not started. `package` must be installed; the extra ddpo[package] brings it."""

    package: ClassVar[str]

    @abstractmethod
    def start(self, session: Session) -> None:
        """Begin the run, or go on with it. The package is imported here and not before."""

    @abstractmethod
    def record(self, step: int, numbers: Mapping[str, float], pairs: Image.Image | None) -> None:
        """One record: the iteration, its finite numbers, and the grid where there was an evaluation."""

    @abstractmethod
    def finish(self) -> None:
        """Called once, also where `record` has failed."""


class Trackers:
    """All trackers of a run. What one of them raises is told once; then that one is left out."""

    def __init__(self, trackers: Iterable[Tracker], folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]):
        self._live = list(trackers)
        self._folder, self._settings, self._say = folder, settings, say
        self._started: list[Tracker] = []
        self._last = -1

    def record(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, which has been written there. The first one starts the trackers; so does one after a rollback."""
        if not self._live:
            return
        if line["iteration"] <= self._last:
            self.close()
        self._last = line["iteration"]
        if not self._started:
            self._started = list(self._live)
            session = Session(self._folder, self._settings, line["iteration"])
            self._each(self._live, lambda tracker: tracker.start(session))
        shown = pairs(self._folder, line)
        self._each(self._live, lambda tracker: tracker.record(line["iteration"], numbers(line), shown))

    def close(self) -> None:
        """Let every tracker that was started write what it still holds."""
        started, self._started = self._started, []
        self._each(started, lambda tracker: tracker.finish())

    def _each(self, trackers: Sequence[Tracker], act: Callable[[Tracker], None]) -> None:
        for tracker in list(trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever it is, training matters more
                if tracker in self._live:
                    self._live.remove(tracker)
                    self._say(
                        f"tracker {tracker.package} failed and gets nothing more of this run; metrics.jsonl has all of it: "
                        f"{type(error).__name__}: {error}"
                    )


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, under its keys."""
    return {k: float(v) for k, v in line.items() if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


def pairs(folder: Path, line: Mapping[str, Any]) -> Image.Image | None:
    """The grid of a record's evaluation; None where it has none, as before training, or its pictures are gone."""
    if line["iteration"] == 0 or "eval/win_rate" not in line:
        return None
    try:
        return grid(folder, line["iteration"], most=PAIRS)
    except (ValueError, OSError):
        return None


def missing(chosen: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(key of the config, what to install) of each chosen component whose package is not there. Imports none of them."""
    for i, component in enumerate(chosen):
        package = getattr(component.factory, "package", None)
        if package and find_spec(package) is None:
            yield f"trackers.{i}", f"{component.name} needs {package}: pip install 'ddpo[{package}]', or leave it out"
