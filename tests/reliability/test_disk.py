"""Full and unusable disks: told with the place and what to do, nothing lost, and the same command goes on when there is space.

pytest tests/reliability/test_disk.py        the small disks need root, to mount a tmpfs.

Elsewhere: ENOSPC at every point of the writer, the order of fsync and rename (tests/test_checkpoint.py, D3, K6), a limit in
the middle of a batch of rewards (tests/test_journal.py).
"""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from ddpo import checkpoint, durable, experiment, journal, state, train
from ddpo.checkpoint import CheckpointError
from ddpo.durable import FileError, run_lock
from ddpo.journal import JournalError
from ddpo.learner import Learner
from tests.command import CONFIG
from tests.test_checkpoint import digests, holds, names, quiet
from tests.test_checkpoint import write as save
from tests.test_trainer import lines, trainer_of, weights


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The weights of a run that nothing went wrong in."""
    trainer = trainer_of(tmp_path_factory.mktemp("runs") / "whole", tiny)
    trainer.run()
    return weights(trainer)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no disk of its own: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def leave(disk: Path, free: int) -> Path:
    """A file beside that leaves about `free` bytes."""
    rest = os.statvfs(disk)
    (disk / "other").write_bytes(bytes(max(0, rest.f_bavail * rest.f_bsize - free)))
    return disk / "other"


@pytest.mark.parametrize("looked", [True, False], ids=["seen before", "filled meanwhile"])
def test_a_small_disk_that_is_full_loses_nothing(tmp_path, monkeypatch, looked):
    """A real ENOSPC, with 0 to 12,000 bytes free where a checkpoint takes about 5,000."""
    refused = 0
    with mounted(tmp_path / "disk", "size=1m") as disk:
        root = disk / "run" / "checkpoints"
        save(root, 1)
        before = digests(root)
        for free in (0, 1, 2_000, 4_096, 8_192, 12_288):
            other = leave(disk, free)
            if not looked:
                monkeypatch.setattr(checkpoint, "_require_space", lambda *_: None)
            try:
                save(root, 2)
            except CheckpointError as error:
                refused += 1
                said = str(error)
                if "is written and whole" in said:  # all but `latest`, which is for people
                    assert holds(root / "step-00000002", 2)
                    break
                assert f"{root}/step-00000002 was not written, older checkpoints are untouched" in said, said
                assert ("bytes of free space are needed" in said) or "No space left" in said, said
                assert "free space or mend permissions there and run the same command again" in said and "\n" not in said
                assert digests(root) == before and names(root) == ["latest", "step-00000001"], free
                assert checkpoint.latest(root, quiet) == root / "step-00000001"
            else:
                break
            finally:
                other.unlink()
        save(root, 2)
        assert holds(root / "step-00000002", 2) and holds(root / "step-00000001", 1)
    assert refused >= 2


@pytest.mark.parametrize("point", ["start", "wrote lora", "wrote manifest", "renamed"])
def test_a_run_whose_disk_fills_up_goes_on_to_the_same_end(tiny, tmp_path, monkeypatch, whole, point):
    saves = []

    def fault(at: str) -> None:
        saves.append(at)
        if at == point and saves.count(point) == 3:  # there is one of the base model
            full()

    monkeypatch.setattr(checkpoint, "fault", fault)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not written.*No space left"):
        trainer_of(tmp_path, tiny).run()
    monkeypatch.undo()
    if point != "renamed":
        assert names(tmp_path / "checkpoints") == ["best", "latest", "step-00000000", "step-00000001"]
    again = trainer_of(tmp_path, tiny)
    again.run()
    assert torch.equal(weights(again), whole)


def test_rewards_that_cannot_be_written_down_are_not_used(tiny, tmp_path, monkeypatch, whole):
    """The second batch of the second iteration: what came before is kept, and no scorer is paid twice for it."""
    append, calls = journal._append, []

    def refusing(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 4:
            full()
        append(path, data)

    monkeypatch.setattr(journal, "_append", refusing)
    trainer = trainer_of(tmp_path, tiny)
    seen: list[torch.Tensor] = []
    improve = Learner.improve
    monkeypatch.setattr(Learner, "improve", lambda *a: (improve(*a), seen.append(weights(trainer)))[0])
    with pytest.raises(
        JournalError, match=r"rewards\.jsonl cannot be read or written .*No space left.*run the same command again"
    ):
        trainer.run()
    assert len(seen) == 1 and torch.equal(weights(trainer), seen[0]), "the second update was made without its rewards"
    assert len(lines(tmp_path, "rewards.jsonl")) == 18 and [m["iteration"] for m in lines(tmp_path)] == [0, 1]
    monkeypatch.undo()
    again = trainer_of(tmp_path, tiny)
    again.run()
    assert torch.equal(weights(again), whole)


def test_rewards_are_on_the_disk_before_they_are_learned_from_and_then_the_checkpoint(tiny, tmp_path, monkeypatch):
    order: list[str] = []
    fsync, rename, improve = os.fsync, os.rename, Learner.improve

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        order.append(f"-> {Path(target).name}")

    trainer = trainer_of(tmp_path, tiny, iterations=1)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(Learner, "improve", lambda *a: (order.append("update"), improve(*a))[1])
    trainer.run()
    at = order.index("update")
    assert order[:at].count("rewards.jsonl") == 2 and "rewards.jsonl" not in order[at:]
    line = order.index("metrics.jsonl", at)
    assert at < line < order.index("manifest.json", at) < order.index("-> step-00000001")


def test_a_line_of_metrics_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").mkdir()
    trainer = trainer_of(tmp_path, tiny)
    monkeypatch.setattr("ddpo.state.resume", lambda trainer: None)
    with pytest.raises(FileError, match=r"metrics\.jsonl: a line was not written: .*run the same command again"):
        trainer.run()


def test_the_name_of_the_best_checkpoint_is_the_old_one_or_the_new(tiny, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, tiny, iterations=1)
    trainer.run()
    best, write = tmp_path / "checkpoints" / "best", durable.write
    before = best.read_text()
    assert (best.parent / before.strip()).is_dir()

    def torn(path: Path, data: bytes) -> None:
        if "best" in path.name:
            write(path, data[:4])
            full()
        write(path, data)

    monkeypatch.setattr(durable, "write", torn)
    trainer.baseline.best = 0
    with pytest.raises(FileError, match=r"best was not written, the checkpoint is: .*No space left"):
        state.save(trainer)
    assert best.read_text() == before and [p.name for p in best.parent.glob(".*")] == []


# ----------------------------------------------------------------------------------------------------------------------
# Run folders that cannot be


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """`ddpo train` in this process, which must not come as far as the model."""
    (tmp_path / "c.yaml").write_text(CONFIG.format(model=tiny))

    def loaded(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(experiment, "_train", loaded)
    return lambda folder: train.main([str(tmp_path / "c.yaml"), f"run.output={folder}"])


def file_in_the_way(folder: Path) -> Path:
    (folder / "run").write_text("")
    return folder / "run"


def file_above(folder: Path) -> Path:
    (folder / "run").write_text("")
    return folder / "run" / "deeper"


def long_name(folder: Path) -> Path:
    return folder / ("x" * 300)


def broken_link(folder: Path) -> Path:
    (folder / "run").symlink_to(folder / "nowhere" / "run")
    return folder / "run"


def no_file_system(folder: Path) -> Path:
    return Path("/proc/run")


FOLDERS = [file_in_the_way, file_above, long_name, broken_link, no_file_system]


@pytest.mark.parametrize("make", FOLDERS)
def test_a_folder_that_cannot_be_ends_with_code_2_before_the_model_loads(command, tmp_path, capsys, make):
    folder = make(tmp_path)
    assert command(folder) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"run.output: {folder} cannot be a run's folder, choose another: ") and said.count("\n") == 1


@pytest.mark.parametrize("options", ["ro", "size=4k"], ids=["read-only", "full"])
def test_a_disk_that_takes_nothing_ends_with_code_2(command, tmp_path, capsys, options):
    with mounted(tmp_path / "disk", options) as disk:
        if options != "ro":
            with contextlib.suppress(OSError):
                (disk / "other").write_bytes(bytes(4096))
        assert command(disk / "run") == 2
    said = capsys.readouterr().err
    assert "cannot be a run's folder" in said and ("Read-only" in said or "No space left" in said) and said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_ends_with_code_2(command, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o555)
    assert command(tmp_path / "run") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_folder_in_use_ends_with_code_2(command, tmp_path, capsys):
    with run_lock(tmp_path / "run"):
        assert command(tmp_path / "run") == 2
    assert f"is in use by pid {os.getpid()}" in capsys.readouterr().err
