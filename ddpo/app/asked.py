"""What a browser or a client asks for, checked: nothing of it is trusted, and what is wrong is told with what is allowed."""

from collections.abc import Mapping
from typing import Any

from ddpo.app.view import View

LONGEST = 2000  # characters of a prompt
LARGEST = 2**31 - 1  # of an iteration or a seed


def text(value: Any, what: str) -> str:
    """Raises ValueError where it is no text, is too long, or holds what no text should."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {type(value).__name__}")
    if len(value) > LONGEST:
        raise ValueError(f"{what} has {len(value)} characters; at most {LONGEST} are allowed")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{what} holds a NUL or half a surrogate pair; remove it")
    return value


def whole(value: Any, what: str) -> int:
    """Raises ValueError where it is no whole number from 0 to 2**31 - 1."""
    if isinstance(value, float) and value.is_integer():  # JSON has one kind of number
        value = int(value)
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{what} must be a whole number from 0 to {LARGEST}, not {value!r:.60}")
    return value


def link(query: Mapping[str, str]) -> View:
    """The view that the page's address names: `?run=NAME&iteration=8&prompt=a cat&seed=0`. What makes no sense is passed over."""
    found: dict[str, Any] = {}
    for key in ("run", "prompt"):
        try:
            found[key] = text(query.get(key, ""), key)
        except ValueError:
            continue
    for key in ("iteration", "seed"):
        if query.get(key, "").isdecimal() and len(query[key]) < 11 and int(query[key]) <= LARGEST:
            found[key] = int(query[key])
    return View(**found)
