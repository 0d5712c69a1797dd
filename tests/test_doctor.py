"""`ddpo doctor` tells each thing that can be wrong with a machine, and what mends it: `pytest tests/test_doctor.py`"""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ddpo import checkpoint, cli, doctor
from ddpo.noise import Address

REQUIRED = ["torch>=2.11", "gradio<7,>=6.20; extra == 'app'", "transformers<6,>=5.3"]


@pytest.fixture
def installed(monkeypatch):
    """Sets the versions that are installed: None is not installed."""

    def set_versions(**versions: str | None) -> None:
        real = metadata.version

        def version(name: str) -> str:
            found = versions.get(name.replace("-", "_"), real)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


def test_what_is_installed_here_is_well():
    found = [*doctor.packages(metadata.requires("ddpo")), *doctor.vulnerabilities(), doctor.python(), doctor.torchvision()]
    assert {f.level for f in found} == {"ok"}, found


@pytest.mark.parametrize(
    ("versions", "name", "seen"),
    [
        ({"torch": "2.10.0"}, "torch", "2.10.0, needed >=2.11"),
        ({"torch": "2.11.0+cu128"}, None, ""),
        ({"torch": None}, "torch", "not installed"),
        ({"transformers": "6.0.1"}, "transformers", "6.0.1, needed <6,>=5.3"),
        ({"gradio": None}, None, ""),  # an extra that nobody asked for
        ({"gradio": "6.19.0"}, "gradio", "6.19.0, needed <7,>=6.20"),
    ],
)
def test_a_package_of_a_wrong_version_is_told(installed, versions, name, seen):
    installed(**versions)
    found = [f for f in doctor.packages(REQUIRED) if f.level != "ok"]
    assert [f.what for f in found] == ([name] if name else [])
    for finding in found:
        assert finding.level == "fail" and seen in finding.seen and f"uv pip install '{name}" in finding.fix


@pytest.mark.parametrize("name", sorted({name for name, *_, through in doctor.KNOWN if through is None}))
def test_a_version_with_a_known_hole_is_told(installed, name):
    fixed = next(fixed for known, fixed, _, through in doctor.KNOWN if known == name and through is None)
    installed(**{name.replace("-", "_"): "0.0.1", "olefile": None})
    [found] = doctor.vulnerabilities()
    assert (found.what, found.level) == (name, "fail") and "CVE-" in found.seen and f">={fixed}" in found.fix


def test_a_hole_that_needs_another_package_is_told_where_it_is_there(installed):
    installed(pillow="12.3.0", olefile="0.47")
    [found] = doctor.vulnerabilities()
    assert "CVE-2026-112398" in found.seen and found.fix == "uv pip uninstall olefile"


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    found = doctor.python()
    assert found.level == "fail" and "3.10.14, needed >=3.11" in found.seen and "uv venv" in found.fix


def test_a_torchvision_for_another_torch_is_told(monkeypatch):
    import torchvision.ops

    def lost(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", lost)
    found = doctor.torchvision()
    assert found.level == "fail" and "nms does not exist" in found.seen and "reinstall" in found.fix
    monkeypatch.setattr(torchvision.ops, "nms", lambda *_: torch.tensor([0, 1, 2]))
    assert doctor.torchvision().level == "fail"
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    assert doctor.torchvision().level == "fail"


def test_a_driver_that_torch_does_not_use_is_told(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert doctor.accelerator().level == "warning"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert doctor.accelerator().level == "ok"


def test_little_memory_is_told(monkeypatch):
    import psutil

    def read_text(path: Path) -> str:
        return "1000000000" if path.name == "memory.max" else "max"

    assert doctor.memory().seen.endswith("GB free")
    monkeypatch.setattr(Path, "read_text", read_text)  # a container's limit
    assert doctor.memory().level == "warning" and doctor.memory().seen == "1.0 GB free"
    monkeypatch.setattr(Path, "read_text", lambda path: "max")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**9})())
    assert doctor.memory().level == "warning"


def test_a_folder_that_cannot_be_written_or_is_full_is_told(tmp_path, monkeypatch):
    assert doctor.folder("run folders", tmp_path / "not" / "yet").level == "ok" and not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    found = doctor.folder("run folders", tmp_path / "file")
    assert found.level == "fail" and "cannot be written" in found.seen and "run.output=DIR" in found.fix
    assert doctor.folder("hub cache", Path("/proc/self")).level == "fail"
    for free, level in ((10**11, "ok"), (10**9, "warning"), (10**8, "fail")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free})())
        found = doctor.folder("hub cache", tmp_path)
        assert found.level == level and ("HF_HOME" in found.fix) == (level != "ok")
    assert list(tmp_path.glob(".ddpo-doctor-*")) == []


def test_a_hub_out_of_reach_is_told_and_asked_only_if_wanted(monkeypatch, capsys):
    import huggingface_hub

    asked = []

    def lost(self, **_):
        asked.append(1)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", lost)
    assert cli.main(["doctor", "--quick"]) == 0 and asked == []
    assert cli.main(["doctor", "--quick", "--online"]) == 0 and asked == [1]  # a warning: training needs no hub
    assert "no route to host" in capsys.readouterr().out


def test_the_table_says_the_worst_and_ends_with_its_code(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--quick", "--runs", str(tmp_path)]) == 0
    assert "All is well." in capsys.readouterr().out
    assert cli.main(["doctor", "--quick", "--runs", str(tmp_path / "file")]) == 1
    shown = capsys.readouterr().out
    assert "fail    run folders" in shown and "fix: mend its permissions" in shown and shown.endswith("Not fit to train.\n")


# ----------------------------------------------------------------------------------------------------------------------
# The self-test, on the real trainer; what is planted is what it is there to find


def levels() -> dict[str, str]:
    return {f.what: f.level for f in doctor.self_test()}


@pytest.mark.slow
def test_the_self_test_passes_here():
    assert levels() == {"scorer process": "ok", "ratio": "ok", "resume": "ok"}


@pytest.mark.slow
def test_a_resume_that_loses_the_optimizer_is_found(monkeypatch):
    monkeypatch.setattr(checkpoint, "unpack_optimizer", lambda *_: None)
    assert levels() == {"scorer process": "ok", "ratio": "ok", "resume": "fail"}


@pytest.mark.slow
def test_a_noise_that_depends_on_when_it_is_drawn_is_found(monkeypatch):
    from ddpo import rollout

    real, drawn = rollout.normal, []

    def moody(addresses: list[Address], shape, device="cpu"):
        drawn.append(1)
        return real([(*a, len(drawn)) for a in addresses], shape, device)

    monkeypatch.setattr(rollout, "normal", moody)
    assert levels()["resume"] == "fail"


@pytest.mark.slow
def test_a_scorer_process_that_cannot_be_started_is_found(monkeypatch):
    from rewards import _isolated

    monkeypatch.setattr(_isolated.sys, "executable", "/nowhere/python")
    [found] = doctor.self_test()
    assert found.level == "fail" and found.what == "self-test" and "/nowhere/python" in found.seen, found
