"""How many pictures go through a network at a time: as many as were asked for, or as the memory bears."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class NoMemory(RuntimeError):
    """Not even one picture at a time fits; the message names the options that help."""


class ElsewhereOutOfMemory(torch.OutOfMemoryError):
    """Another process is out of memory: this one tries again with it, so that all take the same steps."""


class Batch:
    """A batch size that is halved each time the memory does not bear it. What was done before is not done again.

    Args:
        size: pictures at a time.
        phase: what is done with them, in words.
        advice: the options that help where a single picture is too much.
        say: told once a halving.
        agree: given whether this process is out of memory, says whether any is. Called by all processes after each batch.
    """

    def __init__(
        self,
        size: int,
        phase: str = "drawing",
        advice: str = "a smaller model or resolution",
        say: Callable[[str], None] = lambda text: None,
        agree: Callable[[bool], bool] = lambda short: short,
    ):
        self.size, self.phase, self.advice, self.say, self.agree = size, phase, advice, say, agree

    def pieces(self, number: int, work: Callable[[Tensor], T]) -> Iterator[T]:
        """What `work` makes of rows 0 to `number`, in order, `size` of them at a time.

        Raises:
            NoMemory: a single row is too much.
        """
        start = 0
        while start < number:
            rows = torch.arange(start, min(start + self.size, number))
            done, short = self._try(lambda rows=rows: work(rows))  # type: ignore[misc]
            if short:
                self.halve(len(rows))
            else:
                yield from done
                start += len(rows)

    def fitted(self, work: Callable[[], T], undo: Callable[[], None]) -> T:
        """What `work` returns, which goes by `size`, once it fits. What it has half done before is undone. For this process alone."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass  # the traceback holds on to the batch until the handler is left
            self.halve(self.size)
            undo()

    def halve(self, tried: int) -> None:
        _empty_cache()
        if tried <= 1:
            raise NoMemory(f"the memory does not hold even one picture at a time in {self.phase}; {self.advice}")
        self.size = tried // 2
        self.say(
            f"out of memory in {self.phase}: from now on {self.size} pictures at a time in place of {tried}. The batch that is learned "
            "from is the same; the last bits of what is computed are not those of a run without this"
        )

    def _try(self, work: Callable[[], T]) -> tuple[list[T], bool]:
        """([what was made] or [], whether some process is out of memory)."""
        done: list[T] = []
        try:
            done.append(work())
        except ElsewhereOutOfMemory:
            return [], True  # that was agreed upon where it was raised
        except torch.OutOfMemoryError:
            pass
        return done, self.agree(not done)


def _empty_cache() -> None:
    """Give back what the allocator keeps: pieces of the old size do not serve the new one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
