"""Prompt files: what a run draws pictures of.

A .txt file holds one prompt a line; blank lines and lines that start with # are skipped. A .jsonl file holds one JSON
object a line, {"prompt": "two owls", "count": 2}: all but the prompt is metadata, which scorers are given. The files in
ddpo/prompt_lists are built in and go by their names alone. Prompts are data: they are never formatted, never run, and
never part of a path.
"""

import difflib
import hashlib
import itertools
import json
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LISTS = Path(__file__).parent / "prompt_lists"
MAX_BYTES = 100_000_000  # of a file
MAX_LINE = 65_536  # bytes
MAX_PROMPTS = 500_000  # about 150 MB of memory


class PromptError(ValueError):
    """A prompt file cannot be used. The message names the file and, where there is one, the line."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt and whatever else its file says of it."""

    text: str
    metadata: dict = field(default_factory=dict)


def load(source: str) -> list[Prompt]:
    """The prompts of a file in its order, duplicates kept.

    Args:
        source: the path of a .txt or .jsonl file (UTF-8, with or without a byte order mark), or a built-in list's name.

    Raises:
        PromptError: there is no such file or list, it is no regular file or too large, a line is not UTF-8, not JSON,
            too long or holds control characters, or there is no prompt in it.
    """
    return [prompt for _, prompt in numbered(source)]


def numbered(source: str) -> Iterator[tuple[str, Prompt]]:
    """The same, one at a time, each with its place, "file:line"."""
    path, count = _find(source), 0
    parse = PARSERS[path.suffix.lower()]
    for count, (number, line) in enumerate(_lines(path), 1):
        if count > MAX_PROMPTS:
            raise PromptError(f"{path}:{number}: more than {MAX_PROMPTS} prompts; split the file")
        try:
            prompt = parse(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: {error}") from error
        yield f"{path}:{number}", prompt
    if not count:
        raise PromptError(f"{path}: there is no prompt in it, only blank lines and comments; write one a line")


def digest(source: str) -> str:
    """The file's sha256, in hexadecimal. Raises PromptError as `load` does where there is no such file."""
    with _find(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def built_in() -> list[str]:
    """The names of the built-in lists."""
    return sorted(path.stem for path in LISTS.glob("*.txt"))


def _find(source: str) -> Path:
    """The file behind a path or a built-in name, looked at before it is opened: opening a pipe would wait for ever."""
    lists = built_in()
    path = LISTS / f"{source}.txt" if source in lists else Path(source)
    if path.suffix.lower() not in PARSERS:
        close = difflib.get_close_matches(source, lists, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise PromptError(
            f"prompts {source!r}: neither a .txt or .jsonl file nor a built-in list; {meant}Built in: {', '.join(lists)}"
        )
    try:
        status = path.stat()
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        choice = f"give a .txt or .jsonl file, or a built-in list: {', '.join(lists)}"
        raise PromptError(f"prompts {source!r}: there is no such file{where}; {choice}") from error
    except (OSError, ValueError) as error:
        raise PromptError(f"prompts {source[:60]!r}: {getattr(error, 'strerror', None) or error}; give another file") from error
    if not stat.S_ISREG(status.st_mode):
        raise PromptError(
            f"prompts {source!r}: not a regular file ({stat.filemode(status.st_mode)}); give a .txt or .jsonl file"
        )
    if status.st_size > MAX_BYTES:
        raise PromptError(f"prompts {source!r}: {status.st_size} bytes; at most {MAX_BYTES} are read: split the file")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line that is neither blank nor a comment, with its number, read one at a time."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise PromptError(
                    f"{path}:{number}: the line is longer than {MAX_LINE} bytes; a prompt is a few sentences, so shorten it"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                remedy = "unpack it" if line.startswith(b"\x1f\x8b") else "save the file as UTF-8"
                raise PromptError(f"{path}:{number}: not UTF-8 ({error.reason}); {remedy}") from error
            if text and not text.startswith("#"):
                yield number, text


def _plain(line: str) -> Prompt:
    return Prompt(clean(line))


def _record(line: str) -> Prompt:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON ({error.msg.removesuffix(' at')}, character {error.pos + 1}); mend the line or take it out"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError('each line must be a JSON object with a text "prompt", such as {"prompt": "two owls", "count": 2}')
    return Prompt(clean(record.pop("prompt")), record)


def clean(text: str) -> str:
    """The text as it is. Raises ValueError if it is blank or holds what would corrupt a terminal, a log or a page."""
    if not text.strip():
        raise ValueError("the prompt is empty")
    for character in text if not text.isprintable() else "":
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"control character {character!r} in the prompt {text[:60]!r}; remove it")
    return text


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; use null")


PARSERS: dict[str, Callable[[str], Prompt]] = {".txt": _plain, ".jsonl": _record}
