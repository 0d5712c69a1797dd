"""From a name in a config to a class or function, and to the arguments that it takes.

    "nft:NFT"                      NFT in nft.py of the package that the config's field names
    "nft"                          the same, where NFT is the only component of that module, or bears its name
    "my_lab.losses:Mine"           a dotted module is imported as it stands: a plug-in needs no registration
    "path/to/file.py:Mine"         a file, from the working directory
    "theirs"                       what an installed package offers under this name (entry point group "ddpo.<package>")

A component is a public class or function of the module that defines it. Modules are listed without being imported.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_type_hints


@dataclass(frozen=True)
class In:
    """Marks a field that holds a component: the package whose modules may be named shortly.

    `extra` is a dataclass whose fields stand beside the component's own options, as a reward's weight does. A function that
    takes all arguments in `called_with` is itself the component, to be called with them later: its others are options.
    `among` are the modules of the package that hold such components, if not all do. A class without one of `members` is
    another kind of component, and refused.
    """

    package: str
    extra: type | None = None
    called_with: tuple[str, ...] = ()
    among: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    def modules(self) -> list[str]:
        """The modules that may be named shortly."""
        return list(self.among) or modules(self.package)

    def choice(self) -> str:
        """For a message: what there is to choose from."""
        named = [f"{name}:{kind}" for name in self.among for kind in _public(_imported(f"{self.package}.{name}"), self.members)]
        return ", ".join(named or self.modules())


@dataclass(frozen=True)
class Component:
    """What a config names and has not built yet. Arguments that `options` leaves out are filled in with their defaults."""

    name: str  # as it was written
    factory: Callable[..., Any]
    options: dict[str, Any]
    extra: Any = None  # an instance of In.extra

    def __post_init__(self) -> None:
        known = parameters(self.factory)
        defaults = {key: p.default() for key, p in known.items() if p.default and key not in self.options}
        whole = {**defaults, **self.options}
        in_order = {key: whole[key] for key in (*known, *self.options) if key in whole}
        object.__setattr__(self, "options", in_order)

    def build(self) -> Any:
        """The component itself, newly made."""
        return self.factory(**self.options)


@dataclass(frozen=True)
class Parameter:
    """One argument: what it may be, and what makes its default (None if it must be given)."""

    annotation: Any
    default: Callable[[], Any] | None


class NotFound(ValueError):
    """A name that leads to no component; the message lists what there is."""


def find(
    name: str, package: str, called_with: tuple[str, ...] = (), among: tuple[str, ...] = (), members: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """The class or function that a config means by `name`, or what makes the function, if that is itself the component.

    The arguments are those of `In`.

    Raises:
        NotFound: if there is none, or several, or the module cannot be imported, or it is of another kind.
    """
    place, _, attribute = name.partition(":")
    if not attribute and name in (offered := entry_points(package)):
        return _deferred(_fitting(_loaded(offered[name]), In(package, among=among, members=members)), called_with)
    if place.endswith(".py"):
        module = _from_file(place)
    elif all(part.isidentifier() for part in place.split(".")):
        module = _imported(place if "." in place else f"{package}.{place}", In(package, among=among, members=members))
    else:
        raise NotFound(f"{name!r} is no component's name; write module, module:Class, or path/to/file.py:Class")
    found = _named(module, attribute, members) if attribute else _only(module, place, members)
    return _deferred(_fitting(found, In(package, among=among, members=members)), called_with)


def entry_points(package: str) -> dict[str, metadata.EntryPoint]:
    """What installed packages offer beside a package's own modules, by name. A module of ours comes first."""
    group = package if package.startswith("ddpo.") else f"ddpo.{package}"
    return {e.name: e for e in metadata.entry_points(group=group) if e.name not in modules(package)}


def modules(package: str) -> list[str]:
    """The public modules of a package, by their short names."""
    folders = getattr(importlib.import_module(package), "__path__", [])
    return sorted(m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_"))


def parameters(factory: Callable[..., Any]) -> dict[str, Parameter]:
    """What a class's constructor or a function takes by name, in order.

    Raises:
        NotFound: if Python cannot tell.
    """
    subject: Any = factory
    data = inspect.isclass(subject) and dataclasses.is_dataclass(subject)
    made = {f.name: f.default_factory for f in dataclasses.fields(subject)} if data else {}
    try:
        hints = get_type_hints(subject.__init__ if inspect.isclass(subject) and not data else subject, include_extras=True)
        signature = inspect.signature(factory)
    except (NameError, TypeError, ValueError) as error:
        raise NotFound(f"the arguments of {factory!r} cannot be read: {error}") from error
    return {
        p.name: Parameter(hints.get(p.name, Any), _default(p, made.get(p.name, dataclasses.MISSING)))
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def hint(word: Any, choice: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean 'x'?" where a choice is near enough (`cutoff`, 0 to 1) or is its initials, else ""."""
    choice = list(choice)
    initials = "".join(part[:1] for part in str(word).split("_"))  # learning_rate, lr
    close = get_close_matches(str(word), choice, n=1, cutoff=cutoff) or [c for c in choice if c == initials]
    return f"; did you mean {close[0]!r}?" if close else ""


def _default(parameter: inspect.Parameter, made: Any) -> Callable[[], Any] | None:
    if made is not dataclasses.MISSING:  # then the signature shows a stand-in
        return lambda: made()
    return None if parameter.default is parameter.empty else lambda: parameter.default


def _deferred(factory: Callable[..., Any], called_with: tuple[str, ...]) -> Callable[..., Any]:
    """A factory of the function itself, with its options filled in, where it is to be called later; else the factory.

    Raises NotFound where it takes only some of what it would be called with.
    """
    if not called_with or not inspect.isfunction(factory):
        return factory
    signature = inspect.signature(factory)
    lacking = [word for word in called_with if word not in signature.parameters]
    if len(lacking) == len(called_with):
        return factory
    if lacking:
        raise NotFound(
            f"the function {factory.__name__} lacks {', '.join(lacking)}: it is called with {', '.join(called_with)}"
        )

    @functools.wraps(factory)
    def make(**options: Any) -> Callable[..., Any]:
        return functools.partial(factory, **options)

    rest = [p for p in signature.parameters.values() if p.name not in called_with]
    make.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
    return make


def _loaded(offer: metadata.EntryPoint) -> Callable[..., Any]:
    try:
        return cast(Callable[..., Any], offer.load())
    except Exception as error:
        raise NotFound(_failure(f"{offer.name!r} of {offer.value}", error)) from error


def _imported(module: str, place: In | None = None) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        parent, _, leaf = module.rpartition(".")
        if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
            raise NotFound(_failure(module, error)) from error
        if error.name != module:
            raise NotFound(f"there is no module {error.name}; is its folder on PYTHONPATH?") from error
        if place and place.among:
            meant = [name for name in place.choice().split(", ") if name.lower().endswith(f":{leaf.lower()}")]
            raise NotFound(
                f"there is no module {leaf} in {parent}{hint(leaf, meant, 0) or ';'} choose of {place.choice()}"
            ) from error
        raise NotFound(f"there is no module {leaf} in {parent}{_choice(leaf, modules(parent))}") from error


def _from_file(place: str) -> ModuleType:
    """The module in a file, loaded once: its absolute path is its name."""
    path = Path(place).resolve()
    if str(path) in sys.modules:
        return sys.modules[str(path)]
    spec = importlib.util.spec_from_file_location(str(path), path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise NotFound(f"there is no file {place} in {Path.cwd()}")
    module = sys.modules[str(path)] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[str(path)]
        raise NotFound(_failure(place, error)) from error
    return module


def _failure(module: str, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""  # a SyntaxError says it itself
    return f"{module} cannot be imported: {type(error).__name__}: {error}{place}"


def _public(module: ModuleType, members: tuple[str, ...]) -> Iterator[str]:
    """The components of a module; where they must have members, the classes that do."""
    for name, value in vars(module).items():
        own = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
        if own and not name.startswith("_") and (not members or (inspect.isclass(value) and not _unfit(value, members))):
            yield name


def _unfit(factory: Any, members: tuple[str, ...]) -> str:
    """Why a class cannot be such a component, or "". What a function makes is not known yet."""
    if not inspect.isclass(factory):
        return ""
    if inspect.isabstract(factory) or getattr(factory, "_is_protocol", False):
        return f"{factory.__name__} is a base class and no component"
    has = {name for kind in factory.__mro__ for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
    missing = [name for name in members if name not in has]
    return f"{factory.__name__} is another kind of component: it has no {missing[0]}" if missing else ""


def _fitting(factory: Callable[..., Any], place: In) -> Callable[..., Any]:
    if reason := _unfit(factory, place.members) if place.members else "":
        raise NotFound(f"{reason}; choose of {place.choice()}")
    return factory


def _named(module: ModuleType, attribute: str, members: tuple[str, ...]) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if not callable(found):
        choice = _choice(attribute, list(_public(module, members)))
        raise NotFound(f"there is no class or function {attribute} in {module.__name__}{choice}")
    return cast(Callable[..., Any], found)


def _only(module: ModuleType, place: str, members: tuple[str, ...]) -> Callable[..., Any]:
    """The component that a module's name alone stands for."""
    known = list(_public(module, members))
    stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    alike = [name for name in known if name.lower() == stem.lower().replace("_", "")]
    for names in (known, alike):
        if len(names) == 1:
            return cast(Callable[..., Any], getattr(module, names[0]))
    raise NotFound(f"{module.__name__} has {', '.join(known) or 'no component'}; write {place}:Name to choose one")


def _choice(word: str, known: list[str]) -> str:
    return f"{hint(word, known) or ';'} it has {', '.join(known) or 'none'}"
