"""From a config file to a finished run folder."""

import os
import platform
import shlex
import sys
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ddpo import finish, jsonl, offline, prompts, trackers
from ddpo.checkpoint import run_lock, write_json
from ddpo.config import Config, dump, load
from ddpo.durable import FileError, UnusableFolder
from ddpo.memory import NoMemory
from ddpo.models._common import Networks
from ddpo.policy import Policy
from ddpo.recipe import Recipe
from ddpo.rewarding import Scoring, rubrics
from ddpo.updates import NUMBERS_CODE, Alarm

if TYPE_CHECKING:
    from ddpo.meeting import Signals

VERSIONS = ["ddpo", "torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors", "pillow"]


def read(path: str, overrides: list[str], processes: int) -> Config[Recipe]:
    """A checked recipe. Raises ConfigError with everything that is wrong with it."""
    config = load(path, overrides, Recipe)
    config.refuse([*config.recipe.shares(processes), *trackers.missing(config.recipe.trackers)])
    return config


def run(recipe: Recipe, words: list[str]) -> int:
    """Train, and leave a run folder. Returns the exit code, as ddpo/train.py lists them."""
    from ddpo.meeting import Signals, Stop

    with Signals(alone=int(os.environ.get("WORLD_SIZE", "1")) == 1) as signals:
        try:
            return _run(recipe, words, signals)
        except Stop as e:  # while libraries are imported: `_run` tells of all later ones
            print(f"{e}: stopped before training began; nothing is lost", file=sys.stderr, flush=True)
            return e.code


def _run(recipe: Recipe, words: list[str], signals: "Signals") -> int:
    from accelerate import Accelerator  # here, like all that takes seconds to import: a misspelt key should not wait for it

    from ddpo.learner import BadNumbers
    from ddpo.meeting import Stop
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
            trainer, last, alarm = _train(recipe, folder, accelerator, display, signals)
            if record:
                _finish(folder, trainer, last, record, display, alarm)
    except UnusableFolder as e:
        print(e, file=sys.stderr, flush=True)
        return 2
    except (TrainingError, FileError, RewardError, ModelError, NoMemory, offline.PictureError, ImportError, OSError) as e:
        print(f"stopped: {e}", file=sys.stderr, flush=True)
        if record:
            with suppress(FileError):  # the disk may be what is wrong
                record.write("failed", str(e))
            kept = f"everything up to the last checkpoint, {_newest(folder)}, is kept"
            display.say(f"{kept}. To go on after mending it: {record.resume}")
        return NUMBERS_CODE if isinstance(e, BadNumbers) else 1
    except Stop as e:
        if record:
            record.write("interrupted", f"{e} in {display.doing}")
            display.say(
                f"{e}: stopped in {display.doing}. Lost is what was computed since the checkpoint {_newest(folder)}, of "
                f"{recipe.run.save_every} iteration{'s' * (recipe.run.save_every > 1)} at most (run.save_every), and no reward: "
                f"those are written down. To go on: {record.resume}"
            )
        return e.code
    return alarm.code if alarm else 0


def _newest(folder: Path) -> str:
    named = folder / "checkpoints" / "latest"
    return str(named.with_name(named.read_text().strip())) if named.exists() else "(there is none yet)"


def _finish(folder: Path, trainer: Any, last: dict[str, Any], record: "Record", display: Any, alarm: Alarm | None) -> None:
    record.write("stopped" if alarm else "finished", alarm.text if alarm else None)
    lora = finish.leave(folder, trainer.policy, last["iteration"], folder)
    if alarm:
        best, safe = trainer.baseline.best, trainer.baseline.safe
        print(f"stopped by an alarm, {alarm.name}: {alarm.text}", file=sys.stderr, flush=True)
        display.say(
            f"everything is kept: the newest checkpoint is {_newest(folder)}; the trained reward was highest at iteration {best}, what "
            f"is not trained on at {safe}, and both checkpoints are there. {lora} is of the newest, and {folder / 'report.html'} shows "
            f"the run. To go on in spite of it: {record.resume} run.on_alarm=warn"
        )
        return
    display.summary(folder, last, lora, record.resume, f"ddpo generate {folder} -p {shlex.quote(last_prompt(folder))}")


def last_prompt(folder: Path) -> str:
    """A held-out prompt of the run, to try its LoRA on."""
    return str(jsonl.read(folder / "samples" / "index.jsonl")[-1]["prompt"])


class ModelError(FileError):
    """The model could not be loaded."""


def _train(
    recipe: Recipe, folder: Path, accelerator: Any, display: Any, signals: "Signals"
) -> tuple[Any, dict[str, Any], Alarm | None]:
    """Load the model and the scorers, and train. With the last evaluation, and the alarm that ended the run, if one did."""
    from ddpo.trainer import Task, Trainer
    from ddpo.watch import Alarmed

    train, held_out = recipe.training_prompts(), prompts.load(recipe.prompts.held_out)
    trained, watched = rubrics(recipe.rewards, recipe.held_out_rewards, recipe.objective)
    told = [c.build() for c in recipe.trackers] if accelerator.is_main_process else []
    watching = trackers.Trackers(told, folder, yaml.safe_load(dump(recipe)), display.say)
    with closing(trained), closing(watched), closing(watching):
        for rubric in (trained, watched):  # before the model: what is missing is told sooner
            rubric.load()
        display.say(f"{folder}: loading {recipe.model.options.get('path', recipe.model.name)}")
        try:
            policy = Policy(recipe.model.build(), recipe.lora, recipe.rollout.guidance, recipe.run.seed)
        except (OSError, ValueError) as e:
            raise ModelError(f"model {recipe.model.options.get('path', recipe.model.name)!r} cannot be loaded: {e}") from e
        if isinstance(policy.family, Networks) and (unread := policy.family.unread([p.text for p in (*train, *held_out)])):
            display.say(unread)
        task = Task(train, held_out, trained, watched, recipe.objective.max_missing)
        trainer = Trainer(
            policy, recipe.algorithm.build(), recipe.advantage.build(), task, recipe.run, recipe.rollout, recipe.optimizer,
            recipe.evaluation, folder, identity(recipe), accelerator, display, watching, recipe.health, signals,
        )  # fmt: skip
        try:
            return trainer, trainer.run(), None
        except Alarmed as e:
            return trainer, trainer.last_evaluation(), e.alarm


def identity(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's numbers, flat: a checkpoint made with other settings is not resumed from."""
    settings = yaml.safe_load(dump(recipe))
    for key in ("evaluation", "held_out_rewards", "trackers", "health"):
        settings.pop(key, None)
    for said, scorer in zip(settings["rewards"], recipe.rewards, strict=True):
        incidental = {f.name for f in fields(Scoring)} - {"weight", "floor"}
        for key in (*incidental, *getattr(scorer.factory, "incidental", ())):
            said.pop(key, None)
    del settings["rollout"]["pictures"]  # its content is in prompts.train
    settings["run"] = {"seed": recipe.run.seed}
    settings["prompts"] = {"train": prompts.digest(recipe.source)}
    return flat(settings)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"rollout.solver.eta": 1.0}."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, list):
        return flat({str(i): part for i, part in enumerate(value)}, prefix)
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
