"""What makes a checkpoint's folder whole: a manifest that lists every byte, and vouches for its own.

`manifest.json` is one JSON object, {"sha256": ..., "body": ...}. The digest is of the body's text as it stands in the file,
so no byte of it can change unnoticed, not even a blank. The body:

    format      1
    step        the checkpoint's number
    identity    what a resume must find unchanged
    state       what a resume needs besides the tensors
    files       {name: {"bytes": ..., "sha256": ...}}, plain safetensors files beside the manifest
    torch, written_at                   for people
"""

import hashlib
import re
import shlex
import stat
from pathlib import Path
from typing import Any

from ddpo import durable
from ddpo.durable import DamagedFile, FileError

FORMAT = 1  # every later one keeps the envelope and `format`, so that an older program can refuse it
STEP = re.compile(r"step-([0-9]{8})")
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*")
_DIGEST = re.compile("[0-9a-f]{64}")  # of a file: no value that could be set
_FILE = re.compile(r"[A-Za-z0-9._-]{1,100}\.safetensors")
_ENVELOPE = b'{"sha256": "%s", "body": %s}\n'
_MOST_TENSORS = 100_000  # a million empty tensors take seconds to open
_LARGEST_HEADER = 16 << 20  # bytes


class CheckpointError(FileError):
    """A checkpoint could not be written, read or used; the message says what, where, and what to do."""


class CorruptCheckpoint(CheckpointError, DamagedFile):
    """Not a whole checkpoint: some byte is missing or differs, or the folder was never one of ours."""


class MismatchedCheckpoint(CheckpointError):
    """A whole checkpoint, but of another run or for a newer program."""


def entry(data: bytes) -> dict[str, int | str]:
    """What the manifest lists of a file that holds `data`."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def file_name(stem: str) -> str:
    """The file of a stem: "lora" -> "lora.safetensors"; a ValueError where `verify` would refuse the name."""
    if not _FILE.fullmatch(f"{stem}.safetensors"):
        raise ValueError(f"file stem {stem!r} is refused; use at most 100 letters, digits, '.', '_' and '-'")
    return f"{stem}.safetensors"


def seal(body: dict) -> bytes:
    """The manifest's bytes; a ValueError where the body is not strict JSON."""
    return _enveloped(durable.encode({"format": FORMAT, **body}))


def verify(path: Path) -> dict:
    """The manifest's body, if every byte is there: size, sha256 and header of every file. Opens no link.

    Raises:
        CorruptCheckpoint: a file is missing, differs, or has a name that leaves the folder.
        MismatchedCheckpoint: the format is newer than this program's.
    """
    path = Path(path)
    try:
        durable.require_plain(path, stat.S_ISDIR)
        body = _read(path / "manifest.json")
        for name, listed in body["files"].items():
            _verify_file(path, name, listed)
        if (number := STEP.fullmatch(path.name)) and int(number[1]) != body["step"]:
            raise DamagedFile(f"{path}: the folder was renamed, it holds step {body['step']}")
    except (OSError, DamagedFile) as error:
        raise CorruptCheckpoint(f"{error}; not a whole checkpoint, use another one") from error
    return body


def _enveloped(text: bytes) -> bytes:
    return _ENVELOPE % (hashlib.sha256(text).hexdigest().encode(), text)


def _read(path: Path) -> dict:
    data = durable.read_small(path)
    text = data[len(_enveloped(b"")) - 2 : -2]
    if data != _enveloped(text):
        raise DamagedFile(f"{path}: its digest does not match")
    body = durable.decode(text, str(path))
    if not isinstance(body, dict) or type(body.get("format")) is not int or body["format"] < 1:
        raise DamagedFile(f"{path}: no manifest of a checkpoint")
    if body["format"] > FORMAT:
        raise MismatchedCheckpoint(f"{path}: format {body['format']}, this program reads {FORMAT}; install a newer ddpo")
    if type(body.get("step")) is not int or not all(isinstance(body.get(k), dict) for k in ("files", "identity", "state")):
        raise DamagedFile(f"{path}: no manifest of a checkpoint")
    return body


def _verify_file(folder: Path, name: str, listed: object) -> None:
    path = folder / name
    if not _FILE.fullmatch(name):
        raise DamagedFile(f"{folder}: its manifest names the file {name!r}, which is refused")
    size = durable.require_plain(path)
    with open(path, "rb") as file:
        if listed != {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}:
            raise DamagedFile(f"{path}: its size or sha256 is not the one listed in manifest.json")
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        header = durable.decode(file.read(length), str(path)) if length <= _LARGEST_HEADER else None
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
        raise DamagedFile(f"{path}: its header is no table of at most {_MOST_TENSORS} tensors in {_LARGEST_HEADER} bytes")


def differences(then: dict, now: dict) -> str:
    """Each setting of two identities that differs, with both values, and what sets them back; "" where none does."""
    old, new = _flat(then), _flat(now)
    keys = [k for k in sorted(old.keys() | new.keys()) if k not in old or k not in new or old[k] != new[k]]
    if not keys:
        return ""
    listed = "; ".join(f"{k}: checkpoint {_shown(old, k)}, now {_shown(new, k)}" for k in keys)
    words = [f"{k}={_word(old[k])}" for k in keys if k in old and not _DIGEST.fullmatch(str(old[k]))]
    back = f"set them back: {shlex.join(words)}" if words else "set them back"
    return f"{listed} ({back}, or choose another run.output=DIR to start a new run)"


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in ("true", "false", "null")
    return value if plain else durable.encode(value).decode()


def _shown(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
