"""Trackers hold what metrics.jsonl holds, once, and never stop a run. Run: pytest tests/test_trackers.py"""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpo import jsonl
from ddpo.components import Component, NotFound, find
from ddpo.runs import save_samples
from ddpo.trackers import Tracker, Trackers, missing, numbers
from ddpo.trackers.tensorboard import TensorBoard
from ddpo.trackers.trackio import Trackio
from ddpo.trackers.wandb import Wandb

ROOT = Path(__file__).parent.parent


def line(iteration, **more):
    return {"iteration": iteration, "images": 8 * iteration, "reward/mean": iteration / 8, "eval/x/base": None, **more}


def tell(trackers, folder, records):
    """As the trainer does: a record is in metrics.jsonl before trackers get it."""
    for record in records:
        jsonl.append(folder / "metrics.jsonl", record)
        trackers.record(record)


def a_run(folder, made):
    """A run that is killed after iteration 3, goes on from one of iteration 1, is rolled back from 4 to 2, and ends with an evaluation."""
    for iteration in (0, 4):
        save_samples(folder, iteration, torch.full((2, 3, 8, 8), iteration / 8), ["a", "b"], [0, 0], {"x": [0.0, 1.0]})
    first = Trackers([made()], folder, {"run": {"seed": 3}}, print)
    tell(first, folder, [line(0, **{"eval/win_rate": 0.0}), line(1), line(2, lost=1.0), line(3)])
    first.close()
    jsonl.truncate(folder / "metrics.jsonl", lambda record: record["iteration"] <= 1)
    again = Trackers([made()], folder, {"run": {"seed": 3}}, print)
    tell(again, folder, [line(2), line(3, alarms=[{"name": "x"}]), line(4, lost=2.0)])
    jsonl.truncate(folder / "metrics.jsonl", lambda record: record["iteration"] <= 2)
    tell(again, folder, [line(3), line(4, **{"eval/win_rate": 0.5})])
    again.close()


def wanted(folder):
    """{key: [(iteration, value)]} of metrics.jsonl."""
    found = {}
    for record in jsonl.read(folder / "metrics.jsonl"):
        for key, value in numbers(record).items():
            found.setdefault(key, []).append((record["iteration"], value))
    return found


ALONE = """
import sys
from pathlib import Path
calls = []
def hook(event, args):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] != "127.0.0.1":
        calls.append((event, str(args)))
        raise OSError("no network here")
sys.addaudithook(hook)
from tests import test_trackers as t
said = []
t.print = said.append
t.a_run(Path(sys.argv[1]), t.{kind})
assert not calls and not said, (calls, said)
"""


def run_alone(kind, folder):
    """In a process of its own, which may only talk to itself; these packages read the environment once."""
    private = ("WANDB_", "TRACKIO_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(private)} | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    command = [sys.executable, "-c", ALONE.replace("{kind}", kind), str(folder)]
    done = subprocess.run(command, env=kept, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done


def test_tensorboard_holds_every_record_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    a_run(tmp_path, TensorBoard)
    held = EventAccumulator(str(tmp_path / "tb"), {"scalars": 0, "images": 0})
    held.Reload()
    expected = wanted(tmp_path)
    assert set(held.Tags()["scalars"]) - {"lost"} == set(expected)
    for key, points in expected.items():
        assert [(e.step, e.value) for e in held.Scalars(key)] == points
    assert [e.step for e in held.Images("pairs")] == [4]


def test_trackio_holds_every_record_once(tmp_path):
    assert run_alone("Trackio", tmp_path).stdout == ""
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _, _ in rows} == {tmp_path.name}
    held = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [step for step, _ in held] == [0, 1, 2, 3, 4]
    for step, metrics in held:
        pairs = metrics.pop("pairs", None)
        assert (pairs is not None) == (step == 4)
        assert metrics == {key: value for key, points in wanted(tmp_path).items() for at, value in points if at == step}
    assert list((tmp_path / "trackio").rglob("*.png"))


def test_wandb_stays_offline_and_in_the_run_folder_under_one_id(tmp_path):
    done = run_alone("Wandb", tmp_path)
    sessions = sorted((tmp_path / "wandb").glob("offline-run-*"))
    identifier = (tmp_path / "wandb" / "id").read_text()
    assert len(sessions) == 3 and all(identifier in s.name for s in sessions)  # two in a second are told apart by -1
    first, again, back = (b"".join(file.read_bytes() for file in s.glob("*.wandb")) for s in sessions)
    assert all(b"reward/mean" in held for held in (first, again, back))
    assert b"lost" in first and b"lost" in again and b"lost" not in back
    assert list(sessions[2].rglob("*.png")) and not list(sessions[1].rglob("*requirements*"))
    assert "log in" not in done.stdout + done.stderr and "account" not in done.stdout + done.stderr


def test_wandb_online_without_an_account_says_so_and_does_not_ask(tmp_path, monkeypatch):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("it would have asked"))
    said = []
    Trackers([Wandb(mode="online")], tmp_path, {}, said.append).record(line(0))
    assert len(said) == 1 and "wandb login" in said[0]


class Failing(Tracker):
    package = "failing"

    def __init__(self, at):
        self.at, self.calls = at, []

    def _step(self, name):
        self.calls.append(name)
        if name == self.at:
            raise OSError("disk full")

    def start(self, session):
        self._step("start")

    def record(self, step, numbers, pairs):
        self._step("record")

    def finish(self):
        self._step("finish")


@pytest.mark.parametrize("at", ["start", "record", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(tmp_path, at):
    said, failing, other = [], Failing(at), Failing(None)
    trackers = Trackers([failing, other], tmp_path, {}, said.append)
    for i in range(3):
        trackers.record(line(i))
    trackers.close()
    trackers.close()
    assert len(said) == 1 and "failing" in said[0] and "disk full" in said[0] and "metrics.jsonl" in said[0]
    assert other.calls == ["start", "record", "record", "record", "finish"]
    assert failing.calls.count(at) == 1 and failing.calls.count("finish") == 1


def test_what_is_no_number_is_left_out():
    assert numbers({"a": 1, "b": None, "c": True, "d": "x", "e": [1], "f": float("nan"), "g": 0.5}) == {"a": 1.0, "g": 0.5}


def test_names_are_checked_and_a_missing_package_names_its_command(monkeypatch):
    for name, kind in (("tensorboard", TensorBoard), ("trackio", Trackio), ("wandb", Wandb)):
        assert find(name, "ddpo.trackers") is kind
    with pytest.raises(NotFound, match="did you mean 'tensorboard'"):
        find("tensorbord", "ddpo.trackers")
    monkeypatch.setattr("ddpo.trackers.find_spec", lambda name: None if name == "trackio" else object())
    chosen = [Component("wandb", Wandb, {}), Component("trackio", Trackio, {})]
    ((key, text),) = missing(chosen)
    assert key == "trackers.1" and "pip install 'ddpo[trackio]'" in text


def test_choosing_trackers_imports_none_of_them():
    program = (
        "import sys; from ddpo.components import find; [find(n, 'ddpo.trackers')() for n in ('tensorboard', 'trackio', 'wandb')];"
        "sys.exit(any(n in sys.modules for n in ('tensorboard', 'trackio', 'wandb', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_trackers_may_change_between_a_run_and_its_resumption():
    from ddpo.experiment import identity, read

    path = str(ROOT / "configs" / "menagerie_compressibility.yaml")
    with_them = read(path, ["trackers=[tensorboard, {name: wandb, mode: offline}]"], 1).recipe
    assert [c.name for c in with_them.trackers] == ["tensorboard", "wandb"] and identity(with_them) == identity(
        read(path, [], 1).recipe
    )


def test_a_wrong_tracker_is_told_before_anything_loads(monkeypatch):
    from ddpo.config import ConfigError
    from ddpo.experiment import read

    path = str(ROOT / "configs" / "menagerie_compressibility.yaml")
    monkeypatch.setattr("ddpo.trackers.find_spec", lambda name: None)
    for words, expected in (
        (["trackers=[tensorbord]"], "did you mean 'tensorboard'"),
        (["trackers=[{name: wandb, mode: onlin}]"], "trackers.0.mode"),
        (["trackers=[trackio]"], "pip install 'ddpo[trackio]'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            read(path, words, 1)
