"""What browsing costs: a folder of 50 runs of 200 iterations, made here. Run: python benchmarks/app.py [--runs 50] [--iterations 200]

Prints seconds, each measured in a process of its own on a folder that this process has only written: the import of the app, the table
of all runs as HTML, the same again when nothing has changed, and one run opened (its Compare tab, 16 prompts of two
seeds at 21 sampled iterations, 512 x 512 pictures).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = """
import sys, time
from pathlib import Path
clock = time.perf_counter
start = clock()
from ddpo.app import charts, frame, view
from ddpo.app.runs import table
from ddpo.app.shelf import Shelf
done = [clock() - start]
def timed(work):
    start = clock(); work(); done.append(clock() - start)
shelf = Shelf(Path(sys.argv[1]))
timed(lambda: table(shelf.rows(), None, shelf))
timed(lambda: table(shelf.rows(), None, shelf))
timed(lambda: frame.build(shelf))
def opened():
    run = shelf.open("run-000")
    look = view.View().within(run)
    view.overview(run), view.pair(run, look), charts.curves(run, look.iteration), view.gallery(run, look)
timed(opened)
timed(opened)
assert "torch" not in sys.modules
print(*done)
"""
TITLES = ("import of the app", "table", "table again", "page built", "one run opened", "the same run again")


def line(k: int) -> dict:
    """What an iteration writes, with an evaluation of three scorers every tenth time."""
    names = (
        "reward/mean",
        "reward/std",
        "reward/jpeg/mean",
        "ratio/mean",
        "ratio/max",
        "clip_fraction",
        "kl/step_nats",
        "grad_norm",
    )
    found: dict = {"iteration": k, "images": 64 * k, "seconds": 30.5 * k, "lr": 1e-4} | dict.fromkeys(names, 0.123456789012345)
    if k % 10 == 0:
        for name in ("jpeg", "clip", "aesthetic"):
            fields = ("base", "tuned", "delta", "delta_low", "delta_high")
            found |= {f"eval/{name}/{field}": 0.1 + k / 1000 for field in fields}
        found |= {"eval/win_rate": 0.6, "eval/diversity/base": 0.3, "eval/diversity/tuned": 0.29}
    return found


def make(folder: Path, iterations: int, pictures: bool) -> None:
    (folder / "samples").mkdir(parents=True)
    facts = {
        "name": folder.name,
        "status": "finished",
        "started": "2026-11-21T09:00:00+00:00",
        "rewards": ["jpeg"],
        "model": "toy",
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line(k)) + "\n" for k in range(iterations + 1)))
    rng, index = np.random.default_rng(0), []
    for k in range(0, iterations + 1, 10):
        place = f"samples/iteration_{k:04d}"
        (folder / place).mkdir()
        for i in range(32):
            path = f"{place}/{i:04d}.webp"
            if pictures:
                coarse = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize((512, 512))
                coarse.save(folder / path, lossless=True, method=0)
            scores = {"jpeg": 0.5 + k * i / 9000, "clip": 0.2, "aesthetic": 5.0}
            index.append({"iteration": k, "prompt": f"prompt {i // 2}", "seed": i % 2, "scores": scores, "path": path})
    (folder / "samples" / "index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for i in range(args.runs):
            make(Path(root) / f"run-{i:03d}", args.iterations, pictures=i == 0)
        words = [sys.executable, "-c", PROGRAM, root]
        seconds = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    for title, value in zip(TITLES, seconds, strict=True):
        print(f"{title:<20} {float(value):7.3f} s")


if __name__ == "__main__":
    main()
