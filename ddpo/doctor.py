"""`ddpo doctor`: is this machine fit to train on, and if not, what to do about it.

Each check looks at one thing and says ok, warning or fail, with the fix. The self-test is a real run of three iterations on
the built-in model: the trainer itself, its checkpoints, and a scorer in a process of its own.
"""

import argparse
import contextlib
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

GB = 10**9
LITTLE_DISK, LITTLE_MEMORY = 5 * GB, 4 * GB  # bytes, below which to warn; Stable Diffusion 1.5 is 5.5 on disk
NO_DISK = GB // 2

# Package, the first version without it, what it is, and another package without which nothing comes of it. Of a package's
# several only the newest stands here: its fix has the older ones'. Source: the advisory of that number.
KNOWN = [
    ("torch", "2.10.1", "CVE-2026-4538: a file that is loaded can run code", None),
    ("transformers", "5.3.0", "CVE-2026-5241: a model's config can run code", None),
    ("diffusers", "0.38.0", "CVE-2026-44513: a model can run code without trust_remote_code", None),
    ("accelerate", "1.14.1", "CVE-2026-69112: a checkpoint can read files outside its folder", None),
    ("gradio", "6.20.0", "CVE-2026-59806: requests can be sent on to other servers", None),
    ("starlette", "0.49.1", "CVE-2025-62727: one request can keep the server busy", None),
    ("python-multipart", "0.0.27", "CVE-2026-42561: one upload can keep the server busy", None),
    ("pillow", "12.3.0", "CVE-2026-55380: a small picture can fill the memory", None),
    ("pillow", "13.0.0", "CVE-2026-112398: an FPX file can run code where olefile is installed", "olefile"),
]


@dataclass(frozen=True)
class Finding:
    """What a check saw."""

    what: str
    level: Literal["ok", "warning", "fail"]
    seen: str
    fix: str = ""  # none is needed where all is well


def main(words: list[str]) -> int:
    """Prints the findings. Returns the exit code: 0, or 1 if something failed."""
    parser = argparse.ArgumentParser(prog="ddpo doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are to be written")
    parser.add_argument("--online", action="store_true", help="try whether the model hub can be reached")
    parser.add_argument("--quick", action="store_true", help="leave out the self-test")
    args = parser.parse_args(words)
    worst = "ok"
    for finding in findings(args.runs, args.online, args.quick):
        print(f"{finding.level:8}{finding.what:20}{finding.seen}", flush=True)
        if finding.fix:
            print(f"{'':8}{'':20}fix: {finding.fix}", flush=True)
        worst = "fail" if "fail" in (worst, finding.level) else finding.level if worst == "ok" else worst
    print({"ok": "All is well.", "warning": "Fit to train; look at the warnings.", "fail": "Not fit to train."}[worst])
    return int(worst == "fail")


def findings(runs: Path, online: bool, quick: bool) -> Iterator[Finding]:
    """One after the other, as they are found."""
    yield python()
    yield from packages(metadata.requires("ddpo") or [])
    yield from vulnerabilities()
    yield torchvision()
    yield accelerator()
    yield memory()
    from huggingface_hub.constants import HF_HUB_CACHE

    yield folder("run folders", runs)
    yield folder("hub cache", Path(HF_HUB_CACHE))
    if online:
        yield hub()
    if not quick:
        yield from self_test()


def python() -> Finding:
    wanted, found = metadata.metadata("ddpo")["Requires-Python"], platform.python_version()
    if Version(found) in SpecifierSet(wanted, prereleases=True):
        return Finding("python", "ok", found)
    return Finding("python", "fail", f"{found}, needed {wanted}", f"make the environment anew: uv venv --python '{wanted}'")


def packages(required: Sequence[str]) -> Iterator[Finding]:
    """Those that are missing or have another version than pyproject.toml allows; of extras, only those installed."""
    wrong = False
    for requirement in map(Requirement, required):
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        found = _version(requirement.name)
        if (found is None and extra) or (found is not None and requirement.specifier.contains(found, prereleases=True)):
            continue
        wrong = True
        seen = "not installed" if found is None else f"{found}, needed {requirement.specifier}"
        install = f"uv pip install '{requirement.name}{requirement.specifier}'"
        yield Finding(requirement.name, "fail", seen, f"{install}, or make setup")
    if not wrong:
        names = ("torch", "diffusers", "transformers", "accelerate", "peft", "gradio")
        yield Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in names if _version(name)))


def vulnerabilities() -> Iterator[Finding]:
    wrong = False
    for name, fixed, what, through in KNOWN:
        found = _version(name)
        if found is not None and Version(found) < Version(fixed) and (through is None or _version(through)):
            wrong = True
            fix = f"uv pip uninstall {through}" if through else f"uv pip install '{name}>={fixed}'"
            yield Finding(name, "fail", f"{found} has {what}", fix)
    if not wrong:
        yield Finding("vulnerabilities", "ok", "none of those known when this version was made; make audit asks for today's")


def torchvision() -> Finding:
    """A torchvision built for another torch imports, and has lost its operators; CLIP and detection then fail in mid-run."""
    found = _version("torchvision")
    fix = "install both from one index: uv pip install --reinstall torch torchvision"
    if found is None:
        return Finding("torchvision", "fail", "not installed; open_clip needs it", fix)
    try:
        from torchvision.ops import nms

        kept = nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 7, 7]]), torch.tensor([0.9, 0.8, 0.7]), 0.5)
    except (RuntimeError, ImportError, AttributeError, OSError) as error:
        return Finding("torchvision", "fail", f"{found} does not fit torch {torch.__version__}: {_line(error)}", fix)
    if kept.tolist() != [0, 2]:
        return Finding("torchvision", "fail", f"{found}: its nms operator keeps boxes {kept.tolist()}, not [0, 2]", fix)
    return Finding("torchvision", "ok", found)


def accelerator() -> Finding:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16: set model.dtype=float16"
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}))
        seen = f"{torch.cuda.device_count()} x {names}, {free / GB:.1f} of {total / GB:.1f} GB free, CUDA {torch.version.cuda}{bf16}"
        return Finding("accelerator", "ok", seen)
    if torch.accelerator.is_available():
        return Finding("accelerator", "ok", str(torch.accelerator.current_accelerator()))
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        fix = "look at nvidia-smi's CUDA version and install the torch of that version: https://pytorch.org/get-started"
        return Finding(
            "accelerator", "warning", f"there is an NVIDIA driver, but torch {torch.__version__} does not use it", fix
        )
    seen = f"none; {os.cpu_count()} CPU cores will do for the built-in model"
    return Finding("accelerator", "ok", seen)


def memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
            free = min(free, int(limit.read_text()))
    if free >= LITTLE_MEMORY:
        return Finding("memory", "ok", f"{free / GB:.1f} GB free")
    fix = "end other programs; the built-in model needs 2 GB, Stable Diffusion 1.5 some 8"
    return Finding("memory", "warning", f"{free / GB:.1f} GB free", fix)


def folder(what: str, path: Path) -> Finding:
    """Whether a file can be written there, and how much room is left. A folder that is not there yet is not made."""
    there = next(place for place in (path, *path.resolve().parents) if place.exists())
    elsewhere = {"run folders": "run.output=DIR puts a run elsewhere", "hub cache": "HF_HOME=DIR puts it elsewhere"}[what]
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".ddpo-doctor-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(what, "fail", f"{there} cannot be written: {_line(error)}", f"mend its permissions; {elsewhere}")
    seen = f"{path}: {free / GB:.1f} GB free"
    if free < LITTLE_DISK:
        return Finding(what, "fail" if free < NO_DISK else "warning", seen, f"make room; {elsewhere}")
    return Finding(what, "ok", seen)


def hub() -> Finding:
    from huggingface_hub import HfApi, constants

    try:
        next(iter(HfApi().list_models(limit=1)))
    except Exception as error:  # whatever its HTTP library raises
        fix = "look at the proxy, HF_ENDPOINT and HF_HUB_OFFLINE; models can also be copied: model.path=FOLDER"
        return Finding("model hub", "warning", f"{constants.ENDPOINT} cannot be reached: {_line(error)}", fix)
    return Finding("model hub", "ok", f"{constants.ENDPOINT} answers")


# ----------------------------------------------------------------------------------------------------------------------
# The self-test

CONFIG = """
model: {name: sd, path: menagerie, dtype: float32}
lora: {rank: 4}
prompts: {train: menagerie-train, held_out: menagerie-held-out}
rollout: {num_steps: 2, guidance: 1.0, prompts: 2, group_size: 2, batch_size: 4, solver: {name: "diffusion:DDIM", eta: 1.0}}
advantage: {name: "advantage:GroupRelative"}
algorithm: {name: "ddpo:DDPO"}
rewards: [{name: "jpeg:Compressibility"}]
held_out_rewards: []
optimizer: {lr: 1.0e-3, updates: 1, micro_batch: 4}
evaluation: {prompts: 1, seeds: 2}
run: {iterations: 2, eval_every: 2, save_every: 1, threads: 1}
"""
CLOSE = 1e-3  # relative difference of two LoRAs that an accelerator may make of one run; a CPU makes none


def self_test() -> Iterator[Finding]:
    """Train two iterations, and again with a stop after the first: both must end the same."""
    with tempfile.TemporaryDirectory(prefix="ddpo-doctor-") as name:
        place = Path(name)
        (place / "config.yaml").write_text(CONFIG, encoding="utf-8")
        code, said = _train(place, "whole", "rewards.0.isolate=true")
        if code:
            fix = "mend what is above; if nothing is, report it with this output"
            yield Finding("self-test", "fail", f"a run of two iterations ended with exit code {code}: {said}", fix)
            return
        yield Finding("scorer process", "ok", "a scorer in a process of its own scored two iterations")
        yield _ratio(place / "whole")
        for words in (["run.iterations=1"], []):
            code, said = _train(place, "resumed", *words)
        yield _resume(place) if not code else Finding("resume", "fail", f"ended with exit code {code}: {said}", _REPORT)


_REPORT = "report it, with the versions above: a run that is stopped here must not be trusted when it goes on"


def _train(place: Path, run: str, *words: str) -> tuple[int, str]:
    """The real command in this process: its exit code, and the last line that it printed."""
    from ddpo import train

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = train.main([str(place / "config.yaml"), f"run.output={place / run}", *words])
    lines = [line for line in printed.getvalue().splitlines() if line.strip()]
    return code, next((line for line in lines if line.startswith("stopped")), lines[-1] if lines else "")


def _ratio(run: Path) -> Finding:
    from ddpo import jsonl

    off = max(abs(line["ratio/max"] - 1) for line in jsonl.read(run / "metrics.jsonl") if "ratio/max" in line)
    if off <= 1e-4:
        return Finding("ratio", "ok", f"one before the update, to {off:.1g}: acting and learning agree")
    fix = "report it: gradients would be of another policy than the one that drew the pictures"
    return Finding("ratio", "fail", f"off one by {off:.2g} before the update", fix)


def _resume(place: Path) -> Finding:
    from safetensors.torch import load_file

    whole, resumed = (load_file(place / run / "lora" / "pytorch_lora_weights.safetensors") for run in ("whole", "resumed"))
    if whole.keys() != resumed.keys() or any(whole[key].shape != resumed[key].shape for key in whole):
        return Finding("resume", "fail", "the resumed run has other weights", _REPORT)
    if all(torch.equal(whole[key], resumed[key]) for key in whole):
        return Finding("resume", "ok", "a run that was stopped and went on is the same to the bit")
    apart = _norm([whole[key] - resumed[key] for key in whole]) / _norm(whole.values())
    if torch.accelerator.is_available() and apart <= CLOSE:
        return Finding(
            "resume", "ok", f"a run that was stopped and went on differs by {apart:.1g}, as any two runs do on an accelerator"
        )
    return Finding("resume", "fail", f"a run that was stopped and went on differs by {apart:.2g}", _REPORT)


def _norm(parts: Iterable[torch.Tensor]) -> float:
    return sum(part.double().square().sum().item() for part in parts) ** 0.5


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
