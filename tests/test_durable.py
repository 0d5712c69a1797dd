"""A run's plain files are whole, strict, and one run's at a time.

pytest tests/test_durable.py
"""

import os
import signal

import pytest

from ddpo.durable import DamagedFile, FileError, read_json, run_lock, write_json


def test_json_round_trip_leaves_nothing_beside(tmp_path):
    obj = {"status": "running", "lr": 1 / 3, "z": [1, None, True], "a": "größe \U0001f989"}
    write_json(tmp_path / "run.json", {"old": 1})
    write_json(tmp_path / "run.json", obj)
    assert read_json(tmp_path / "run.json") == obj and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("obj", [float("nan"), {"a": [float("inf")]}, {"a": object()}, {(1, 2): 3}])
def test_what_is_not_json_is_refused_and_the_old_text_stands(tmp_path, obj):
    write_json(tmp_path / "run.json", {"old": 1})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write_json(tmp_path / "run.json", obj)
    assert read_json(tmp_path / "run.json") == {"old": 1} and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("text", [b"", b"{", b"[NaN]", b"-Infinity", b"\xff", b"[" * 200_000, b" " * (17 << 20)])
def test_reading_is_strict(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(DamagedFile, match=r"run\.json"):
        read_json(tmp_path / "run.json")


def test_a_missing_file_is_missing_and_a_link_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "run.json")
    write_json(tmp_path / "other.json", 1)
    (tmp_path / "run.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(DamagedFile, match="link"):
        read_json(tmp_path / "run.json")


def test_a_dead_writers_draft_is_written_over(tmp_path):
    (tmp_path / ".run.json.tmp").write_text("half of")
    write_json(tmp_path / "run.json", 1)
    assert os.listdir(tmp_path) == ["run.json"]


def test_the_disks_refusal_names_the_file(tmp_path):
    with pytest.raises(FileError, match=r"run\.json was not written: .*No such file or directory"):
        write_json(tmp_path / "missing" / "run.json", 1)


def test_one_run_a_folder_and_a_dead_run_holds_nothing(tmp_path):
    folder = tmp_path / "runs" / "a"
    told, tell = os.pipe()
    if (pid := os.fork()) == 0:
        with run_lock(folder):
            os.write(tell, b"!")
            signal.pause()
    os.read(told, 1)
    try:
        with (
            pytest.raises(FileError, match=rf"in use by pid {pid} on {os.uname().nodename}; .*run\.output=DIR"),
            run_lock(folder),
        ):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for _ in range(2):
        with run_lock(folder):
            assert (folder / ".lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


@pytest.mark.parametrize("name", ["file/run", "file", "x" * 300])
def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be a run's folder"), run_lock(tmp_path / name):
        pass
