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
import itertools
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
from statistics import mean, median
from typing import Literal

RATES, SEARCH_SEED, SEEDS = (1e-2, 3e-3, 1e-3, 3e-4), 100, (0, 1, 2)
ITERATIONS, SEARCH_ITERATIONS = 8, 8
TIMED = 4  # iterations; the first, in which the machine warms up, does not count
DISTANCE = "distance.json"
GOAL = 0.02  # of held-out CLIP score, for "pictures and seconds to"
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


def search(root: Path, model: str, method: str, rates: Sequence[float]) -> float:
    """The learning rate to take; a single one is taken as it is. A run that fell apart (NaN) is worse than any."""
    chosen, highest = rates[0], -math.inf
    if len(rates) == 1:
        return chosen
    for rate in rates:
        job = Job(model, method, rate, SEARCH_SEED, SEARCH_ITERATIONS)
        job.run(root)
        gain = job.evaluations(root)[-1]["eval/clip/delta"]
        if gain < highest:
            break
        if gain > highest:
            chosen, highest = rate, gain
    return chosen


def search_table(root: Path, model: str, methods: Sequence[str], rates: Sequence[float]) -> str:
    """Markdown: the held-out gain at each learning rate that was tried, the best method first."""
    rows = []
    for method in methods:
        jobs = [Job(model, method, rate, SEARCH_SEED, SEARCH_ITERATIONS) for rate in rates]
        gains = [job.evaluations(root)[-1]["eval/clip/delta"] if _finished(job.folder(root)) else math.nan for job in jobs]
        told = ["" if math.isnan(gain) else f"{gain:+.3f}" for gain in gains]
        known = [gain for gain in gains if not math.isnan(gain)]
        rows.append((-max(known, default=-math.inf), f"| {method} | {' | '.join(told)} |"))
    head = (f"| learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |", "|" + "---|" * (len(rates) + 1))
    return "\n".join([*head, *(row for _, row in sorted(rows))]) + "\n"


def at(curve: list[dict], axis: str, where: float, key: str) -> float:
    """A metric at a point of the curve, on the straight line between its neighbours; NaN past its end."""
    for before, after in itertools.pairwise(curve):
        if before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / (after[axis] - before[axis])
            return before[key] + share * (after[key] - before[key])
    return math.nan


def reached(curve: list[dict], axis: str, goal: float) -> float:
    """Where the held-out gain first reaches the goal; infinity where it never does."""
    for before, after in itertools.pairwise(curve):
        low, high = before["eval/clip/delta"], after["eval/clip/delta"]
        if low < goal <= high:
            return before[axis] + (goal - low) / (high - low) * (after[axis] - before[axis])
    return math.inf


def table(root: Path, model: str, rates: dict[str, float], seeds: tuple[int, ...], iterations: int) -> str:
    """Markdown, the best first: each figure is a mean over the seeds with the lowest and the highest."""
    jobs = {m: [Job(model, m, rate, seed, iterations) for seed in seeds] for m, rate in rates.items()}
    curves = {m: [job.curve(root) for job in runs] for m, runs in jobs.items()}
    shortest = min(curve[-1]["spent"] for runs in curves.values() for curve in runs)
    rows = []
    for method, runs in curves.items():
        ends = [curve[-1] for curve in runs]
        rows.append((
            -mean(e["eval/clip/delta"] for e in ends), method, f"{rates[method]:g}",
            spread([e["eval/clip/delta"] for e in ends], "+.3f"),
            spread([at(c, "spent", shortest, "eval/clip/delta") for c in runs], "+.3f"),
            spread([e["eval/scene/delta"] for e in ends], "+.3f"),
            spread([e["eval/diversity/tuned"] / e["eval/diversity/base"] - 1 for e in ends], "+.0%"),
            spread([job.distance(root) for job in jobs[method]], ".2g"), spread([reached(c, "images", GOAL) for c in runs], ",.0f"),
            spread([reached(c, "spent", GOAL) for c in runs], ",.0f"), spread([e["spent"] for e in ends], ",.0f"),
        ))  # fmt: skip
    head = (
        f"| method | lr | CLIP score | after {shortest:.0f} s | rules | diversity | KL | images to +{GOAL} | seconds to it | seconds |",
        "|" + "---|" * 10,
    )
    return "\n".join([*head, *("| " + " | ".join(row[1:]) + " |" for row in sorted(rows))]) + "\n"


def spread(values: list[float], form: str) -> str:
    """ "mean (lowest .. highest)", or "never" for the runs that did not get there."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < len(values):
        return "never" if not known else f"{len(known)} of {len(values)} runs: {mean(known):{form}}"
    return f"{mean(known):{form}}" + (f" ({min(known):{form}} .. {max(known):{form}})" if len(known) > 1 else "")


def draw(root: Path, rates: dict[str, dict[str, float]], seeds: tuple[int, ...], iterations: int) -> None:
    """learning.png: held-out gain by pictures and by seconds. cost.png: by CLIP's gain, that of the rules, and diversity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for name, axes_of in (
        ("learning", [("images", "eval/clip/delta"), ("spent", "eval/clip/delta")]),
        ("cost", [("eval/clip/delta", "eval/scene/delta"), ("eval/clip/delta", "eval/diversity/tuned")]),
    ):
        figure, axes = plt.subplots(len(rates), 2, figsize=(12, 4.5 * len(rates)), squeeze=False)
        for row, (model, chosen) in zip(axes, rates.items(), strict=True):
            for axis, (x, y) in zip(row, axes_of, strict=True):
                for i, (method, rate) in enumerate(chosen.items()):
                    runs = [Job(model, method, rate, seed, iterations).curve(root) for seed in seeds]
                    points = [[(mean(line.get(k, 0.0) for line in lines)) for k in (x, y)] for lines in zip(*runs, strict=True)]
                    style = ("-", "--", ":", "-.")[i // 10]
                    axis.plot(*zip(*points, strict=True), style, label=method, marker=".", color=f"C{i % 10}")
                axis.set(xlabel=LABELS[x], ylabel=LABELS[y], title=f"{model} menagerie, mean of {len(seeds)} seeds")
                axis.grid(alpha=0.3)
            row[-1].legend(fontsize=7, ncols=2)
        figure.tight_layout()
        figure.savefig(root / f"{name}.png", dpi=110)


LABELS = {
    "images": "pictures drawn", "spent": "seconds of drawing, scoring and learning", "eval/clip/delta": "held-out CLIP score, gain",
    "eval/scene/delta": "rules, gain (never trained on)",
    "eval/diversity/tuned": "diversity",
}  # fmt: skip


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
    parts = []
    for model in args.models:
        parts += [model, table(args.root, model, rates[model], seeds, iterations)]
        if len(tried) > 1:
            parts.append(search_table(args.root, model, args.methods, tried))
    text = "\n".join(f"{part}\n" for part in parts)
    (args.root / "table.md").write_text(text)
    draw(args.root, rates, seeds, iterations)
    print(text)


if __name__ == "__main__":
    main()
