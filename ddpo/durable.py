"""Files that survive a kill and a power cut: whole or not there, on the disk before they are used.

A file is written under another name, fsynced, and renamed once; then the folder is fsynced, because a name is the folder's
content. JSON is strict both ways: NaN and infinity are not JSON.
"""

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LARGEST_JSON = 16 << 20  # bytes; a larger one is not ours


class FileError(RuntimeError):
    """A file or folder of a run could not be written, read or locked; the message says what, where, and what to do."""


class UnusableFolder(FileError):
    """No run can be in this folder: it cannot be made or written, or another run is in it."""


class DamagedFile(FileError):
    """Not what was written: no plain file, too large, or not JSON."""


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` so that `path` holds the old text or the new, never half of one.

    Raises:
        ValueError: `obj` is not strict JSON.
        FileError: the disk refuses; the old text stands.
    """
    path = Path(path)
    with explained(f"{path} was not written"):
        replace(path, encode(obj) + b"\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: not strict JSON, no plain file, or over 16 MiB.
    """
    return decode(read_small(Path(path)), str(path))


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run's folder, made if missing, for this process; the kernel frees it however the process ends.

    Raises:
        UnusableFolder: another run holds it (its pid and host are named), or the folder cannot be made, written or locked.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        with explained(f"run.output: {folder} cannot be a run's folder, choose another", UnusableFolder):
            make_folder(folder)
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            _lock(descriptor, folder)
            os.truncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
        yield


def is_locked(folder: Path) -> bool:
    """Whether a run is at work in this folder. To see it the lock is held for a moment, which `run_lock` waits out."""
    path = Path(folder) / ".lock"
    if not path.is_file():
        return False
    with contextlib.suppress(PermissionError), open(path, "rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock(descriptor: int, folder: Path) -> None:
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)  # who only looks (`is_locked`) has let go by the next try
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another run"
    raise UnusableFolder(f"{folder} is in use by {holder}; stop that run or choose another run.output=DIR")


@contextlib.contextmanager
def explained(outcome: str, kind: type[FileError] = FileError) -> Iterator[None]:
    """Inside, what the disk or a damaged file says is told as `kind`: the outcome first, the remedy last."""
    try:
        yield
    except (OSError, DamagedFile) as error:
        raise kind(f"{outcome}: {error}; free space or mend permissions there and run the same command again") from error


def write(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Puts `data` in the place of what `path` holds, at once. A dead writer's draft, `.NAME.tmp`, is written over."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        write(draft, data)
        os.rename(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    fsync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and the ones above it where they are missing, and waits until the disk has their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_folder(folder.parent)


def fsync_folder(path: Path) -> None:
    """Waits until the disk has the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_plain(path: Path, is_kind: Callable[[int], bool] = stat.S_ISREG) -> int:
    """The size in bytes of a plain file (or what `is_kind` asks for). Links, pipes and devices raise DamagedFile, unopened."""
    status = path.lstat()
    if not is_kind(status.st_mode):
        raise DamagedFile(f"{path}: a link, or of another kind than expected ({stat.filemode(status.st_mode)})")
    return status.st_size


def read_small(path: Path) -> bytes:
    """A plain file's bytes, refused with DamagedFile where it is larger than JSON of ours can be."""
    if (size := require_plain(path)) > LARGEST_JSON:
        raise DamagedFile(f"{path}: {size} bytes, at most {LARGEST_JSON} are read")
    return path.read_bytes()


def encode(obj: Any) -> bytes:
    """Strict JSON, or a ValueError that says why not."""
    try:
        return json.dumps(obj, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON: {error}") from error


def decode(data: bytes, where: str) -> Any:
    """Reads strict JSON; DamagedFile names `where` it came from."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{where}: not JSON ({error})") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")
