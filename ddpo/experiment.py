"""From a config file to a finished run folder."""

import os
import platform
import shlex
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from ddpo import export, jsonl, offline, prompts, report
from ddpo.checkpoint import latest, run_lock, write_json
from ddpo.checkpoint import load as load_checkpoint
from ddpo.config import Config, dump, load
from ddpo.diffusion import DDIM
from ddpo.durable import FileError
from ddpo.noise import Address
from ddpo.policy import Policy
from ddpo.recipe import Recipe
from ddpo.rewarding import Scoring, rubrics
from ddpo.rollout import collect

VERSIONS = ["ddpo", "torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors", "pillow"]


def read(path: str, overrides: list[str], processes: int) -> Config[Recipe]:
    """A checked recipe. Raises ConfigError with everything that is wrong with it."""
    config = load(path, overrides, Recipe)
    config.refuse(config.recipe.shares(processes))
    return config


def run(recipe: Recipe, words: list[str]) -> int:
    """Train, and leave a run folder. Returns the exit code."""
    from accelerate import Accelerator  # here, like all that takes seconds to import: a misspelt key should not wait for it

    from ddpo.progress import Display
    from ddpo.trainer import TrainingError
    from rewards import RewardError

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # several CPU processes need to be told
    if accelerator.device.type == "cpu":  # launchers give each process one thread
        shared_out = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(recipe.run.threads or max(1, shared_out))
    folder = _folder(recipe, words[0], accelerator)
    main = accelerator.is_main_process
    display = Display(main, folder / "train.log" if main else None)
    record: Record | None = None
    try:
        with run_lock(folder) if main else nullcontext():
            record = Record(folder, recipe, words, accelerator.num_processes) if main else None
            trainer, last = _train(recipe, folder, accelerator, display)
            if record:
                _finish(folder, trainer.policy, last, record, display)
    except (TrainingError, FileError, RewardError, ModelError, offline.PictureError, ImportError) as e:
        print(f"stopped: {e}", file=sys.stderr, flush=True)
        if record:
            record.write("failed", str(e))
            display.say(f"everything up to the last checkpoint is kept. To go on after mending it: {record.resume}")
        return 1
    except KeyboardInterrupt:
        if record:
            record.write("interrupted")
            display.say(f"interrupted; at most one iteration is lost. To go on: {record.resume}")
        return 130
    return 0


def _finish(folder: Path, policy: Policy, last: dict[str, Any], record: "Record", display: Any) -> None:
    lora = export.save_lora(policy, folder, folder.name)
    export.save_card(folder, record.fields, last)
    record.write("finished")
    report.write_report(folder)
    display.summary(folder, last, lora, record.resume, f"ddpo generate {folder} -p {shlex.quote(last_prompt(folder))}")


def last_prompt(folder: Path) -> str:
    """A held-out prompt of the run, to try its LoRA on."""
    return str(jsonl.read(folder / "samples" / "index.jsonl")[-1]["prompt"])


class ModelError(RuntimeError):
    """The model could not be loaded."""


def _train(recipe: Recipe, folder: Path, accelerator: Any, display: Any) -> tuple[Any, dict[str, Any]]:
    """Load the model and the scorers, and train."""
    from ddpo.trainer import Task, Trainer

    train, held_out = recipe.training_prompts(), prompts.load(recipe.prompts.held_out)
    trained, watched = rubrics(recipe.rewards, recipe.held_out_rewards, recipe.objective)
    with closing(trained), closing(watched):
        for rubric in (trained, watched):  # before the model: what is missing is told sooner
            rubric.load()
        display.say(f"{folder}: loading {recipe.model.options.get('path', recipe.model.name)}")
        try:
            policy = Policy(recipe.model.build(), recipe.lora, recipe.rollout.guidance, recipe.run.seed)
        except (OSError, ValueError) as e:
            raise ModelError(f"model {recipe.model.options.get('path', recipe.model.name)!r} cannot be loaded: {e}") from e
        task = Task(train, held_out, trained, watched, recipe.objective.max_missing)
        trainer = Trainer(
            policy, recipe.algorithm.build(), recipe.advantage.build(), task, recipe.run, recipe.rollout, recipe.optimizer,
            recipe.evaluation, folder, identity(recipe), accelerator, display,
        )  # fmt: skip
        return trainer, trainer.run()


def identity(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's numbers, flat: a checkpoint made with other settings is not resumed from."""
    settings = yaml.safe_load(dump(recipe))
    for key in ("evaluation", "held_out_rewards"):
        settings.pop(key, None)
    for said, scorer in zip(settings["rewards"], recipe.rewards, strict=True):
        incidental = {f.name for f in fields(Scoring)} - {"weight", "floor"}
        for key in (*incidental, *getattr(scorer.factory, "incidental", ())):
            said.pop(key, None)
    del settings["rollout"]["pictures"]  # its content is in prompts.train
    settings["run"] = {"seed": recipe.run.seed}
    settings["prompts"] = {"train": prompts.digest(recipe.source)}
    return _flat(settings)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, list):
        return _flat({str(i): part for i, part in enumerate(value)}, prefix)
    return {prefix[:-1]: value}


def _folder(recipe: Recipe, config: str, accelerator: Any) -> Path:
    """run.output, or runs/<name>; all processes agree on the time in it."""
    from accelerate.utils import broadcast

    if recipe.run.output:
        return Path(recipe.run.output)
    started = broadcast(torch.tensor([int(time.time())], device=accelerator.device)).item()
    stamp = datetime.fromtimestamp(started).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / (recipe.run.name or f"{Path(config).stem}-{stamp}")


class Record:
    """run.json and config.yaml: what was asked for, by whom and when, and how it ended."""

    def __init__(self, folder: Path, recipe: Recipe, words: list[str], processes: int):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump(recipe), encoding="utf-8")
        self.path = folder / "run.json"
        self.resume = shlex.join(["accelerate", "launch", "-m", "ddpo.train", *_with_output(words, folder)])
        self.fields: dict[str, Any] = {
            "name": folder.name,
            "command": shlex.join(["accelerate", "launch", "-m", "ddpo.train", *words]),
            "resume_command": self.resume,
            "seed": recipe.run.seed,
            "model": recipe.model.options.get("path", recipe.model.name),
            "revision": recipe.model.options.get("revision"),
            "algorithm": recipe.algorithm.name,
            "rewards": [c.name for c in recipe.rewards],
            "held_out_rewards": [c.name for c in recipe.held_out_rewards],
            "prompts": {
                key: {"path": source, "sha256": prompts.digest(source)}
                for key, source in (("train", recipe.source), ("held_out", recipe.prompts.held_out))
            },
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in VERSIONS},
            "world_size": processes,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }

        self.write("running")

    def write(self, status: str, reason: str | None = None) -> None:
        ended = None if status == "running" else datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.path, {**self.fields, "status": status, "ended": ended, "exit_reason": reason})


def _with_output(words: list[str], folder: Path) -> list[str]:
    kept = [w for w in words if not w.lstrip("-").startswith(("run.output=", "run.name="))]
    return [*kept, f"run.output={folder}"]


def generate_pairs(folder: Path, prompt: str, seeds: int, output: Path) -> Path:
    """Draw a prompt with the base model (above) and with the run's newest LoRA (below), from the same noise."""
    from PIL import Image

    recipe = load(folder / "config.yaml", [], Recipe).recipe
    policy = Policy(recipe.model.build(), recipe.lora, recipe.rollout.guidance, recipe.run.seed)
    found = latest(folder / "checkpoints", print)
    if found is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet: there is nothing to compare with the base model")
    policy.load(load_checkpoint(found, identity(recipe)).tensors["lora"])
    addresses: list[Address] = [("generate", seed) for seed in range(seeds)]
    rows = []
    for self_name in ("reference", "now"):
        with policy.acting_as(self_name):
            drawn = collect(
                policy, [prompt] * seeds, addresses, DDIM(0.0), recipe.rollout.num_steps, recipe.rollout.batch_size, False
            )
        rows.append(torch.cat(list(drawn.images), 2))
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(output)
    return output
