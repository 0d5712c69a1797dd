"""A run of two processes, and what it leaves."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.reliability.victims import ended, said_by, start_ranks

CONFIG = """
model: {{name: sd, path: {tiny}, dtype: float32}}
lora: {{rank: 4}}
prompts: {{train: menagerie-train, held_out: menagerie-held-out}}
rollout: {{solver: {{name: "diffusion:DDIM", eta: 1.0}}, num_steps: 2, guidance: 2.0, prompts: 4, group_size: 4, batch_size: 8}}
advantage: {{name: "advantage:GroupRelative"}}
algorithm: {{name: "ddpo:DDPO", clip: 0.1}}
rewards: [{{name: "tests.reliability.ill_ranks:tilt", isolate: false}}]
optimizer: {{lr: 3.0e-4, micro_batch: 4, max_grad_norm: 1.0e-4}}  # small beside Adam's eps is then what is only rounding
evaluation: {{prompts: 1, seeds: 2}}
objective: {{max_missing: 0.5}}
run: {{iterations: 3, eval_every: 100, save_every: 1, on_alarm: warn, threads: 1, timeout: 2}}
"""
PATCHY = "rewards=[{name: 'tests.reliability.ill_ranks:Patchy', isolate: false}]"
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ddpo.train")


def written(tiny: Path, folder: Path) -> str:
    """The config file of a run on the tiny pipeline."""
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(tiny=tiny))
    return str(path)


class Two:
    """A run of two processes, ended."""

    def __init__(self, words, folder, before=None, timeout=300.0):
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder, output = folder, folder.with_name(f"{folder.name}.out")
        began = time.monotonic()
        self.codes = ended(start_ranks([*words, f"run.output={folder}"], output, before), timeout)
        self.seconds = time.monotonic() - began
        self.said = [" ".join(said_by(output, rank).read_text().split()) for rank in (0, 1)]

    def lora(self):
        assert self.codes == [0, 0], self.said
        return load_file(self.folder / "lora" / "pytorch_lora_weights.safetensors")


def rewards(folder: Path) -> dict[tuple[int, int, int], float | None]:
    """By iteration, group and member."""
    lines = [json.loads(line) for path in folder.glob("rewards*.jsonl") for line in path.read_text().splitlines()]
    return {(line["iteration"], line["group"], line["member"]): next(iter(line["scores"].values())) for line in lines}


def dumped(folder: Path, rank: int, iteration: int) -> dict[str, torch.Tensor]:
    """The weights that `ill_ranks.dump` wrote down."""
    return load_file(folder / f"weights-{rank}-{iteration}.safetensors")
