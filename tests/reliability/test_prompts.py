"""Twenty prompt files: refused by file and line, or accepted as documented; and prompts are data wherever they go.

pytest tests/reliability/test_prompts.py

What each rule of the reader does is in tests/test_prompts.py.
"""

import dataclasses
import io
import tracemalloc

import pytest
from rich.console import Console

from ddpo import experiment, prompts
from ddpo.config import ConfigError
from ddpo.models.sd import StableDiffusion
from ddpo.progress import Display
from tests.reliability.bad_configs import GOOD
from tests.reliability.bad_prompts import PROMPTS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_twenty():
    assert len(PROMPTS) == 20


@pytest.mark.parametrize("name", [name for name, file in PROMPTS.items() if not file.said])
def test_what_is_accepted_is_read_as_it_stands(name):
    file = PROMPTS[name]
    file.place()
    assert tuple(p.text for p in prompts.load(file.path)) == file.texts


@pytest.mark.parametrize("name", [name for name, file in PROMPTS.items() if file.said])
def test_what_is_refused_is_told_where_it_is_named_in_the_config(name):
    """Through the real entry, as a line of c.yaml."""
    file = PROMPTS[name]
    file.place()
    with open("c.yaml", "w") as config:
        config.write(GOOD.replace("train: menagerie-train", f"train: {file.path}"))
    with pytest.raises(ConfigError) as caught:
        experiment.read("c.yaml", [], 1)
    (said,) = str(caught.value).splitlines()
    assert said.startswith("c.yaml:3: prompts.train: ") and all(part in said for part in file.said), said
    assert said.isprintable() and len(said) < 600


def test_memory_is_that_of_the_prompts_and_not_of_the_file(folder):
    """A prompt costs its text and two small objects, whatever else is in the file: no list of lines, no copy of the text.

    Measured: a prompt of 40 bytes takes 208, so the 500,000 that are read at most take 104 MB.
    """
    (folder / "p.txt").write_text("".join(f"a cat on a background of number {i:07d}\n" for i in range(50_000)))
    tracemalloc.start()
    try:
        found = prompts.load("p.txt")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 50_000
    assert held / len(found) * prompts.MAX_PROMPTS < 200e6
    assert peak - held < 2_000_000, "a file is read a line at a time"


def test_a_file_of_comments_costs_nothing(folder):
    (folder / "p.txt").write_text("# nothing\n" * 50_000 + "a cat\n")
    tracemalloc.start()
    try:
        assert len(prompts.load("p.txt")) == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_what_a_file_says_is_shown_and_not_obeyed(folder):
    """By the lines that a run prints, where metadata and prompts of other files come through."""
    display = Display(True, folder / "train.log")
    display._console = Console(file=(seen := io.StringIO()), force_terminal=True, markup=False, emoji=False, highlight=False)
    display.say("a \x1b[2J cat\r\n[red]two[/red] owls :cat: \u202e {0}")
    assert seen.getvalue() == "a \\x1b[2J cat\\r\n  [red]two[/red] owls :cat: \\u202e {0}\n"
    assert (folder / "train.log").read_text() == seen.getvalue()


def test_prompts_beyond_the_tokenizer_are_told_once_with_their_number(tiny):
    family = StableDiffusion(str(tiny), dtype="float32")
    most = family.reader[1]
    fits, long = " ".join(["cat"] * (most - 2)), " ".join(["cat"] * (most - 1))  # with the marks of beginning and end
    assert family.unread(["a cat", fits]) is None
    said = family.unread(["a cat", long, f"{long} owl"])
    assert said is not None and said.startswith(f"2 of 3 prompts are longer than the {most} tokens that this model reads")
    assert f"the longest has {most + 2}: 'cat cat" in said and "\n" not in said
    assert dataclasses.astuple(prompts.Prompt(long))[0] == long, "the file's prompt itself is left whole"
