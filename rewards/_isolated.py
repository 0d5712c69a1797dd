"""A scorer in a process of its own: what hangs, crashes or eats memory there is killed, and the run goes on or stops whole.

Pictures pass through shared memory, everything else as JSON over pipes; nothing is pickled. This isolates from faults. It
is no sandbox: a scorer is code and has the user's rights. One that is not trusted belongs behind `rewards.remote`.
"""

import contextlib
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from rewards._contract import RewardError, name_of

RESTARTS = 2  # of a process that died or hung, for one batch
START_SECONDS = 300.0  # to import and build the scorer, which may load weights
LONGEST_ANSWER = 2**24  # bytes
PASSED_ON = {  # of the environment: no tokens
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TORCH_HOME", "XDG_CACHE_HOME", "VIRTUAL_ENV", "HF_HUB_DISABLE_TELEMETRY",
    "DIFFUSERS_DISABLE_REMOTE_CODE", "DO_NOT_TRACK",
}  # fmt: skip


class Isolated:
    """A reward whose calls are answered by another process.

    Args:
        factory: what makes the scorer there: an importable class or function. A function that takes images, prompts and
            metadata is the scorer itself.
        options: its other arguments, as JSON.
        timeout: seconds for the answer to one batch. A process that has not answered is killed, with all it started.
        memory_gb: what it may allocate; None is the machine's memory. More raises MemoryError there.
        environment: names of environment variables to pass on beside the usual ones.

    Raises (by `load` and by calls):
        RewardError: the scorer raised, or its process died or hung three times; with the end of what it printed.
    """

    differentiable = False  # no gradient passes between processes
    elsewhere = True

    def __init__(
        self, factory: Callable[..., Any], options: dict[str, Any], timeout: float = 60.0, memory_gb: float | None = None,
        environment: Sequence[str] = (),
    ):  # fmt: skip
        self.name = name_of(factory)
        if callable(getattr(factory, "refresh", None)):
            raise ValueError(
                f"{self.name} learns from the pictures (it has refresh()), and must share the process: isolate: false"
            )
        self.groupwise = getattr(factory, "groupwise", False) is True
        self.deterministic = getattr(factory, "deterministic", True) is not False
        limit = int((memory_gb or 0) * 2**30) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._asked = {"module": _module_of(factory), "attribute": factory.__qualname__, "options": options, "memory": limit}
        self._timeout, self._passed_on = timeout, {*PASSED_ON, *environment}
        self._device = "cpu"
        self._process: _Process | None = None
        self.restarts = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float | None]:
        for attempt in range(RESTARTS + 1):
            try:
                return self._running().score(images, prompts, metadata, self._timeout)
            except _Lost as lost:
                self.close()
                why = str(lost)
                self.restarts += 1
                print(f"reward {self.name!r}, attempt {attempt + 1} of {RESTARTS + 1}: {why}", file=sys.stderr, flush=True)
        raise RewardError(
            f"reward {self.name!r} failed {RESTARTS + 1} times, last: {why}\nMend the scorer, or raise its timeout ({self._timeout:g} s) "
            "or memory_gb, and run the same command again."
        )

    def load(self) -> None:
        """Start the process and build the scorer in it."""
        try:
            self._running()
        except _Lost as lost:
            raise RewardError(f"reward {self.name!r} could not be started: {lost}") from lost

    def to(self, device: torch.device | str) -> None:
        self._device = str(device)
        if self._process is not None:
            self._process.request({"device": self._device}, START_SECONDS)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _running(self) -> "_Process":
        if self._process is None:
            env = {k: v for k, v in os.environ.items() if k in self._passed_on}
            self._process = _Process(self.name, env)
            self._process.request(self._asked, START_SECONDS)
            self._process.request({"device": self._device}, START_SECONDS)
        return self._process


class _Lost(RuntimeError):
    """The process died, hung, or broke the protocol."""


class _Process:
    """One child: requests go down its stdin as lines of JSON, answers come back on its stdout."""

    def __init__(self, name: str, env: dict[str, str]):
        self.name = name
        self.memory = tempfile.TemporaryFile(prefix="ddpo-reward-", dir=_memory_folder())  # noqa: SIM115 has no name, so no leftover
        self.map: mmap.mmap | None = None
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "rewards._worker", str(self.memory.fileno())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[self.memory.fileno()],
            env=env | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}, start_new_session=True,
        )  # fmt: skip
        self._finalizer = weakref.finalize(self, _kill_group, self.popen)
        self.printed: deque[str] = deque(maxlen=20)
        self._listener = threading.Thread(target=_listen, args=(name, self.popen.stderr, self.printed), daemon=True)
        self._listener.start()

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict], timeout: float) -> list[float | None]:
        text = json.dumps([list(prompts), list(metadata)]).encode()
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        size = pixels.numel() * 4
        self._make_room(size + len(text))
        assert self.map is not None
        torch.frombuffer(self.map, dtype=torch.float32, count=pixels.numel()).copy_(pixels.flatten())
        self.map[size : size + len(text)] = text
        answer = self.request({"shape": list(pixels.shape), "text": len(text)}, timeout)
        return answer["scores"]

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Raises _Lost, or RewardError with what the scorer raised."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(message).encode() + b"\n")  # short: fits the pipe whether it is read or not
            self.popen.stdin.flush()
            answer = json.loads(self._line(time.monotonic() + timeout, timeout))
        except (BrokenPipeError, ValueError) as error:
            raise self._lost(f"its process ended ({error})") from error
        if "error" in answer:
            cause = torch.OutOfMemoryError(answer["error"]) if answer.get("out_of_memory") else None
            raise RewardError(answer["error"]) from cause
        return answer

    def _line(self, end: float, timeout: float) -> bytes:
        assert self.popen.stdout is not None
        descriptor, received = self.popen.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise self._lost(f"no answer in {timeout:g} s")
                piece = os.read(descriptor, 2**16)
                received += piece
                if not piece:
                    raise self._lost(f"its process died, {_reason(self.popen)}")
                if len(received) > LONGEST_ANSWER:
                    raise self._lost(f"it answered more than {LONGEST_ANSWER} bytes")
        return received

    def _lost(self, what: str) -> _Lost:
        self.kill()
        self._listener.join(timeout=2)  # its last words
        said = "".join(f"\n    {line}" for line in self.printed)
        return _Lost(f"{what}. It printed last:{said}" if said else f"{what}, having printed nothing")

    def _make_room(self, size: int) -> None:
        if self.map is None or len(self.map) < size:
            os.ftruncate(self.memory.fileno(), size)
            self.map = mmap.mmap(self.memory.fileno(), size)

    def kill(self) -> None:
        """The process and all that it started."""
        self._finalizer()
        for pipe in (self.popen.stdin, self.popen.stdout, self.memory):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _module_of(factory: Callable[..., Any]) -> str:
    """What the other process is to import: a module, or the file of a script that is being run."""
    if factory.__module__ != "__main__":
        return factory.__module__
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        raise ValueError(f"{factory.__qualname__} stands in no file that another process could import: write it into one")
    return os.path.realpath(script)


def _kill_group(popen: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def _reason(popen: subprocess.Popen) -> str:
    try:
        code = popen.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "closing its output"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _listen(name: str, stream: IO[bytes], printed: deque[str]) -> None:
    """Show what the scorer prints, and remember the end of it."""
    for line in stream:
        text = line.decode(errors="replace").rstrip()
        printed.append(text[:500])
        print(f"[{name}] {text}", file=sys.stderr, flush=True)


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
