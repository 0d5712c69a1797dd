"""A scorer in its own process: whatever it does, the run is told and no process is left. `pytest tests/test_rewards_isolated.py`

Starting a process takes seconds, so those that behave are started once.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import rewards
from rewards import RewardError
from rewards._isolated import Isolated
from tests import misbehaving

PROMPTS = ["a cat", "two owls", "a fox"]
IMAGES = torch.rand(3, 3, 32, 24, generator=torch.Generator().manual_seed(1))
EMPTY: list[dict] = [{}, {}, {}]


@pytest.fixture
def isolated():
    """Makes isolated scorers, and looks that closing them leaves no process."""
    made = []

    def make(factory, timeout=60.0, **options):
        made.append(Isolated(factory, options, timeout))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
    assert children() == []


def children() -> list[str]:
    """Processes of the scorers that this process started, dead ones that nobody waited for included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_text()
            if int(parent) == os.getpid() and ("rewards._worker" in command or state == "Z"):
                found.append(f"{stat.parent.name} {state} {command}")
    return found


def gate(scorer, images=IMAGES, prompts=PROMPTS, metadata=EMPTY):
    return rewards.score(scorer.name, scorer, images, prompts, metadata)


def test_it_scores_to_the_bit_what_it_would_in_this_process_and_batches_may_grow(isolated):
    scorer = isolated(misbehaving.well, power=0.5)
    for rows in (1, 3, 2):
        given = IMAGES[:rows], PROMPTS[:rows], EMPTY[:rows]
        assert torch.equal(gate(scorer, *given), rewards.score("well", lambda *a: misbehaving.well(*a, 0.5), *given))
    assert not scorer.differentiable
    before = IMAGES.clone()
    rewards.check(scorer)
    assert torch.equal(IMAGES, before)


def test_it_keeps_its_state_and_is_moved(isolated):
    scorer = isolated(misbehaving.Slow, start=40)
    scorer.to("cpu")
    assert [gate(scorer)[0].item() for _ in range(2)] == [41, 42]


def test_metadata_and_gaps_pass_and_the_class_says_what_it_is(isolated):
    scorer = isolated(misbehaving.Named)
    assert (scorer.name, scorer.groupwise) == ("my_judge", True)
    assert gate(scorer, metadata=[{"wanted": 1}, {}, {"wanted": 0.25, "é": ["x"]}]).nan_to_num(-1).tolist() == [1, -1, 0.25]


def test_what_it_prints_does_not_reach_the_protocol(isolated, capfd):
    scorer = isolated(misbehaving.prints)
    assert torch.equal(gate(scorer), misbehaving.well(IMAGES, PROMPTS, EMPTY).double())
    for _ in range(100):
        if "[prints] hello" in (printed := capfd.readouterr().err):
            break
        time.sleep(0.05)
    assert "[prints] hello" in printed


def test_it_gets_no_token_that_it_was_not_promised(isolated, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert gate(isolated(misbehaving.tells_its_environment)).tolist() == [0, 0, 0]
    promised = Isolated(misbehaving.tells_its_environment, {}, environment=["SECRET_TOKEN"])
    assert gate(promised).tolist() == [1, 1, 1]
    promised.close()


TOLD_AT_ONCE = {  # what it does: what must be said; its process lives on, for trying again would not help
    "raises": r"reward 'raises' raised KeyError: 'count' \(.*misbehaving.py:\d+, in raises\)",
    "changes_its_input": "changed the images",
    "leaves": "SystemExit: no more",
    "eats_memory": "raised (RuntimeError|MemoryError|OutOfMemoryError)",
}


@pytest.mark.parametrize("kind", TOLD_AT_ONCE)
def test_an_exception_is_told_and_not_tried_again(isolated, kind):
    scorer = isolated(getattr(misbehaving, kind))
    with pytest.raises(RewardError, match=TOLD_AT_ONCE[kind]):
        gate(scorer)
    assert scorer.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hangs", "hangs_deaf"])
def test_what_hangs_is_killed_at_its_deadline_and_tried_twice_more(isolated, kind):
    scorer = isolated(getattr(misbehaving, kind), timeout=0.3)
    with pytest.raises(RewardError, match=rf"reward '{kind}' failed 3 times, last: no answer in 0.3 s"):
        gate(scorer)
    assert children() == []


def test_what_a_hanging_scorer_started_is_killed_with_it(isolated, tmp_path):
    note = tmp_path / "pid"
    scorer = isolated(misbehaving.hangs_with_a_child, timeout=1.0, note=str(note))
    with pytest.raises(RewardError, match="no answer in 1 s"):
        gate(scorer)
    stat = Path(f"/proc/{note.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # gone, or dead and left to init


@pytest.mark.parametrize(
    ("kind", "message"),
    [("segfaults", r"killed by SIGSEGV\. It printed last:\n    about to fall"), ("exits", "with exit code 7")],
)
def test_what_dies_is_started_again_and_then_told_with_its_last_words(isolated, kind, message):
    with pytest.raises(RewardError, match=f"failed 3 times, last: its process died, {message}"):
        gate(isolated(getattr(misbehaving, kind)))


def test_what_dies_once_goes_on_and_is_counted(isolated, tmp_path, capsys):
    scorer = isolated(misbehaving.dies_once, note=str(tmp_path / "note"))
    assert torch.equal(gate(scorer), misbehaving.well(IMAGES, PROMPTS, EMPTY).double())
    assert scorer.restarts == 1 and "attempt 1 of 3: its process died" in capsys.readouterr().err


def test_a_scorer_that_cannot_be_made_is_told_by_load(isolated):
    with pytest.raises(RewardError, match="FileNotFoundError: no weights here"):
        isolated(misbehaving.Broken).load()


def test_one_that_learns_must_share_the_process():
    class Learner:
        def refresh(self, images, prompts, metadata):
            pass

    with pytest.raises(ValueError, match="isolate: false"):
        Isolated(Learner, {})


def test_it_dies_with_a_run_that_is_killed(tmp_path):
    note = tmp_path / "pid"
    code = f"""
        import os, signal
        from pathlib import Path
        from rewards._isolated import Isolated
        from tests import misbehaving
        scorer = Isolated(misbehaving.well, {{}})
        scorer.load()
        Path({str(note)!r}).write_text(str(scorer._process.popen.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    stat = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(200):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the scorer's process outlived the run")
