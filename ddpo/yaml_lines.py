"""YAML in which every value remembers where it was written: a line of a file, or a word of the command line.

Plain data is all that is read: no tags, no aliases, no key twice. Scalars follow YAML 1.2 and not PyYAML's 1.1: `3e-4`
is a number, `off` and `2026-01-31` are text, and only `true` and `false` are booleans. What is wrong is added to a list,
so that the user hears of everything at once.
"""

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

MAX_BYTES = 1_000_000

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """A value and where it stands. `value` is a dict of text to Node, a list of Node, or a scalar."""

    value: Any
    where: str
    implied: bool = False  # a parent that a word of the command line goes through, and does not write itself

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def nearest(self, keys: Sequence[str]) -> "Node":
        """The node at these keys or, where they lead to what is not written, the last one on the way."""
        node = self
        for key in keys:
            if isinstance(node.value, list) and key.isdecimal() and int(key) < len(node.value):
                node = node.value[int(key)]
            elif isinstance(node.value, dict) and key in node.value:
                node = node.value[key]
            elif key != "0":  # a single mapping stands for a list of one
                break
        return node

    def named(self) -> "Node":
        """A component written short, as its name alone, in full."""
        short = isinstance(self.value, str)
        return replace(self, value={"name": replace(self, implied=False)}) if short else self

    def counts(self) -> bool:
        """Whether the keys are the numbers of a list's items, as in `rewards.0.weight=2`."""
        return isinstance(self.value, dict) and bool(self.value) and all(key.isdecimal() for key in self.value)


class Problems(list[str]):
    """What is wrong, one line each: `where: key: message`."""

    def add(self, where: str, key: str, message: str) -> None:
        text = ": ".join(part for part in (where, key, message) if part)
        self.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def load(path: Path | None, overrides: Sequence[str], components: Collection[Keys], problems: Problems) -> Node | None:
    """The file over all that it extends, and the command line on top; None if a file cannot be read.

    Args:
        path: None is an empty file.
        overrides: words `a.b=value` or `--a.b=value`; a number in the key counts a list's items from 0.
        components: keys, without the lists' numbers, whose mappings are components. One that changes its `name`
            replaces the mapping below it, since another component's options would be stale.
    """
    reader = _Reader(components, problems)
    file = reader.file(path, str(path)) if path else Node({}, "command line", implied=True)
    above = Node({}, str(path or "command line"), implied=True)
    for word in overrides:  # joined before they meet the file, so that their order does not matter
        above = reader.merge(above, reader.word(word))
    return None if file is None else reader.merge(file, above)


def dump(data: Any) -> str:
    """YAML text that `load` reads back as the same data."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120))


@dataclass(frozen=True)
class _Reader:
    components: Collection[Keys]
    problems: Problems

    def file(self, path: Path, said: str, below: tuple[Path, ...] = ()) -> Node | None:
        """A file over the one that it extends. `said` is where it was named, `below` are the files that extend it."""
        try:
            if path.resolve() in below:
                raise ValueError(f"{path} extends itself, through {below[-1].name}; take one of the two out")
            text = _text(path)
        except (ValueError, OSError) as error:
            self.problems.add(said, "extends" if below else "", str(error))
            return None
        node = self.parse(text, lambda line: f"{path}:{line}")
        if node is not None and not isinstance(node.value, dict | None):
            self.problems.add(node.where, "", "a config should be a mapping of keys to values, a line each: key: value")
            return None
        if node is None or "extends" not in (node.value or {}):
            return node and replace(node, value=node.value or {})
        extends = node.value.pop("extends")
        if not isinstance(extends.value, str):
            self.problems.add(extends.where, "extends", "should be the path of one YAML file, relative to this file")
            return None
        base = self.file(path.parent / extends.value, extends.where, (*below, path.resolve()))
        return None if base is None else self.merge(base, node)

    def word(self, word: str) -> Node:
        """The tree that one word of the command line writes: "a.b=1" -> {a: {b: 1}}."""
        where = f"command line ({word})"
        key, equals, text = word.removeprefix("--").partition("=")
        node = None
        if not equals or not all(key.split(".")):
            self.problems.add(where, "", "should be key=value, with dots between the parts of the key, as in optimizer.lr=1e-4")
        else:
            node = self.parse(text, lambda line: where)
        if node is None:
            return Node({}, where, implied=True)
        for part in reversed(key.split(".")):
            node = Node({part: node}, where, implied=True)
        return node

    def parse(self, text: str, where: Callable[[int], str]) -> Node | None:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return self.build(loader, node, where, ()) if node else Node(None, where(1))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.problems.add(where(line), "", f"not the YAML of a config: {_reason(error)}")
        except ReaderError as error:
            self.problems.add(
                where(text.count("\n", 0, error.position) + 1),
                "",
                f"not text: {error.reason} (#x{error.character:02x}); remove it",
            )
        except RecursionError:
            self.problems.add(where(1), "", "nested too deeply; a config has sections, and options in them")
        return None

    def build(self, loader: "_Loader", node: yaml.Node, where: Callable[[int], str], at: Keys) -> Node:
        """PyYAML's node as ours. What a key holds stands where the key stands."""
        here = where(node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.build(loader, item, where, (*at, str(i))) for i, item in enumerate(node.value)], here)
        if not isinstance(node, yaml.MappingNode):
            return Node(loader.construct_object(node), here)
        entries: dict[str, Node] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key should be a word", problem_mark=key.start_mark)
            said, path = where(key.start_mark.line + 1), (*at, key.value)
            if key.value in entries:
                self.problems.add(said, ".".join(path), f"written twice; first at {entries[key.value].where}: take one out")
            entries[key.value] = replace(self.build(loader, child, where, path), where=said)
        return Node(entries, here)

    def merge(self, base: Node, over: Node, at: Keys = ()) -> Node:
        """`over` on top of `base`: mappings are merged, all else is replaced."""
        component = tuple(key for key in at if not key.isdecimal()) in self.components
        if component:
            base, over = base.named(), over.named()
            if isinstance(base.value, dict) and over.counts() and not base.counts():
                base = Node([base], base.where)
        if isinstance(base.value, list) and over.counts():
            return self.items(base, over, at)
        if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
            return over
        names = [node.value["name"].value for node in (base, over) if "name" in node.value]
        if component and len(names) == 2 and names[0] != names[1]:
            return over
        merged = dict(base.value)
        for key, child in over.value.items():
            merged[key] = self.merge(merged[key], child, (*at, key)) if key in merged else child
        return Node(merged, base.where if over.implied else over.where, base.implied and over.implied)

    def items(self, base: Node, over: Node, at: Keys) -> Node:
        """The list `base`, with the items changed that `over` gives by number."""
        items = list(base.value)
        for key, child in over.value.items():
            if int(key) < len(items):
                items[int(key)] = self.merge(items[int(key)], child, (*at, key))
            else:
                message = f"there is no item {key}: the list has {len(items)}, counted from 0"
                self.problems.add(child.where, ".".join((*at, key)), message)
        return Node(items, base.where)


def _text(path: Path) -> str:
    """Raises ValueError if the file is none, or none that a config could be."""
    if not os.path.exists(path):
        raise ValueError(f"there is no file {path}{_meant(path)}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder, a pipe or a device; give a YAML file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config has at most {MAX_BYTES:,}: is it the right file?")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None


def _meant(path: Path) -> str:
    """A file near to the one that is not there, or where it was looked for."""
    try:
        close = get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.8)
    except (OSError, ValueError):
        close = []
    if close:
        return f"; did you mean {path.with_name(close[0])}?"
    return f"{'' if path.is_absolute() else f' in {Path.cwd()}'}; the first argument is a config file"


# PyYAML's words -> ours.
_WORDS = {
    "while scanning for the next token, found character '\\t' that cannot start any token": "a tab; indent with spaces",
    "while parsing a flow mapping, ": "in { }: ", "while parsing a flow sequence, ": "in [ ]: ", "while parsing a flow node, ": "",
    "while parsing a block mapping, ": "in lines of key: value: ", "'<stream end>'": "the end; is a bracket or a quote not closed?",
    "mapping values are not allowed here": "a second colon; put text that holds one in quotes",
    "expected a single document in the stream, but found another document": "a second document (---); one file is one config",
}  # fmt: skip


def _reason(error: yaml.MarkedYAMLError) -> str:
    text = ", ".join(part for part in (error.context, error.problem) if part)
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it; filled below)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"an alias (*{event.anchor}) is refused; write the value out", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"a tag ({event.tag}) is refused; write plain values", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # an integer of more digits than Python reads
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)
