"""Blind votes on pairs of pictures: preferences.jsonl of a run folder, its statistics, and its export. Imports no torch.

A line is a vote in Pick-a-Pic's columns (Kirstain et al. 2023, arXiv:2305.01569), with what was shown besides, so that
`ddpo rewards train` and `rollout.pictures` read the file as it stands:

    {"id": "9f1c...", "time": "2026-01-31T12:00:00+00:00", "prompt": "two owls", "image_0": "samples/iteration_0000/0003.webp",
     "image_1": "samples/iteration_0016/0003.webp", "label_0": 0.0, "label_1": 1.0, "answer": "a", "left": 1, "run_0": null,
     "iteration_0": 0, "seed_0": 1, "run_1": null, "iteration_1": 16, "seed_1": 1, "rater": "k2", "seconds": 2.4}

A vote is taken back by a further line, {"withdraws": "9f1c...", "prompt": "two owls", ...}: no line is ever rewritten.
"""

import csv
import io
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from ddpo import durable, jsonl

FILE = "preferences.jsonl"
COLUMNS = ("prompt", "image_0", "image_1", "label_0", "label_1")  # Pick-a-Pic's

Answer = Literal["a", "b", "tie", "both_bad"]
LABELS: dict[str, float] = {"tie": 0.5, "both_bad": 0.0}  # of both pictures, where neither is preferred


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Vote(BaseModel):
    """What one person said of two pictures of a prompt. Pictures are numbered 0 and 1; the answer is by where they stood."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    id: str = Field(default_factory=lambda: secrets.token_hex(8), min_length=1)
    time: str = Field(default_factory=_now)
    prompt: str
    image_0: str  # from the file's folder, with forward slashes
    image_1: str
    answer: Answer  # "a" prefers the left picture, "b" the right one
    left: Literal[0, 1]  # which picture stood left
    run_0: str | None = None  # the run that drew it, by name; None: the one whose file this is
    iteration_0: int = Field(ge=0)
    seed_0: int
    run_1: str | None = None
    iteration_1: int = Field(ge=0)
    seed_1: int
    rater: str  # a session of a person or program
    seconds: Annotated[float, Field(ge=0)]  # from when the pair was shown

    @property
    def winner(self) -> Literal[0, 1] | None:
        """The preferred picture; None where neither is."""
        if self.answer in LABELS:
            return None
        return self.left if self.answer == "a" else 1 - self.left  # type: ignore[return-value]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def label_0(self) -> float:
        return LABELS.get(self.answer, float(self.winner == 0))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def label_1(self) -> float:
        return LABELS.get(self.answer, float(self.winner == 1))

    @property
    def images(self) -> tuple[str, str]:
        return self.image_0, self.image_1

    @property
    def stages(self) -> tuple["Stage", "Stage"]:
        """What is compared: who drew either picture."""
        return Stage(self.iteration_0, self.run_0), Stage(self.iteration_1, self.run_1)


@dataclass(frozen=True, order=True)
class Stage:
    """The model after an iteration; iteration 0 is the base model.

    Args:
        run: a run's name, or None for the run whose votes these are.
    """

    iteration: int
    run: str | None = None

    def __str__(self) -> str:
        name = f"iteration {self.iteration}" if self.iteration else "base"
        return name if self.run is None else f"{self.run}, {name}"


@dataclass(frozen=True)
class Votes:
    """A file of votes as it was read.

    Args:
        standing: the votes that were not withdrawn, oldest first.
        withdrawn: how many were.
        notes: what is wrong with the file, a sentence a line; such lines do not count, the others do.
    """

    standing: list[Vote]
    withdrawn: int
    notes: list[str]


def add(folder: Path, vote: Vote) -> None:
    """Append a vote to the run folder's file; it is on the disk when this returns."""
    jsonl.append(folder / FILE, vote.model_dump())


def withdraw(folder: Path, vote: Vote) -> None:
    """Take a vote back, by a further line."""
    jsonl.append(folder / FILE, {"withdraws": vote.id, "prompt": vote.prompt, "rater": vote.rater, "time": _now()})


def read(folder: Path) -> Votes:
    """The votes of a run folder; none where it has no file.

    Nothing that stands in the file is raised: a damaged line, or a last line that was never finished, is a note.
    """
    path, votes, withdrawn, notes = folder / FILE, dict[str, Vote](), set[str](), list[str]()
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("withdraws"), str):
                withdrawn.add(record["withdraws"])
            else:
                vote = Vote.model_validate(record)
                votes[vote.id] = vote
        except (ValueError, RecursionError) as error:
            notes.append(f"{FILE}:{number}: not a vote ({_briefly(error)}); it is not counted")
    if torn:
        notes.append(f"{FILE}: the last line was never finished, as after a power cut; it is not counted")
    return Votes([v for v in votes.values() if v.id not in withdrawn], len(withdrawn & votes.keys()), notes)


def _briefly(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
    return str(error)[:100]


def export(votes: Iterable[Vote], folder: Path, output: Path) -> int:
    """Write Pick-a-Pic's columns (prompt, image_0, image_1, label_0, label_1), with paths relative to `output`.

    Args:
        folder: the run folder that the votes' own paths are relative to.
        output: a .jsonl or .csv file; its folder is made if missing.

    Returns:
        how many votes it holds.

    Raises:
        ValueError: `output` has another suffix.
    """
    if output.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"votes are exported as .jsonl or .csv, not {output.name!r}; give the file such a name")
    rows = [_exported(vote, folder, output.parent) for vote in votes]
    if output.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    durable.make_folder(output.parent)
    durable.replace(output, text.encode())
    return len(rows)


def _exported(vote: Vote, folder: Path, place: Path) -> dict[str, str | float]:
    seen = [Path(os.path.relpath(folder.resolve() / image, place.resolve())).as_posix() for image in vote.images]
    return dict(zip(COLUMNS, (vote.prompt, *seen, vote.label_0, vote.label_1), strict=True))


def of_stages(votes: Sequence[Vote]) -> dict[tuple[Stage, Stage], list[Vote]]:
    """The votes by what they compare, the most voted on first."""
    found: dict[tuple[Stage, Stage], list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.stages, []).append(vote)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
