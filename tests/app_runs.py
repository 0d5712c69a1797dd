"""A small finished run folder for the tests of the app, made of tiny pictures: no model, no training."""

import json

import numpy as np

from ddpo import jsonl
from ddpo.runs import save_samples

EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} `x` \"q\" & 'b' $name"


def evaluation(scorers):
    """{scorer: (base, tuned)} as an evaluation's share of a line of metrics.jsonl."""
    line = {"eval/win_rate": 0.7, "eval/diversity/base": 0.31, "eval/diversity/tuned": 0.28}
    for name, (base, tuned) in scorers.items():
        line |= {f"eval/{name}/base": base, f"eval/{name}/tuned": tuned, f"eval/{name}/delta": tuned - base}
        line |= {f"eval/{name}/delta_low": tuned - base - 0.05, f"eval/{name}/delta_high": tuned - base + 0.05}
    return line


def prompts():
    return ["a cat", "two owls", "a red horse", EVIL]


def gain(i, iteration):
    """Of the i-th picture in `jpeg`: at iteration 4 the first gains most and the last loses most."""
    return iteration * (0.3 - 0.1 * i) / 4


def make(folder, iterations=(0, 2, 4), started="2026-11-21T09:00:00+00:00", status="finished", base_colour=0):
    """Four prompts of two seeds each, 8 x 8 pictures; trained on `jpeg`, watched by `clip`; an alarm at iteration 3."""
    folder.mkdir(parents=True)
    facts = {
        "name": folder.name, "status": status, "started": started, "exit_reason": None,
        "ended": None if status == "running" else "2026-11-21T09:10:00+00:00",
        "algorithm": "ddpo:DDPO", "model": "toy", "rewards": ["jpeg"], "held_out_rewards": ["clip"], "versions": {"ddpo": "1"},
        "resume_command": "accelerate launch -m ddpo.train x.yaml",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text("rewards:\n- name: jpeg\n")
    rng = np.random.default_rng(len(folder.name))
    for k in range(5):
        line = {"iteration": k, "images": 8 * k, "seconds": 10.0 * k + 1}
        line |= {"reward/mean": 0.5 + k / 40, "reward/std": 0.2, "reward/jpeg/mean": 0.5, "kl/step_nats": k / 9} if k else {}
        line |= evaluation({"jpeg": (0.5, 0.5 + k / 10), "clip": (0.2, 0.2 - k / 50)}) if k in iterations else {}
        line |= {"alarms": [{"name": "hacking", "level": "warn", "text": "clip fell while jpeg rose"}]} if k == 3 else {}
        jsonl.append(folder / "metrics.jsonl", line)
    for k in iterations:
        rows = [(prompt, seed) for prompt in prompts() for seed in (0, 1)]
        images = (
            rng.random((8, 3, 8, 8)) * 0.4 + 0.5 * (np.arange(3) == (base_colour if k == 0 else k % 3))[None, :, None, None]
        )
        scores = {"jpeg": [0.5 + gain(i, k) for i in range(8)], "clip": [None if i == 7 else 0.2 for i in range(8)]}
        save_samples(folder, k, images, [p for p, _ in rows], [s for _, s in rows], scores)
    return folder
