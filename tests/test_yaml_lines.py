"""Reading YAML: what is read is plain data, every value knows its line, and what is merged keeps the line it came from.

python -m pytest tests/test_yaml_lines.py        3 s
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpo.yaml_lines import Node, Problems, dump, load

Write = Callable[..., Path]
COMPONENTS = {("algorithm",), ("rewards",), ("run", "solver")}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file and returns its path, which is relative: the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "c.yaml") -> Path:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return Path(name)

    return write


def tree(path: Path, *overrides: str) -> Node:
    problems = Problems()
    node = load(path, overrides, COMPONENTS, problems)
    assert node is not None and not problems, problems
    return node


def read(path: Path, *overrides: str) -> Any:
    return tree(path, *overrides).plain()


def wrong(path: Path, *overrides: str) -> list[str]:
    problems = Problems()
    load(path, overrides, COMPONENTS, problems)
    return list(problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("3e-4", 3e-4), ("-1E5", -1e5), ("1.", 1.0), (".5", 0.5), ("+2.5e3", 2500.0), ("12", 12), ("-0", 0), ("1_000", 1000)],
        *[
            ("true", True),
            ("FALSE", False),
            ("null", None),
            ("~", None),
            ("", None),
            ("[1, a]", [1, "a"]),
            ("{1: 2}", {"1": 2}),
        ],
        *[(word, word) for word in ("yes", "off", "N", "007", "0x1f", "1:30", "2026-01-31", ".inf", ".nan", "1e", "e5", "-a")],
        *[('"3e-4"', "3e-4"), ("'true'", "true"), ("|\n  a\n  b", "a\nb\n")],
    ],
)
def test_scalars_follow_yaml_1_2(write: Write, text: str, value: Any) -> None:
    read_back = read(write(f"x: {text}\n"))["x"]
    assert read_back == value and type(read_back) is type(value)


def test_dumping_and_loading_is_the_identity(write: Write) -> None:
    """Also for text that either version of YAML would take for something else, and for a value that stands twice."""
    words = [
        "off",
        "3e-4",
        "1_000",
        "null",
        "~",
        "2026-01-31",
        "1:30",
        "",
        " a: b #c",
        "über\nzwei",
        "007",
        "true",
        ".inf",
        "=",
        "<<",
    ]
    twice = [1, 2]
    data = {
        "words": words,
        "keys": dict.fromkeys(words, 0),
        "twice": [twice, twice],
        "numbers": [1e-5, 1e16, 0.1, -3, True, None],
    }
    assert read(write(dump(data))) == data


def test_every_value_knows_its_line(write: Write) -> None:
    node = tree(write("# first\na:\n  b: 1\n  c:\n    - 1\n    - {d: 2}\ne: [3,\n  4]\n"))
    places = {"a": 2, "a.b": 3, "a.c": 4, "a.c.0": 5, "a.c.1.d": 6, "e.1": 8, "a.b.none": 3, "none": 2, "a.c.7": 4}
    assert {key: node.nearest(key.split(".")).where for key in places} == {k: f"c.yaml:{v}" for k, v in places.items()}


# What is wrong in a file -> a part of the only thing that is said.
BAD: dict[str, tuple[str | bytes, str]] = {
    "key twice": ("a: 1\nb: 2\na: 2", "c.yaml:3: a: written twice; first at c.yaml:1"),
    "deep key twice": ("a: [{b: 1, b: 2}]", "c.yaml:1: a.0.b: written twice; first at c.yaml:1"),
    "bracket left open": ("a: [1", "c.yaml:1: not the YAML of a config: in [ ]: expected"),
    "tab": ("a:\n\tb: x", "c.yaml:2: not the YAML of a config: a tab; indent with spaces"),
    "colon twice": ("a: b: c", "c.yaml:1: not the YAML of a config: a second colon; put text that holds one in quotes"),
    "python tag": (
        "a:\n  !!python/object/apply:os.getpid []",
        "c.yaml:2: not the YAML of a config: a tag (tag:yaml.org,2002:python",
    ),
    "own tag": ("a: !mine 3", "a tag (!mine) is refused"),
    "even a harmless tag": ("a: !!str 3", "a tag (tag:yaml.org,2002:str) is refused"),
    "alias": ("a: &x [1]\nb: *x", "c.yaml:2: not the YAML of a config: an alias (*x) is refused"),
    "two documents": ("a: 1\n---\nb: 1", "c.yaml:2: not the YAML of a config: a second document (---)"),
    "list as a key": ("? [1]\n: 2", "c.yaml:1: not the YAML of a config: a key should be a word"),
    "zero byte": ("a: 1\nb: \0", "c.yaml:2: not text: special characters are not allowed"),
    "endless integer": (f"a: {'1' * 5000}", "c.yaml:1: not the YAML of a config: Exceeds the limit"),
    "deep nest": ("a: " + "[" * 2_000, "c.yaml:1: nested too deeply"),
    "a list": ("- a\n", "c.yaml:1: a config should be a mapping of keys to values"),
    "a word": ("word", "c.yaml:1: a config should be a mapping of keys to values"),
    "Latin-1": (b"a: \xff", "c.yaml: c.yaml is not UTF-8 text: invalid start byte at byte 3"),
    "UTF-16": ("a: 1".encode("utf-16"), "c.yaml: c.yaml is not UTF-8 text: invalid start byte at byte 0"),
    "too large": ("#" * 1_000_001, "c.yaml: c.yaml has 1,000,001 bytes; a config has at most 1,000,000"),
    "extends two": ("extends: [a, b]", "c.yaml:1: extends: should be the path of one YAML file"),
    "extends none": ("a: 1\nextends: none.yaml", "c.yaml:2: extends: there is no file none.yaml"),
    "extends itself": ("a: 1\nextends: c.yaml", "c.yaml:2: extends: c.yaml extends itself, through c.yaml"),
    "a newline in a key": ('"a\\n\\e[31m": 1\n"a\\n\\e[31m": 2', "c.yaml:2: a\\n\\x1b[31m: written twice"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_bad_file(write: Write, text: str | bytes, said: str) -> None:
    found = wrong(write(text))
    assert len(found) == 1 and said in found[0] and found[0].isprintable(), found


def test_what_is_no_file(write: Write) -> None:
    write("")
    assert wrong(Path("none.yaml")) == [
        f"none.yaml: there is no file none.yaml in {Path.cwd()}; the first argument is a config file"
    ]
    assert wrong(Path(".")) == [".: . is a folder, a pipe or a device; give a YAML file"]
    assert "device" in wrong(Path("/dev/zero"))[0]


def test_files_from_windows_and_empty_files_are_read(write: Write) -> None:
    assert read(write(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")) == {"a": 1, "b": 2}
    assert read(write("")) == read(write("# nothing\n")) == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a.b", "command line (a.b): should be key=value"),
        ("=1", "command line (=1): should be key=value"),
        ("a..b=1", "command line (a..b=1): should be key=value"),
        ("a=[1", "command line (a=[1): not the YAML of a config"),
        ("a=!!python/name:os.system", "a tag (tag:yaml.org,2002:python/name:os.system) is refused"),
        ("a={x: 1, x: 2}", "command line (a={x: 1, x: 2}): x: written twice"),
        (
            "rewards.2.weight=1",
            "command line (rewards.2.weight=1): rewards.2: there is no item 2: the list has 2, counted from 0",
        ),
    ],
)
def test_bad_override(write: Write, word: str, said: str) -> None:
    found = wrong(write("rewards: [x, y]"), word)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides(write: Write, dashes: str) -> None:
    path = write("a: {b: 1, c: 2}\nlist: [1, 2]\nrewards: [x, {name: y, weight: 1}]\n")
    words = ["a.b=3e-4", "new.deep.key=a=b", "list.1=5", "rewards.0.weight=2", "rewards.1.weight=3", "a.d={e: 1}", "a.d.f="]
    node = tree(path, *(dashes + word for word in words))
    assert node.plain() == {
        "a": {"b": 3e-4, "c": 2, "d": {"e": 1, "f": None}},
        "list": [1, 5],
        "rewards": [{"name": "x", "weight": 2}, {"name": "y", "weight": 3}],
        "new": {"deep": {"key": "a=b"}},
    }
    places = {"a": "c.yaml:1", "a.b": f"command line ({dashes}a.b=3e-4)", "a.c": "c.yaml:1", "rewards.0": "c.yaml:3"}
    assert {key: node.nearest(key.split(".")).where for key in places} == places
    assert read(path, "a=1", "a=2")["a"] == 2


@pytest.mark.parametrize("rewards", ["x", "[x]", "{name: x}", "[{name: x, weight: 7}]"])
def test_an_override_by_number_reaches_a_single_component(write: Write, rewards: str) -> None:
    assert read(write(f"rewards: {rewards}"), "rewards.0.weight=2") == {"rewards": [{"name": "x", "weight": 2}]}


@pytest.mark.parametrize("words", [["algorithm.name=nft", "algorithm.beta=3"], ["algorithm.beta=3", "algorithm.name=nft"]])
def test_another_component_does_not_inherit_options(write: Write, words: list[str]) -> None:
    """In whichever order it is said. What is no component, such as a section with a name of its own, is merged."""
    path = write("algorithm: {name: ddpo, clip: 0.2}\nrun: {name: a, seed: 1, solver: {name: ddim, eta: 1}}\n")
    assert read(path, *words)["algorithm"] == {"name": "nft", "beta": 3}
    assert read(path, "algorithm=ddpo", "algorithm.epochs=2")["algorithm"] == {"name": "ddpo", "clip": 0.2, "epochs": 2}
    run = read(path, "run.name=b", "run.solver=ode")["run"]
    assert run == {"name": "b", "seed": 1, "solver": {"name": "ode"}}


def test_extends(write: Write) -> None:
    Path("sub").mkdir()
    write("seed: 1\nalgorithm: {name: ddpo, clip: 0.5}\nrun:\n  steps: 3\n  name: base\n  lr: 1\n", "sub/base.yaml")
    write("extends: base.yaml\nrun: {name: middle, times: [1, 2]}\nrewards: [x, y]\n", "sub/middle.yaml")
    path = write("extends: sub/middle.yaml\nrewards: [z]\nrun:\n  lr: 1e-3\nalgorithm: {name: ddpo, epochs: 2}\n")
    node = tree(path, "run.times.0=7")
    assert node.plain() == {
        "seed": 1,
        "algorithm": {"name": "ddpo", "clip": 0.5, "epochs": 2},
        "run": {"steps": 3, "name": "middle", "lr": 1e-3, "times": [7, 2]},
        "rewards": ["z"],
    }
    places = {"seed": "sub/base.yaml:1", "run.steps": "sub/base.yaml:4", "run.name": "sub/middle.yaml:2", "run.lr": "c.yaml:4"}
    places |= {"run": "c.yaml:3", "rewards.0": "c.yaml:2", "run.times.0": "command line (run.times.0=7)", "none": "c.yaml:1"}
    assert {key: node.nearest(key.split(".")).where for key in places} == places
    assert read(write("extends: sub/middle.yaml\nalgorithm: {name: nft}\n"))["algorithm"] == {"name": "nft"}


def test_a_circle_of_files_is_refused(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("seed: 1\nextends: a.yaml\n", "b.yaml")
    assert wrong(Path("a.yaml")) == ["b.yaml:2: extends: a.yaml extends itself, through b.yaml; take one of the two out"]
