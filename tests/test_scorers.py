"""`ddpo rewards ...` as a user types it: `pytest tests/test_scorers.py`"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import rewards
from ddpo import cli, components
from ddpo.experiment import read
from ddpo.rewarding import Scoring, rubrics
from rewards._pictures import to_pil
from rewards.jpeg import Compressibility

ROOT = Path(__file__).parent.parent


def shown(capsys, *words) -> str:
    assert cli.main(["rewards", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert cli.main(["rewards", *words]) == 2
    return capsys.readouterr().err


def scorers() -> list[type]:
    """Every class of the package that a config may name."""
    modules = [importlib.import_module(f"rewards.{name}") for name in components.modules("rewards")]
    own = [v for m in modules for v in vars(m).values() if isinstance(v, type) and v.__module__ == m.__name__]
    return [v for v in own if not v.__name__.startswith("_") and any("__call__" in vars(base) for base in v.__mro__)]


def test_list_names_every_scorer_once(capsys):
    lines = shown(capsys, "list").splitlines()
    names = [line.split()[0] for line in lines[1:] if line and not line.startswith("Your own")]
    assert len(names) == len(set(names))
    for scorer in scorers():
        module = scorer.__module__.removeprefix("rewards.")
        assert module in names or f"{module}:{scorer.__name__}" in names, scorer


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.__name__)
def test_every_scorer_says_what_it_is_and_stands_in_the_documentation(scorer):
    card = scorer.card
    assert isinstance(card, rewards.Card) and card.range and card.gamed_by and card.watch and scorer.__doc__
    page = (ROOT / "docs" / "rewards.md").read_text()
    alone = [s.__module__ for s in scorers()].count(scorer.__module__) == 1
    assert f"`{scorer.__module__.removeprefix('rewards.')}" in page and (alone or scorer.__name__ in page)
    extras = (ROOT / "pyproject.toml").read_text()
    assert not card.extra or f"\n{card.extra} = [" in extras


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.__name__)
def test_every_option_can_be_set_in_a_config(scorer):
    beside = {"name", *components.parameters(Scoring)}
    assert not beside & components.parameters(scorer).keys()


def test_every_line_of_the_documentation_is_a_reward(tmp_path):
    page = (ROOT / "docs" / "rewards.md").read_text()
    block = page.partition("### A line for each")[2].partition("```yaml\n")[2].partition("```")[0]
    lines = [line for line in block.splitlines() if "name: learned" not in line]  # which needs a head that was trained
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for folder in ("references/", "pictures/"):
        lines = [line.replace(folder, str(tmp_path)) for line in lines]
    config = tmp_path / "run.yaml"
    config.write_text(f"extends: {ROOT / 'configs' / 'menagerie_compressibility.yaml'}\nrewards:\n" + "\n".join(lines))
    recipe = read(str(config), [], 1).recipe
    rubric, _ = rubrics(recipe.rewards, [], recipe.objective)
    assert len(rubric.parts) == len(lines) > 10


def test_info_shows_the_options_and_how_it_is_gamed(capsys):
    text = shown(capsys, "info", "jpeg:Compressibility")
    assert "quality   95" in text and "gamed by" in text and "kB" in text
    assert "did you mean 'Compressibility'" in refused(capsys, "info", "jpeg:Compresibility")


def test_score_says_what_the_scorer_says(capsys, tmp_path):
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / "one.png", tmp_path / "two=2.png"]
    for path, picture in zip(paths, to_pil(images), strict=True):
        picture.save(path)
    text = shown(capsys, "score", "jpeg:Compressibility", *map(str, paths), "-p", "a cat", "quality=40")
    eight_bit = (images * 255).round() / 255
    wanted = Compressibility(40)(eight_bit, [], [])
    assert [float(line.split()[-1]) for line in text.splitlines()] == pytest.approx(wanted.tolist())
    assert "cannot be scored" in shown(capsys, "score", "scene:Colour", str(paths[0]), "-p", "a cat")
    assert "name at least one picture" in refused(capsys, "score", "scene:Colour", "-p", "a cat")
    (tmp_path / "bad.png").write_bytes(b"GIF89a")
    assert "not a whole PNG" in refused(capsys, "score", "scene:Colour", str(tmp_path / "bad.png"), "-p", "a cat")
    Image.new("RGB", (5000, 2)).save(tmp_path / "wide.png")
    assert "at most 4096 pixels" in refused(capsys, "score", "scene:Colour", str(tmp_path / "wide.png"), "-p", "a cat")


@pytest.mark.slow
def test_check_tries_ones_own_in_its_own_process(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def clear(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    text = shown(capsys, "check", f"{file}:clear")
    assert "clear keeps the contract" in text and "none" in text  # no gradient passes between processes
    assert "reaches the pictures" in shown(capsys, "check", f"{file}:clear", "isolate=false")
    file.write_text("def clear(images, prompts, metadata):\n    return 1 / 0\n")
    again = tmp_path / "again.py"
    again.write_text(file.read_text())
    assert f"ZeroDivisionError: division by zero ({again}:2, in clear)" in refused(capsys, "check", f"{again}:clear")
    assert "did you mean 'quality'" in refused(capsys, "check", "jpeg:Compressibility", "qualty=3")
    metadata = json.dumps({"wanted": 1})
    assert "keeps the contract" in shown(
        capsys, "check", "tests.misbehaving:Named", "-p", "x", "-p", "x", "-m", metadata, "-m", metadata
    )
