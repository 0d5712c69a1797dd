"""What training prints. Run: pytest tests/test_progress.py"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpo.progress import Display, printable

METRICS = {
    "iteration": 3, "images": 384, "seconds": 50.0, "seconds/rollout": 6.0, "seconds/reward": 1.0, "seconds/update": 9.0,
    "reward/mean": 0.612, "kl/step_nats": 0.0021, "clip_fraction": 0.031, "ratio/mean": 1.0004, "ratio/max": 1.08,
}  # fmt: skip
EVALUATION = {
    "iteration": 10, "eval/win_rate": 0.71, "eval/diversity/base": 0.31, "eval/diversity/tuned": float("nan"),
    "eval/scene/base": 0.5, "eval/scene/tuned": 0.6, "eval/clip/base": 0.2, "eval/clip/tuned": 0.19,
    "eval/scene/delta": 0.1, "eval/scene/delta_low": 0.0417, "eval/scene/delta_high": 0.158,
    "eval/clip/delta": -0.01, "eval/clip/delta_low": -0.0312, "eval/clip/delta_high": 0.0112,
}  # fmt: skip
WHOLE_RUN = """
from pathlib import Path
from ddpo.progress import Display
display = Display(True, Path("train.log"))
display.say("loading [bold]x[/bold] :cat:")
with display.phase("iteration 1/2 · sampling [red]", 4) as advance:
    for _ in range(4):
        advance(1)
display.iteration({"iteration": 1, "images": 8, "seconds/rollout": 2.0, "reward/mean": 0.5}, 2)
display.evaluation({"iteration": 0, "eval/scene/base": 0.5, "eval/scene/tuned": 0.5, "eval/scene/delta": 0.0})
"""


@pytest.fixture
def display(tmp_path):
    return Display(True, tmp_path / "train.log")


def on_a_terminal(program: str, folder: Path) -> str:
    """What the program writes to a terminal, cursor movements and all."""
    leader, follower = os.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", program], stdout=follower, stderr=subprocess.STDOUT, cwd=folder, env=env)
    os.close(follower)
    seen = b""
    try:
        while piece := os.read(leader, 4096):
            seen += piece
    except OSError:  # how Linux tells that the other end was closed
        pass
    os.close(leader)
    assert child.wait() == 0, seen.decode()
    return seen.decode()


def test_control_characters_are_shown_and_not_obeyed(display, tmp_path, capsys):
    evil = "a\x1b[2Jb\rc\x07d\x00e\x9bf\u202eg\ud800h\ti [red]j[/red] :smile:"
    shown = "a\\x1b[2Jb\\rc\\x07d\\x00e\\x9bf\\u202eg\\ud800h\\ti [red]j[/red] :smile:"
    assert printable(evil) == shown
    display.say(evil)
    with display.phase(evil, 1):
        pass
    assert capsys.readouterr().out.startswith(f"{shown}\n{shown}: ")
    assert (tmp_path / "train.log").read_text("utf-8").startswith(f"{shown}\n{shown}: ")
    assert printable("ein Bär, 猫\u3000, 👩\u200d🚀, e\u0301") == "ein Bär, 猫\u3000, 👩\u200d🚀, e\u0301"


def test_further_lines_of_a_text_cannot_pass_for_ours(display, capsys):
    display.say("stopped: bad\niteration 9/9 · reward 1.00\n")
    assert capsys.readouterr().out == "stopped: bad\n  iteration 9/9 · reward 1.00\n"


def test_long_lines_are_not_wrapped(display, capsys):
    display.say("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("colour", [{}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}])
def test_plain_output_has_no_escapes_and_is_the_log(tmp_path, colour):
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_RUN], cwd=tmp_path, env=os.environ | colour, capture_output=True, check=True
    )
    printed = done.stdout.decode()
    assert "\x1b" not in printed and "\r" not in printed and done.stderr == b""
    assert printed == (tmp_path / "train.log").read_text("utf-8")
    lines = printed.splitlines()
    assert lines[0] == "loading [bold]x[/bold] :cat:" and lines[1].startswith("iteration 1/2 · sampling [red]: ")
    assert lines[2:] == [
        "iteration 1/2 · reward 0.500 · 4.00 images/s · 2.0 s left",
        "base model, held-out prompts: scene 0.500",
    ]


def test_a_terminal_gets_a_bar_that_goes_away_and_the_log_stays_plain(tmp_path):
    seen = on_a_terminal(WHOLE_RUN, tmp_path)
    assert "━" in seen and "4/4" in seen and "sampling [red]" in seen and "loading [bold]x[/bold] :cat:" in seen
    assert "sampling [red]: " not in seen
    after = seen[seen.rindex("━") :]
    assert "\x1b[2K" in after[: after.index("iteration 1/2 · reward")]  # the bar's line was erased
    log = (tmp_path / "train.log").read_text("utf-8")
    assert "\x1b" not in log and "sampling [red]: " in log and len(log.splitlines()) == 4


def test_output_that_cannot_hold_a_letter_does_not_stop_training(tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", WHOLE_RUN], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert b"iteration 1/2 \\xb7 reward 0.500" in done.stdout
    assert "iteration 1/2 · reward 0.500" in (tmp_path / "train.log").read_text("utf-8")


def test_only_one_process_speaks(tmp_path, capsys):
    silent = Display(False, tmp_path / "train.log")
    silent.say("x")
    with silent.phase("y", 3) as advance:
        advance(3)
    silent.iteration(METRICS, 40)
    silent.evaluation(EVALUATION)
    silent.summary(tmp_path, EVALUATION, tmp_path / "lora", "resume", "show")
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_a_phase_that_failed_leaves_no_line_and_its_error(display, capsys):
    with pytest.raises(ZeroDivisionError), display.phase("sampling", 3) as advance:
        advance(1 // 0)
    assert capsys.readouterr().out == ""


def test_an_iteration_is_one_line(display, capsys):
    display.iteration(METRICS, 40)
    assert capsys.readouterr().out == (
        "iteration 3/40 · reward 0.612 · KL 0.00210 nats · clipped 3.1 % · ratio 1.00, at most 1.08 · 8.00 images/s"
        " · 9 min 52 s left\n"
    )
    display.iteration({"iteration": 4, "reward/mean": None, "kl/step_nats": None, "images": 512}, 4)
    assert capsys.readouterr().out == "iteration 4/4\n"


def test_reward_is_compared_with_the_first_iteration_which_is_the_base_models(display, capsys):
    for k, reward in ((1, 0.6), (2, 0.55)):
        display.iteration({"iteration": k, "images": k, "reward/mean": reward}, 9)
    assert capsys.readouterr().out.splitlines() == [
        "iteration 1/9 · reward 0.600",
        "iteration 2/9 · reward 0.550 (-0.050 on base)",
    ]


def test_time_left_is_judged_by_the_iterations_of_this_process(display, capsys):
    for k, seconds in ((11, 10.0), (12, 20.0)):  # resumed after 10
        display.iteration(
            {"iteration": k, "images": 64 * k, "seconds": 9999.0, "seconds/rollout": seconds, "seconds/eval": 2.0}, 20
        )
    assert [line.split(" · ")[1:] for line in capsys.readouterr().out.splitlines()] == [
        ["6.40 images/s", "1 min 48 s left"],  # 9 x 12 s; evaluations cost time, but make no training images
        ["3.20 images/s", "2 min 16 s left"],  # 8 x 17 s
    ]


def test_an_evaluation_is_shown_as_it_was_measured(display, capsys):
    display.evaluation(EVALUATION)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("after iteration 10, held-out prompts")
    assert lines[1:] == [
        "  scene  0.500 → 0.600  +0.100 [+0.042, +0.158]     higher",
        "  clip   0.200 → 0.190  -0.0100 [-0.0312, +0.0112]  no clear change",
        "  tuned beats base in 71.0 % of pairs · diversity 0.310 → n/a",
    ]


@pytest.mark.parametrize("metrics", [EVALUATION, {}])
def test_the_summary_says_where_everything_is(display, capsys, metrics):
    display.summary(Path("runs/x"), metrics, Path("runs/x/lora/a.safetensors"), "train again", "ddpo report runs/x")
    printed = capsys.readouterr().out
    for line in (
        "run folder  runs/x",
        "LoRA        runs/x/lora/a.safetensors",
        "report      runs/x/report.html",
        "resume      train again",
    ):
        assert line in printed.splitlines()
    assert ("+0.100 [+0.042, +0.158]" in printed) == bool(metrics)
