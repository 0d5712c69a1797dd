"""A config is checked before anything is built: what is right comes out typed, and all that is wrong is said at once.

python -m pytest tests/test_config.py        3 s. The components live in a package made for the test.
"""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt

from ddpo.config import Component, ConfigError, In, dump, load

PACKAGE = {
    "__init__.py": "",
    "clipped.py": """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import Annotated, Literal
        from annotated_types import Gt, Lt

        def helper(x: float = 1.0) -> float:
            return x

        @dataclass(frozen=True)
        class Clipped:
            clip: Annotated[float, Gt(0), Lt(1)] = 0.2
            epochs: int = 1
            betas: tuple[float, float] = (0.9, 0.999)
            norm: Literal["group", "batch", "off"] = "group"
            kl: float | None = None

            def __post_init__(self) -> None:
                if self.epochs > 1 and self.norm == "off":
                    raise ValueError("epochs above 1 need a norm")
        """,
    "forward.py": """
        from typing import Annotated
        from annotated_types import Gt
        from scratch_lab.clipped import Clipped

        class Forward:
            def __init__(self, beta: Annotated[float, Gt(0)], decay: float = float("inf"), act=abs, **ignored):
                self.beta, self.decay = beta, decay
        """,
    "heavy.py": """
        class Heavy:
            def __init__(self, path: str = "weights"):
                raise AssertionError("load must not build a component")
        """,
    "weighty.py": "class Weighty:\n    def __init__(self, weight: float = 1.0): pass\n",
}

Write = Callable[..., Path]
MINIMAL = "algorithm: clipped\nrun:\n  iterations: 3\n"


@dataclass(frozen=True)
class Weighted:
    weight: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True)
class Schedule:
    warmup: int = 0
    times: list[float] = field(default_factory=lambda: [0.0, 1.0])
    decay: Annotated[Component, In("scratch_lab")] | None = None
    steps: int = field(init=False, default=2)


@dataclass(frozen=True)
class Run:
    iterations: Annotated[int, Ge(1)]
    name: str | None = None
    lr: Annotated[float, Gt(0)] = 3e-4
    resume: bool = True
    output: Path = Path("runs")
    mode: Literal["stop", "warn", "off"] = "warn"
    tags: dict[str, int | str] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.schedule.warmup > self.iterations:
            raise ValueError(f"warmup {self.schedule.warmup} is longer than the run of {self.iterations}")


@dataclass(frozen=True)
class Recipe:
    algorithm: Annotated[Component, In("scratch_lab")]
    run: Run
    rewards: list[Annotated[Component, In("scratch_lab", extra=Weighted)]] = field(default_factory=list)
    advantage: Annotated[Component, In("scratch_lab")] | None = None
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.seed == 13:
            yield "seed", "is unlucky"
            yield "run.schedule.warmup", "is unlucky too"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "scratch_lab").mkdir()
    for name, text in PACKAGE.items():
        (folder / "scratch_lab" / name).write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in [n for n in sys.modules if n.startswith("scratch_lab")]:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file and returns its path, which is relative: the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "c.yaml") -> Path:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return Path(name)

    return write


def read(path: Path, *overrides: str) -> Recipe:
    return load(path, overrides, Recipe).recipe


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, Recipe)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_every_kind_of_value(write: Write) -> None:
    recipe = read(
        write("""
algorithm: {name: "clipped:Clipped", clip: 1e-4, betas: [0, 1], norm: off}
run: {iterations: 3, name: 2026-01-31, lr: 3e-4, output: a/b, mode: off, tags: {on: 1, b: no}, schedule: {times: [1]}}
rewards: {name: forward, beta: 2, weight: 3}
advantage: null
""")
    )
    clipped = recipe.algorithm.build()
    assert (clipped.clip, clipped.epochs, clipped.betas, clipped.norm) == (1e-4, 1, (0.0, 1.0), "off")
    assert type(clipped).__module__ == "scratch_lab.clipped"
    tags: dict[str, int | str] = {"on": 1, "b": "no"}
    assert recipe.run == Run(3, "2026-01-31", 3e-4, True, Path("a/b"), "off", tags, Schedule(times=[1.0]))
    assert [(r.extra, r.options["beta"], r.build().beta) for r in recipe.rewards] == [(Weighted(3.0), 2.0, 2.0)]
    assert (recipe.advantage, recipe.seed) == (None, 0)


def test_a_name_alone_is_the_component_that_bears_the_modules_name(write: Write) -> None:
    short = read(write(MINIMAL)).algorithm
    full = read(write(MINIMAL.replace("clipped", "{name: scratch_lab.clipped:Clipped}"))).algorithm
    assert short.factory is full.factory and short.options == full.options and short.name == "clipped"


def test_a_component_in_a_file(write: Write) -> None:
    write("from dataclasses import dataclass\n@dataclass\nclass Mine:\n    x: float = 1.0\n", "mine.py")
    path = write(MINIMAL.replace("clipped", "{name: 'mine.py:Mine', x: 2}"))
    assert read(path).algorithm.build().x == 2.0 and read(path) == read(path)


def test_components_are_not_built_unless_they_are_dataclasses(write: Write) -> None:
    component = read(write(MINIMAL), "algorithm=heavy").algorithm
    assert component.options == {"path": "weights"}
    with pytest.raises(AssertionError):
        component.build()


def test_dumping_and_loading_is_the_identity(write: Write) -> None:
    """Defaults and all, but for those that YAML cannot say: of forward they are infinity and a function."""
    words = ["run.tags={a: off, b: '3', c: 3}", 'run.name="über\\nzwei"', "algorithm.clip=1e-05", "rewards=[heavy, clipped]"]
    recipe = read(write(MINIMAL), *words, "rewards.1.weight=2", "advantage={name: forward, beta: 1}")
    again = read(write(dump(recipe), "again.yaml"))
    assert again == recipe and dump(again) == dump(recipe)
    assert "epochs: 1" in dump(recipe) and "warmup: 0" in dump(recipe) and "weight: 1.0" in dump(recipe)
    assert again.advantage is not None and again.advantage.options["act"] is abs


def test_a_default_component_has_its_options_filled_in(write: Write) -> None:
    @dataclass(frozen=True)
    class Other:
        run: Run
        algorithm: Annotated[Component, In("scratch_lab")] = field(
            default_factory=lambda: Component("clipped", read(Path("c.yaml")).algorithm.factory, {"clip": 0.5})
        )

    path = write(MINIMAL)
    recipe = load(write("run: {iterations: 3}", "other.yaml"), [], Other).recipe
    assert recipe.algorithm == read(path, "algorithm.clip=0.5").algorithm
    assert load(write(dump(recipe), "again.yaml"), [], Other).recipe == recipe


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides(write: Write, dashes: str) -> None:
    path = write(MINIMAL + "rewards: [clipped, {name: forward, beta: 1}]\n")
    words = ["run.schedule.warmup=2", "algorithm.clip=0.5", "rewards.1.beta=7", "rewards.0.weight=2", "run.name=a=b"]
    recipe = read(path, *(dashes + word for word in words))
    assert (recipe.run.schedule.warmup, recipe.run.iterations, recipe.run.name) == (2, 3, "a=b")
    assert recipe.algorithm.options["clip"] == 0.5
    assert recipe.rewards[1].options["beta"] == 7.0 and recipe.rewards[0].extra == Weighted(2.0)
    assert read(path, "seed=1", "seed=2").seed == 2
    below = ["run.schedule.decay={name: clipped, clip: 0.5}", "run.schedule.decay.name=heavy"]
    decay = read(path, *below).run.schedule.decay
    assert decay is not None and decay.options == {"path": "weights"}
    assert read(path, "run.tags={a: 1}", "run.tags.b=2").run.tags == {"a": 1, "b": 2}


def test_extends(write: Write) -> None:
    write("seed: 1\nalgorithm: {name: clipped, clip: 0.5}\nrun:\n  iterations: 3\n  lr: -1\n", "base.yaml")
    path = write("extends: base.yaml\nrun: {lr: 1e-3}\nadvantage: {name: clipped}\n")
    config = load(path, ["run.schedule.warmup=2"], Recipe)
    assert config.recipe.run == Run(3, lr=1e-3, schedule=Schedule(2))
    assert config.recipe.algorithm.options["clip"] == 0.5
    places = {"seed": "base.yaml:1", "run.iterations": "base.yaml:4", "run.lr": "c.yaml:2", "run.mode": "c.yaml:2"}
    places |= {"run.schedule.warmup": "command line (run.schedule.warmup=2)", "rewards": "c.yaml:1"}
    assert {key: config.where(key) for key in places} == places
    replaced = read(write("extends: base.yaml\nalgorithm: {name: forward, beta: 1}\nrun: {lr: 1}\n"))
    assert "clip" not in replaced.algorithm.options
    both = [
        "base.yaml:5: run.lr: should be greater than 0, got -1; the default is 0.0003",
        "c.yaml:2: seed: should be a whole number, got true; the default is 0",
    ]
    assert problems(write("extends: base.yaml\nseed: true\n")) == both


# What follows MINIMAL in a file -> a part of the only thing that must be said.
BAD = [
    ("optimiser: 1", "c.yaml:4: optimiser: unknown key; a config takes algorithm, run, rewards"),
    ("reward: [clipped]", "c.yaml:4: reward: unknown key; did you mean 'rewards'?"),
    ("  nmae: x", "c.yaml:4: run.nmae: unknown key; did you mean 'name'? run takes iterations"),
    ("  schedule:\n    warm: 1", "c.yaml:5: run.schedule.warm: unknown key; did you mean 'warmup'?"),
    ("advantage:\n  name: clipped\n  clipp: 1", "c.yaml:6: advantage.clipp: unknown key; did you mean 'clip'?"),
    ("advantage: {name: clipped, beta: 1}", "Clipped takes clip, epochs, betas, norm, kl"),
    ("advantage: {name: forward, beta: 1, anything: 1}", "advantage.anything: unknown key"),
    ("rewards:\n- clipped\n- {name: clipped, wieght: 1}", "c.yaml:6: rewards.1.wieght: unknown key; did"),
    ("rewards: [{name: clipped, weight: 0}]", "c.yaml:4: rewards.0.weight: should be greater than 0, got 0"),
    ("advantage: forward", "c.yaml:4: advantage.beta: missing; Forward needs it"),
    ("seed: many", 'c.yaml:4: seed: should be a whole number, got "many"'),
    ('seed: "3"', "seed: should be a whole number"),
    ("seed: 1.5", "seed: should be a whole number, got 1.5"),
    ("seed: true", "seed: should be a whole number, got true"),
    ("seed:", "seed: should be a whole number, got null"),
    ("  lr: true", "run.lr: should be a number, got true"),
    ("  lr: .nan", "run.lr: should be a number"),
    ("  lr: .inf", "run.lr: should be a number"),
    ("  lr: 1e400", "run.lr: should be a finite number"),
    ("  lr: -3e-4", "c.yaml:4: run.lr: should be greater than 0, got -0.0003"),
    ("  resume: 1", "run.resume: should be true or false"),
    ("  name: 12", "run.name: should be a text, got 12"),
    ("  mode: wran", "run.mode: should be 'stop', 'warn' or 'off', got \"wran\"; did you mean 'warn'?"),
    ("  schedule:\n    times:\n    - 1\n    - x", "c.yaml:7: run.schedule.times.1: should be a number"),
    ("  tags: [1]", "run.tags: should be a mapping, got [1]"),
    ("  tags: {a: 1.5}", "run.tags.a: should be a whole number or should be a text, got 1.5"),
    ("advantage: {name: clipped, betas: [1]}", "advantage.betas: an item is missing, got [1]"),
    ("advantage: {name: clipped, clip: 1}", "advantage.clip: should be less than 1, got 1"),
    ("  schedule: []", "run.schedule: should be a mapping of keys to values, got []"),
    ("  schedule:", "run.schedule: should be a mapping of keys to values, got null"),
    ("advantage: 3", "advantage.name: should name a component of scratch_lab: clipped, forward"),
    ("advantage: {clip: 1}", "advantage.name: should name a component of scratch_lab"),
    ("advantage: cliped", "there is no module cliped in scratch_lab; did you mean 'clipped'? it has clipped"),
    ("advantage: clipped:Cliped", "no class or function Cliped in scratch_lab.clipped; did you mean 'Clipped'?"),
    ("rewards: weighty", "rewards.0.name: Weighty has an argument 'weight', which means something else"),
    ("  schedule: {warmup: 9}", "c.yaml:2: run: warmup 9 is longer than the run of 3"),
    ("advantage: {name: clipped, epochs: 2, norm: off}", "c.yaml:4: advantage: epochs above 1 need a norm"),
    ("seed: 1\nseed: 2", "c.yaml:5: seed: written twice; first at c.yaml:4"),
    ("run.name: x", "c.yaml:4: run.name: unknown key"),
    ("<<: {seed: 1}", "c.yaml:4: <<: unknown key"),
    ("seed: !!python/object/apply:os.getpid []", "c.yaml:4: not the YAML of a config: a tag (tag:yaml.org"),
    ('"\\e[31m": 1', "c.yaml:4: \\x1b[31m: unknown key"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_bad_file(write: Write, text: str, said: str) -> None:
    found = problems(write(MINIMAL + text + "\n"))
    assert len(found) == 1 and said in found[0] and found[0].isprintable(), found


# A word of the command line -> the same.
BAD_WORDS = [
    ("algorithm.clipp=1", "command line (algorithm.clipp=1): algorithm.clipp: unknown key; did you mean 'clip'?"),
    ("--seed=x", "command line (--seed=x): seed: should be a whole number"),
    ("optim.lr=1", "command line (optim.lr=1): optim: unknown key"),
    ("algorithm.clip", "command line (algorithm.clip): should be key=value"),
    ("seed=!!python/name:os.system", "a tag (tag:yaml.org,2002:python/name:os.system) is refused"),
    ("run.lr=0", "command line (run.lr=0): run.lr: should be greater than 0, got 0"),
    ("rewards.2.weight=1", "rewards.2: there is no item 2: the list has 1"),
    ("run.schedule.0.x=1", "run.schedule.0: unknown key"),
    ("seed.x=1", 'seed: should be a whole number, got {"x": 1}'),
    ("algorithm.name=forward", "command line (algorithm.name=forward): algorithm.beta: missing"),
    ("run.schedule.warmup=9", "c.yaml:2: run: warmup 9 is longer"),
    ("extends=b.yaml", "command line (extends=b.yaml): extends: unknown key"),
]


@pytest.mark.parametrize(("word", "said"), BAD_WORDS)
def test_bad_override(write: Write, word: str, said: str) -> None:
    found = problems(write(MINIMAL + "rewards: clipped\n"), word)
    assert len(found) == 1 and said in found[0], found


def test_everything_wrong_is_said_at_once(write: Write) -> None:
    text = """seed: 1
seed: x
sead: 1
algorithm: {name: clipped, clip: 3, clap: 2}
run:
  lr: -1
  schedule: {warmup: x}
rewards: [nope, {name: forward, weight: -1}]
"""
    found = problems(write(text), "oops", "run.resume=3", "advantage=3")
    assert [line.split(": ")[1] for line in found[:2]] == [
        "seed",
        "should be key=value, with dots between the parts of the key, as in optimizer.lr=1e-4",
    ]
    wrong = "sead algorithm.clap algorithm.clip run.iterations run.lr run.resume run.schedule.warmup"
    wrong += " rewards.0.name rewards.1.beta rewards.1.weight advantage.name seed"
    assert [line.split(": ")[1] for line in found[2:]] == wrong.split()


def test_the_schema_has_the_last_word(write: Write) -> None:
    path = write(MINIMAL + "  schedule:\n    times: [1]\nseed: 13\n")
    assert problems(path) == ["c.yaml:6: seed: is unlucky", "c.yaml:4: run.schedule.warmup: is unlucky too"]
    assert problems(path, "seed=13")[0] == "command line (seed=13): seed: is unlucky"
    assert "unlucky" not in problems(path, "sead=1")[0]


def test_refuse_is_for_what_is_found_later(write: Write) -> None:
    config = load(write(MINIMAL + "rewards:\n  name: forward\n  beta: 1\n"), [], Recipe)
    config.refuse([])
    with pytest.raises(ConfigError) as caught:
        config.refuse([("run.iterations", "too many"), ("rewards.0.beta", "too few")])
    assert caught.value.problems == ["c.yaml:3: run.iterations: too many", "c.yaml:6: rewards.0.beta: too few"]


def test_importing_config_is_light() -> None:
    code = "import sys, ddpo.config; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_dictionary_with_numbers_as_keys(write: Write) -> None:
    @dataclass(frozen=True)
    class Steps:
        rates: dict[int, float]
        anything: Any = None

    config = load(write("rates: {1: 0.5, 10: 2}\nanything: {0: [true, null]}\n"), ["rates.10=3"], Steps)
    assert config.recipe == Steps({1: 0.5, 10: 3.0}, {"0": [True, None]})
    assert load(write(dump(config.recipe), "again.yaml"), [], Steps).recipe == config.recipe
