"""Told to end at any moment: soon, with the right code, and the same command goes on to the same end. The real command."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ddpo import experiment
from ddpo.meeting import Meeting, Signals, Stop
from tests.command import ROOT, check_same, config, finish, start, started  # noqa: F401

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def test_a_signal_ends_what_is_done_at_once_and_the_handlers_come_back():
    def own(number, frame):
        raise AssertionError("the user's own handler is not asked while a run lasts")

    before = signal.signal(signal.SIGTERM, own), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stop) as stopped, Signals(alone=True):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
        assert stopped.value.code == 143 and str(stopped.value) == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is own and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_one_of_several_goes_on_to_where_they_meet():
    with Signals(alone=False) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_no_failure_is_taken_for_a_signal():
    assert not issubclass(Stop, Exception)


def test_a_thread_that_may_not_set_handlers_runs_without_them():
    def run():
        with Signals(alone=True):
            ran.append(True)

    ran = []
    (thread := threading.Thread(target=run)).start()
    thread.join()
    assert ran == [True]


SECOND = """
import signal, sys, time
from ddpo.meeting import Signals
with Signals(alone=False):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_the_second_signal_ends_the_process_at_once():
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)  # two within 0.3 s are one: a launcher passes on what the terminal sent to all
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def interrupted(config, folder, number, wait, launcher=(sys.executable,)):  # noqa: F811
    """Starts the run, sends the signal `wait` seconds after the folder has a line of metrics and the process handles signals; returns
    (exit code, output, seconds it took to end), or None where the run was done before, or so far that it only had to leave."""
    process = start(config, folder, launcher)
    while not (started(folder) and handles_signals(process.pid)) and process.poll() is None:
        time.sleep(0.02)
    try:
        process.wait(wait)
        assert process.returncode == 0, process.stdout.read()
        return None
    except subprocess.TimeoutExpired:
        pass
    process.send_signal(number)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        assert "ddpo generate" in output and json.loads((folder / "run.json").read_text())["status"] == "finished"
        return None
    return process.returncode, output, time.monotonic() - asked


def handles_signals(pid):
    """Past Python's own start, in which a signal kills a process."""
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return all(int(caught[1], 16) >> (number - 1) & 1 for number in CODES) if caught else False


def check_told(folder, number, code, output):
    assert code == CODES[number] and "Traceback" not in output, output
    said = " ".join(output.split())
    if "nothing is lost" in said:  # before training began
        return
    assert f"{signal.Signals(number).name}: stopped in " in said and "To go on: accelerate launch -m ddpo.train" in said
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "interrupted" and run["exit_reason"].startswith(signal.Signals(number).name)


def journal(folder):
    return (folder / "rewards.jsonl").read_text()


def test_a_signal_while_libraries_are_imported_is_told_and_has_its_code(monkeypatch, capfd):
    def imported(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(experiment, "_run", imported)
    before = signal.getsignal(signal.SIGTERM)
    assert experiment.run(None, []) == 143 and "SIGTERM: stopped before training began" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


VERB = """
import signal, sys
from ddpo import cli, train
train.main = lambda words: signal.raise_signal(signal.SIGTERM)  # as while libraries are imported
sys.exit(cli.main(["train", "run.yaml"]))
"""


def test_the_console_command_is_told_of_signals_as_early_as_the_module_is():
    ended = subprocess.run([sys.executable, "-c", VERB], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 143 and ended.stderr == "SIGTERM: stopped outside of training; nothing is lost\n"


LATE = """
import os, signal, sys, threading, time
from ddpo import train

def tell():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)

class AtTheEnd:
    def __init__(self, kill, pid, number):  # modules lose what they hold before this is called
        self.tell = lambda: kill(pid, number)
    def __del__(self):
        print("told", flush=True)
        self.tell()

def main(words):
    global last
    if words == ["thread"]:
        threading.Timer(0.2, tell).start()
        threading.Timer(60.0, print, ["a library that is still busy"]).start()
    if words == ["atexit"]:
        import atexit
        atexit.register(tell)
    if words == ["teardown"]:
        last = AtTheEnd(os.kill, os.getpid(), signal.SIGINT)
    return 0

train.main = main
sys.exit(train.command(sys.argv[1:]))
"""


@pytest.mark.parametrize("where", ["thread", "atexit", "teardown"])
def test_a_signal_to_a_finished_run_changes_nothing(where):
    ended = subprocess.run(
        [sys.executable, "-c", LATE, where], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "told\n" if where == "teardown" else "", "")


def test_a_run_that_is_done_does_not_end_for_a_signal(monkeypatch, tmp_path, tiny, config):  # noqa: F811
    closed = Meeting.close

    def told(self):
        signal.raise_signal(signal.SIGTERM)
        closed(self)

    monkeypatch.setattr(Meeting, "close", told)
    recipe = experiment.read(str(config), [f"run.output={tmp_path / 'run'}", "run.iterations=1"], 1).recipe
    assert experiment.run(recipe, [str(config)]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_run_told_to_end_twice_ends_as_one_that_was_not(config, tmp_path):  # noqa: F811
    check_many(config, tmp_path, stops=2, seed=1)


@pytest.mark.slow
def test_twenty_signals_at_random_moments(config, tmp_path):  # noqa: F811
    check_many(config, tmp_path, stops=20, seed=0)


def check_many(config, tmp_path, stops, seed):  # noqa: F811
    whole = finish(config, tmp_path / "whole")
    log = (tmp_path / "whole" / "metrics.jsonl").read_text()
    training = float(re.findall(r'"seconds": ([\d.]+)', log)[-1])
    chance, told, run, worst = random.Random(seed), 0, 0, 0.0
    while told < stops:
        folder, number = tmp_path / f"run-{run}", chance.choice(list(CODES))
        ended = interrupted(config, folder, number, chance.uniform(0, training))
        if ended is None:
            assert run < stops, "signals are not heeded"
            check_same(whole, load_file(folder / "lora" / "pytorch_lora_weights.safetensors"))
            run += 1
            continue
        check_told(folder, number, *ended[:2])
        worst, told = max(worst, ended[2]), told + 1
    check_same(whole, finish(config, folder))
    assert sorted(set(journal(folder).splitlines())) == sorted(journal(folder).splitlines())  # no reward was asked for twice
    print(f"{told} signals, the slowest end after {worst:.2f} s")


@pytest.mark.slow
def test_two_processes_stop_together(config, tmp_path):  # noqa: F811
    """The signal reaches one of them only, by its own number."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    folder = tmp_path / "two"
    process = start(config, folder, launcher)
    while not started(folder):
        assert process.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    said = " ".join(output.split())
    assert "SIGTERM: stopped in" in said, output
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("on_alarm, code, status", [("stop", 4, "stopped"), ("warn", 0, "finished")])
def test_an_alarm_ends_the_command_with_a_code_and_a_report(config, tmp_path, on_alarm, code, status):  # noqa: F811
    process = start(config, tmp_path, (sys.executable,), f"run.on_alarm={on_alarm}", "health.kl_budget=1.0e-9")
    output, _ = process.communicate(timeout=300)
    run = json.loads((tmp_path / "run.json").read_text())
    assert process.returncode == code and run["status"] == status, output
    assert (tmp_path / "report.html").exists() and (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert "ALARM, kl budget: since iteration 1 the policy is" in " ".join(output.split()) and "Traceback" not in output
    assert run["exit_reason"] is None if code == 0 else run["exit_reason"].startswith("since iteration 1 ")
