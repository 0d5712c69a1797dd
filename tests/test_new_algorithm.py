"""The algorithm of docs/new-algorithm.md: one file, not registered anywhere, and it trains."""

import re
from pathlib import Path

import pytest
import torch

from ddpo.config import ConfigError, load
from ddpo.recipe import Recipe
from tests.test_trainer import ODE, lines, trainer_of, weights

DOC = (Path(__file__).parent.parent / "docs" / "new-algorithm.md").read_text()
RECIPE = "configs/menagerie_alignment.yaml"
ODE_WORD = "rollout.solver={name: 'diffusion:DDIM', eta: 0}"


@pytest.fixture
def plug_in(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    path = tmp_path / "my_algorithm.py"
    path.write_text(code)
    return path


def test_the_file_is_all_it_takes_to_train(plug_in, tiny, tmp_path):
    recipe = load(RECIPE, [f"algorithm={{name: '{plug_in}:Pull', near: 2.0}}", ODE_WORD], Recipe).recipe
    algorithm = recipe.algorithm.build()
    assert algorithm.near == 2.0 and algorithm.passes(3) == 1
    whole = trainer_of(tmp_path / "whole", tiny, algorithm=algorithm, solver=ODE, iterations=2)
    before = weights(whole)
    whole.run()
    assert not torch.equal(weights(whole), before) and lines(tmp_path / "whole")[-1]["distance"] >= 0
    small = trainer_of(tmp_path / "small", tiny, algorithm=algorithm, solver=ODE, iterations=2, micro_batch=2)
    small.run()
    torch.testing.assert_close(weights(small), weights(whole), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("word, told", [("near: -1", "at least 0"), ("neer: 2", "did you mean 'near'")])
def test_its_options_are_checked_as_all_are(plug_in, word, told):
    with pytest.raises(ConfigError, match=told):
        load(RECIPE, [f"algorithm={{name: '{plug_in}:Pull', {word}}}", ODE_WORD], Recipe)
