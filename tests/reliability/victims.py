"""Training commands to do harm to, each in a process of its own, forked from one that has imported everything already."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ddpo.experiment", "ddpo.trainer", "ddpo.models.sd", "ddpo.algorithms.ddpo", "tests.tiny"])


def start(
    words: Sequence[str], output: Path, environment: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> BaseProcess:
    """`python -m ddpo.train *words`.

    Args:
        output: the file that stdout and stderr go to.
        environment: what is added to this one.
        before: called in the process, before the command: breaks something of it. A function of a module.
    """
    process = SERVER.Process(target=_run, args=(list(words), output, dict(environment or {}), before))
    process.start()
    return process


def start_ranks(
    words: Sequence[str], output: Path, before: Callable[[], None] | None = None, number: int = 2
) -> list[BaseProcess]:
    """The same as a launcher would start it, without one; the output of rank N goes to `output` with .N after its name."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1"}  # as launchers set it; accelerate warns where it is not set
    return [
        start(words, said_by(output, rank), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, before)
        for rank in range(number)
    ]


def said_by(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.{rank}")


def ended(processes: Sequence[BaseProcess], timeout: float = 300.0) -> list[int | None]:
    """The exit codes; None of one that had to be killed, for it did not end in time."""
    limit = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _run(words: list[str], output: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.environ |= environment
    if before is not None:
        before()
    from ddpo import train

    sys.exit(train.command(words))
