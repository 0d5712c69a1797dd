"""What a run folder offers to draw and to score with, read without loading anything. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ddpo import jsonl
from ddpo.manifest import STEP

EXPORTED = Path("lora") / "pytorch_lora_weights.safetensors"  # in a run folder

# Scorers that need no download, as a config names them.
BUILT_IN: dict[str, dict[str, Any]] = {
    "clip, built-in": {"name": "clip", "model": "menagerie"},
    **{
        name: {"name": name}
        for name in (
            "jpeg:Compressibility", "jpeg:Incompressibility", "pixels:Brightness", "pixels:Contrast", "pixels:Sharpness",
            "pixels:Colourfulness", "pixels:Saturation", "pixels:Symmetry", "scene:Scene", "scene:Colour", "scene:Count",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """Args:
    num_steps, guidance: as in the run's evaluations.
    iterations: 0, the base model, and each after which a LoRA is there.
    scorers: what the run's config says of each of its rewards, by the name to choose it by.
    prompt: a held-out one.
    note: what could not be read, and why; empty if all could.
    """

    num_steps: int = 20
    guidance: float = 1.0
    iterations: list[int] = field(default_factory=lambda: [0])
    scorers: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompt: str = ""
    note: str = ""

    @classmethod
    def of(cls, folder: Path) -> "Offer":
        """Reads what can be read: a folder that is half copied or being written still offers what is whole."""
        try:
            found = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
            acting, steps = found["rollout"], (found.get("evaluation") or {}).get("num_steps")
            return cls(
                int(steps or acting["num_steps"]), float(acting["guidance"]), saved(folder), _scorers(found), _prompt(folder),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
            reason = "there is none" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {e}".splitlines()[0]
            return cls(note=f"config.yaml cannot be read ({reason}), so nothing can be drawn with this run")


def saved(folder: Path) -> list[int]:
    """The iterations that can be drawn with: 0, those of checkpoints, and the last one's if its LoRA was exported."""
    root = folder / "checkpoints"
    steps = {int(m[1]) for m in map(STEP.fullmatch, (p.name for p in root.iterdir())) if m} if root.is_dir() else set()
    if (last := exported(folder)) is not None:
        steps.add(last)
    return sorted({0, *steps})


def exported(folder: Path) -> int | None:
    """The iteration whose LoRA is in `lora/`, the last one; None where there is no such file, or no telling."""
    if not (folder / EXPORTED).is_file():
        return None
    try:
        return int(jsonl.read(folder / "metrics.jsonl")[-1]["iteration"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _scorers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for section, mark in (("rewards", ""), ("held_out_rewards", " (held out)")):
        for entry in config.get(section) or []:
            name, number = f"{entry['name']}{mark}", 1
            while (unique := name if number == 1 else f"{name} {number}") in found:
                number += 1
            found[unique] = dict(entry)
    return found


def _prompt(folder: Path) -> str:
    try:
        return str(jsonl.read(folder / "samples" / "index.jsonl")[-1]["prompt"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
