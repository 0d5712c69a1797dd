"""The run folders under one folder, by name. Imports no torch: looking at runs needs neither weights nor a GPU."""

from dataclasses import dataclass
from pathlib import Path

from ddpo.runs import Run


@dataclass(frozen=True)
class Shelf:
    """Every run folder directly under `root`."""

    root: Path

    def names(self) -> list[str]:
        """Folders that hold a run.json, config.yaml or metrics.jsonl, newest first."""
        if not self.root.is_dir():
            return []
        marks = ("run.json", "config.yaml", "metrics.jsonl")
        found = [p for p in self.root.iterdir() if p.is_dir() and any((p / mark).is_file() for mark in marks)]
        return [p.name for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]

    def folder(self, name: str) -> Path:
        """Where the run of this name is.

        Raises:
            ValueError: there is none. A name is looked up among `names()`; it is never a path.
        """
        if name not in self.names():
            raise ValueError(f"there is no run {name!r} under {self.root}")
        return self.root / name

    def open(self, name: str) -> Run:
        """Raises ValueError where there is no such run, or a file of it is damaged."""
        return Run.load(self.folder(name))
