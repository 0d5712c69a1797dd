"""Hundreds of iterations: not one tensor or file descriptor more than at the start (reliability 2.6).

pytest tests/reliability/test_soak.py -m slow           300 iterations
pytest tests/reliability/test_soak.py -m weekly         5,000
"""

import gc
import itertools
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from tests.command import CONFIG
from tests.reliability import victims

SMALL = [
    "rollout.prompts=2", "rollout.group_size=2", "rollout.batch_size=4", "rollout.num_steps=2", "rollout.guidance=1",
    "optimizer.micro_batch=4", "optimizer.updates=1", "optimizer.lr=1e-5", "evaluation.prompts=1", "run.on_alarm=warn",
]  # fmt: skip
SETTLED = 60  # iterations: windows and deques are full, pools are grown


def counted(path: Path, leak: bool = False) -> None:
    """Write down what there is at the start of each iteration."""
    from ddpo.trainer import Trainer

    iterate, kept = Trainer._iterate, []

    def first_count(trainer):
        gc.collect()
        seen = {
            "tensors": sum(torch.is_tensor(o) for o in gc.get_objects()),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "memory": psutil.Process().memory_info().rss,
            "at": time.monotonic(),
            "written": sum(p.stat().st_size for p in trainer.folder.glob("*.jsonl")),
        }
        with open(path, "a") as file:
            file.write(f"{json.dumps(seen)}\n")
        if leak:
            kept.append(torch.zeros(1))
        return iterate(trainer)

    Trainer._iterate = first_count


def census(folder: Path, tiny: Path, iterations: int, leak: bool = False) -> list[dict]:
    config, path = folder / "run.yaml", folder / "census.jsonl"
    config.write_text(CONFIG.format(model=tiny))
    words = [*SMALL, f"run.iterations={iterations}", "run.eval_every=10", "run.save_every=5", f"run.output={folder / 'run'}"]
    child = victims.start([str(config), *words], folder / "log", before=partial(counted, path, leak))
    child.join()
    assert child.exitcode == 0, (folder / "log").read_text()[-3000:]
    return [json.loads(line) for line in path.read_text().splitlines()]


def pace(part: list[dict]) -> float:
    """Seconds of an iteration."""
    return statistics.median(after["at"] - before["at"] for before, after in itertools.pairwise(part))


@pytest.mark.parametrize(
    "iterations", [pytest.param(300, marks=pytest.mark.slow), pytest.param(5000, marks=pytest.mark.weekly)]
)
def test_nothing_grows(tiny, tmp_path, iterations):
    seen = census(tmp_path, tiny, iterations)
    assert len(seen) == iterations
    tensors = [line["tensors"] for line in seen]
    assert len(set(tensors[1:])) == 1, f"tensors at the start of iterations 2, 3, ...: {tensors[1:]}"
    assert len({line["descriptors"] for line in seen[1:]}) == 1
    growth = seen[-1]["memory"] - seen[iterations // 3]["memory"]
    early, late = (pace(part) for part in (seen[SETTLED : iterations // 2], seen[iterations // 2 :]))
    middle, last = (seen[i]["written"] - seen[i - iterations // 3]["written"] for i in (2 * iterations // 3, iterations - 1))
    print(
        f"{iterations} iterations: {tensors[-1]} tensors, {seen[-1]['descriptors']} descriptors, {growth / 1e6:+.1f} MB over the "
        f"last two thirds, {late / early:.2f} times the seconds in the second half, {last / middle:.2f} times the bytes in the last third"
    )
    assert growth <= 10e6
    assert 0.9 < last / middle < 1.1


@pytest.mark.slow
def test_a_leak_of_one_tensor_an_iteration_is_seen(tiny, tmp_path):
    tensors = [line["tensors"] for line in census(tmp_path, tiny, 25, leak=True)]
    assert len(set(tensors[1:])) == 24
