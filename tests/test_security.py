"""What SECURITY.md promises, tried: `pytest tests/test_security.py`. The whole run under an audit hook takes minutes: slow."""

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from safetensors import SafetensorError

import ddpo
from ddpo import doctor
from rewards import _pictures
from rewards._tensors import MOST_TENSORS, read_tensors

ROOT = Path(__file__).parent.parent
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


HEADERS = {
    "a million tensors": header(json.dumps({str(i): EMPTY for i in range(10 * MOST_TENSORS)}).encode()),
    "one too many": header(json.dumps({str(i): EMPTY for i in range(MOST_TENSORS + 1)}).encode()),
    "a header of 17 MiB": header(b"{}" + b" " * (17 << 20)),
    "a header of 2**63 bytes": header(b"{}", 2**63),
    "nested 100 000 deep": header(b"[" * 100_000),
    "a list": header(b"[]"),
    "no JSON": header(b"{"),
    "a pickle": b"\x80\x04\x95cos\nsystem\n" * 9,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_weights_are_refused_before_the_library_opens_them(tmp_path, monkeypatch, name):
    from rewards import _tensors

    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    monkeypatch.setattr(_tensors, "load_file", lambda _: pytest.fail("it was opened"))
    with pytest.raises(SafetensorError, match="header"):
        read_tensors(path)


def test_a_scorer_says_which_weights_are_refused(tmp_path):
    from rewards import aesthetic

    path = tmp_path / "head.safetensors"
    path.write_bytes(HEADERS["one too many"])
    with pytest.raises(ValueError, match=r"head\.safetensors.*at most 100000 tensors"):
        aesthetic._read(str(path))


def saved(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_pictures_are_of_three_formats_and_of_a_limited_size(monkeypatch):
    for kind in ("PNG", "JPEG", "WEBP"):
        assert _pictures.opened(saved(Image.new("RGB", (8, 8)), kind)).size == (8, 8)
    for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PDF", "EPS"):
        with pytest.raises(ValueError, match="not a whole PNG, JPEG or WebP"):
            _pictures.opened(saved(Image.new("RGB", (16, 16)), kind))
    monkeypatch.setattr(_pictures, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="it has 1001 bytes; at most 1000 are read"):
        _pictures.opened(bytes(1001))


@pytest.mark.parametrize("module", ["ddpo.train", "ddpo.app.shelf", "ddpo"])
def test_every_way_in_turns_the_libraries_reports_off_and_keeps_what_the_user_set(module):
    env = {k: v for k, v in os.environ.items() if k not in ddpo.DEFAULTS} | {"PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "0"}
    code = f"import {module}, os, json; print(json.dumps(dict(os.environ)))"
    seen = json.loads(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert {k: seen[k] for k in ddpo.DEFAULTS} == ddpo.DEFAULTS | {"DO_NOT_TRACK": "0"}


WHOLE = """
    import sys

    def hook(event, args):
        if event == "pickle.find_class":
            print("WATCHED", event, args, flush=True)
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname") and "127.0.0.1" not in str(args):
            print("WATCHED", event, args, flush=True)

    sys.addaudithook(hook)
    from ddpo import cli
    folder = sys.argv[1]
    code = cli.main(["train", folder + "/config.yaml", "run.output=" + folder + "/run"])
    code = code or cli.main(["report", folder + "/run"])
    code = code or cli.main(["generate", folder + "/run", "-p", "a cat", "--seeds", "1", "-o", folder + "/pairs.png"])
    sys.exit(code)
"""


@pytest.mark.slow
def test_a_whole_run_uses_no_pickle_and_no_network(tmp_path):
    """Train on the built-in model with its CLIP watched, write the report, export the LoRA, draw from it; without the
    environment of these tests that would keep it from the network by itself."""
    watched = doctor.CONFIG.replace("held_out_rewards: []", "held_out_rewards: [{name: clip, model: menagerie}]")
    (tmp_path / "config.yaml").write_text(watched)
    env = {k: v for k, v in os.environ.items() if k not in (*ddpo.DEFAULTS, "HF_HUB_OFFLINE")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(WHOLE), str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "WATCHED" not in ended.stdout, [line for line in ended.stdout.splitlines() if "WATCHED" in line]
    for name in ("report.html", "lora/pytorch_lora_weights.safetensors", "lora/run.safetensors", "checkpoints/latest"):
        assert (tmp_path / "run" / name).is_file()
    files = [p.suffix for p in (tmp_path / "run").rglob("*")]
    assert not {".pkl", ".pt", ".pth", ".bin", ".ckpt"} & set(files)
