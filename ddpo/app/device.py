"""The one device that draws and scores for all who look at the page: a piece of work at a time, stopped within a step."""

import functools
import html
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import gradio as gr

if TYPE_CHECKING:  # both bring torch, which looking at runs does not need
    from ddpo.panel import Panel
    from ddpo.studio import Studio

T = TypeVar("T")
Tell = Callable[[str], None]

# Of every event that uses the device. Its arguments come as they were sent, for all of them are checked here, and told alike.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device", "preprocess": False}


class Stopped(Exception):
    """Nobody waits for the work any more."""


class Task(Generic[T]):
    """Work that goes on in the device's thread, seen from an event's generator.

    Iterating tells how far it is. All of it runs in one thread, since torch's modes belong to threads, while gradio takes
    each step of a generator in whichever is free.
    """

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[Tell], T]):
        self._said: SimpleQueue[str | None] = SimpleQueue()
        self._stop = Event()
        self._future: Future[T] = pool.submit(work, self._tell)
        self._future.add_done_callback(lambda _: self._said.put(None))

    def __iter__(self) -> Iterator[str]:
        while (said := self._said.get()) is not None:
            yield said

    def result(self) -> T:
        """Raises what the work raised."""
        return self._future.result()

    def stop(self) -> None:
        """End the work at its next step. Does not wait for it: gradio closes generators on its event loop."""
        self._stop.set()
        self._future.cancel()

    def _tell(self, what: str) -> None:
        if self._stop.is_set():
            raise Stopped
        self._said.put(what)


class Device:
    """What is in memory: at most one model and the scorers that were asked beside it. Use `device()`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "device")
        self._studio: Studio | None = None
        self._panel: Panel | None = None

    @contextmanager
    def task(self, work: Callable[[Tell], T]) -> Iterator[Task[T]]:
        """Start work, which tells its steps; leaving the context ends it, whatever it is left by."""
        task = Task(self._pool, work)
        try:
            yield task
        finally:
            task.stop()

    # For work, in the device's thread.

    def studio(self, folder: Path) -> "Studio":
        """The run's model. Raises ConfigError or ModelError."""
        from ddpo.studio import Studio

        if self._studio is None or self._studio.folder != folder:
            last, self._studio = self._studio, None
            if self._panel:
                self._panel.close()  # another run has other scorers
            self._studio = Studio.open(folder, last)
        return self._studio

    def panel(self) -> "Panel":
        from ddpo.panel import Panel

        if self._panel is None:
            import torch

            self._panel = Panel(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
        return self._panel


@functools.cache
def device() -> Device:
    """The process has one."""
    return Device()


@contextmanager
def told() -> Iterator[None]:
    """What is wrong with a request, a run or a model is shown in the page, and is no traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as e:  # RuntimeError: a FileError or RewardError, or out of memory
        raise gr.Error(html.escape(str(e), quote=False), duration=None, print_exception=False) from e


def chosen(offered: dict[str, dict[str, Any]], names: Any) -> dict[str, dict[str, Any]]:
    """The scorers of these names. Raises ValueError where one is not offered."""
    if not isinstance(names, list | None) or any(not isinstance(name, str) for name in names or []):
        raise ValueError("the scorers must be a list of names")
    if unknown := [name for name in names or [] if name not in offered]:
        raise ValueError(f"there is no scorer {unknown[0][:80]!a} here; choose from {', '.join(offered) or 'none'}")
    return {name: offered[name] for name in dict.fromkeys(names or [])}
