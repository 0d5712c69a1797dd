"""A damaged, foreign, newer or hostile checkpoint is refused with one line that says why, and nothing it names is run.

pytest tests/test_manifest.py

Damage, byte by byte, and what a run does then are in reliability/test_checkpoints.py.
"""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpo import checkpoint, manifest
from ddpo.checkpoint import CorruptCheckpoint, MismatchedCheckpoint

torch.set_num_threads(1)


def write(root: Path, step: int) -> Path:
    g = torch.Generator().manual_seed(step)
    tensors = {stem: {"a": torch.randn(40, 8, generator=g)} for stem in ("lora", "optimizer")}
    return checkpoint.save(root, step, tensors, {"prompt": "größe", "lr": 1e-5}, {"model": "menagerie"}, keep=9)


def reseal(path: Path, change: Callable[[dict], object]) -> None:
    """Lets `change` edit the manifest's body, or give another, and signs it again: what someone hostile would do."""
    body = json.loads((path / "manifest.json").read_bytes())["body"]
    other = change(body)
    text = json.dumps(body if other is None else other).encode()
    (path / "manifest.json").write_bytes(manifest._enveloped(text))


def plant(path: Path, data: bytes) -> None:
    """Puts `data` in the place of lora.safetensors, with a manifest that agrees."""
    (path / "lora.safetensors").write_bytes(data)
    reseal(path, lambda body: body["files"].update({"lora.safetensors": manifest.entry(data)}))


def with_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def test_nothing_whole_is_an_error_and_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / "lora.safetensors").unlink()
    warned: list[str] = []
    with pytest.raises(CorruptCheckpoint, match="none of its 2 checkpoints is whole"):
        checkpoint.latest(tmp_path, warned.append)
    assert len(warned) == 2


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    write(tmp_path, 1)
    reseal(write(tmp_path, 2), lambda body: body.update(format=2, files="another shape"))
    with pytest.raises(MismatchedCheckpoint, match=r"step-00000002.*format 2, this program reads 1; install"):
        checkpoint.latest(tmp_path, print)
    with pytest.raises(MismatchedCheckpoint, match="format 2"):
        checkpoint.load(tmp_path / "step-00000002", {})


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def accelerates(path: Path) -> None:
    empty(path)
    for name in ("pytorch_model.bin", "random_states_0.pkl", "optimizer.bin"):
        (path / name).write_bytes(b"\x80\x04\x95cos\nsystem\n")


def text(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path / "manifest.json").write_bytes(data) and None


def body(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda path: reseal(path, change)


NO_TENSORS = with_header(b"{}")


def lists(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).write_bytes(NO_TENSORS)
        reseal(path, lambda b: b["files"].update({name: manifest.entry(NO_TENSORS)}))

    return make


def linked_file(path: Path) -> None:
    shutil.move(path / "lora.safetensors", path.parent / "elsewhere")
    (path / "lora.safetensors").symlink_to(path.parent / "elsewhere")


def linked_manifest(path: Path) -> None:
    shutil.move(path / "manifest.json", path.parent / "elsewhere")
    (path / "manifest.json").symlink_to(path.parent / "elsewhere")


def linked_folder(path: Path) -> None:
    shutil.move(path, path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def pipe(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


def planted(data: bytes) -> Callable[[Path], None]:
    return lambda path: plant(path, data)


MANY = json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}).encode()
HOSTILE: dict[str, Callable[[Path], None]] = {
    "an empty folder": empty,
    "accelerate's": accelerates,
    "a file": file_for_folder,
    "a link to a checkpoint": linked_folder,
    "a manifest that is a list": text(b"[]"),
    "a manifest without an envelope": text(b'{"format": 1, "files": {}}'),
    "a manifest not in UTF-8": text(b"\xff\xfe{}"),
    "a manifest of 17 MiB": text(b" " * (17 << 20)),
    "a manifest 200 000 deep": text(manifest._enveloped(b"[" * 200_000)),
    "a manifest that is a link": linked_manifest,
    "a manifest that is a pipe": pipe,
    "a body that is a list": body(lambda b: [1]),
    "a body with NaN": body(lambda b: b.update(state={"mean": float("nan")})),
    "a body without a step": body(lambda b: b.pop("step") and None),
    "a step that is text": body(lambda b: b.update(step="2")),
    "the number of another": body(lambda b: b.update(step=3)),
    "format 0": body(lambda b: b.update(format=0)),
    "format true": body(lambda b: b.update(format=True)),
    "files that are a list": body(lambda b: b.update(files=["lora.safetensors"])),
    "a file without a digest": body(lambda b: b["files"].update({"lora.safetensors": 5})),
    "a file outside": body(lambda b: b["files"].update({"../../../../../../../../etc/passwd": {}})),
    "an absolute file": body(lambda b: b["files"].update({"/etc/passwd.safetensors": {}})),
    "a file outside that is whole": lists("../x.safetensors"),
    "a name with a newline": lists("lora.safetensors\n"),
    "a pickle": lists("optimizer.pkl"),
    "a file that is a link": linked_file,
    "100 001 tensors": planted(with_header(MANY)),
    "a header of 17 MiB": planted(with_header(b"{}" + b" " * (17 << 20))),
    "a header of 2**63 bytes": planted(with_header(b"{}", 2**63)),
    "a header 100 000 deep": planted(with_header(b"[" * 100_000)),
    "a header that is a list": planted(with_header(b"[]")),
    "an empty tensor file": planted(b""),
    "a tensor past the end": planted(with_header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}')),
    "a dtype nobody knows": planted(with_header(b'{"a": {"dtype": "F31", "shape": [0], "data_offsets": [0, 0]}}')),
    "a pickle under our name": planted(b"\x80\x04\x95cos\nsystem\n" * 9),
    "NaN in a tensor": planted(safetensors.torch.save({"a": torch.tensor([1.0, float("nan")])})),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_foreign_and_hostile_folders_are_refused_in_one_line(tmp_path, make):
    path = write(tmp_path, 2)
    make(path)
    with pytest.raises(CorruptCheckpoint, match="step-00000002") as refused:
        checkpoint.load(path, {"model": "menagerie"})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_no_pickle_is_opened_and_nothing_outside_the_folder(tmp_path):
    """An audit hook cannot be taken back, so it lives in a child."""
    paths = [write(tmp_path / str(i), 2) for i in range(len(HOSTILE))]
    for path, make in zip(paths, HOSTILE.values(), strict=True):
        make(path)
    if (pid := os.fork()) == 0:
        seen: list[str] = []

        def hook(event: str, args: tuple) -> None:
            if event == "pickle.find_class" or (event == "open" and not str(args[0]).startswith(str(tmp_path))):
                seen.append(f"{event} {args}")

        sys.addaudithook(hook)
        for path in paths:
            try:
                checkpoint.load(path, {"model": "menagerie"})
            except CorruptCheckpoint:
                continue
            seen.append(f"{path} was loaded")
        print(*seen, sep="\n", file=sys.stderr)
        os._exit(bool(seen))
    assert os.waitpid(pid, 0)[1] == 0
