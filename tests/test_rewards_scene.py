"""The menagerie's rules against real scenes, and regions against a walk: `pytest tests/test_rewards_scene.py`."""

import random

import numpy as np
import torch

from ddpo.menagerie import scenes
from rewards import scene


def test_scene_reads_what_real_scenes_show():
    rng = random.Random(0)
    drawn = [scenes.sample(rng, held_out=i % 2 == 1) for i in range(300)]
    images = scenes.to_tensor([scenes.draw(s, rng) for s in drawn]).float() / 255
    captions = [s.caption for s in drawn]
    for reward in (scene.Colour(), scene.Count(), scene.Scene()):
        assert sum(reward(images, captions, [{}] * 300)) >= 0.97 * 300
    wrong = [scenes.Scene(s.animal, "red" if s.colour != "red" else "blue", s.count % 3 + 1).caption for s in drawn]
    assert sum(scene.Scene()(images, wrong, [{}] * 300)) <= 0.03 * 300


def test_scene_understands_every_caption_and_scores_no_other():
    for s in scenes.all_scenes():
        assert (scene.asked_colour(s.caption), scene.asked_count(s.caption)) == (s.colour, s.count)
    prompts = ["cats and dogs", "a cat at night", "Portrait on a RED background"]
    assert scene.Scene()(torch.zeros(3, 3, 16, 16), prompts, [{}] * 3) == [None, 0.0, 0.0]


def flood(mask: np.ndarray) -> np.ndarray:
    """Connected regions by walking: each pixel's label is the highest pixel number (from 1) that it can reach."""
    labels = np.zeros(mask.shape, int)
    for start in sorted(zip(*np.nonzero(mask), strict=True), reverse=True):
        todo = [start] if not labels[start] else []
        while todo:
            y, x = todo.pop()
            labels[y, x] = start[0] * mask.shape[1] + start[1] + 1
            around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            todo += [
                (i, j)
                for i, j in around
                if 0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] and mask[i, j] and not labels[i, j]
            ]
    return labels


def spiral(size: int) -> np.ndarray:
    """One path of a single pixel's width: the longest way a label can have to go."""
    mask, y, x = np.zeros((size, size), bool), 0, -1
    for turn, length in enumerate([size] + [n for n in range(size - 1, 1, -2) for _ in (0, 1)]):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
    return mask


def test_components_equal_a_walk():
    rng = np.random.default_rng(0)
    masks = [rng.random((23, 31)) < p for p in (0, 0.2, 0.35, 0.4, 0.5, 1)] + [np.pad(spiral(23), ((0, 0), (0, 8)))]
    found = scene._components(torch.from_numpy(np.stack(masks)))
    for mask, labels in zip(masks, found.numpy(), strict=True):
        assert (labels == flood(mask)).all()
