"""The natural hack: animals vanish where only the size of the JPEG counts. When does the alarm fire, and what is lost by then?

    python benchmarks/hack.py runs/hack --seeds 0          # about 20 minutes a seed on a quiet core

Measured (seed 0): evaluated every 2 iterations on 128 prompts, over-optimisation is told at iteration 36 with the rule down 15.6 points;
every 5 iterations on 64 prompts, at iteration 45, down 30.5. Three standard errors of so many pictures are 9 and 14 points, and two
evaluations running are asked for: how much is lost before the alarm is what the probe cannot see, and how seldom it looks.

Trains configs/menagerie_compressibility.yaml with the rule for the number of animals watched and not trained on, and stops at
the first alarm, as a run does by default.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ddpo import jsonl

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "menagerie_compressibility.yaml"
RULE = "scene:Count"


def train(folder: Path, seed: int, every: int, prompts: int) -> int:
    words = [
        f"run.output={folder}", f"run.seed={seed}", "run.on_alarm=stop", f"run.eval_every={every}", "run.threads=1",
        f"held_out_rewards=[{{name: '{RULE}'}}]", f"evaluation.prompts={prompts}",
    ]  # fmt: skip
    return subprocess.run([sys.executable, "-m", "ddpo.train", str(CONFIG), *words], cwd=ROOT, check=False).returncode


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
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts of an evaluation, two pictures each")
    given = parser.parse_args()
    for line in [told(f := given.folder / f"seed{s}", train(f, s, given.every, given.prompts)) for s in given.seeds]:
        print(line)


if __name__ == "__main__":
    main()
