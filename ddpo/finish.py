"""What a run leaves behind for others: LoRA files, a model card with pictures, report.html. At its end, or again later."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ddpo import card, checkpoint, export, manifest, report
from ddpo.config import Component, In, load
from ddpo.policy import LoRA, Policy
from ddpo.runs import Run


@dataclass(frozen=True)
class _Weights:
    """Of a run's config, what its LoRA files need. The rest may name files that are not on this machine."""

    model: Annotated[Component, In("ddpo.models")]
    lora: LoRA


def leave(folder: Path, policy: Policy, iteration: int, target: Path) -> Path:
    """Write the policy as it is now under `target`: lora/, README.md, images/ and report.html. Returns the LoRA for diffusers.

    Args:
        folder: of the run; its records say what is written of it.
        iteration: after which the policy is what it is.
        target: any folder, the run's own too.
    """
    run = Run.load(folder)
    lora = export.save_lora(policy, target, run.name, export.described(run, policy, iteration))
    card.write_card(run, target, iteration)
    report.write_report(folder, target)
    return lora


def export_run(folder: Path, which: str, target: Path) -> Path:
    """The same from a checkpoint of a run folder.

    Args:
        which: "best" (by the trained reward on held-out prompts), "latest", or the number of an iteration.

    Raises:
        FileNotFoundError: there is no such run or checkpoint; the message lists those there are.
        ValueError, checkpoint.CheckpointError: the config or the checkpoint is damaged, or they do not belong together.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    chosen = _chosen(folder / "checkpoints", which)
    weights = load(folder / "config.yaml", [], _Weights, partly=True).recipe
    saved = checkpoint.load(chosen, manifest.verify(chosen)["identity"])
    try:
        policy = Policy(weights.model.build(), weights.lora)
    except OSError as error:
        raise ValueError(f"the run's model cannot be loaded: {error}") from error
    shapes = {name: weight.shape for name, weight in policy.weights.items()}
    if shapes != {name: tensor.shape for name, tensor in saved.tensors["lora"].items()}:
        raise ValueError(f"{chosen} was made with another model or lora section than {folder / 'config.yaml'} has now")
    policy.load(saved.tensors["lora"])
    return leave(folder, policy, saved.step, target)


def _chosen(root: Path, which: str) -> Path:
    if which == "latest":
        if (found := checkpoint.latest(root, print)) is None:
            raise FileNotFoundError(f"{root.parent} has no checkpoint yet")
        return found
    name = (root / "best").read_text().strip() if which == "best" and (root / "best").is_file() else which
    path = root / (f"step-{int(name):08d}" if name.isdecimal() else name)
    if not re.fullmatch(r"step-\d{8}", path.name) or not path.is_dir():
        held = ", ".join(str(int(p.name[5:])) for p in sorted(root.glob("step-????????"))) or "none"
        raise FileNotFoundError(
            f"{root.parent} has no checkpoint {which}; use latest, best, or one of these iterations: {held}"
        )
    return path
