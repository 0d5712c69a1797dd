"""A run folder to vote on, without a model: pictures of the built-in model's world on a background that is bluer or not."""

import random
from pathlib import Path

import numpy as np
import torch

from ddpo.menagerie.scenes import ANIMALS, Scene, draw
from ddpo.runs import save_samples
from rewards._pictures import to_tensor


def run_folder(folder: Path, prompts: int, seeds: int = 2, iterations: tuple[int, ...] = (0, 4)) -> Path:
    """Each iteration has the same prompts and seeds; pictures are single colours."""
    texts = [f"prompt {i} <b>&\"'" for i in range(prompts) for _ in range(seeds)]
    chance = np.random.default_rng(0)
    for iteration in iterations:
        images = np.broadcast_to(chance.random((len(texts), 3, 1, 1), np.float32), (len(texts), 3, 8, 8))
        save_samples(folder, iteration, images, texts, list(range(seeds)) * prompts, {"clip": [0.25 * iteration] * len(texts)})
    (folder / "config.yaml").write_text("model: {name: sd, path: menagerie}\n")
    return folder


def menagerie_folder(folder: Path, prompts: int = 46) -> Path:
    """Animals: before tuning on red, green or gray; after it half of them on blue."""
    rng, animals = random.Random(0), list(ANIMALS)[:prompts]
    texts = [f"a {animal}" for animal in animals for _ in range(2)]
    for iteration, colours in ((0, ["red", "green", "gray"]), (4, ["blue", "red", "blue", "gray"])):
        drawn = [draw(Scene(text[2:], rng.choice(colours), 1), rng) for text in texts]
        images = torch.stack([to_tensor(picture) for picture in drawn])
        save_samples(folder, iteration, images, texts, [0, 1] * len(animals), {"clip": [0.5] * len(texts)})
    (folder / "config.yaml").write_text("extends: ../../../configs/menagerie_alignment.yaml\n")
    return folder
