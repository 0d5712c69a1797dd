"""Killed at any moment, or spread over two processes: the run ends the same. The real command, as users start it."""

import os
import random
import re
import signal
import subprocess
import sys
import time
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


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_bit_identical(config, tmp_path):
    whole = finish(config, tmp_path / "whole")
    log = (tmp_path / "whole" / "metrics.jsonl").read_text()
    training = float(re.findall(r'"seconds": ([\d.]+)', log)[-1]) + 0.5  # the last half second: the files at the end
    moments, kills, run = random.Random(0), 0, 0
    while kills < 10:
        folder = tmp_path / f"killed-{run}"
        process = start(config, folder)
        while not started(folder) and process.poll() is None:
            time.sleep(0.02)
        try:
            process.wait(moments.uniform(0, training))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            check_same(whole, load_file(folder / "lora" / "pytorch_lora_weights.safetensors"))
            run += 1
    check_same(whole, finish(config, folder))


def check_same(whole, other):
    assert whole.keys() == other.keys() and all(torch.equal(whole[k], other[k]) for k in whole)


@pytest.mark.slow
def test_two_processes_agree_with_one(config, tmp_path):
    one = finish(config, tmp_path / "one")
    two = finish(
        config, tmp_path / "two", (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    )
    assert '"world_size": 2' in (tmp_path / "two" / "run.json").read_text()
    change = {k: v for k, v in one.items() if ".up." in k}  # B starts at zero: it is the accumulated change itself
    assert sum(v.square().sum() for v in change.values()) > 0
    apart = sum((two[k] - v).square().sum() for k, v in change.items()) / sum(v.square().sum() for v in change.values())
    assert apart.sqrt() <= 1e-4, f"relative difference {apart.sqrt():.2g}"


@pytest.mark.slow
def test_another_seed_ends_elsewhere(config, tmp_path):
    """The control: the comparisons above can tell two runs apart."""
    a, b = (
        finish(config, tmp_path / "a", (sys.executable,), "run.iterations=1"),
        finish(config, tmp_path / "b", (sys.executable,), "run.iterations=1", "run.seed=1"),
    )
    assert any(not torch.equal(a[k], b[k]) for k in a)
