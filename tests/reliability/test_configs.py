"""Forty bad configs: each answered at once with where, what, what is allowed and the fix, before anything heavy is imported.

pytest tests/reliability/test_configs.py        half a minute: five of them go through the real command.

What each rule of the reader does is in tests/test_config.py and tests/test_yaml_lines.py.
"""

import os
import subprocess
import sys

import pytest

from ddpo import experiment
from ddpo.config import ConfigError
from tests.command import ENVIRONMENT
from tests.reliability.bad_configs import CONFIGS, GOOD, Bad, line

HEAVY = ("diffusers", "transformers", "peft", "accelerate", "open_clip")
THROUGH_THE_COMMAND = ("a misspelt option", "beyond every number", "a bomb of anchors", "a pipe", "everything at once")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(bad: Bad, lines: list[str]) -> None:
    assert len(lines) == len(bad.said), lines
    for said, wanted in zip(lines, bad.said, strict=True):
        assert all(part in said for part in wanted), f"{said!r} lacks {[part for part in wanted if part not in said]}"
        assert said.isprintable() and len(said) < 600, said


def test_the_config_that_all_of_them_spoil_is_good(folder):
    line("", file=GOOD).place()
    assert experiment.read("c.yaml", [], 1).recipe.run.iterations == 2


def test_there_are_forty():
    assert len(CONFIGS) == 40


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_is_told(name):
    bad = CONFIGS[name]
    bad.place()
    with pytest.raises(ConfigError) as caught:
        experiment.read(bad.path, list(bad.words), 1)
    check(bad, str(caught.value).splitlines())


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
def test_the_command_ends_with_code_2_and_no_traceback(name, folder):
    """The command in a process of its own, which says at its end which libraries it has imported."""
    bad = CONFIGS[name]
    bad.place()
    code = (
        "import sys\n"
        "from ddpo import train\n"
        f"code = train.main([{bad.path!r}, *{list(bad.words)!r}])\n"
        f"print('heavy:', [m for m in {HEAVY} if m in sys.modules])\n"
        "sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.strip()) == (2, "heavy: []"), ended.stderr
    check(bad, ended.stderr.splitlines())
    assert sorted(os.listdir(folder)) == ["c.yaml"], "a config that is wrong leaves nothing behind"
