"""RLHF for images on one machine: do 300 votes for blue backgrounds make a model that paints them?

    python benchmarks/rlhf.py runs/rlhf                     # seed 0; two runs of two to three minutes on a CPU core, and the votes
    python benchmarks/rlhf.py runs/rlhf --seeds 0 1 2

1. A first run on prompts that name no colour ("two owls") is paid for variety alone (diversity:PixelDiversity), so that there is
   something to choose from.
2. A simulated rater who likes blue votes on its pictures, base against tuned, through the app's own endpoints. Left is preferred
   with probability sigmoid((r - l) / 0.15), where l and r are how far the two backgrounds lie from blue, measured in the pixels
   that were shown (summed RGB difference, rewards/scene.py).
3. A reward is fitted to the votes, and a run from the base model trained on it: what the two buttons of the page do.
4. The share of blue backgrounds on held-out prompts, in no vote and in no training, base against tuned from the same noise.

Writes OUT/seed-N/base and OUT/seed-N/from-votes; run it again to go on where it stopped.
"""

import argparse
import base64
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from ddpo import prompts, votes
from ddpo.app.feedback import Launcher, clip_of, train_reward
from ddpo.app.shelf import Shelf
from ddpo.tally import tally
from ddpo.votes import Stage

VOTES, SCALE, SEEDS = 300, 0.15, 4
HELD_OUT = "menagerie-no-colour-held-out"
BASE = [
    "configs/menagerie_alignment.yaml", "prompts={train: menagerie-no-colour, held_out: menagerie-no-colour}",
    "rewards=[{name: 'diversity:PixelDiversity'}]",
    "held_out_rewards=[{name: clip, model: menagerie}, {name: 'scene:Count'}, {name: 'scene:Colour', colour: blue}]",
    "rollout.prompts=8", "evaluation={prompts: 86, seeds: 2}", "run={iterations: 16, eval_every: 8, threads: 1}",
]  # fmt: skip


def finished(folder: Path) -> bool:
    return (folder / "run.json").exists() and json.loads((folder / "run.json").read_text())["status"] == "finished"


def first_run(folder: Path, seed: int) -> None:
    command = [sys.executable, "-m", "ddpo.train", *BASE, f"run.seed={seed}", f"run.output={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class LikesBlue:
    """Sees two pictures as the page shows them; prefers the one whose background is nearer to blue, the surer the clearer."""

    def __init__(self, seed: int):
        self._chance = random.Random(seed)

    def answer(self, pair: dict) -> str:
        left, right = (self._distance(pair[side]) for side in ("left", "right"))
        return "a" if self._chance.random() < 1 / (1 + math.exp((left - right) / SCALE)) else "b"

    def _distance(self, uri: str) -> float:
        from rewards._pictures import opened, to_tensor
        from rewards.scene import PALETTE, colour_distances

        picture = to_tensor(opened(base64.b64decode(uri.partition(",")[2])))
        return colour_distances(picture[None])[0, list(PALETTE).index("blue")].item()


def vote(root: Path, run: str, seed: int) -> None:
    """Cast what is missing of VOTES, through the served app."""
    from gradio_client import Client

    from ddpo.app.frame import build

    page, rater = build(Shelf(root)), LikesBlue(seed)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        for _ in range(VOTES - len(votes.read(root / run).standing)):
            pair = client.predict(run, "likes-blue", api_name="/next_pair")
            client.predict(run, pair["token"], rater.answer(pair), api_name="/vote")
    finally:
        page.close()


def pictures(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """(2, N, 3, H, W) the held-out prompts from SEEDS noises each: by the base model, and with the run's LoRA."""
    from ddpo.checkpoint import latest, load
    from ddpo.config import load as config
    from ddpo.diffusion import DDIM
    from ddpo.experiment import identity
    from ddpo.policy import Policy
    from ddpo.recipe import Recipe
    from ddpo.rollout import collect

    recipe = config(folder / "config.yaml", [], Recipe).recipe
    policy = Policy(recipe.model.build(), recipe.lora, recipe.rollout.guidance, recipe.run.seed)
    found = latest(folder / "checkpoints", print)
    assert found is not None
    policy.load(load(found, identity(recipe)).tensors["lora"])
    texts = [p.text for p in prompts.load(HELD_OUT) for _ in range(SEEDS)]
    addresses = [("rlhf", recipe.run.seed, i) for i in range(len(texts))]
    drawn = []
    for self_name in ("reference", "now"):
        with policy.acting_as(self_name):
            images = collect(
                policy, texts, addresses, DDIM(0.0), recipe.rollout.num_steps, recipe.rollout.batch_size, False
            ).images
        drawn.append(images.float() / 255)
    return torch.stack(drawn), texts


def measure(folder: Path) -> None:
    """Print base -> tuned on the held-out prompts."""
    import rewards
    from ddpo.evaluate import paired_interval
    from rewards.clip import Clip
    from rewards.scene import Colour, Count

    images, texts = pictures(folder)
    scorers = {"blue backgrounds": Colour("blue"), "number right": Count(), "CLIP score": Clip("menagerie")}
    for name, scorer in scorers.items():
        with torch.no_grad():
            base, tuned = (rewards.score(name, scorer, some, texts, [{}] * len(texts)) for some in images)
        found = paired_interval(tuned - base, texts)
        means = f"{base.mean():.3f} -> {tuned.mean():.3f}"
        print(f"  {name}: {means}, difference {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")


def once(root: Path, seed: int) -> None:
    """The loop, from one seed."""
    began, base, new = time.monotonic(), root / "base", root / "from-votes"
    if not finished(base):
        first_run(base, seed)
    vote(root, "base", seed)
    print(f"seed {seed}: {tally((Stage(0), Stage(16)), votes.read(base).standing)}".split("\n  ")[0])
    if not finished(new):
        print(train_reward(base))
        launcher = Launcher(Shelf(root))
        print(launcher.start("base", "from-votes", (f"run.seed={seed}",)))
        if launcher.wait():
            raise SystemExit(f"the run failed: {(new / 'console.log').read_text()[-2000:]}")
    print(f"held-out prompts, {len(prompts.load(HELD_OUT))} with {SEEDS} pictures each; CLIP {clip_of(base)[0]}:")
    measure(new)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    torch.set_num_threads(1)
    for seed in args.seeds:
        once(args.out / f"seed-{seed}", seed)


if __name__ == "__main__":
    main()
