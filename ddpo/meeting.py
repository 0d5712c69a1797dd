"""Where the processes of a run meet: a signal, a failure or a lack of memory of one is all others' too."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpo.memory import ElsewhereOutOfMemory

TOGETHER = 0.3  # seconds in which two signals are one: a launcher passes on what a terminal sent to all


class TrainingError(RuntimeError):
    """Training cannot go on. Nothing was updated; everything up to the last checkpoint is kept."""


class Stop(BaseException):
    """The run was told to end. No Exception, so that nothing takes it for a failure of its own.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def code(self) -> int:
        """Of the process, as shells have it."""
        return 128 + self.number


class Signals:
    """While this context lasts, SIGTERM and SIGINT (Ctrl-C) end the run; the second one ends the process at once.

    One process raises `Stop` where it stands: nothing on the disk is ever half done. Of several, each goes on to where they meet,
    because one that left alone would leave the others waiting.

    Args:
        alone: there is one process.
    """

    def __init__(self, alone: bool):
        self.alone, self.received, self._at = alone, 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._at > TOGETHER:
                os._exit(128 + number)
            return
        self.received, self._at = number, time.monotonic()
        if self.alone:
            raise Stop(number)


class Meeting:
    """What the processes tell each other. Every method but `raise_if_told` is to be called by all of them."""

    def __init__(self, accelerator: Accelerator, signals: Signals | None = None):
        self.accelerator = accelerator
        self.signals = signals or Signals(alone=True)  # nobody's: nothing is received

    def step(self, short: bool = False) -> bool:
        """Whether some process is out of memory.

        Raises:
            Stop: some process was told to end.
        """
        told = self.signals.received
        if self.accelerator.num_processes > 1:
            flags = torch.zeros(2 + signal.NSIG, device=self.accelerator.device)
            flags[0] = short
            flags[1 + told] = told > 0
            flags = self.accelerator.reduce(flags, "sum")
            short, told = bool(flags[0]), int(flags[1:].argmax()) if flags[1:].any() else 0
        if told:
            raise Stop(told)
        return short

    def stepwise(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """To be called after each denoising step: shows progress, and meets.

        It raises `ElsewhereOutOfMemory` where another process has run out of memory in this step, and `Stop` as `step` does.
        """

        def stepped(rows: int) -> None:
            advance(rows)
            if self.step():
                raise ElsewhereOutOfMemory

        return stepped

    def raise_if_told(self) -> None:
        """Between meetings, where there is one process."""
        if self.accelerator.num_processes == 1:
            self.step()

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values, in the order of the processes, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def on_main(self, act: Callable[[], None]) -> None:
        """The main process acts; if it fails, every process raises: none goes on alone."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                act()
            except Exception as e:  # told to the others first, then raised
                failure = e
        failed = self.accelerator.reduce(torch.tensor([float(failure is not None)], device=self.accelerator.device), "sum")
        if failure is not None:
            raise failure
        if failed.item():
            raise TrainingError("the main process could not write to the run folder; its message says why")
