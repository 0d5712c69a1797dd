"""From a config file to a finished run folder."""

import os
import platform
import shlex
import sys
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ddpo import finish, jsonl, offline, prompts, trackers
from ddpo.checkpoint import run_lock, write_json
from ddpo.config import Config, dump, load
from ddpo.durable import FileError, UnusableFolder, explained, replace
from ddpo.memory import NoMemory
from ddpo.models._common import Networks
from ddpo.policy import Policy
from ddpo.recipe import Recipe
from ddpo.rewarding import Scoring, rubrics
from ddpo.updates import NUMBERS_CODE, Alarm

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ddpo.meeting import Meeting, Signals, Stop
    from ddpo.progress import Display

VERSIONS = ["ddpo", "torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors", "pillow"]


def read(path: str, overrides: list[str], processes: int) -> Config[Recipe]:
    """A checked recipe. Raises ConfigError with everything that is wrong with it."""
    config = load(path, overrides, Recipe)
    config.refuse([*config.recipe.shares(processes), *trackers.missing(config.recipe.trackers)])
    return config


def run(recipe: Recipe, words: list[str]) -> int:
    """Train, and leave a run folder. Returns the exit code, as ddpo/train.py lists them."""
    from ddpo.meeting import Signals, Stop, Unreachable

    with Signals(alone=int(os.environ.get("WORLD_SIZE", "1")) == 1) as signals:
        try:
            return _run(recipe, words, signals)
        except Stop as e:  # while libraries are imported: `_run` tells of all later ones
            print(f"{e}: stopped before training began; nothing is lost", file=sys.stderr, flush=True)
            return e.code
        except Unreachable as e:  # while the processes look for each other
            print(f"stopped: {e}", file=sys.stderr, flush=True)
            return 1


def _run(recipe: Recipe, words: list[str], signals: "Signals") -> int:
    from ddpo.meeting import Meeting, Stop  # here, like all that takes seconds to import: a misspelt key should not wait for it
    from ddpo.progress import Display

    accelerator = _accelerator(recipe)
    meeting = Meeting(accelerator, signals, recipe.run.timeout)
    folder = _folder(recipe, words[0], meeting)
    main = accelerator.is_main_process
    display = Display(main, folder / "train.log" if main else None)
    record = Record(folder, recipe, words, accelerator.num_processes)
    with ExitStack() as held:
        try:
            meeting.on_main(lambda: held.enter_context(run_lock(folder)))
            meeting.on_main(record.begin)
            trainer, last, alarm = _train(recipe, folder, accelerator, display, meeting)
            meeting.on_main(lambda: _finish(folder, trainer, last, record, display, alarm))
            signals.done()
        except Stop as e:
            if main:
                _interrupted(e, recipe, folder, record, display)
            meeting.close()
            return e.code
        except Exception as e:
            code = _failed(e, meeting, folder, record, display)
            if not _expected(e):
                raise
            return code
    meeting.close()
    return alarm.code if alarm else 0


def _accelerator(recipe: Recipe) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ddpo.meeting import Unreachable

    waiting = InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.run.timeout))
    cpu = not torch.accelerator.is_available()  # several CPU processes need to be told
    try:
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[waiting])
    except torch.distributed.DistError as e:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Unreachable(
            f"not all {os.environ.get('WORLD_SIZE')} processes met at {address} within {recipe.run.timeout:g} minutes (run.timeout); start "
            f"all of them with the same MASTER_ADDR and MASTER_PORT, as a launcher does ({e})"
        ) from e
    if accelerator.device.type == "cpu":  # launchers give each process one thread
        shared_out = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(recipe.run.threads or max(1, shared_out))
    return accelerator


def _interrupted(stop: "Stop", recipe: Recipe, folder: Path, record: "Record", display: "Display") -> None:
    if not record.begun:
        print(f"{stop}: stopped before training began; nothing is lost", file=sys.stderr, flush=True)
        return
    with suppress(FileError):  # the disk may be full: the code and the words below are what matters
        record.write("interrupted", f"{stop} in {display.doing}")
    display.say(
        f"{stop}: stopped in {display.doing}. Lost is what was computed since {_newest(folder)}, of "
        f"{recipe.run.save_every} iteration{'s' * (recipe.run.save_every > 1)} at most (run.save_every), and no reward: "
        f"those are written down. To go on: {record.resume}"
    )


def _failed(error: Exception, meeting: "Meeting", folder: Path, record: "Record", display: "Display") -> int:
    """Tell the other processes, and the user: once, by the main process where it can be reached. Returns the exit code."""
    from ddpo.learner import BadNumbers
    from ddpo.meeting import Failure, Unreachable

    code = 2 if isinstance(error, UnusableFolder) else NUMBERS_CODE if isinstance(error, BadNumbers) else 1
    text = str(error) if _expected(error) else f"an error of this program, {error!r}; its traceback is shown too"
    mine = Failure(code, f"in {display.doing}: {text}" if isinstance(error, Unreachable) else text)
    told = meeting.tell(error, mine)
    code, text = told or mine
    if told is None and not meeting.is_main:
        print(f"stopped: process {meeting.rank}: {text}", file=sys.stderr, flush=True)
    elif meeting.is_main and not record.begun:
        print(text, file=sys.stderr, flush=True)
    elif meeting.is_main:
        print(f"stopped: {text}", file=sys.stderr, flush=True)
        with suppress(FileError):  # the disk may be what is wrong
            record.write("failed", text)
        display.say(
            f"lost is what was computed since {_newest(folder)}; rewards are kept. To go on after mending it: {record.resume}"
        )
    if told is not None:
        meeting.close()
    return code


def _expected(error: Exception) -> bool:
    """Whether it is no error of this program, but of what it was given or where it runs."""
    from ddpo.meeting import TrainingError
    from rewards import RewardError

    return isinstance(error, (TrainingError, FileError, RewardError, NoMemory, offline.PictureError, ImportError, OSError))


def _newest(folder: Path) -> str:
    named = folder / "checkpoints" / "latest"
    if not named.exists():
        return "the start, there being no checkpoint yet"
    return f"the checkpoint {named.with_name(named.read_text().strip())}"


def _finish(folder: Path, trainer: Any, last: dict[str, Any], record: "Record", display: Any, alarm: Alarm | None) -> None:
    record.write("stopped" if alarm else "finished", alarm.text if alarm else None)
    lora = finish.leave(folder, trainer.policy, last["iteration"], folder)
    if alarm:
        best, safe = trainer.baseline.best, trainer.baseline.safe
        print(f"stopped by an alarm, {alarm.name}: {alarm.text}", file=sys.stderr, flush=True)
        display.say(
            f"everything is kept: the newest is {_newest(folder)}; the trained reward was highest at iteration {best}, what "
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
    recipe: Recipe, folder: Path, accelerator: "Accelerator", display: "Display", meeting: "Meeting"
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
        meeting.step()
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
            recipe.evaluation, folder, identity(recipe), accelerator, display, watching, recipe.health, meeting,
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


def _folder(recipe: Recipe, config: str, meeting: "Meeting") -> Path:
    """run.output, or runs/<name>; all processes agree on the time in it."""
    if recipe.run.output:
        return Path(recipe.run.output)
    started = meeting.gather(torch.tensor([int(time.time())]))[0].item()
    stamp = datetime.fromtimestamp(started).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / (recipe.run.name or f"{Path(config).stem}-{stamp}")


class Record:
    """run.json and config.yaml: what was asked for, by whom and when, and how it ended."""

    def __init__(self, folder: Path, recipe: Recipe, words: list[str], processes: int):
        self.path, self.config, self.begun = folder / "run.json", dump(recipe), False
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

    def begin(self) -> None:
        """In a folder that is this run's, and locked."""
        with explained(f"{self.path.parent}: what is asked for was not written down"):
            replace(self.path.with_name("config.yaml"), self.config.encode())
        self.write("running")
        self.begun = True

    def write(self, status: str, reason: str | None = None) -> None:
        ended = None if status == "running" else datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.path, {**self.fields, "status": status, "ended": ended, "exit_reason": reason})


def _with_output(words: list[str], folder: Path) -> list[str]:
    kept = [w for w in words if not w.lstrip("-").startswith(("run.output=", "run.name="))]
    return [*kept, f"run.output={folder}"]
