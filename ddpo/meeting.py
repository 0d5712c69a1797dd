"""Where the processes of a run meet: a signal, a failure or a lack of memory of one is all others' too."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from ddpo.memory import ElsewhereOutOfMemory

T = TypeVar("T")

TOGETHER = 0.3  # seconds in which two signals are one: a launcher passes on what a terminal sent to all
LONGEST = 8192  # bytes of what one process tells the others of its failure


class TrainingError(RuntimeError):
    """Training cannot go on. Nothing was updated; everything up to the last checkpoint is kept."""


class Failure(NamedTuple):
    """Why a process cannot go on."""

    code: int  # that it ends with, above zero
    text: str


class FailedElsewhere(TrainingError):
    """Another process cannot go on, and said why. All end."""

    def __init__(self, failure: Failure):
        self.failure = failure
        super().__init__(failure.text)


class Unreachable(TrainingError):
    """Another process ended without a word, or has not answered for `run.timeout`."""


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

    def done(self) -> None:
        """There is nothing left to stop: only a second signal ends the process before it ends by itself."""
        self.alone = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._at > TOGETHER:
                os._exit(128 + number)
            return
        self.received, self._at = number, time.monotonic()
        if self.alone:
            raise Stop(number)


class Meeting:
    """What the processes tell each other. Each method is to be called by all of them, but `raise_if_told` and `tell`.

    Every meeting begins with the same three numbers of each process, so that one that failed elsewhere can tell the others
    wherever they are (`tell`): none waits for it in vain. They talk on the CPU. That costs the device nothing, and who does not
    answer is told here, with the phase, where NCCL's own watchdog would end the process without a word.

    Args:
        timeout: minutes that one waits for another.

    Raises:
        Stop, FailedElsewhere, Unreachable: of any method.
    """

    def __init__(self, accelerator: Accelerator, signals: Signals | None = None, timeout: float = 10.0):
        self.accelerator, self.timeout = accelerator, timeout
        self.signals = signals or Signals(alone=True)  # nobody's: nothing is received
        self.alone, self.rank, self.is_main = (
            accelerator.num_processes == 1,
            accelerator.process_index,
            accelerator.is_main_process,
        )
        self._group: Any = None if self.alone else distributed.new_group(timeout=timedelta(minutes=timeout), backend="gloo")

    def close(self) -> None:
        """After the last word, where all are there to hear it. Where torch's threads still run as the interpreter ends, they may abort
        it (pytorch issue 190489)."""
        if not self.alone:
            distributed.destroy_process_group()

    def step(self, short: bool = False) -> bool:
        """Whether some process is out of memory."""
        told, failed = self.signals.received, False
        if not self.alone:
            short, told, failed = self._most(short, told, failed)
        if failed:
            raise FailedElsewhere(self._hear())
        if told:
            raise Stop(told)
        return short

    def stepwise(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """To be called after each denoising step: shows progress, and meets.

        It raises `ElsewhereOutOfMemory` where another process has run out of memory in this step, and what `step` raises.
        """

        def stepped(rows: int) -> None:
            advance(rows)
            if self.step():
                raise ElsewhereOutOfMemory

        return stepped

    def raise_if_told(self) -> None:
        """Between meetings, where there is one process."""
        if self.alone:
            self.step()

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values, in the order of the processes, on the CPU."""
        self.step()
        return values.cpu() if self.alone else self._gather(values.cpu())

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, on their device: these may be large."""
        self.step()
        return self._reaching(lambda: self.accelerator.reduce(values, "sum"))

    def on_main(self, act: Callable[[], None]) -> None:
        """The main process acts, and the others wait for it; if it fails, none goes on alone."""
        if self.is_main:
            act()
        self.step()

    def tell(self, error: Exception, failure: Failure) -> Failure | None:
        """Bring what ends this process to the others, who hear of it in the meeting they come to next, as `FailedElsewhere`.

        Args:
            error: where another process gave rise to it, there is nothing to tell.
            failure: what to say of it.

        Returns:
            the failure to speak of, on all alike: that of the first process that has one. None where the others are not reached.
        """
        if self.alone:
            return failure
        if isinstance(error, FailedElsewhere):
            return error.failure
        if isinstance(error, Unreachable):
            return None
        try:
            self._most(False, 0, True)
            return self._hear(failure)
        except Unreachable:
            return None

    def _most(self, short: bool, told: int, failed: bool) -> tuple[bool, int, bool]:
        """Each at its largest over all processes."""
        flags = torch.tensor([short, told, failed], dtype=torch.int64)
        self._reaching(lambda: distributed.all_reduce(flags, distributed.ReduceOp.MAX, self._group))
        most = flags.tolist()
        return bool(most[0]), most[1], bool(most[2])

    def _hear(self, mine: Failure | None = None) -> Failure:
        """The first process's failure, of those that have one."""
        code, text = mine or Failure(0, "")
        said = bytes([code]) + text.encode(errors="replace")[: LONGEST - 1]
        everyones = self._gather(torch.tensor(list(said.ljust(LONGEST, b"\0")), dtype=torch.uint8)[None]).tolist()
        rank, first = next((rank, bytes(row)) for rank, row in enumerate(everyones) if row[0])
        told = first[1:].rstrip(b"\0").decode(errors="ignore")
        return Failure(first[0], f"process {rank}: {told}" if rank else told)

    def _gather(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.accelerator.num_processes)]
        self._reaching(lambda: distributed.all_gather(parts, values.contiguous(), self._group))
        return torch.cat(parts)

    def _reaching(self, talk: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return talk()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            waited = time.monotonic() - started >= 59 * self.timeout  # of the 60 seconds of each minute
            what = f"has not answered for {self.timeout:g} minutes (run.timeout)" if waited else "ended or cannot be reached"
            reason = re.sub(r"^\[\S+\] ", "", str(e)).partition(". ")[0]  # gloo's begins with a line of its source
            raise Unreachable(f"another process {what} ({reason}); the same command goes on from the last checkpoint") from e
