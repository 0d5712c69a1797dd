"""What a person sees while training: a bar for the phase at hand on a terminal, plain lines everywhere else.

A line says the same on a terminal, in a CI log and in train.log, where none has colours or cursor movements. Texts may hold
prompts, which are data: control characters in them are shown, not obeyed.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpo.figures import comparisons, duration, means, number, percent, places

# C0, DEL, C1, line separators, bidirectional overrides and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Display:
    """Everything that is printed.

    Args:
        enabled: False prints and writes nothing: of several processes, one speaks.
        log: a file that every line is added to.
    """

    def __init__(self, enabled: bool, log: Path | None):
        self.enabled, self.log = enabled, log
        # Asked here, because rich would also trust FORCE_COLOR, which CI services set.
        self._console = Console(force_terminal=sys.stdout.isatty(), markup=False, emoji=False, highlight=False)
        self.doing = "starting"  # the phase at hand, and how far it is
        self._seconds: list[float] = []  # of the iterations finished in this process
        self._first: float | None = None  # the base model's reward: nothing is trained yet in the first iteration

    def say(self, text: str) -> None:
        """One plain line. Further lines of the text follow indented, so no text can pass for a line of ours."""
        if not self.enabled:
            return
        line = "\n  ".join(printable(part) for part in text.rstrip("\n").split("\n"))
        encoding = self._console.encoding
        self._console.print(line.encode(encoding, "backslashreplace").decode(encoding), soft_wrap=True)
        self._write(line)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that is told how many of the total are done; leaves one line when all went well."""
        started = time.monotonic()
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        shown = self.enabled and self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not shown) as bar:
            task, count = bar.add_task(printable(name), total=total), 0

            def advance(done: int) -> None:
                nonlocal count
                count += done
                bar.advance(task, done)
                self.doing = f"{name} ({count}/{total})"

            self.doing = name
            yield advance
        line = f"{name}: {duration(time.monotonic() - started)}"
        if shown:
            self._write(printable(line))  # the terminal showed the bar instead
        else:
            self.say(line)

    def iteration(self, metrics: dict, iterations: int) -> None:
        """One line on a training iteration, from its line of metrics; what was not measured is left out.

        Time left is the mean of the iterations finished in this process times those that remain.
        """
        done = metrics["iteration"]
        if done == 1:
            self._first = metrics.get("reward/mean")
        self._seconds.append(_seconds(metrics))
        left = (iterations - done) * sum(self._seconds) / len(self._seconds)
        parts = [f"iteration {done}/{iterations}", *self._parts(metrics), *([f"{duration(left)} left"] if left else [])]
        self.say(" · ".join(parts))

    def _parts(self, metrics: dict) -> Iterator[str]:
        reward, working = metrics.get("reward/mean"), _seconds(metrics) - (metrics.get("seconds/eval") or 0.0)
        if reward is not None and (self._first is None or metrics["iteration"] == 1):
            yield f"reward {number(reward)}"
        elif reward is not None and self._first is not None:
            yield f"reward {number(reward)} ({number(reward - self._first, places(reward), '+')} on base)"
        if (kl := metrics.get("kl/step_nats")) is not None:
            yield f"KL {number(kl)} nats"
        if (clipped := metrics.get("clip_fraction")) is not None:
            yield f"clipped {percent(clipped)}"
        if (largest := metrics.get("ratio/max")) is not None:
            yield f"ratio {number(metrics.get('ratio/mean'))}, at most {number(largest)}"
        if working > 0:
            yield f"{number(metrics['images'] / metrics['iteration'] / working)} images/s"

    def evaluation(self, metrics: dict) -> None:
        """A line a scorer: the tuned model against the base model. Before training there is only the base model."""
        found = comparisons(metrics)
        if metrics["iteration"] == 0:
            self.say("base model, held-out prompts: " + " · ".join(f"{c.scorer} {number(c.base)}" for c in found))
            return
        self.say(f"after iteration {metrics['iteration']}, held-out prompts: base → tuned, difference [95 % interval]")
        rows = [(c.scorer, means(c.base, c.tuned), c.change, c.verdict) for c in found]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            self.say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)))
        variety = means(metrics.get("eval/diversity/base"), metrics.get("eval/diversity/tuned"))
        self.say(f"  tuned beats base in {percent(metrics.get('eval/win_rate'))} of pairs · diversity {variety}")

    def summary(self, folder: Path, metrics: dict, lora: Path, resume: str, show: str) -> None:
        """What came of it, where it is, and how to see it or go on. `metrics`: the last line that holds an evaluation."""
        self.say("done")
        if comparisons(metrics):
            self.evaluation(metrics)
        where = {"run folder": folder, "LoRA": lora, "report": folder / "report.html", "show": show, "resume": resume}
        for name, what in where.items():
            self.say(f"{name:<10}  {what}")

    def _write(self, line: str) -> None:
        if not self.log:
            return
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # no reason to stop: what must be written tells of a full disk itself
            log, self.log = self.log, None
            self.say(f"{log} cannot be written ({error}); lines are only printed from now on")


def printable(text: str) -> str:
    """The text with its control characters shown: "\\x1b[2J" instead of a cleared screen."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _seconds(metrics: dict) -> float:
    """Of this iteration, all phases."""
    return sum(value for key, value in metrics.items() if key.startswith("seconds/"))
