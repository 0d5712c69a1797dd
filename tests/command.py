"""The real command on a tiny pipeline, as users start it: what several tests run, and how they compare."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CONFIG = """
model: {{name: sd, path: {model}, dtype: float32}}
lora: {{rank: 4}}
prompts: {{train: menagerie-train, held_out: menagerie-held-out}}
rollout: {{solver: {{name: "diffusion:DDIM", eta: 1.0}}, num_steps: 4, guidance: 2.0, prompts: 4, group_size: 4, batch_size: 8}}
advantage: {{name: "advantage:PerPrompt", window: 8, min_count: 2}}
algorithm: {{name: "ddpo:DDPO", clip: 0.1, kl: 0.01, steps: 0.5}}
rewards: [{{name: "jpeg:Compressibility"}}, {{name: "scene:Count", weight: 0.1}}]
held_out_rewards: []
optimizer: {{lr: 1.0e-2, updates: 2, micro_batch: 4}}
evaluation: {{prompts: 2, seeds: 2}}
run: {{iterations: 6, eval_every: 3, save_every: 1, threads: 1}}
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(CONFIG.format(model=tiny))
    return path


def start(config, folder, launcher=(sys.executable,), *words):
    command = [*launcher, "-m", "ddpo.train", str(config), f"run.output={folder}", *words]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(config, folder, *more):
    process = start(config, folder, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def started(folder):
    log = folder / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def check_same(whole, other):
    assert whole.keys() == other.keys() and all(torch.equal(whole[k], other[k]) for k in whole)
