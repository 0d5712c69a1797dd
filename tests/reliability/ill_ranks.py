"""What goes wrong on one process of several, and what they leave behind to compare: for test_ranks.py."""

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

from ddpo import journal
from ddpo.algorithms.ddpo import DDPO
from ddpo.judge import Hearing
from ddpo.learner import Learner
from ddpo.policy import Policy
from ddpo.trainer import Trainer


def tilt(images, prompts, metadata):
    """How much lighter the left half is: of these pictures it differs far more than a byte that falls to the other side does."""
    left, right = images.double().chunk(2, 3)
    return left.mean((1, 2, 3)) - right.mean((1, 2, 3))


class Patchy:
    """The same; but a third of all groups score alike, and in another third the first picture cannot be scored."""

    groupwise = True

    def __call__(self, images, prompts, metadata):
        kind = sum(prompts[0].encode()) % 3
        scores = [0.5] * len(prompts) if kind == 0 else tilt(images, prompts, metadata).tolist()
        return [None if kind == 1 and i == 0 else score for i, score in enumerate(scores)]


@dataclass(frozen=True)
class Struck(DDPO):
    """DDPO whose process 1, at its loss number `at`, sends itself the signal that the file says, once.

    Args:
        note: the file.
    """

    note: str = ""
    at: int = 10
    calls: ClassVar[list[int]] = []

    def loss(self, policy, view):
        self.calls.append(1)
        note = Path(self.note)
        if rank() == 1 and len(self.calls) == self.at and note.exists():
            number = int(note.read_text())
            note.unlink()
            os.kill(os.getpid(), number)
        return super().loss(policy, view)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# ----------------------------------------------------------------------------------------------------------------------
# For `victims.start(before=...)`


def dump(folder: Path) -> None:
    """Each process leaves its weights after each iteration there, and the pictures it drew."""
    record, add = Trainer._record, Hearing.add

    def recorded(trainer, metrics, evaluated):
        weights = {name: w.detach().clone() for name, w in trainer.policy.weights.items()}
        save_file(weights, folder / f"weights-{rank()}-{trainer.iteration}.safetensors")
        return record(trainer, metrics, evaluated)

    def added(hearing, images):
        rows = hearing.rows[len(hearing.keys) : len(hearing.keys) + len(images)]
        pictures = {f"{row.group}-{row.member}": image.clone() for row, image in zip(rows, images, strict=True)}
        save_file(pictures, folder / f"pictures-{hearing.iteration + 1}-{rows[0].group}-{rows[0].member}.safetensors")
        add(hearing, images)

    Trainer._record, Hearing.add = recorded, added


def mean_of_means(folder: Path) -> None:
    """Each process divides by its own count, and then they average: what design.md forbids."""
    dump(folder)

    def average(learner, weights, weight, lost=0.0):
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights])
        told = torch.cat([flat / max(weight, 1e-12), flat.new_tensor([float(lost)])])
        everywhere = learner.meeting.add_up(told) / learner.accelerator.num_processes
        for p, grad in zip(weights, everywhere[:-1].split([p.numel() for p in weights]), strict=True):
            p.grad = grad.view_as(p)
        return everywhere[:-1], everywhere[-1].item()

    Learner._average = average


def full_disk() -> None:
    """The second batch of rewards that process 1 writes down meets a full disk."""
    append, calls = journal._append, []

    def refusing(path, data):
        calls.append(path)
        if rank() == 1 and len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, data)

    journal._append = refusing


def bad_loss(folder: Path) -> None:
    """Process 1's losses are not finite in the second iteration, of one picture."""
    dump(folder)
    loss, iterate, at = DDPO.loss, Trainer._iterate, [0]

    def iterated(trainer):
        at[0] = trainer.iteration
        return iterate(trainer)

    def spoilt(algorithm, policy, view):
        made, metrics = loss(algorithm, policy, view)
        return made * torch.where((torch.arange(len(made)) == 0) & (rank() == 1) & (at[0] == 1), torch.nan, 1.0), metrics

    Trainer._iterate, DDPO.loss = iterated, spoilt


def bad_gradient(folder: Path) -> None:
    """Process 1's gradient of one weight is not finite in the second iteration."""
    dump(folder)
    iterate = Trainer._iterate

    def iterated(trainer):
        if rank() == 1 and trainer.iteration == 1:
            next(iter(trainer.policy.weights.values())).register_hook(lambda grad: grad * torch.inf)
        return iterate(trainer)

    Trainer._iterate = iterated


def error_of_ours() -> None:
    """Process 1 meets an error in this program, in the middle of an update."""
    loss = DDPO.loss

    def wrong(algorithm, policy, view):
        if rank() == 1:
            raise KeyError("a bug")
        return loss(algorithm, policy, view)

    DDPO.loss = wrong


def no_model() -> None:
    """The model cannot be loaded, on process 1 alone."""
    init = Policy.__init__

    def refusing(*args, **kwargs):
        if rank() == 1:
            raise OSError("no such model here")
        init(*args, **kwargs)

    Policy.__init__ = refusing


def main_killed() -> None:
    """Process 0 is killed in the second iteration's sampling."""
    _struck(0, signal.SIGKILL)


def stopped() -> None:
    """Process 1 stands still in the second iteration's sampling."""
    _struck(1, signal.SIGSTOP)


def _struck(victim: int, number: int) -> None:
    act = Trainer._act

    def struck(trainer, hearing):
        if rank() == victim and trainer.iteration == 1:
            os.kill(os.getpid(), number)
        return act(trainer, hearing)

    Trainer._act = struck


def never() -> None:
    """Process 1 does not come."""
    if rank() == 1:
        os._exit(0)
