"""Killed at any moment, as often as one likes: the same command ends with the same bytes (reliability K1, K2).

pytest tests/reliability/test_kills.py -m ''            5, then 50 runs killed at random moments, and each point of the writer
pytest tests/reliability/test_kills.py -m weekly        500 runs
"""

import hashlib
import itertools
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ddpo import checkpoint
from tests.command import CONFIG
from tests.reliability import victims

WORDS = ["optimizer.micro_batch=8", "run.iterations=5"]


class Run:
    """One run folder, and the command that makes it."""

    def __init__(self, config: Path, folder: Path):
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.words = [str(config), *WORDS, f"run.output={folder}"]

    def start(self, before=None):
        return victims.start(self.words, self.log, before=before)

    def finish(self) -> dict[str, str]:
        """To the end; the digests of what the run leaves."""
        child = self.start()
        child.join(300)
        assert child.exitcode == 0, self.log.read_text()[-3000:]
        return self.digests()

    def digests(self) -> dict[str, str]:
        """sha256 of the exported LoRA's tensors and of each file of the newest checkpoint."""
        newest = checkpoint.latest(self.folder / "checkpoints", print)
        exported = load_file(self.folder / "lora" / "pytorch_lora_weights.safetensors")  # its header holds the run's name
        tensors = hashlib.sha256(b"".join(name.encode() + exported[name].numpy().tobytes() for name in sorted(exported)))
        files = {name: entry["sha256"] for name, entry in checkpoint.verify(newest)["files"].items()}
        return files | {"name": newest.name, "exported": tensors.hexdigest()}

    def check_whole(self) -> None:
        """Whatever has a checkpoint's name is one."""
        root = self.folder / "checkpoints"
        for path in root.glob("step-*") if root.exists() else ():
            checkpoint.verify(path)

    def check_clean(self) -> None:
        assert not [p.name for p in (self.folder / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(CONFIG.format(model=tiny))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(digests, seconds) of a run that nobody killed; the seconds are of a second one, the first waits for imports."""
    first, second = (Run(config, tmp_path_factory.mktemp("whole") / name) for name in ("first", "second"))
    digests = first.finish()
    began = time.monotonic()
    assert second.finish() == digests
    return digests, time.monotonic() - began


def killed(run: Run, moments: list[float]) -> int:
    """Starts the run and kills it after each of these seconds. Returns how many kills met it alive; runs that end by themselves end
    well."""
    for done, moment in enumerate(moments):
        child = run.start()
        child.join(moment)
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:  # it had ended
            assert child.exitcode == 0, run.log.read_text()[-3000:]
            return done
        run.check_whole()
    return len(moments)


@pytest.mark.parametrize("runs", [5, pytest.param(50, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.weekly)])
def test_runs_killed_at_random_moments_end_bit_identical(config, whole, tmp_path, runs):
    digests, seconds = whole
    chance, kills = random.Random(runs), 0
    for number in range(runs):
        moments = [chance.uniform(0, seconds) for _ in range(chance.choice([1, 1, 2, 3]))]
        for tries in itertools.count():
            run = Run(config, tmp_path / f"{number}-{tries}")
            if met := killed(run, moments):
                break
            moments = [moment / 2 for moment in moments]  # the machine has become faster, and the run had ended
        kills += met
        assert run.finish() == digests, f"run {number} ended otherwise"
        run.check_clean()
    print(f"{runs} runs, {kills} kills, {seconds:.1f} s a run that nobody kills")


# ----------------------------------------------------------------------------------------------------------------------
# At named points of the writer


def record(path: Path) -> None:
    checkpoint.fault = partial(_append, path)


def _append(path: Path, point: str) -> None:
    with open(path, "a") as file:
        file.write(f"{point}\n")


def kill_at(point: str, nth: int) -> None:
    """Dies when the writer is at this point for the nth time."""
    seen = []

    def fault(now: str) -> None:
        if now == point:
            seen.append(now)
            if len(seen) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.fault = fault


@pytest.mark.slow
def test_killed_at_every_point_of_the_writer_it_ends_bit_identical(config, whole, tmp_path):
    points = tmp_path / "points"
    child = Run(config, tmp_path / "recorded").start(partial(record, points))
    child.join(300)
    passed = points.read_text().splitlines()
    names = list(dict.fromkeys(passed))
    assert len(names) >= 12, names
    cases = [(name, nth) for name in names for nth in (1, 3) if passed.count(name) >= nth]
    for case, (point, nth) in enumerate(cases):
        run = Run(config, tmp_path / str(case))
        child = run.start(partial(kill_at, point, nth))
        child.join(300)
        assert child.exitcode == -signal.SIGKILL, (point, nth, child.exitcode)
        run.check_whole()
        assert run.finish() == whole[0], (point, nth)
        run.check_clean()
    print(f"{len(cases)} kills at {len(names)} points: {', '.join(names)}")
    assert len(cases) >= 24


def test_another_seed_ends_elsewhere(config, whole, tmp_path):
    """The control: what is compared above can tell two runs apart."""
    run = Run(config, tmp_path / "other")
    run.words.append("run.seed=1")
    assert run.finish()["lora.safetensors"] != whole[0]["lora.safetensors"]
