"""A run is one YAML file and words of the command line. This turns them into checked values, or says all that is wrong.

The caller hands in a dataclass, and no section is known by name here. A field of it is a section (another dataclass), a
component (`Annotated[Component, In("ddpo.algorithms")]`, or a list of them), or a plain value. A component's options
are the arguments of its class: there is no second list of them, and a misspelt one stops the run before any weights load.

    algorithm: {name: "nft:NFT", beta: 0.3}     is ddpo.algorithms.nft.NFT(beta=0.3)
    algorithm: nft                              is the one component of that module, with its defaults
    algorithm: my_lab.losses:Mine               is imported as it stands: a plug-in needs no registration
    algorithm: path/to/file.py:Mine             is loaded from the file
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from ddpo import wording, yaml_lines
from ddpo.components import Component, In, NotFound, Parameter, find, hint, parameters
from ddpo.yaml_lines import Keys, Node, Problems

__all__ = ["Component", "Config", "ConfigError", "In", "dump", "load"]

T = TypeVar("T")


class ConfigError(ValueError):
    """All that is wrong with a config: `problems` has a line for each, as `file:line: key: what is wrong`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Config(Generic[T]):
    """A checked recipe that still knows where each of its values was written."""

    recipe: T
    _root: Node = field(repr=False)

    def where(self, key: str) -> str:
        """Where a dotted key was written: "file:line" or "command line (key=value)".

        A key that is written nowhere, being a default, is said to stand where its nearest written parent does.
        """
        return self._root.nearest(key.split(".")).where

    def refuse(self, problems: Iterable[tuple[str, str]]) -> None:
        """Raises ConfigError if there is any problem. Each is (dotted key, what is wrong)."""
        lines = Problems()
        for key, message in problems:
            lines.add(self.where(key), key, message)
        if lines:
            raise ConfigError(lines)


def load(path: str | Path | None, overrides: Sequence[str], schema: type[T], partly: bool = False) -> Config[T]:
    """Reads a YAML file (None: no file) and what it `extends`, lays `key.path=value` words over it, and checks all of it.

    Components are found and their options checked, but not built, for they may load weights; one that is a dataclass is
    built once and dropped, so that its __post_init__ has its say. If nothing is wrong and the schema has a method
    `problems()`, which yields (dotted key, what is wrong), it is asked last.

    Args:
        partly: pass over sections that the schema has not. For who needs some of a run's settings: the others may name files and
            packages that are on another machine.

    Raises:
        ConfigError: with everything that is wrong at once.
    """
    problems = Problems()
    root = yaml_lines.load(None if path is None else Path(path), overrides, set(_component_keys(schema)), problems)
    if root and partly and isinstance(root.value, dict):
        known = {f.name for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
        root = replace(root, value={key: child for key, child in root.value.items() if key in known})
    recipe = _Check(problems).section(root, schema, ()) if root else None
    if root is None or recipe is None or problems:
        raise ConfigError(problems)
    config = Config(recipe, root)
    if further := getattr(recipe, "problems", None):
        config.refuse(further())
    return config


def dump(recipe: Any) -> str:
    """The recipe as YAML, defaults and all; `load` makes an equal recipe of it.

    A default that YAML cannot say (a function, infinity) is left out: `load` will find it again.
    """
    return yaml_lines.dump(_plain(recipe))


_UNSAID = object()


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        extra = {} if value.extra is None else _plain(value.extra)
        return {"name": value.name, **extra, **_plain(value.options)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init})
    if isinstance(value, Mapping):
        return {str(key): p for key, v in value.items() if (p := _plain(v)) is not _UNSAID}
    if isinstance(value, list | tuple):
        items = [_plain(v) for v in value]
        return items if all(item is not _UNSAID for item in items) else _UNSAID
    if isinstance(value, float) and not math.isfinite(value):
        return _UNSAID
    try:
        return to_jsonable_python(value)
    except PydanticSerializationError:
        return _UNSAID


# Strict: true is no number, "3" no integer. Read as JSON: a list may fill a tuple, a text a path.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class _Check:
    """Turns nodes into values. Where one is wrong, says so and goes on, with None in its place."""

    problems: Problems

    def say(self, node: Node, at: Keys, message: str) -> None:
        self.problems.add(node.where, ".".join(at), message)

    def value(self, node: Node, annotation: Any, at: Keys, remedy: str = "") -> Any:
        kind = _required(annotation)
        if node.value is None and kind is not annotation:
            return None
        if (item := _item(kind)) is not kind:
            return self.items(node, item, at)
        if place := _place(kind):
            return self.component(node, place, at)
        if _is_section(kind):
            return self.section(node, kind, at)
        return self.scalar(node, annotation, at, remedy)

    def items(self, node: Node, item: Any, at: Keys) -> list[Any] | None:
        if node.counts():
            self.say(node, at, "there is no list whose items could be changed; write the list in the file")
            return None
        nodes = node.value if isinstance(node.value, list) else [node]
        return [self.value(child, item, (*at, str(i))) for i, child in enumerate(nodes)]

    def section(self, node: Node, schema: type[T], at: Keys) -> T | None:
        if not isinstance(node.value, dict):
            takes = wording.keys(parameters(schema))
            self.say(node, at, f"should be a mapping of keys to values, got {wording.shown(node.plain())}; it takes {takes}")
            return None
        values = self.bind(node, parameters(schema), at, at[-1] if at else "a config")
        return None if values is None else self.made(schema, values, node, at)

    def component(self, node: Node, place: In, at: Keys) -> Component | None:
        node = node.named()
        factory = self.found(node, place, at)
        if factory is None:
            return None
        own, beside = parameters(factory), parameters(place.extra) if place.extra else {}
        rest = replace(node, value={key: child for key, child in node.value.items() if key != "name"})
        values = self.bind(rest, {**beside, **own}, at, factory.__name__)
        if values is None:
            return None
        extra = self.made(place.extra, {k: v for k, v in values.items() if k in beside}, node, at) if place.extra else None
        options = {k: v for k, v in values.items() if k in own}
        component = Component(node.value["name"].value, factory, options, extra)
        if dataclasses.is_dataclass(factory):
            self.made(component.build, {}, node, at)
        return component

    def found(self, node: Node, place: In, at: Keys) -> Callable[..., Any] | None:
        """The class or function that a component's mapping names."""
        name = node.value.get("name") if isinstance(node.value, dict) else None
        if name is None or not isinstance(name.value, str):
            said = f", got {wording.shown(name.plain() if name else node.plain())}"
            self.say(name or node, (*at, "name"), f"should name a component of {place.package}: {place.choice()}{said}")
            return None
        try:
            factory = find(name.value, place.package, place.called_with, place.among, place.members)
            reserved = {"name", *(parameters(place.extra) if place.extra else ())}
            if taken := reserved & parameters(factory).keys():
                raise NotFound(f"{factory.__name__} has an argument {min(taken)!r}, which means something else here")
        except NotFound as error:
            self.say(name, (*at, "name"), str(error))
            return None
        return factory

    def bind(self, node: Node, accepted: Mapping[str, Parameter], at: Keys, taker: str) -> dict[str, Any] | None:
        """The arguments that a mapping gives; None if any of them is wrong, unknown or missing."""
        before = len(self.problems)
        for key in node.value:
            if key not in accepted:
                choice = f"{taker} takes {wording.keys(accepted)}"
                self.say(node.value[key], (*at, key), f"unknown key{hint(key, accepted) or ';'} {choice}")
        for key, parameter in accepted.items():
            if parameter.default is None and key not in node.value:
                self.say(node, (*at, key), f"missing; {taker} needs it{_wanted(parameter.annotation)}")
        given = {
            key: self.value(node.value[key], p.annotation, (*at, key), wording.default(p))
            for key, p in accepted.items()
            if key in node.value
        }
        return given if len(self.problems) == before else None

    def made(self, factory: Callable[..., T], values: dict[str, Any], node: Node, at: Keys) -> T | None:
        try:
            return factory(**values)
        except ValueError as error:
            self.say(node, at, str(error))
            return None

    def scalar(self, node: Node, annotation: Any, at: Keys, remedy: str) -> Any:
        try:
            return TypeAdapter(annotation, config=_STRICT).validate_json(json.dumps(node.plain()))
        except PydanticUserError as error:
            self.say(node, at, f"cannot be set in a config: {error.message.splitlines()[0]}")
            return None
        except ValidationError as error:
            wrong: dict[Keys, list[Any]] = {}
            for detail in error.errors():
                wrong.setdefault(_written(node, detail["loc"]), []).append(detail)
        for keys, details in wrong.items():
            said = wording.reason(details)
            self.say(node.nearest(keys), (*at, *keys), said if keys or "; " in said else said + remedy)


def _written(node: Node, loc: Iterable[int | str]) -> Keys:
    """The part of a pydantic location that is a key of the config; the rest names the members of a union."""
    keys: Keys = ()
    for part in map(str, loc):
        if node is (node := node.nearest([part])):
            break
        keys = (*keys, part)
    return keys


def _required(annotation: Any) -> Any:
    """`X | None` -> X; all else as it is."""
    members = [a for a in get_args(annotation) if a is not NoneType]
    return members[0] if get_origin(annotation) in (Union, UnionType) and len(members) == 1 else annotation


def _item(kind: Any) -> Any:
    """A list of components or of sections -> what its items are; all else as it is."""
    item = get_args(kind)[0] if get_origin(kind) is list else kind
    return item if _place(item) or _is_section(item) else kind


def _place(kind: Any) -> In | None:
    return next((mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, In)), None)


def _is_section(kind: Any) -> bool:
    return isclass(kind) and dataclasses.is_dataclass(kind)


def _wanted(annotation: Any) -> str:
    """What a missing key should hold, where that is a component or a section."""
    item = _item(_required(annotation))
    if place := _place(item):
        return f": name a component of {place.package}: {place.choice()}"
    return f": a mapping of {wording.keys(parameters(item))}" if _is_section(item) else ""


def _component_keys(schema: Any, at: Keys = ()) -> Iterator[Keys]:
    """The keys below which a schema wants components, without the numbers of lists."""
    for key, parameter in parameters(schema).items():
        item = _item(_required(parameter.annotation))
        if _place(item):
            yield (*at, key)
        elif _is_section(item):
            yield from _component_keys(item, (*at, key))
