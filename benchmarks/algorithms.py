"""Which algorithm learns most, from the same pictures and in the same time?

    python benchmarks/algorithms.py runs/algorithms               # everything; run it again to go on where it stopped
    python benchmarks/algorithms.py runs/algorithms --quick       # one seed, two iterations: does it still run?

Every method tunes the built-in models for their CLIP score on the same prompts with the same number of pictures an iteration. Its
learning rate is searched first: RATES from the highest down, on a seed of its own, until one leaves a lower held-out reward than the
one before it. Then it runs from SEEDS. Nothing else is tuned. What differs from the algorithms' defaults stands in METHODS and fits them
to eight steps and few pictures: clip ranges, two noise levels a picture, `max_advantage` 2 for NFT, no KL term for AWM, and the
noisiest levels alone (`lowest`), as the window's are for those that learn from steps.
Held-out prompts never appear in training; the rules (right number, right background colour, measured in the pixels) are watched and
never trained on. Seconds are not those of the runs, which may share the machine: each method is timed by a few iterations more, of one
thread, `--jobs` at a time; leave the machine alone while that goes on (it is the last thing done). Writes table.md, learning.png
and cost.png into the folder.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import algorithms_report as report

RATES, SEARCH_SEED, SEEDS = (1e-2, 3e-3, 1e-3, 3e-4), 100, (0, 1, 2)
ITERATIONS, SEARCH_ITERATIONS = 8, 8
TIMED = 4  # iterations; the first, in which the machine warms up, does not count
DISTANCE = "distance.json"
MODELS = {
    "eps": ["model={name: sd, path: menagerie}"],
    "flow": ["model={name: sd3, path: menagerie-flow}"],
}
ODE = ["rollout.solver={name: 'diffusion:DDIM', eta: 0}"]
MEMORYLESS = ["rollout.solver={name: 'diffusion:DDIM', eta: 1, min_sigma: 0}"]
EVERYWHERE = {
    "eps": MEMORYLESS,
    "flow": ["rollout.solver={name: 'diffusion:FlowSDE', noise_level: 0.7}"],
}
WINDOW = ["rollout.window={name: 'window:First', length: 2}"]


@dataclass(frozen=True)
class Method:
    """An algorithm as the config names it, and where its sampler adds noise: in all steps, in the first two, or nowhere.

    "memoryless" is noise in all steps, and so much that the end of a path tells nothing of its start.

    The first two of eight steps are the noisiest 30 % of the schedule; `lowest: 0.6` is the same idea for what looks at pictures
    that are noised anew. Both are there with and without.
    """

    algorithm: str
    noise: Literal["everywhere", "memoryless", "window", "nowhere"] = "nowhere"
    more: tuple[str, ...] = ()

    def words(self, model: str) -> list[str]:
        sampler = {
            "everywhere": EVERYWHERE[model], "memoryless": MEMORYLESS, "window": EVERYWHERE[model] + WINDOW, "nowhere": ODE,
        }[self.noise]  # fmt: skip
        return [f"algorithm={self.algorithm}", *sampler, *self.more]


METHODS = {
    "DDPO, all steps": Method("{name: 'ddpo:DDPO', clip: 1.0e-3}", "everywhere"),
    "DDPO": Method("{name: 'ddpo:DDPO', clip: 1.0e-3}", "window"),
    "DDPO-SF": Method("{name: 'ddpo:ScoreFunction'}", "window", ("optimizer.updates=1",)),
    "GRPO": Method("{name: 'grpo:GRPO', clip: 1.0e-3}", "window"),
    "GRPO-Guard": Method("{name: 'grpo:GRPOGuard', clip: 2.0e-3}", "window"),
    "Flow-DPPO": Method("{name: 'grpo:FlowDPPO', delta: 1.0e-3}", "window"),
    "DPOK": Method("{name: 'dpok:DPOK', clip: 1.0e-3}", "window", ("advantage={name: 'advantage:Standardised'}",)),
    "D3PO": Method("{name: 'dpo:D3PO'}", "window"),
    "NFT, all levels": Method("{name: 'forward:NFT', max_advantage: 2.0}"),
    "NFT": Method("{name: 'forward:NFT', max_advantage: 2.0, lowest: 0.6}"),
    "AWM, all levels": Method("{name: 'forward:AWM', times: 2, kl: 0.0}"),
    "AWM": Method("{name: 'forward:AWM', times: 2, kl: 0.0, lowest: 0.6}"),
    "EPG": Method("{name: 'elbo:EPG', lowest: 0.6}"),
    "PEPG": Method("{name: 'elbo:PEPG', lowest: 0.6}"),
    "RAM": Method(
        "{name: 'ram:RAM', temperature: 0.02, lowest: 0.6}", "nowhere", ("advantage={name: 'advantage:LeaveOneOut'}",)
    ),
    "EFM": Method(
        "{name: 'efm:EFM', temperature: 0.02, lowest: 0.6}", "nowhere", ("advantage={name: 'advantage:LeaveOneOut'}",)
    ),
    "RWR": Method("{name: 'forward:RWR', lowest: 0.6}"),
    "RAFT (best of 8)": Method("{name: 'forward:RAFT', lowest: 0.6}"),
    "Diffusion-DPO": Method("{name: 'dpo:DiffusionDPO'}"),
    "DRaFT-1": Method("{name: 'draft:DRaFT'}"),
    "DRaFT-LV": Method("{name: 'draft:DRaFTLV'}"),
    "AlignProp": Method("{name: 'draft:AlignProp', steps: 8}"),
    "ReFL": Method("{name: 'draft:ReFL', steps: 4}"),
    "Adjoint matching": Method("{name: 'adjoint:AdjointMatching', temperature: 0.02, steps: 0.25}", "memoryless"),
}


@dataclass(frozen=True)
class Job:
    """One run of the trainer."""

    model: str
    method: str
    rate: float
    seed: int
    iterations: int
    pictures: int = 64  # prompts of an evaluation

    def folder(self, root: Path) -> Path:
        name = f"{'-'.join(re.findall('[A-Za-z0-9]+', self.method))}-lr{self.rate:g}-seed{self.seed}-{self.iterations}"
        return root / self.model / name

    def run(self, root: Path) -> None:
        """Train; nothing where that was done before. Stops all where it fails."""
        folder = self.folder(root)
        if _finished(folder):
            return
        words = [
            *MODELS[self.model], *METHODS[self.method].words(self.model), f"optimizer.lr={self.rate}", f"run.seed={self.seed}",
            f"run.iterations={self.iterations}", f"run.eval_every={min(4, self.iterations)}", "run.save_every=100", "run.on_alarm=warn",
            "run.threads=1", "rollout.prompts=8", f"evaluation.prompts={self.pictures}", "evaluation.seeds=2",
            "held_out_rewards=[{name: 'scene:Scene'}]",
            f"run.output={folder}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "ddpo.train", "configs/menagerie_alignment.yaml", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{folder}: {done.stderr.strip()[-2000:]}")
        print(f"{folder}: {_told(self.evaluations(root)[-1])}", flush=True)

    def lines(self, root: Path) -> list[dict]:
        return [json.loads(line) for line in (self.folder(root) / "metrics.jsonl").read_text().splitlines()]

    def evaluations(self, root: Path) -> list[dict]:
        return [line for line in self.lines(root) if "eval/win_rate" in line]

    def gain(self, root: Path) -> float:
        """Of its end, in held-out CLIP score."""
        return self.evaluations(root)[-1]["eval/clip/delta"]

    def curve(self, root: Path) -> list[dict]:
        """The evaluations, each with the seconds of drawing, scoring and learning that it takes to get there."""
        pace = clock(self.model, self.method, self.iterations).seconds(root)
        return [line | {"spent": line["iteration"] * pace} for line in self.evaluations(root)]

    def distance(self, root: Path) -> float:
        """KL to the base model in nats a denoising step; see `measure_distances`."""
        return json.loads((self.folder(root) / DISTANCE).read_text())["nats"]

    def seconds(self, root: Path) -> float:
        """Of an iteration, the median of those after the first."""
        parts = ("rollout", "reward", "update")
        return median(sum(line.get(f"seconds/{part}", 0.0) for part in parts) for line in self.lines(root)[2:])


def clock(model: str, method: str, iterations: int) -> Job:
    """The run by which a method is timed: few iterations, hardly any evaluation."""
    return Job(model, method, 1e-3, SEARCH_SEED, min(TIMED, iterations), pictures=2)


def measure_distances(root: Path, jobs: Sequence[Job]) -> None:
    """Into each run's folder: its end's KL to the base model, the same for all samplers.

    The runs' own is of the steps that add noise, which are other steps in a window. This one is of DDPM's, on what the tuned model
    draws without noise for 16 held-out prompts.
    """
    from safetensors.torch import load_file

    from ddpo import prompts
    from ddpo.diffusion import DDIM
    from ddpo.drift import posterior_kl
    from ddpo.rollout import collect
    from ddpo.studio import Studio

    studio = None
    texts = [p.text for p in prompts.load("menagerie-held-out")]
    texts = texts[:: len(texts) // 16][:16]
    for job in jobs:
        folder = job.folder(root)
        if (folder / DISTANCE).exists():
            continue
        studio = Studio.open(folder, studio)
        studio.policy.load(load_file(folder / "checkpoints" / f"step-{job.iterations:08d}" / "lora.safetensors"))
        addresses = [(job.seed, "distance", i) for i in range(len(texts))]
        rollout = collect(studio.policy, texts, addresses, DDIM(0.0), 8, len(texts), False)
        (folder / DISTANCE).write_text(json.dumps({"nats": posterior_kl(studio.policy, rollout, len(texts)).kl}))


def _finished(folder: Path) -> bool:
    return (folder / "run.json").exists() and json.loads((folder / "run.json").read_text())["status"] == "finished"


def _told(line: dict) -> str:
    return f"CLIP {line['eval/clip/delta']:+.4f}, rules {line['eval/scene/delta']:+.3f}"


def searched(root: Path, model: str, method: str, rates: Sequence[float]) -> dict[float, float]:
    """{learning rate: held-out gain}, of those that the search tried, and that did not fall apart (NaN)."""
    jobs = [Job(model, method, rate, SEARCH_SEED, SEARCH_ITERATIONS) for rate in rates]
    gains = {job.rate: job.gain(root) for job in jobs if _finished(job.folder(root))}
    return {rate: gain for rate, gain in gains.items() if math.isfinite(gain)}


def found(root: Path, model: str, method: str, rate: float, seeds: Sequence[int], iterations: int) -> report.Found:
    jobs = [Job(model, method, rate, seed, iterations) for seed in seeds]
    return report.Found(rate, [job.curve(root) for job in jobs], [job.distance(root) for job in jobs])


def search(root: Path, model: str, method: str, rates: Sequence[float]) -> float:
    """The learning rate to take; a single one is taken as it is. A run that fell apart (NaN) is worse than any."""
    chosen, highest = rates[0], -math.inf
    if len(rates) == 1:
        return chosen
    for rate in rates:
        job = Job(model, method, rate, SEARCH_SEED, SEARCH_ITERATIONS)
        job.run(root)
        gain = job.gain(root)
        if gain < highest:
            break
        if gain > highest:
            chosen, highest = rate, gain
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the runs go")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates to search; a single one is taken")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="of each run; those of the search have always the same"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, two iterations")
    args = parser.parse_args()
    seeds, tried, iterations = (
        (SEEDS[:1], [1e-3], 2) if args.quick else (SEEDS, sorted(args.rates, reverse=True), args.iterations)
    )
    pictures = 4 if args.quick else Job.pictures

    grid = [(model, method) for model in args.models for method in args.methods]
    rates: dict[str, dict[str, float]] = {model: {} for model in args.models}
    with ThreadPoolExecutor(args.jobs) as pool:
        for (model, method), rate in zip(grid, pool.map(lambda cell: search(args.root, *cell, tried), grid), strict=True):
            rates[model][method] = rate
        runs = [
            Job(model, method, rates[model][method], seed, iterations, pictures) for seed in seeds for model, method in grid
        ]
        list(pool.map(lambda job: job.run(args.root), runs))
        measure_distances(args.root, runs)
        list(pool.map(lambda cell: clock(*cell, iterations).run(args.root), grid))
    models = {
        model: {m: found(args.root, model, m, rate, seeds, iterations) for m, rate in rates[model].items()} for model in rates
    }
    parts = []
    for model, methods in models.items():
        parts += [model, report.table(methods)]
        if len(tried) > 1:
            parts.append(report.search_table({m: searched(args.root, model, m, tried) for m in methods}))
    text = "\n".join(f"{part}\n" for part in parts)
    (args.root / "table.md").write_text(text)
    report.draw(args.root, models)
    print(text)


if __name__ == "__main__":
    main()
