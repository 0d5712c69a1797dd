"""What happens to one process of two is soon known to both, said once, and the same command goes on (reliability 2.7).

    pytest tests/reliability/test_ranks_ill.py -m 'slow or not slow'

The real command on a tiny pipeline. Most runs are started by `victims`; those by torchrun are under "The launcher".
A signal to one of two is in tests/test_signals.py.
"""

import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpo.durable import run_lock
from tests.command import ENVIRONMENT, ROOT, check_same
from tests.reliability import ill_ranks
from tests.reliability.ranks import LAUNCHER, Two, dumped, rewards, written
from tests.reliability.victims import ended, said_by, start_ranks


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return written(tiny, tmp_path_factory.mktemp("config"))


def check_ends(run: Two, code: int, *words: str) -> None:
    """Both end with this code; the words are said by the first process alone, and no traceback is shown."""
    assert run.codes == [code, code], run.said
    assert "Traceback" not in "".join(run.said) and run.said[1] == "", run.said
    for word in words:
        assert run.said[0].count(word) == 1, (word, run.said[0])


def failure(folder: Path) -> str:
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed"
    return run["exit_reason"]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def test_a_folder_in_use_ends_both_with_code_2(config, tmp_path):
    with run_lock(tmp_path / "run"):
        run = Two([config], tmp_path / "run")
    check_ends(run, 2, f"is in use by pid {os.getpid()}")
    assert "loading" not in run.said[0] and not (tmp_path / "run" / "run.json").exists()


def test_a_folder_that_cannot_be_ends_both_with_code_2(config, tmp_path):
    (tmp_path / "run").write_text("")
    check_ends(Two([config], tmp_path / "run"), 2, "cannot be a run's folder, choose another")


def test_a_model_that_one_cannot_load_ends_both(config, tmp_path):
    run = Two([config], tmp_path / "run", ill_ranks.no_model)
    check_ends(run, 1, "stopped: process 1: model ", "cannot be loaded: no such model here")


def test_a_journal_that_one_cannot_write_ends_both_and_the_same_command_goes_on(config, tmp_path):
    whole = Two([config], tmp_path / "whole")
    run = Two([config], tmp_path / "run", ill_ranks.full_disk)
    said = (
        f"process 1: {tmp_path / 'run' / 'rewards-rank1.jsonl'} cannot be read or written ([Errno 28] No space left on device)"
    )
    check_ends(run, 1, f"stopped: {said}", "checkpoints/step-00000001; rewards are kept. To go on after mending it:")
    assert failure(run.folder).startswith(said) and leftovers(run.folder) == []
    assert (run.folder / "checkpoints" / "latest").read_text() == "step-00000001\n"
    kept = rewards(run.folder)
    assert sum(iteration == 1 for iteration, *_ in kept) == 8  # of the other process, which had been asked for
    check_same(whole.lora(), Two([config], tmp_path / "run").lora())
    assert rewards(run.folder) == rewards(whole.folder) and kept.items() <= rewards(run.folder).items()


@pytest.mark.parametrize("before, why", [(ill_ranks.bad_loss, "a loss"), (ill_ranks.bad_gradient, "the gradient")])
def test_numbers_that_are_not_finite_on_one_are_learned_from_by_none(config, tmp_path, before, why):
    (tmp_path / "dumps").mkdir()
    run = Two([config, "run.iterations=2"], tmp_path / "run", functools.partial(before, tmp_path / "dumps"))
    assert run.codes == [0, 0], run.said
    moved, *rest = (dumped(tmp_path / "dumps", rank, iteration) for rank, iteration in ((0, 1), (1, 1), (0, 2), (1, 2)))
    for other in rest:
        check_same(moved, other)
    assert any(not torch.equal(w, moved[name]) for name, w in dumped(tmp_path / "dumps", 0, 0).items())
    assert run.said[0].count(f"iteration 2: update 1 was skipped, for {why} is not finite") == 1 and run.said[1] == ""
    if why == "a loss":  # the first of each four that process 1 drew: it drew groups 2 and 3
        assert "(group 2, member 0)" in run.said[0] and "(group 3, member 0)" in run.said[0]
        assert "(group 0," not in run.said[0] and "(group 1," not in run.said[0]


def test_an_error_of_this_program_on_one_ends_both_with_one_traceback(config, tmp_path):
    run = Two([config], tmp_path / "run", ill_ranks.error_of_ours)
    assert run.codes == [1, 1]
    assert run.said[1].count("Traceback") == 1 and "KeyError: 'a bug'" in run.said[1] and "Traceback" not in run.said[0]
    assert "stopped: process 1: an error of this program, KeyError('a bug')" in run.said[0]
    assert failure(run.folder).startswith("process 1: an error of this program")


def test_where_the_first_process_is_killed_the_other_says_so(config, tmp_path):
    run = Two([config], tmp_path / "run", ill_ranks.main_killed)
    assert run.codes == [-signal.SIGKILL, 1] and "Traceback" not in run.said[1], run.said
    assert run.said[1].startswith("stopped: process 1: in iteration 2/3 · sampling")
    assert run.said[1].count("another process ended or cannot be reached") == 1
    with run_lock(run.folder):
        pass  # it is free


def test_processes_that_do_not_find_each_other_say_so(config, tmp_path):
    first, _ = start_ranks([config, "run.timeout=0.02", f"run.output={tmp_path / 'run'}"], tmp_path / "out", ill_ranks.never)
    assert ended([first]) == [1]
    said = " ".join(said_by(tmp_path / "out", 0).read_text().split())
    assert "stopped: not all 2 processes met at 127.0.0.1:" in said and "within 0.02 minutes (run.timeout)" in said, said
    assert "Traceback" not in said


@pytest.fixture
def standing() -> Iterator[list]:
    processes: list = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def test_one_that_stands_still_is_told_with_the_phase_when_the_time_is_up(config, tmp_path, standing):
    words = [config, "run.timeout=0.1", f"run.output={tmp_path / 'run'}"]
    standing += start_ranks(words, tmp_path / "out", ill_ranks.stopped)
    standing[0].join(120)
    said = " ".join(said_by(tmp_path / "out", 0).read_text().split())
    assert standing[0].exitcode == 1 and standing[1].exitcode is None and "Traceback" not in said, said
    assert said.count("another process has not answered for 0.1 minutes (run.timeout)") == 1
    assert "stopped: in iteration 2/3 · sampling" in said and "lost is what was computed since the checkpoint " in said
    assert failure(tmp_path / "run").startswith("in iteration 2/3 · sampling")


# ----------------------------------------------------------------------------------------------------------------------
# The launcher


def launched(words, timeout: float) -> tuple[int, str, float]:
    """(exit code, output, seconds that it took)."""
    began = time.monotonic()
    ended = subprocess.run(
        [*LAUNCHER, *words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    return ended.returncode, " ".join(ended.stdout.split()), time.monotonic() - began


@pytest.fixture
def struck(config, tmp_path):
    """Words of a run that a signal strikes once, when a file is written; and that file."""
    note = tmp_path / "note"
    return [config, f"algorithm={{name: 'tests.reliability.ill_ranks:Struck', clip: 0.1, note: '{note}'}}"], note


@pytest.mark.slow
def test_one_that_is_killed_ends_the_launcher_and_the_same_command_goes_on(struck, tmp_path):
    words, note = struck
    whole = Two(words, tmp_path / "whole")
    note.write_text(str(int(signal.SIGKILL)))
    process = subprocess.Popen(
        [*LAUNCHER, *words, f"run.output={tmp_path / 'run'}"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while note.exists() and process.poll() is None:  # it is removed in the moment before
        time.sleep(0.01)
    struck_at = time.monotonic()
    output, _ = process.communicate(timeout=60)
    said = " ".join(output.split())
    print(f"the launcher ended {time.monotonic() - struck_at:.2f} s after the kill")
    assert process.returncode != 0
    assert said.count("another process ended or cannot be reached (") == 1, output  # gloo has several words for it
    assert f'File "{ROOT}/ddpo' not in output  # a traceback of ours: the launcher shows its own
    assert "stopped: in iteration 3/3 · learning" in said and "To go on after mending it" in said
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002\n"
    code, said, _ = launched([*words, f"run.output={tmp_path / 'run'}"], 300)
    assert code == 0, said
    check_same(whole.lora(), load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"))


@pytest.mark.slow
def test_one_that_stands_still_ends_the_launcher(struck, tmp_path):
    words, note = struck
    note.write_text(str(int(signal.SIGSTOP)))
    code, said, seconds = launched([*words, f"run.output={tmp_path / 'run'}", "run.timeout=0.1"], 300)
    print(f"the launcher ended {seconds:.1f} s after its start; it waits 30 s itself for who does not end when asked")
    assert code != 0 and not note.exists()
    assert said.count("another process has not answered for 0.1 minutes (run.timeout)") == 1, said
    assert "stopped: in iteration 3/3 · learning" in said and f'File "{ROOT}/ddpo' not in said


@pytest.mark.slow
def test_a_folder_in_use_ends_the_launcher_with_one_message(config, tmp_path):
    with run_lock(tmp_path / "run"):
        code, said, _ = launched([config, f"run.output={tmp_path / 'run'}"], 300)
    assert code != 0 and said.count(f"is in use by pid {os.getpid()}") == 1
