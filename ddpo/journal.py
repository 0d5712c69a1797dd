"""The reward journal: rewards are written down before they are used.

An interrupted iteration is done again: the same pictures are drawn, and their rewards are read here instead of being asked
for again. So a scorer is never paid twice, and one that would answer differently the second time cannot change a resumed
run. One JSON object a line, in the run's folder:

    {"iteration": 3, "salt": 0, "group": 1, "member": 2, "image": "9f3a...", "prompt": "a cat", "scores": {"scene": 0.5}}

Each process appends to a file of its own, rewards.jsonl or rewards-rankN.jsonl, and reads them all, so a run may be resumed
with another number of processes. Where kernels are not deterministic a picture drawn again may differ in a bit; then its
hash is not found and the scorer is asked: correct, only dearer.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ddpo.durable import FileError, fsync_folder, make_folder

Scores = dict[str, float | None]  # {scorer's name: score}; None: this picture could not be scored


class Key(NamedTuple):
    """Which picture: its place in the run, and what it shows."""

    iteration: int
    salt: int
    group: int
    member: int
    image: str  # image_hash of its pixels


Record = tuple[Key, str, Scores]  # with the prompt, for people who read the file


class JournalError(FileError):
    """The journal cannot be read or written; the message names the file, the line where there is one, and what to do."""


def image_hash(pixels: bytes) -> str:
    """The first 16 hex digits of the sha256 of a picture's 8-bit pixels, in any one fixed layout."""
    return hashlib.sha256(pixels).hexdigest()[:16]


class Journal:
    """All rewards of a run so far.

    Args:
        folder: the run's folder; made if missing.
        rank: this process. Rank r alone appends to its file; a line that its death cut short is cut off here.

    Raises:
        JournalError: a line that is not a record, or a disk that refuses.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder = Path(folder)
        self.path = folder / (f"rewards-rank{rank}.jsonl" if rank else "rewards.jsonl")
        self._scores: dict[Key, Scores] = {}
        with _explained(self.path):
            make_folder(folder)
            _open_own(self.path)
        for path in sorted(folder.glob("rewards*.jsonl")):
            with _explained(path):
                for key, _, scores in _records(path):
                    self._remember(key, scores)

    def get(self, key: Key) -> Scores | None:
        """{scorer's name: score} as far as they are known, or None."""
        found = self._scores.get(key)
        return None if found is None else dict(found)

    def add(self, records: Sequence[Record]) -> None:
        """Appends records; when this returns they are on the disk. Scorers of one key add up; said twice, the last counts.

        Raises:
            ValueError: a score that is NaN or infinite.
            JournalError: the disk refuses. None of the records counts, and the file ends with a whole line.
        """
        checked = [(key, prompt, _checked(scores, prompt)) for key, prompt, scores in records]
        lines = [json.dumps({**key._asdict(), "prompt": prompt, "scores": scores}) for key, prompt, scores in checked]
        with _explained(self.path):
            _append(self.path, "".join(f"{line}\n" for line in lines).encode())
        for key, _, scores in checked:
            self._remember(key, scores)

    def _remember(self, key: Key, scores: Scores) -> None:
        self._scores.setdefault(key, {}).update(scores)


def _checked(scores: Scores, prompt: str) -> Scores:
    for name, score in scores.items():
        if score is not None and not math.isfinite(score):
            raise ValueError(f"{name} gave {score} for {prompt!r}; return None for a picture that cannot be scored")
    return {name: None if score is None else float(score) for name, score in scores.items()}


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        end, rest = file.tell(), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell; the next start cuts off a torn tail
                file.truncate(end)
            raise


def _open_own(path: Path) -> None:
    """Makes the file, or cuts off the last line where it has no end."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def _records(path: Path) -> Iterator[Record]:
    """The records of one file. A last line without its end is being written, or its writer died: it is passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _parsed(line, f"{path}, line {number}")


def _parsed(line: bytes, where: str) -> Record:
    try:
        found = json.loads(line)
        key, prompt, scores = Key(*(found[field] for field in Key._fields)), found["prompt"], found["scores"]
        if [type(value) for value in key] != list(Key.__annotations__.values()):
            raise TypeError(f"{key} has fields of the wrong type")
        return key, prompt, _checked(scores, prompt)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        remedy = "remove this line (its rewards will be asked for again) and run the same command again"
        raise JournalError(f"{where}: not a reward record ({error!r}); {remedy}") from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "the rewards before are kept: free space or mend permissions there and run the same command again"
        raise JournalError(f"{path} cannot be read or written ({error}); {remedy}") from error
