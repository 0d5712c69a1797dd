"""Files of a run read as far as they can be: what is wrong with one becomes a note, and the rest of it is shown.

A run may be half copied, being written this moment, damaged, or from a newer version. Training and resuming refuse such
files (`ddpo.jsonl.read`, `ddpo.durable.read_json`); someone who only looks wants to see what there is.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from ddpo.durable import DamagedFile, require_plain
from ddpo.runs import Sample

T = TypeVar("T")

LARGEST = 64 << 20  # bytes of a file that are read
TAIL = 64 << 10  # bytes from a file's end, at first
LONGEST = 10_000  # characters of a text
MEASURES = ("reward/", "eval/", "kl/")  # keys of metrics.jsonl that hold numbers in every version


def content(path: Path, notes: list[str]) -> bytes:
    """A file's bytes, at most LARGEST; empty, and a note, where they cannot be read."""
    try:
        if (size := require_plain(path)) > LARGEST:
            notes.append(f"{path.name} has {size} bytes; only the first {LARGEST} are read.")
        with open(path, "rb") as file:
            return file.read(LARGEST)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
    except (OSError, DamagedFile) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is a link, or no plain file"
        notes.append(f"{path.name} cannot be read: {reason}.")
    return b""


def facts(path: Path, notes: list[str]) -> dict[str, Any]:
    """What run.json says. A value that is not what every version writes there is left out, with a note."""
    data = content(path, notes)
    if not data:
        return {}
    found = _parse(data)
    if found is None:
        notes.append(f"{path.name} is damaged (not a JSON object): what this run was asked to do is not shown.")
        return {}
    wrong = sorted(key for key, kind in _FACTS.items() if not isinstance(found.get(key), kind))
    if wrong:
        notes.append(f"{path.name} holds something unexpected as {', '.join(wrong)}; that is left out.")
    kept = {clean(key): _tidy(value) for key, value in found.items() if key not in wrong}
    return kept | {key: [str(name) for name in kept[key]] for key in ("rewards", "held_out_rewards") if kept.get(key)}


def records(path: Path, notes: list[str]) -> list[tuple[int, dict]]:
    """The objects of a file of JSON lines, each with its line number from 1. Damaged lines and a torn last one are noted."""
    *lines, torn = content(path, notes).split(b"\n")
    if torn:
        notes.append(f"{path.name}: its last line is unfinished (being written, or cut off) and is left out.")
    parsed = [(i, _parse(line)) for i, line in enumerate(lines, 1)]
    _note_lines(path, [i for i, found in parsed if found is None], notes)
    return [(i, found) for i, found in parsed if found is not None]


def metrics(path: Path, notes: list[str]) -> list[dict]:
    """The lines of metrics.jsonl, by iteration; of each its finite numbers and its alarms."""
    kept = _kept(path, notes, _metric, lambda line: line["iteration"])
    return [kept[k] for k in sorted(kept)]


def samples(path: Path, notes: list[str]) -> list[Sample]:
    """The pictures of samples/index.jsonl. Fields that this version does not know are passed over."""
    return list(_kept(path, notes, _sample, lambda sample: (sample.iteration, sample.prompt, sample.seed)).values())


def _kept(path: Path, notes: list[str], understand: Callable[[dict], T | None], key: Callable[[T], Any]) -> dict[Any, T]:
    """What the records mean, the last one of each key; lines that mean nothing are noted."""
    kept: dict[Any, T] = {}
    wrong = []
    for i, record in records(path, notes):
        understood = understand(record)
        if understood is None:
            wrong.append(i)
        else:
            kept[key(understood)] = understood
    _note_lines(path, wrong, notes)
    return kept


def last_lines(path: Path) -> tuple[dict, dict]:
    """The last line of metrics.jsonl and the last that evaluated the tuned model, from the file's end; {} where there is none.

    Damage is passed over in silence: a table has no room to tell of it, and the run's own page does.
    """
    try:
        size, reach = require_plain(path), TAIL
        with open(path, "rb") as file:
            while True:
                start = max(size - reach, 0)
                file.seek(start)
                lines = file.read(size - start).split(b"\n")[1 if start else 0 : -1]
                newest, evaluated = _newest(lines)
                if evaluated or not start or reach >= LARGEST:
                    return newest, evaluated
                reach *= 4
    except (OSError, DamagedFile):
        return {}, {}


def _newest(lines: list[bytes]) -> tuple[dict, dict]:
    newest: dict = {}
    for line in reversed(lines):
        found = _metric(_parse(line) or {})
        newest = newest or found or {}
        if found and found["iteration"] > 0 and any(k.startswith("eval/") and k.endswith("/delta") for k in found):
            return newest, found
    return newest, {}


def clean(text: str) -> str:
    """Text that every encoder takes: what is no character (half a surrogate pair) becomes "?"."""
    return text[:LONGEST].encode("utf-8", "replace").decode()


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(str(k)): _tidy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_tidy(v) for v in value]
    return clean(value) if isinstance(value, str) else value


_FACTS: dict[str, Any] = {  # of run.json: what is read, and what it may be
    "name": str | None, "status": str | None, "started": str | None, "ended": str | None, "exit_reason": str | None,
    "model": str | None, "algorithm": str | None, "rewards": list | None, "held_out_rewards": list | None,
    "command": str | list | None, "prompts": dict | None, "versions": dict | None,
}  # fmt: skip


def _parse(line: bytes) -> dict | None:
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 53


def _finite(value: Any) -> float | None:
    """The number, or None where it is none that can be shown."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return value


def _metric(record: dict) -> dict | None:
    if not _whole(record.get("iteration")):
        return None
    if any(key.startswith(MEASURES) and not isinstance(value, int | float | None) for key, value in record.items()):
        return None
    numbers = {clean(key): _finite(value) for key, value in record.items() if isinstance(value, int | float | None)}
    found = record.get("alarms")
    alarms = [_alarm(alarm) for alarm in found if isinstance(alarm, dict)] if isinstance(found, list) else []
    return numbers | ({"alarms": alarms} if alarms else {})


def _alarm(alarm: dict) -> dict[str, str]:
    """Any level but "stop" is a warning."""
    level = "stop" if alarm.get("level") == "stop" else "warn"
    return {"name": clean(str(alarm.get("name", "alarm"))), "level": level, "text": clean(str(alarm.get("text", "")))}


def _sample(record: dict) -> Sample | None:
    iteration, prompt, seed, path = (record.get(key) for key in ("iteration", "prompt", "seed", "path"))
    scores = record.get("scores", {})
    if not (_whole(iteration) and _whole(seed) and isinstance(prompt, str) and isinstance(path, str)):
        return None
    if not isinstance(scores, dict):
        return None
    return Sample(iteration, clean(prompt), seed, {clean(name): _finite(v) for name, v in scores.items()}, clean(path))


def _note_lines(path: Path, lines: list[int], notes: list[str]) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
        verb = "is" if len(lines) == 1 else "are"
        notes.append(f"{path.name}: line {shown} {verb} damaged and left out; the rest is shown.")
