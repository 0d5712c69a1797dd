"""Files of JSON lines that survive being killed: what was appended is on the disk, and a half-written line does not count."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ddpo.durable import explained, replace


def append(path: Path, record: dict) -> None:
    """Add one line; it is on the disk when this returns. NaN and infinity, which JSON has not, are written as null.

    A last line without its newline was never finished (the process was killed while writing it): it is cut off first.

    Raises:
        FileError: the disk refuses.
    """
    with explained(f"{path}: a line was not written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _cut_torn_tail(file)
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """The records of a file; none if there is no such file. A last line without its newline is left out.

    Raises:
        ValueError: some other line is not a JSON object.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_parse(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]


def truncate(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop the records that `keep` refuses, as those of iterations that will be done again."""
    if path.exists():
        write(path, [record for record in read(path) if keep(record)])


def write(path: Path, records: list[dict]) -> None:
    """Make these the file's records: after a crash the file is the old one or the new one."""
    replace(path, b"".join(_line(record) for record in records))


def _cut_torn_tail(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _line(record: dict) -> bytes:
    return json.dumps(_finite(record), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes, place: str) -> dict:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError as error:
        raise ValueError(f"{place}: not a line of JSON ({error}); restore the file or delete this line") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: a {type(record).__name__} where a JSON object belongs; restore the file or delete this line"
        )
    return record
