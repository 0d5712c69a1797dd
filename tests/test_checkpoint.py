"""Checkpoints are whole or invisible: killed at every point of the writer, on full disks, and back to the bit.

    pytest tests/test_checkpoint.py

What a reader refuses is in test_manifest.py, the optimizer's state in test_checkpoint_optimizer.py.
"""

import errno
import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpo import checkpoint
from ddpo.checkpoint import CheckpointError, MismatchedCheckpoint

torch.set_num_threads(1)  # children are forked, and threads do not survive that
IDENTITY = {"model": "menagerie", "lora": {"rank": 4, "targets": ["to_q", "to_v"]}, "seed": 0, "lr": 1e-4}


def quiet(message: str) -> None:
    raise AssertionError(f"nothing should be skipped: {message}")


def trained(step: int) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(step)
    weights = {f"block.{i}.lora_A.weight": torch.randn(4, 8, generator=g) for i in range(3)}
    return {"lora": weights, "optimizer": {f"{k}.exp_avg": torch.randn(4, 8, generator=g) for k in weights}}


def write(root: Path, step: int, content: int | None = None, **options) -> Path:
    return checkpoint.save(root, step, trained(step if content is None else content), {"iteration": step}, IDENTITY, **options)


def holds(path: Path, content: int) -> bool:
    found, want = checkpoint.load(path, IDENTITY).tensors, trained(content)
    return all(torch.equal(found[stem][k], v) for stem, named in want.items() for k, v in named.items())


def bits(value: Tensor) -> list[int]:
    return value.contiguous().flatten().view(torch.uint8).tolist()


def digests(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("step-*/*")}


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root)) if root.exists() else []


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a forked process that does `work`."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def first(root: Path) -> None:
    """The first save of a run."""


def later(root: Path) -> None:
    """A save that retires an old checkpoint, and two of a timeline that was left."""
    for step in (2, 3, 5, 6):
        write(root, step, keep=9)


def again(root: Path) -> None:
    """A save over the only checkpoint there is."""
    write(root, 4, content=40)


STARTS = [first, later, again]


def every_point(
    folder: Path, start: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, str, Path]]:
    """Each point at which saving step 4 can be stopped, in order, with a fresh copy of what was there at the start."""
    seen: list[str] = []
    for name in ("start", "recorded"):
        (folder / name).mkdir()
        start(folder / name)
    monkeypatch.setattr(checkpoint, "fault", seen.append)
    write(folder / "recorded", 4, keep=1, pin=(3,))
    monkeypatch.undo()
    for nth, point in enumerate(seen):
        root = shutil.copytree(folder / "start", folder / str(nth))
        yield nth, point, root


def stop_at(nth: int, stop: Callable[[], None]) -> Callable[[str], None]:
    count = iter(range(10**6))
    return lambda point: stop() if next(count) == nth else None


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_round_trip_is_exact_to_the_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(6, 6, generator=g)
    odd = torch.tensor([-0.0, 1e-45, 3.4e38])
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    saved = {
        "lora": {"view": shared[1:3], "transposed": shared.T, "same memory": shared, "odd": odd, "empty": torch.zeros(0, 3)},
        "optimizer": {str(kind): (torch.randn(5, generator=g) * 9).to(kind) for kind in kinds} | {"step": torch.tensor(7.0)},
        "nothing": {},
    }
    state = {"iteration": 12, "lr": 1 / 3, "prompt": "größe \U0001f989 \ud800", "tuple": (1, 2), "none": None, 9: "key"}
    path = checkpoint.save(tmp_path / "checkpoints", 12, saved, state, IDENTITY)
    found = checkpoint.load(path, IDENTITY)
    assert found.step == 12 and found.path == path == tmp_path / "checkpoints" / "step-00000012"
    assert found.state == {k: v for k, v in state.items() if k != 9} | {"tuple": [1, 2], "9": "key"}
    assert {stem: named.keys() for stem, named in found.tensors.items()} == {s: n.keys() for s, n in saved.items()}
    for stem, named in saved.items():
        for name, value in named.items():
            back = found.tensors[stem][name]
            assert back.dtype == value.dtype and back.shape == value.shape and bits(back) == bits(value), name
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000012\n"


@pytest.mark.parametrize("start", STARTS)
def test_killed_at_every_point_of_the_writer(tmp_path, monkeypatch, start):
    for nth, point, root in every_point(tmp_path, start, monkeypatch):
        monkeypatch.setattr(checkpoint, "fault", stop_at(nth, kill))
        status = in_child(lambda: write(root, 4, keep=1, pin=(3,)))  # noqa: B023 (runs at once)
        monkeypatch.undo()
        assert os.WIFSIGNALED(status), point
        checkpoint.sweep(root)
        assert all(n == "latest" or n.startswith("step-") for n in names(root)), (point, names(root))
        for name in names(root):
            if name != "latest":
                checkpoint.verify(root / name)
        newest = checkpoint.latest(root, quiet)
        assert newest or start is first, f"killed at {point!r}: every checkpoint is lost"
        if newest:
            number = int(newest.name[-8:])
            assert holds(newest, number) or (start is again and holds(newest, 40)), point
        assert checkpoint.latest(write(root, 4, keep=1).parent, quiet).name == "step-00000004"


@pytest.mark.parametrize("start", STARTS)
def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, start):
    for nth, point, root in every_point(tmp_path, start, monkeypatch):
        before = digests(root)
        monkeypatch.setattr(checkpoint, "fault", stop_at(nth, fill_disk))
        with pytest.raises(CheckpointError, match=r"step-00000004.*No space left.*run the same command again"):
            write(root, 4, keep=1, pin=(3,))
        monkeypatch.undo()
        if point in ("latest", "retired", "sweep"):
            assert checkpoint.latest(root, quiet).exists() and holds(root / "step-00000004", 4), point
        elif point not in ("renamed", "durable"):
            assert digests(root) == before and all(n == "latest" or n.startswith("step-") for n in names(root)), point
        write(root, 4, keep=1)


def test_a_write_that_really_fails_is_told_and_cleared_away(tmp_path):
    root = tmp_path / "checkpoints"
    write(root, 1)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="step-00000002 was not written"):
            write(root, 2)

    assert in_child(limited) == 0
    assert names(root) == ["latest", "step-00000001"] and holds(root / "step-00000001", 1)


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path):
    huge = {"lora": {"weight": torch.zeros(1).expand(10**16)}}
    with pytest.raises(CheckpointError, match="80000000000000000 bytes of free space are needed"):
        checkpoint.save(tmp_path, 1, huge, {}, {})
    assert names(tmp_path) == []


def test_every_byte_is_on_the_disk_before_the_name_and_the_name_before_anything_goes(tmp_path, monkeypatch):
    root = tmp_path / "run" / "checkpoints"
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        calls.append(("rename", f"{source} -> {target}"))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    write(root, 1, keep=1)
    assert {("fsync", str(tmp_path)), ("fsync", str(root.parent))} <= set(calls), "a new folder's name is in the one above"
    calls.clear()
    write(root, 2, keep=1)
    named = next(
        i for i, (kind, what) in enumerate(calls) if kind == "rename" and what.endswith("-> " + str(root / "step-00000002"))
    )
    draft = calls[named][1].split(" -> ")[0]
    files = ["lora.safetensors", "optimizer.safetensors", "manifest.json"]
    assert calls[:named] == [("fsync", f"{draft}/{name}") for name in files] + [("fsync", draft)]
    assert calls[named + 1] == ("fsync", str(root)) and "trash" in calls[-1][1]


def test_retention_keeps_the_newest_and_the_pinned(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, keep=2, pin=(1, 3))
    assert names(tmp_path) == ["latest", *(f"step-{s:08d}" for s in (1, 3, 6, 7))]


def test_what_was_written_last_is_the_newest_even_after_a_step_back(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    write(tmp_path, 2, content=20)
    assert checkpoint.latest(tmp_path, quiet) == tmp_path / "step-00000002" and holds(tmp_path / "step-00000002", 20)
    assert names(tmp_path) == ["latest", "step-00000002"], "1 was retired before; 3 and 4 are of the timeline that was left"


def test_the_number_decides_and_not_the_clock(tmp_path):
    for step in (9, 10):
        write(tmp_path, step)
    os.utime(tmp_path / "step-00000010", (0, 0))
    assert checkpoint.latest(tmp_path, quiet) == tmp_path / "step-00000010"
    assert checkpoint.latest(tmp_path / "missing", quiet) is None


def test_other_settings_are_refused_field_by_field(tmp_path):
    path = write(tmp_path, 1)
    now = {"model": "sd15", "lora": {"rank": 8, "targets": ("to_q", "to_v")}, "seed": 0, "eta": 1.0}
    with pytest.raises(MismatchedCheckpoint) as refused:
        checkpoint.load(path, now)
    fields = ["model: checkpoint 'menagerie', now 'sd15'", "lora.rank: checkpoint 4, now 8"]
    fields += ["lr: checkpoint 0.0001, now absent", "eta: checkpoint absent, now 1.0"]
    assert all(field in str(refused.value) for field in fields)
    assert "targets" not in str(refused.value) and "seed" not in str(refused.value)
    assert checkpoint.load(path, IDENTITY | {"lora": {"rank": 4, "targets": ("to_q", "to_v")}}).step == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_not_saved(tmp_path, bad):
    write(tmp_path, 1)
    weights = trained(2)
    weights["lora"]["block.1.lora_A.weight"][2, 3] = bad
    with pytest.raises(CheckpointError, match=r"lora holds NaN or infinity in block\.1\.lora_A\.weight"):
        checkpoint.save(tmp_path, 2, weights, {}, IDENTITY)
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, 2, trained(2), {"mean": bad}, IDENTITY)
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize("stem", ["../lora", "/tmp/lora", "a/b", "", "x" * 101])
def test_a_file_name_cannot_leave_the_folder(tmp_path, stem):
    with pytest.raises(ValueError, match="refused"):
        checkpoint.save(tmp_path / "checkpoints", 1, {stem: {}}, {}, {})
    assert names(tmp_path / "checkpoints") == [] and names(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize("options", [{"keep": 0}, {"step": -1}, {"step": 10**8}])
def test_arguments_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be"):
        checkpoint.save(tmp_path, **{"step": 1, "tensors": {}, "state": {}, "identity": {}} | options)
