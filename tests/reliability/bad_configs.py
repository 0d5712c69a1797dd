"""Forty bad configs, and what each message must say. `python -m tests.reliability.show` prints them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GOOD = """\
model: {name: sd, path: menagerie}
lora: {rank: 4}
prompts: {train: menagerie-train, held_out: menagerie-held-out}
rollout:
  solver: {name: "diffusion:DDIM", eta: 1.0}
  num_steps: 8
  guidance: 1.0
  prompts: 4
  group_size: 4
  batch_size: 16
advantage: {name: "advantage:GroupRelative"}
algorithm: {name: "ddpo:DDPO", clip: 1.0e-3}
rewards:
  - {name: "jpeg:Compressibility", quality: 95}
optimizer: {lr: 5.0e-4, updates: 2, micro_batch: 8}
evaluation: {prompts: 4, seeds: 2}
run: {iterations: 2}
"""


@dataclass(frozen=True)
class Bad:
    """What is asked for, and what must be said of it.

    Args:
        said: for each line of the message, in order, its parts: where, key, value, what is allowed, the fix.
        file: what c.yaml holds, or what puts it there.
        words: of the command line.
        path: the config that is named.
    """

    said: tuple[tuple[str, ...], ...]
    file: str | bytes | Callable[[], object] = GOOD
    words: tuple[str, ...] = ()
    path: str = "c.yaml"

    def place(self) -> None:
        """Put its file into the working directory."""
        if callable(self.file):
            self.file()
        else:
            Path("c.yaml").write_bytes(self.file.encode() if isinstance(self.file, str) else self.file)


def line(*parts: str, **options: object) -> Bad:
    """One line of message."""
    return Bad((parts,), **options)  # type: ignore[arg-type]


def where(old: str, new: str, *parts: str) -> Bad:
    """GOOD with a part of it written otherwise."""
    assert GOOD.count(old) == 1, old
    return line(*parts, file=GOOD.replace(old, new))


def word(text: str, *parts: str) -> Bad:
    """GOOD with a word of the command line."""
    return line(f"command line ({text})", *parts, words=(text,))


CONFIGS = {
    # Unknown keys, one a section
    "a misspelt option": where(
        "lr: 5.0e-4",
        "learing_rate: 5.0e-4",
        "c.yaml:15: optimizer.learing_rate: unknown key",
        "did you mean 'lr'?",
        "takes lr, updates",
    ),
    "a misspelt section": where("optimizer:", "optimiser:", "c.yaml:15: optimiser: unknown key", "did you mean 'optimizer'?"),
    "a misspelt LoRA option": where(
        "{rank: 4}", "{rnak: 4}", "c.yaml:2: lora.rnak:", "did you mean 'rank'?", "rank, alpha, targets"
    ),
    "a misspelt scorer's option": where("quality: 95", "qualty: 95", "c.yaml:14: rewards.0.qualty:", "did you mean 'quality'?"),
    "a misspelt model's option": where("path: menagerie", "pth: menagerie", "c.yaml:1: model.pth:", "did you mean 'path'?"),
    # Wrong types
    "a word for a number": where(
        "rank: 4", "rank: four", 'c.yaml:2: lora.rank: should be a whole number, got "four"', "default is 16"
    ),
    "a number in quotes": where(
        "lr: 5.0e-4", 'lr: "5e-4"', 'optimizer.lr: should be a number, got "5e-4"', "write it without quotes"
    ),
    "a whole number with a point": word("run.iterations=1e2", "run.iterations: should be a whole number, got 100.0; write 100"),
    "true for a number": where(
        "iterations: 2", "iterations: true", "c.yaml:17: run.iterations: should be a whole number, got true"
    ),
    "nothing for a number": where(
        "num_steps: 8", "num_steps:", "c.yaml:6: rollout.num_steps:", "whole number, got null", "default is 50"
    ),
    "a word for a list": where("{rank: 4}", "{targets: to_q}", 'lora.targets: should be a list, got "to_q"; write [to_q]'),
    "a list for a section": where(
        "run: {iterations: 2}", "run: [2]", "c.yaml:17: run: should be a mapping", "got [2]; it takes name, output"
    ),
    # Out of range
    "a negative rate": where(
        "lr: 5.0e-4", "lr: -5.0e-4", "c.yaml:15: optimizer.lr: should be greater than 0, got -0.0005; the default"
    ),
    "no steps": where(
        "num_steps: 8", "num_steps: 0", "c.yaml:6: rollout.num_steps: should be at least 1, got 0; the default is 50"
    ),
    "not a number": where(
        "lr: 5.0e-4", "lr: .nan", 'c.yaml:15: optimizer.lr: should be a number, got ".nan"', "the default is 0.0003"
    ),
    "beyond every number": where(
        "lr: 5.0e-4", "lr: 1e400", "c.yaml:15: optimizer.lr: should be a finite number, got Infinity; the default is 0.0003"
    ),
    "a rank of a billion": where(
        "rank: 4", "rank: 1000000000", "c.yaml:2: lora.rank: should be at most 4096, got 1000000000; the default"
    ),
    "a choice that is none": where(
        "path: menagerie",
        "path: menagerie, dtype: float8",
        "model.dtype: should be 'float32', 'bfloat16' or",
        'got "float8"; did you mean',
    ),
    "a name that is a path": word(
        "run.name=../../etc", "run.name: should be a folder's name", "for a path use run.output", 'got "../../etc"'
    ),
    # What cannot go together
    "groups that updates do not divide": where(
        "updates: 2",
        "updates: 3",
        "c.yaml:8: rollout.prompts: is 4; it must be a multiple of optimizer.updates x processes",
        "use 6",
    ),
    "pictures that batches do not divide": where(
        "batch_size: 16", "batch_size: 7", "c.yaml:10: rollout.batch_size: is 7;", "16 pictures", "must divide: use 4"
    ),
    "more micro-batch than divides": where(
        "micro_batch: 8", "micro_batch: 5", "c.yaml:15: optimizer.micro_batch: is 5;", "use 4"
    ),
    "noise that is not there": where(
        "eta: 1.0", "eta: 0", "c.yaml:5: rollout.solver: DDPO learns from the noise", "adds none; set rollout"
    ),
    # Components
    "a module that is none": where(
        "name: sd", "name: sd15", "c.yaml:1: model.name: there is no module sd15", "did you mean 'sd'?", "flux"
    ),
    "a class for a module": where(
        '"diffusion:DDIM", eta: 1.0',
        "ddim",
        "c.yaml:5: rollout.solver.name: there is no module ddim",
        "did you mean 'diffusion:DDIM'?",
    ),
    "a module of several": where(
        '"ddpo:DDPO", clip: 1.0e-3',
        "forward",
        "c.yaml:12: algorithm.name:",
        "forward has NFT, AWM, RWR, RAFT; write forward:Name",
    ),
    "another kind of component": where(
        "advantage:GroupRelative",
        "diffusion:DDIM",
        "c.yaml:11: advantage.name: DDIM is another kind of component",
        "choose of advantage:GroupRelative",
    ),
    "a model that is not there": word(
        "model.path=menagere", "model.path: there is no folder menagere", "did you mean 'menagerie'?"
    ),
    "prompts that are not there": where(
        "train: menagerie-train",
        "train: nowhere.txt",
        "c.yaml:3: prompts.train: prompts 'nowhere.txt': there is no such file",
        "built-in list: ",
    ),
    # YAML that is refused
    "a key twice": where(
        "clip: 1.0e-3", "clip: 1e-3, clip: 1e-4", "c.yaml:12: algorithm.clip: written twice; first at c.yaml:12: take one out"
    ),
    "a Python object": where(
        "menagerie-train",
        "!!python/object/apply:os.system [id]",
        "c.yaml:3: not the YAML",
        "python/object/apply:os.system) is refused; write plain",
    ),
    "a bomb of anchors": line(
        "c.yaml:2: not the YAML of a config: an alias (*a) is refused; write the value out",
        file="a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    ),
    "a tab": where(
        "run: {iterations: 2}", "run:\n\titerations: 2", "c.yaml:18: not the YAML of a config: a tab; indent with spaces"
    ),
    # Files that are none
    "an empty file": Bad(
        tuple(
            (f"c.yaml:1: {key}: missing; a config needs it: {wanted}",)
            for key, wanted in (
                ("model", "name a component of ddpo.models: flux"),
                ("prompts", "a mapping of train, held_out"),
                ("rollout", "a mapping of solver"),
                ("algorithm", "name a component of ddpo.algorithms"),
                ("advantage", "name a component of ddpo: advantage:GroupRelative"),
                ("rewards", "name a component of rewards"),
            )
        ),
        file="",
    ),
    "a list": line("c.yaml:1: a config should be a mapping of keys to values", file="- model\n"),
    "UTF-16": line("c.yaml is not UTF-8 text", "save it as UTF-8", file=GOOD.encode("utf-16")),
    "a hundred megabytes": line(
        "c.yaml has 100,000,000 bytes; a config has at most 1,000,000", file=lambda: os.truncate(_made("c.yaml"), 100_000_000)
    ),
    "a pipe": line("c.yaml is a folder, a pipe or a device; give a YAML file", file=lambda: os.mkfifo("c.yaml")),
    "a circle": line("c.yaml:1: extends: c.yaml extends itself, through c.yaml; take one", file="extends: c.yaml\n" + GOOD),
    "everything at once": Bad(
        (
            ("command line (nonsense): should be key=value", "as in optimizer.lr=1e-4"),
            ("command line (run.itertions=3): run.itertions: unknown key; did you mean 'iterations'?",),
            ("c.yaml:2: lora.rank: should be at least 1, got 0",),
            ("c.yaml:15: optimizer.lr: should be a number",),
        ),
        file=GOOD.replace("rank: 4", "rank: 0").replace("lr: 5.0e-4", "lr: quick"),
        words=("nonsense", "run.itertions=3"),
    ),
}


def _made(name: str) -> str:
    Path(name).touch()
    return name
