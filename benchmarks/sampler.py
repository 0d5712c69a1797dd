"""Does the tuned model draw from p_base(x) exp(r(x) / lambda)? On the built-in flow model, whose colours can be counted.

    python benchmarks/sampler.py runs/sampler                  # EFM at four lambdas, three seeds; run it again to go on
    python benchmarks/sampler.py runs/sampler --methods RAM "RAM, path cost" --temperatures 1 --seeds 0

The prompts name no background colour, and the reward is 1 where the background is of one colour, else 0. If the base model draws
that colour in a share p of the pictures of a prompt, the tilted density has it in

    q = p exp(1 / lambda) / (p exp(1 / lambda) + 1 - p)

of them. Each run should end at q, and stay there. Printed are the shares on held-out prompts, base and tuned by the same sampler from
the same noise, and q, averaged over prompts by the base model's own share of each (from its pictures of that prompt, and a tenth of
one more); intervals are over prompts. At lambda 1e6 nothing is tilted: what changes there is how well the model is fitted to its own
pictures. A colour is settled at high noise, so only the noisiest levels are looked at. The flow begins in noise alone; Stable
Diffusion's schedule begins with a trace of the picture in it, which is not tilted.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

COLOUR = "orange"
LAYERS = (  # linear ones of the pictures' path, modulation too; in one try, attention alone tilted a little less
    "to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2", "norm1.linear",
    "norm_out.linear", "proj_out", "context_embedder",
)  # fmt: skip
METHODS = {
    "EFM": "name: 'efm:EFM'",
    "RAM": "name: 'ram:RAM'",
    "RAM, path cost": "name: 'ram:RAM', path_cost: 1",
}


def words(method: str, temperature: float, seed: int, iterations: int, output: Path) -> list[str]:
    return [
        "model={name: sd3, path: menagerie-flow}", f"lora={{rank: 64, targets: [{', '.join(LAYERS)}]}}",
        "prompts={train: menagerie-no-colour, held_out: menagerie-no-colour-held-out}",
        f"rewards=[{{name: 'scene:Colour', colour: {COLOUR}}}]",
        "held_out_rewards=[{name: 'scene:Count'}, {name: clip, model: menagerie}]",
        f"algorithm={{{METHODS[method]}, temperature: {temperature}, times: 1, lowest: 0.7}}",
        "advantage={name: 'advantage:LeaveOneOut'}", "rollout.solver={name: 'diffusion:DDIM', eta: 0, min_sigma: 0}",
        "rollout.prompts=32", "rollout.num_steps=16", "rollout.batch_size=64", "optimizer.lr=1.0e-3", "optimizer.lr_decay=1",
        "optimizer.epochs=3", "optimizer.updates=4", "optimizer.micro_batch=64",
        f"run.seed={seed}", f"run.iterations={iterations}", f"run.eval_every={iterations}", "run.save_every=8",
        "run.threads=1", "run.on_alarm=warn", "evaluation.prompts=32", "evaluation.seeds=32", f"run.output={output}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["EFM"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[2.0, 1.0, 0.5, 1e6])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=48)
    args = parser.parse_args()
    print("| method | lambda | seed | base | q | tuned | tuned - q |\n|---|---|---|---|---|---|---|")
    for method, temperature, seed in itertools.product(args.methods, args.temperatures, args.seeds):
        folder = args.root / f"{'-'.join(method.replace(',', '').split())}-lambda{temperature:g}-seed{seed}"
        command = [sys.executable, "-m", "ddpo.train", "configs/menagerie_alignment.yaml"]
        done = subprocess.run(
            [*command, *words(method, temperature, seed, args.iterations, folder)], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{folder}: {done.stderr.strip()[-2000:]}")
        print(f"| {method} | {temperature:g} | {seed} | {row(folder, temperature)} |", flush=True)


def row(folder: Path, temperature: float) -> str:
    shares: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in (folder / "samples" / "index.jsonl").read_text().splitlines():
        sample = json.loads(line)
        shares[sample["iteration"]][sample["prompt"]].append(sample["scores"]["colour"])
    base, *later = ([sum(s) / len(s) for s in by_prompt.values()] for _, by_prompt in sorted(shares.items()))
    expected = [tilted((sum(scores) + 0.1) / (len(scores) + 1), temperature) for scores in shares[0].values()]
    off = [tuned - q for tuned, q in zip(later[-1], expected, strict=True)]
    return f"{interval(base)} | {sum(expected) / len(expected):.3f} | {interval(later[-1])} | {interval(off)}"


def tilted(share: float, temperature: float) -> float:
    weight = share * math.exp(1 / temperature)
    return weight / (weight + 1 - share)


def interval(shares: list[float]) -> str:
    mean = sum(shares) / len(shares)
    error = (sum((s - mean) ** 2 for s in shares) / len(shares) / (len(shares) - 1)) ** 0.5
    return f"{mean:.3f} [{mean - 1.96 * error:.3f}, {mean + 1.96 * error:.3f}]"


if __name__ == "__main__":
    main()
