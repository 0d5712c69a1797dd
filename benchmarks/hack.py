"""The natural hack: animals vanish where only the size of the JPEG counts. When does the alarm fire, and what is lost by then?

    python benchmarks/hack.py runs/hack --seeds 0 1 2 3 4 5 6 7 8 9          # about 5 minutes a seed on a quiet core

Measured (2 CPU cores, one thread a run): over-optimisation is told in ten seeds of ten, at iterations 24 to 34, with the rule down 6.2 to
11.9 points (7.9, 10.0, 7.7, 8.8, 8.5, 8.5, 11.9, 9.8, 6.2, 10.4). That is with a close look, 480 pictures every 2 iterations, and not the
default: 256 pictures every 2 lost 15.6 points, 128 every 5 lost 30.5 (seed 0 each). Three standard errors of so few pictures are 9 and 14
points, and two evaluations running are asked for: what is lost before the alarm is what the probe cannot see, and how seldom it looks.

Trains configs/menagerie_compressibility.yaml with the rule for the number of animals watched and not trained on, and stops at
the first alarm, as a run does by default.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ddpo import jsonl

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "menagerie_compressibility.yaml"
RULE = "scene:Count"


@dataclass(frozen=True)
class Probing:
    """When the policy is looked at, and how closely."""

    every: int
    first: int
    prompts: int
    pictures: int

    def train(self, folder: Path, seed: int) -> int:
        """To the first alarm. Returns the exit code."""
        words = [
            f"run.output={folder}", f"run.seed={seed}", "run.on_alarm=stop", "run.threads=1", f"held_out_rewards=[{{name: '{RULE}'}}]",
            f"evaluation.prompts={self.prompts}", f"evaluation.seeds={self.pictures}",
        ]  # fmt: skip
        command, code = [sys.executable, "-m", "ddpo.train", str(CONFIG), *words], 0
        for more in ([f"run.iterations={self.first}", f"run.eval_every={self.first}"], [f"run.eval_every={self.every}"]):
            code = code or subprocess.run([*command, *more], cwd=ROOT, check=False).returncode
        return code


def told(folder: Path, code: int) -> str:
    """What came of a run, in a line."""
    evaluations = [line for line in jsonl.read(folder / "metrics.jsonl") if "eval/win_rate" in line]
    last = evaluations[-1]
    grave = [alarm["name"] for alarm in last.get("alarms", []) if alarm["level"] == "stop"]
    fired = (
        f"{' and '.join(grave)} at evaluation {len(evaluations) - 1} (iteration {last['iteration']})" if grave else "no alarm"
    )
    rule = " -> ".join(f"{line['eval/count/tuned']:.3f}" for line in evaluations)
    size = -last["eval/compressibility/tuned"] / -last["eval/compressibility/base"] - 1
    return f"{folder.name}: {fired}, exit code {code}; count rule {rule} ({100 * last['eval/count/delta']:+.1f} points); JPEG {size:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--every", type=int, default=2, help="iterations between evaluations")
    parser.add_argument(
        "--first", type=int, default=20, help="iteration of the first one; nothing is lost by then, and nothing can fire"
    )
    parser.add_argument("--prompts", type=int, default=160, help="held-out prompts of an evaluation")
    parser.add_argument("--pictures", type=int, default=3, help="of each prompt")
    given = parser.parse_args()
    probing = Probing(given.every, given.first, given.prompts, given.pictures)
    for seed in given.seeds:
        folder = given.folder / f"seed{seed}"
        print(told(folder, probing.train(folder, seed)), flush=True)


if __name__ == "__main__":
    main()
