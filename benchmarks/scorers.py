"""What it costs to run a scorer in a process of its own, and what it saves to score while the next pictures are drawn.

    python benchmarks/scorers.py

First: the same scorer in this process and in its own, 16 pictures of 512 x 512; the difference is pixels through shared memory and
JSON through pipes. Second: one rollout of the built-in model with a scorer that waits as a server does, asked after all pictures are
drawn and asked beside drawing; the time of the second over the first.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpo import experiment, prompts
from ddpo.deal import Deal
from ddpo.journal import Journal
from ddpo.judge import Judge
from ddpo.noise import Address
from ddpo.policy import Policy
from ddpo.rollout import collect
from rewards import Rubric
from rewards._isolated import Isolated

REPEATS = 9


def corner(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    """Does next to nothing."""
    return images[:, 0, 0, 0].double()


class Waiting:
    """A server that takes its time for each picture."""

    name = "waiting"

    def __init__(self, seconds: float, elsewhere: bool):
        self.seconds, self.elsewhere = seconds, elsewhere

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        time.sleep(self.seconds * len(images))
        return corner(images, prompts, metadata)


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def boundary() -> None:
    given = torch.rand(16, 3, 512, 512), ["a cat"] * 16, [{}] * 16
    isolated = Isolated(corner, {})
    isolated.load()
    isolated(*given)  # the first call makes the shared memory
    here, there = median_ms(lambda: corner(*given)), median_ms(lambda: isolated(*given))
    isolated.close()
    print(f"16 pictures of 512 x 512: {here:.2f} ms in this process, {there:.2f} ms in its own; median of {REPEATS}")


def overlap() -> None:
    recipe = experiment.read("configs/menagerie_compressibility.yaml", [], 1).recipe
    acting = recipe.rollout
    policy = Policy(recipe.model.build(), recipe.lora, acting.guidance)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    policy.to(device)
    deal = Deal(prompts.load(recipe.source), acting.prompts, acting.group_size, 1, 1, 0)
    rows = deal.rows(0, 0, 0)
    addresses: list[Address] = [("benchmark", row.group, row.member) for row in rows]

    def rollout(seconds: float, elsewhere: bool) -> float:
        with tempfile.TemporaryDirectory() as folder:
            judge = Judge(Rubric.of([(Waiting(seconds, elsewhere), 1.0)]), Rubric.of([]), Journal(Path(folder)), device, 16)
            start = time.perf_counter()
            hearing = judge.hear(rows, 0, 0, acting.group_size)
            texts = [row.prompt.text for row in rows]
            collect(policy, texts, addresses, acting.solver.build(), acting.num_steps, 16, True, drawn=hearing.add)
            hearing.scores()
            return time.perf_counter() - start

    rollout(0.0, False)  # warms up
    seconds = rollout(0.0, False) / len(rows)  # as long for a picture as drawing it
    after, beside = (statistics.median(rollout(seconds, elsewhere) for _ in range(3)) for elsewhere in (False, True))
    print(
        f"{len(rows)} pictures, {1000 * seconds:.0f} ms each to draw and as long to score: {after:.1f} s one after the other, "
        f"{beside:.1f} s at the same time, {beside / after:.2f} of it"
    )


if __name__ == "__main__":
    boundary()
    overlap()
