"""The run folders under one folder, by name. Imports no torch: looking at runs needs neither weights nor a GPU."""

import math
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from ddpo.app import reading
from ddpo.durable import is_locked
from ddpo.figures import Comparison, comparisons
from ddpo.runs import Pair, Run, Sample

MARKS = ("run.json", "config.yaml", "metrics.jsonl")  # a folder that holds one of these is a run
KEPT = 4  # runs that are kept open
Place = tuple[str, int]  # what is drawn at every evaluation: a prompt and a seed


@dataclass(frozen=True)
class Row:
    """What the table of runs says of one."""

    name: str
    objective: str
    algorithm: str
    model: str
    result: Comparison | None  # of the first scorer trained on, at the last evaluation
    status: str  # running, finished, failed ...; "stopped" where it says running and nobody holds its lock
    started: datetime | None
    seconds: float | None  # from its start to its last iteration
    iteration: int


@dataclass(frozen=True)
class Opened(Run):
    """A run as far as its files can be read."""

    notes: list[str]  # what is wrong with which file, a sentence each
    samples: list[Sample]
    status: str

    @cached_property
    def by_place(self) -> dict[Place, dict[int, Sample]]:
        """The pictures of each prompt and seed by iteration, in the order of the index."""
        found: dict[Place, dict[int, Sample]] = {}
        for s in self.samples:
            found.setdefault((s.prompt, s.seed), {})[s.iteration] = s
        return found

    @cached_property
    def places(self) -> list[Place]:
        return list(self.by_place)

    @cached_property
    def iterations(self) -> list[int]:
        """Those that were sampled, 0 among them where the base model was."""
        return sorted({s.iteration for s in self.samples})

    @cached_property
    def scorers(self) -> list[str]:
        """Those of the pictures and of the evaluations; what was trained on comes first."""
        named = [name for s in self.samples for name in s.scores] + [c.scorer for m in self.metrics for c in comparisons(m)]
        known = list(dict.fromkeys(named))
        return [n for n in known if n in self.trained] + [n for n in known if n not in self.trained]

    def gain(self, place: Place, iteration: int, scorer: str) -> float | None:
        """Tuned less base; None where one of the two was not scored."""
        of = self.by_place.get(place, {})
        base, tuned = (of[k].scores.get(scorer) if k in of else None for k in (0, iteration))
        if base is None or tuned is None:
            return None
        return 0.0 if math.isclose(base, tuned, rel_tol=1e-9) else tuned - base  # rounding is no loss


@dataclass(frozen=True)
class Shelf:
    """Every run folder directly under `root`. Files are read again only when their size or time of change differ."""

    root: Path
    _known: dict = field(default_factory=dict, compare=False, repr=False)  # by name: what its files were, what they said
    _opened: dict = field(default_factory=dict, compare=False, repr=False)

    def names(self) -> list[str]:
        """Folders that hold a run.json, config.yaml or metrics.jsonl, newest first."""
        return [row.name for row in self.rows()]

    def rows(self) -> list[Row]:
        """One of each run, the newest first: by what run.json says it started, else by the folder's time of change."""
        found = [(self._row(folder), folder) for folder in self._folders()]
        return [row for row, folder in sorted(found, key=lambda item: _age(*item), reverse=True)]

    def folder(self, name: str) -> Path:
        """Where the run of this name is.

        Raises:
            ValueError: there is none. A name is looked up among the folders of `root`; it is never a path.
        """
        found = {folder.name: folder for folder in self._folders()}
        if name not in found:
            raise ValueError(f"there is no run {name!r:.200} in {self.root.resolve().name}; choose one of the list")
        return found[name]

    def open(self, name: str) -> Opened:
        """All of a run. What cannot be read is in its notes. Raises ValueError where there is no such run."""
        folder = self.folder(name)
        stamp = (_stamp(folder, *MARKS, "samples/index.jsonl"), is_locked(folder))
        known, run = self._opened.get(name, (None, None))
        if known != stamp:
            run = _opened(folder)
            for old in list(self._opened)[: max(len(self._opened) - KEPT + 1, 0)]:
                self._opened.pop(old, None)
            self._opened[name] = (stamp, run)
        return run

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            names = [e.name for e in entries if e.name == reading.clean(e.name) and not e.name.startswith(".") and e.is_dir()]
        return [self.root / n for n in names if any((self.root / n / mark).is_file() for mark in MARKS)]

    def _row(self, folder: Path) -> Row:
        stamp = (_stamp(folder, "run.json", "metrics.jsonl"), is_locked(folder))
        known, row = self._known.get(folder.name, (None, None))
        if known != stamp:
            row = _row(folder, stamp[1])
            self._known[folder.name] = (stamp, row)
        return row


def _stamp(folder: Path, *names: str) -> tuple:
    """Size and time of change of these files, to see that one was written since."""

    def of(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    return tuple(of(folder / name) for name in names)


def _row(folder: Path, locked: bool) -> Row:
    facts = reading.facts(folder / "run.json", [])
    newest, evaluated = reading.last_lines(folder / "metrics.jsonl")
    found = comparisons(evaluated)
    trained = Run(folder, facts, "", [newest] if newest else [], []).trained
    first = [c for c in found if c.scorer in trained] or found
    return Row(
        name=folder.name,
        objective=" + ".join(map(str, facts.get("rewards") or trained)) or "not recorded",
        algorithm=facts.get("algorithm") or "not recorded",
        model=facts.get("model") or "not recorded",
        result=first[0] if first else None,
        status=_status(facts, locked),
        started=_time(facts.get("started")),
        seconds=newest.get("seconds"),
        iteration=newest.get("iteration", 0),
    )


def _status(facts: dict, locked: bool) -> str:
    """As run.json says; but who was killed could not say so, and left a lock that is free."""
    said = facts.get("status") or "unknown"
    return "stopped" if said == "running" and not locked else said


def _time(text: str | None) -> datetime | None:
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _age(row: Row, folder: Path) -> float:
    try:
        return row.started.timestamp() if row.started else folder.stat().st_mtime
    except (OSError, OverflowError):
        return 0.0


def _opened(folder: Path) -> Opened:
    notes: list[str] = []
    facts = reading.facts(folder / "run.json", notes)
    config = reading.content(folder / "config.yaml", notes).decode("utf-8", "replace")
    metrics = reading.metrics(folder / "metrics.jsonl", notes)
    samples = reading.samples(folder / "samples" / "index.jsonl", notes)
    newest = max((s.iteration for s in samples), default=0)
    base = {(s.prompt, s.seed): s for s in samples if s.iteration == 0}
    pairs: list[Pair] = [
        (base[s.prompt, s.seed], s) for s in samples if s.iteration == newest > 0 and (s.prompt, s.seed) in base
    ]
    return Opened(folder, facts, config, metrics, pairs, notes, samples, _status(facts, is_locked(folder)))
