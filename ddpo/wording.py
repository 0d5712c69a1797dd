"""What is wrong with one value of a config, in words: what it should be, what it is, and what would mend it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ddpo.components import Parameter, hint

_WORDS = {
    "Input should": "should", "Value error, ": "", "array": "list", "an object": "a mapping", "Field required": "an item is missing",
    "greater than or equal to": "at least", "less than or equal to": "at most", "be a valid integer": "be a whole number",
    "be a valid number": "be a number", "be a valid string": "be a text", "be a valid boolean": "be true or false",
    "be a valid list": "be a list", "List should have": "should have", " after validation, not 0": "",
}  # fmt: skip


def reason(details: Sequence[Any]) -> str:
    """Pydantic's words on one value (several, if each member of a union refuses it) as ours."""
    text = " or ".join(dict.fromkeys(d["msg"] for d in details))
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    value = details[0]["input"]
    expected = re.findall("'([^']*)'", " ".join(d.get("ctx", {}).get("expected", "") for d in details))
    return f"{text}, got {shown(value)}{hint(value, expected) or _respelt(value, text)}"


def shown(value: Any) -> str:
    """A value as it would be written, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def default(parameter: Parameter) -> str:
    """ "; the default is 0.1", where a default can be written."""
    value = parameter.default() if parameter.default else None
    plain = isinstance(value, bool | int | float | str) or (value is None and parameter.default is not None)
    return f"; the default is {shown(value)}" if plain else ""


def keys(accepted: Mapping[str, Parameter]) -> str:
    """Which keys there are."""
    return ", ".join(accepted) or "no options"


def _respelt(value: Any, wanted: str) -> str:
    """The same value in the kind that is wanted, where it can be told."""
    if isinstance(value, float) and value.is_integer() and "whole number" in wanted:
        return f"; write {int(value)}"
    if isinstance(value, str) and "number" in wanted and re.fullmatch(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?", value):
        return "; write it without quotes"
    if isinstance(value, str) and "be a list" in wanted:
        return f"; write [{value}]"
    if isinstance(value, int | float) and not isinstance(value, bool) and "be a text" in wanted:
        return "; write it in quotes"
    return ""
