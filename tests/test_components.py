"""Finding components: a short name, a full one and a file lead to the same kind of thing, and a wrong one says what there is.

python -m pytest tests/test_components.py        2 s. The components live in a package made for the test.
"""

import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from ddpo.components import Component, NotFound, find, modules, parameters

PACKAGE = {
    "__init__.py": "",
    "_hidden.py": "",
    "nft.py": """
        from __future__ import annotations
        from dataclasses import dataclass, field
        from pathlib import Path

        def helper(x): ...

        @dataclass
        class Base:
            where: Path = Path("base")

        @dataclass
        class NFT(Base):
            beta: float = field(default=0.5, kw_only=True)
            times: list[int] = field(default_factory=lambda: [1, 2])
            count: int = field(default=0, init=False)
        """,
    "clip_score.py": "class ClipScore: ...\nclass Other: ...\n",
    "heir.py": "from scratch_nook.nft import NFT\nclass Heir(NFT): ...\n",
    "several.py": "class One: ...\nclass Two: ...\n",
    "empty.py": "from math import sqrt\nfrom pathlib import Path\n_Hidden = type('_Hidden', (), {})\n",
    "needs.py": "import no_such_library\n",
    "broken.py": "x = 1\n1 / 0\n",
    "typo.py": "def f(:\n",
    "vague.py": "from __future__ import annotations\nclass Vague:\n    def __init__(self, table: Missing): ...\n",
}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "scratch_nook").mkdir()
    for name, text in PACKAGE.items():
        (folder / "scratch_nook" / name).write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in [n for n in sys.modules if n.startswith("scratch_nook")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nft:NFT", "nft.NFT"),
        ("nft", "nft.NFT"),
        ("nft:helper", "nft.helper"),
        ("scratch_nook.nft:NFT", "nft.NFT"),
        ("scratch_nook.nft", "nft.NFT"),
        ("clip_score", "clip_score.ClipScore"),
        ("heir", "heir.Heir"),
        ("heir:NFT", "nft.NFT"),
    ],
)
def test_names(name: str, found: str) -> None:
    factory = find(name, "scratch_nook")
    assert f"{factory.__module__}.{factory.__qualname__}" == f"scratch_nook.{found}"


BAD = {
    "nfd": "there is no module nfd in scratch_nook; did you mean 'nft'? it has broken, clip_score, empty, heir, needs",
    "nft:NTF": "there is no class or function NTF in scratch_nook.nft; did you mean 'NFT'? it has helper, Base, NFT",
    "nft:__name__": "there is no class or function __name__",
    "scratch_nook.nfd:NFT": "there is no module nfd in scratch_nook; did you mean 'nft'?",
    "scratch_nook.nft.deeper:NFT": "there is no module deeper in scratch_nook.nft; it has none",
    "no_such_lab.scores:Mine": "there is no module no_such_lab; is its folder on PYTHONPATH?",
    "several": "scratch_nook.several has One, Two; write several:Name to choose one",
    "empty": "scratch_nook.empty has no component",
    "../nft": "'../nft' is no component's name; write module, module:Class, or path/to/file.py:Class",
    "": "'' is no component's name",
    "needs": "scratch_nook.needs cannot be imported: ModuleNotFoundError: No module named 'no_such_library' (",
    "broken": "scratch_nook.broken cannot be imported: ZeroDivisionError: division by zero (",
    "typo": "scratch_nook.typo cannot be imported: SyntaxError",
    "none.py:Mine": "there is no file none.py in ",
}


@pytest.mark.parametrize(("name", "said"), BAD.items(), ids=BAD)
def test_bad_names(name: str, said: str) -> None:
    with pytest.raises(NotFound) as caught:
        find(name, "scratch_nook")
    assert said in str(caught.value)


def test_a_broken_module_is_shown_where_it_breaks() -> None:
    with pytest.raises(NotFound, match=r"broken\.py:2\)$"):
        find("broken", "scratch_nook")
    with pytest.raises(NotFound, match=r"\(typo\.py, line 1\)$"):
        find("typo", "scratch_nook")


def test_a_component_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded once, so that its class is one class; and again after it failed and was mended."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("1 / 0")
    with pytest.raises(NotFound, match=r"mine\.py cannot be imported: ZeroDivisionError.*mine\.py:1\)"):
        find("mine.py:Mine", "scratch_nook")
    lines = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "@dataclass",
        "class Mine:",
        "    x: float = 1",
    ]
    Path("mine.py").write_text("\n".join(lines))
    mine = find("mine.py:Mine", "scratch_nook")
    assert mine is find("./mine.py", "scratch_nook") is find(f"{tmp_path}/mine.py:Mine", "scratch_nook")
    assert parameters(mine)["x"].annotation is float


def test_modules_are_listed_without_being_imported() -> None:
    sys.modules.pop("scratch_nook.several", None)
    assert modules("scratch_nook") == sorted(name[:-3] for name in PACKAGE if not name.startswith("_"))
    assert "scratch_nook.several" not in sys.modules


def test_parameters_are_the_arguments_that_can_be_given_by_name() -> None:
    found = parameters(find("nft", "scratch_nook"))
    assert {key: p.annotation for key, p in found.items()} == {"where": Path, "times": list[int], "beta": float}

    def function(a: int, /, b: str, *c: int, d: float = 2.0, **e: int) -> None: ...

    assert list(parameters(function)) == ["b", "d"]
    assert parameters(function)["b"].default is None


def test_unreadable_parameters_are_refused() -> None:
    with pytest.raises(NotFound, match="cannot be read: name 'Missing' is not defined"):
        parameters(find("vague", "scratch_nook"))


def test_a_component_has_all_its_options() -> None:
    factory = find("nft", "scratch_nook")
    one, two = Component("nft", factory, {"beta": 2.0}), Component("nft", factory, {"beta": 2.0})
    assert one == two and one.options == {"where": Path("base"), "times": [1, 2], "beta": 2.0}
    assert list(one.options) == list(parameters(factory)) and one.options["times"] is not two.options["times"]
    assert one.build().beta == 2.0 and one.build() is not one.build()


def later(x, y, power: float = 1.0):
    return x * y**power


def test_a_function_that_is_called_later_is_itself_the_component():
    factory = find(f"{__name__}:later", "scratch_nook", ("x", "y"))
    assert list(parameters(factory)) == ["power"] and factory.__module__ == __name__
    assert Component("later", factory, {"power": 2.0}).build()(3, y=2) == 12
    plain = find(f"{__name__}:later", "scratch_nook", ("images",))  # a function that makes the component
    assert list(parameters(plain)) == ["x", "y", "power"]
    with pytest.raises(NotFound, match="the function later lacks z: it is called with x, z"):
        find(f"{__name__}:later", "scratch_nook", ("x", "z"))


def test_installed_packages_offer_components_by_name_and_ours_come_first(monkeypatch):
    offers = [
        metadata.EntryPoint(name, value, "ddpo.scratch_nook")
        for name, value in (
            ("theirs", "scratch_nook.several:Two"), ("nft", "scratch_nook.several:Two"), ("gone", "scratch_nook.several:Three"),
        )
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "entry_points", lambda group: [o for o in offers if o.group == group])
    assert find("theirs", "scratch_nook").__name__ == "Two" and find("nft", "scratch_nook").__name__ == "NFT"
    with pytest.raises(NotFound, match=r"'gone' of scratch_nook\.several:Three cannot be imported: AttributeError"):
        find("gone", "scratch_nook")
