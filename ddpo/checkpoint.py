"""Crash-safe checkpoints: plain files, whole or invisible, and no pickle.

A checkpoint exists if and only if its folder `step-NNNNNNNN` does. The folder gets that name by one rename, after every
byte below it was written, fsynced, read back and listed with its sha256 in `manifest.json`:

    checkpoints/latest                          the newest one's name, for people: what counts is the number
    checkpoints/step-00000012/                  manifest.json  lora.safetensors  optimizer.safetensors
    checkpoints/.tmp-step-00000012-9f3a0c1e/    a writer's, or a dead writer's
    checkpoints/.old-step-00000012-5d20b7aa/    an earlier step 12, until the new one has its name
    checkpoints/.trash-step-00000009-11c07fd2/  being removed

All trained state is the same on every process, so one process writes, under `run_lock`, and this file knows of no other.
Object stores cannot rename and are not supported: write to a disk and copy.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpo import durable, manifest
from ddpo.durable import explained
from ddpo.durable import read_json as read_json
from ddpo.durable import run_lock as run_lock
from ddpo.durable import write_json as write_json
from ddpo.manifest import STEP, CheckpointError, CorruptCheckpoint, MismatchedCheckpoint, verify

_MOST_STEPS = 10**8 - 1
_DEBRIS = re.compile(r"\.(?:tmp|old|trash)-(step-[0-9]{8})-[0-9a-f]{8}")

Tensors = dict[str, dict[str, Tensor]]  # {file stem: {name: tensor}}


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, as it comes back."""

    step: int
    state: dict  # as JSON gives it: tuples are lists, keys are strings
    tensors: Tensors  # on the CPU, the same to the bit
    path: Path

    def like(self, stem: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file that must have just these names, shapes and dtypes; a MismatchedCheckpoint names the first other."""
        found, remedy = self.tensors.get(stem, {}), "resume with the same model and LoRA, or choose another run.output=DIR"
        for name in sorted(found.keys() | wanted.keys()):
            then, now = (f"{v.dtype} {list(v.shape)}" if (v := t.get(name)) is not None else "absent" for t in (found, wanted))
            if then != now:
                raise MismatchedCheckpoint(f"{self.path}: {stem}: {name} is {then}, and the model's is {now}; {remedy}")
        return found


def fault(point: str) -> None:
    """Called at every named point of the writer. Tests put a kill or a full disk in its place."""


def save(
    root: Path, step: int, tensors: Tensors, state: dict, identity: dict, keep: int = 3, pin: Collection[int] = ()
) -> Path:
    """Writes checkpoint `step` under `root`, then removes old ones; returns its folder.

    What has this number already is replaced. What has a higher number belongs to a timeline that was left (a rollback, a
    resume from an older checkpoint) and goes once this one is durable: the highest number is always the last one written.

    Args:
        tensors: {file stem: {name: tensor}}, finite, on any device.
        state: JSON; what a resume needs besides the tensors.
        identity: JSON; what a resume must find unchanged (see `load`).
        keep: this many of the newest stay, at least 1.
        pin: older steps that stay besides.

    Raises:
        CheckpointError: the disk refuses, or a tensor is not finite. What was there before is still there.
        ValueError: `step`, `keep`, a file stem, or something that is not JSON.
    """
    if keep < 1 or not 0 <= step <= _MOST_STEPS:
        raise ValueError(f"keep is {keep}, must be at least 1; step is {step}, must be in 0..{_MOST_STEPS}")
    root = Path(root)
    final, suffix = root / f"step-{step:08d}", f"step-{step:08d}-{secrets.token_hex(4)}"
    try:
        with explained(f"{final} was not written, older checkpoints are untouched", CheckpointError):
            durable.make_folder(root)
            _require_space(root, tensors)
            _require_finite(tensors)
            _write_draft(root / f".tmp-{suffix}", {"step": step, "identity": identity, "state": state}, tensors)
            if os.path.lexists(final):
                os.rename(final, root / f".old-{suffix}")
                fault("moved aside")
            os.rename(root / f".tmp-{suffix}", final)
            fault("renamed")
            durable.fsync_folder(root)
            fault("durable")
    except BaseException:
        sweep(root)
        raise
    with explained(f"{final} is written and whole, but what is old could not be cleared away", CheckpointError):
        durable.replace(root / "latest", f"{final.name}\n".encode())
        fault("latest")
        _retire(root, step, keep, pin)
        sweep(root)
    return final


def latest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint by number (clocks skew), or None where there is none at all.

    `warn` is told which ones are skipped and why.

    Raises:
        CorruptCheckpoint: there are checkpoints and none is whole. To start over is for the user to decide.
        MismatchedCheckpoint: the newest is for a newer program. An older one in its place would undo work.
    """
    steps = _steps(Path(root))
    for step in steps:
        path = Path(root) / f"step-{step:08d}"
        try:
            verify(path)
        except CorruptCheckpoint as error:
            warn(f"skipping a damaged checkpoint: {error}")
        else:
            return path
    if steps:
        raise CorruptCheckpoint(f"{root}: none of its {len(steps)} checkpoints is whole; move it away to start afresh")
    return None


def load(path: Path, identity: dict) -> Checkpoint:
    """Reads one checkpoint, every byte verified. What the user names is what is loaded: nothing falls back.

    Raises:
        CorruptCheckpoint: it is damaged, or not one of ours.
        MismatchedCheckpoint: `identity` is not the one it was saved with; lists each field that differs, both values.
    """
    path = Path(path)
    body = verify(path)
    if different := manifest.differences(body["identity"], json.loads(durable.encode(identity))):
        raise MismatchedCheckpoint(f"{path} was made with other settings: {different}")
    tensors = {name.removesuffix(".safetensors"): _read_tensors(path / name) for name in body["files"]}
    return Checkpoint(body["step"], body["state"], tensors, path)


def folder_of(root: Path, step: int) -> Path:
    """Where a checkpoint of this number is, if there is one."""
    return Path(root) / f"step-{step:08d}"


@contextlib.contextmanager
def understood(root: Path) -> Iterator[None]:
    """Inside, a whole checkpoint whose state is not what this program writes is told as a MismatchedCheckpoint."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        remedy = "use the ddpo that wrote it, or choose another run.output=DIR"
        raise MismatchedCheckpoint(f"{root}: its state is not what this ddpo writes ({error!r}); {remedy}") from error


def sweep(root: Path) -> None:
    """Clears away what dead writers left under `root`. A checkpoint that was only moved aside gets its name back.

    To be called when a run starts, under `run_lock`.
    """
    root = Path(root)
    for name in _names(root):
        found = _DEBRIS.fullmatch(name)
        if found and name.startswith(".old-") and not os.path.lexists(root / found[1]):
            os.rename(root / name, root / found[1])
        elif found:
            fault("sweep")
            shutil.rmtree(root / name, ignore_errors=True)  # NFS refuses while a reader holds it: the next sweep tries again
        elif name == ".latest.tmp":
            (root / name).unlink()


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state by parameter name: tensors `<name>.<field>`, not copied, and the rest as JSON.

    The optimizer has one parameter group; `names` are its parameters' names, in order.
    """
    packed = optimizer.state_dict()
    settings = {k: v for k, v in _group(packed, names).items() if k != "params"}
    fields = {f"{names[i]}.{k}": v for i, held in packed["state"].items() for k, v in held.items()}
    tensors = {k: v for k, v in fields.items() if isinstance(v, Tensor)}
    return tensors, {"settings": settings, "others": {k: v for k, v in fields.items() if k not in tensors}}


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor], packed: dict) -> None:
    """Puts back what `pack_optimizer` took, learning rate included: the next step is the same to the bit.

    Raises:
        MismatchedCheckpoint: state of a parameter that is not in `names`, or of another shape than its parameter.
    """
    group = _group(optimizer.state_dict(), names)
    shapes = {name: p.shape for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | packed["others"]).items():
        name, field = key.rsplit(".", 1)
        if name not in shapes or (isinstance(value, Tensor) and value.dim() and value.shape != shapes[name]):
            raise MismatchedCheckpoint(f"optimizer state {key!r} fits no parameter; resume with the same model and LoRA")
        # load_state_dict keeps the tensors it is given and steps them in place: the checkpoint's own must not change
        state.setdefault(names.index(name), {})[field] = value.clone() if isinstance(value, Tensor) else value
    settings = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in packed["settings"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": [group | settings]})


def _group(packed: dict, names: list[str]) -> dict[str, Any]:
    held = [len(group["params"]) for group in packed["param_groups"]]
    if held != [len(names)]:
        raise ValueError(f"the optimizer's groups hold {held} parameters; one group of the {len(names)} named ones is needed")
    return packed["param_groups"][0]


def _write_draft(draft: Path, body: dict, tensors: Tensors) -> None:
    fault("start")
    os.mkdir(draft)
    fault("made")
    listed = {}
    for stem, named in tensors.items():
        name = manifest.file_name(stem)
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in named.items()}  # none may share memory
        data = safetensors.torch.save(copies)
        listed[name] = manifest.entry(data)
        durable.write(draft / name, data)
        fault(f"wrote {stem}")
    about = {"torch": str(torch.__version__), "written_at": datetime.now(UTC).isoformat(timespec="seconds")}  # for people
    durable.write(draft / "manifest.json", manifest.seal({**body, "files": listed, **about}))
    fault("wrote manifest")
    durable.fsync_folder(draft)
    fault("complete")
    verify(draft)  # the digests are of the bytes in memory, so a write that went wrong in silence is noticed
    fault("verified")


def _retire(root: Path, step: int, keep: int, pin: Collection[int]) -> None:
    steps = _steps(root)
    left = [s for s in steps if s > step]
    old = [s for s in steps[len(left) + keep :] if s not in pin]
    for s in left + old:
        os.rename(root / f"step-{s:08d}", root / f".trash-step-{s:08d}-{secrets.token_hex(4)}")
        fault("retired")


def _names(root: Path) -> list[str]:
    return sorted(os.listdir(root)) if root.is_dir() else []


def _steps(root: Path) -> list[int]:
    return sorted((int(m[1]) for m in map(STEP.fullmatch, _names(root)) if m), reverse=True)


def _require_space(root: Path, tensors: Tensors) -> None:
    needed = 2 * sum(v.numel() * v.element_size() for named in tensors.values() for v in named.values())
    if (free := shutil.disk_usage(root).free) < needed:
        raise OSError(f"{needed} bytes of free space are needed, {free} are there")


def _require_finite(tensors: Tensors) -> None:
    for stem, named in tensors.items():
        if bad := _not_finite(named):
            remedy = "the checkpoints already there are sound: resume from one, with a lower learning rate"
            raise CheckpointError(f"{stem} holds NaN or infinity in {', '.join(bad)}, so no checkpoint is written; {remedy}")


def _not_finite(named: dict[str, Tensor]) -> list[str]:
    return [name for name, value in named.items() if not value.isfinite().all()]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        named = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path}: not a safetensors file ({error}); use another checkpoint") from error
    if bad := _not_finite(named):
        raise CorruptCheckpoint(f"{path}: holds NaN or infinity in {', '.join(bad)}; use another checkpoint")
    return named
