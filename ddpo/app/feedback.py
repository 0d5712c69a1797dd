"""From votes to a reward, and from the reward to a run: the loop of RLHF. Imports neither gradio nor, until it trains, torch."""

import fcntl
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from ddpo import durable, votes
from ddpo.app.shelf import Shelf

HEAD, USED = "preferences.safetensors", "preferences-used.jsonl"
PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")


def clip_of(folder: Path) -> tuple[str, str | None]:
    """(model, pretrained) of the CLIP that the run's scorers use, else of its built-in model, else ViT-L-14.

    Raises:
        ValueError: config.yaml cannot be read.
    """
    config = _config(folder)
    for scorer in [*(config.get("rewards") or []), *(config.get("held_out_rewards") or [])]:
        if isinstance(scorer, dict) and str(scorer.get("name")).split(":")[0] == "clip" and scorer.get("model"):
            return scorer["model"], scorer.get("pretrained")
    if str((config.get("model") or {}).get("path")).startswith("menagerie"):
        return "menagerie", None
    return "ViT-L-14", "openai"


def train_reward(folder: Path) -> str:
    """Fit a reward to the standing votes, as preferences.safetensors of the run folder. Returns the report.

    The votes it was fitted to are kept beside it, as preferences-used.jsonl.

    Raises:
        ValueError: the votes are too few, or something of them cannot be read.
    """
    found = votes.read(folder)
    if not found.standing:
        raise ValueError("there are no votes yet; vote on some pairs first")
    clip = clip_of(folder)
    votes.export(found.standing, folder, folder / USED)
    from rewards._preferences import train

    report = train(folder / USED, folder / HEAD, *clip)
    return "\n".join([*found.notes, f"{report.pictures} pictures, seen by CLIP {clip[0]}", str(report.fit)])


class Launcher:
    """Starts runs on learned rewards beside the others, one at a time, as processes that outlive the app.

    The kernel keeps count: a lock on a file of the shelf is held by the run's process and freed however it ends.
    """

    def __init__(self, shelf: Shelf):
        self._shelf = shelf
        self._started: subprocess.Popen[bytes] | None = None

    def start(self, run: str, name: str, overrides: tuple[str, ...] = ()) -> str:
        """Train from the base model, as `run` was, on the reward learned from the votes on it.

        Args:
            run: a run of the shelf, with preferences.safetensors.
            name: of the new run, a folder beside it.
            overrides: further words of the command; never from a browser.

        Returns:
            the command. Its output goes to console.log of the new folder.

        Raises:
            ValueError: the name is taken or none, there is no learned reward, another run goes on, or the run stopped at once
                (its last words are told).
        """
        folder = self._shelf.folder(run)
        if not isinstance(name, str) or not PLAIN.fullmatch(name):
            raise ValueError("the new run's name may hold letters, digits, - and _, at most 64 of them")
        if not (folder / HEAD).is_file():
            raise ValueError("train a reward from the votes first")
        new, config = self._shelf.root / name, derived(_config(folder), run)
        if self._started is not None:
            self._started.poll()  # takes notice of its end
        with open(self._shelf.root / ".feedback.lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError("a run that was started here still goes on; wait for its end, or stop it") from None
            if new.exists():
                raise ValueError(f"there is a {name} already; choose another name")
            durable.make_folder(new)
            shutil.copyfile(folder / HEAD, new / HEAD)  # votes go on; this run keeps the reward that it began with
            config |= {"rewards": [{"name": "learned", "head": str(new / HEAD)}], "run": {"output": str(new)}}
            durable.replace(new / "request.yaml", yaml.safe_dump(config, sort_keys=False).encode())
            command = [sys.executable, "-m", "ddpo.train", str(new / "request.yaml"), *overrides]
            with open(new / "console.log", "wb") as log:
                self._started = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(lock.fileno(),)
                )
        self._watch(new)
        return shlex.join(["python", *command[1:]])

    def wait(self) -> int:
        """Until the run that was started has ended. Returns its exit code."""
        assert self._started is not None, "nothing was started"
        return self._started.wait()

    def _watch(self, new: Path, patience: float = 60) -> None:
        """Until the run has a run.json, so that what is wrong with its config is told here."""
        assert self._started is not None
        end = time.monotonic() + patience
        while time.monotonic() < end and not (new / "run.json").exists():
            if self._started.poll():
                said = (new / "console.log").read_text("utf-8", "replace").strip()[-1000:]
                raise ValueError(f"the run stopped at once: {said}")
            time.sleep(0.2)


def derived(config: dict[str, Any], run: str) -> dict[str, Any]:
    """Of the new run's config what the old one's decides: all of it, with its rewards only watched.

    Raises:
        ValueError: the old run learned from existing pictures, on which a reward has no influence.
    """
    if (config.get("rollout") or {}).get("pictures"):
        raise ValueError(f"{run} learned from pictures that existed; a reward needs a run that draws its own")
    old = [*(config.get("rewards") or []), *(config.get("held_out_rewards") or [])]
    watched: dict[str, dict[str, Any]] = {}
    for scorer in old:
        if scorer.get("name") not in ("learned", "discriminator"):  # what another folder's votes taught is no watcher
            watched.setdefault(str(scorer.get("name")), {k: v for k, v in scorer.items() if k not in ("weight", "floor")})
    return {"extends": f"../{run}/config.yaml", "held_out_rewards": list(watched.values())}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder.name}: config.yaml cannot be read: {type(error).__name__}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder.name}: config.yaml is not a config")
    return config
