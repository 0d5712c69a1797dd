"""Which pair of pictures is voted on next, and which of them stands left. Imports no torch.

Unvoted pairs come first, then the least voted; among equals chance decides, seeded by the rater's session, so that raters go
different ways. Sides are balanced within a pair, and over the pairs of a first round exactly.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddpo.runs import Sample, samples
from ddpo.votes import Answer, Stage, Vote


@dataclass(frozen=True)
class Duel:
    """Two pictures of a prompt. Paths are relative to the folder of the run whose votes these are."""

    stages: tuple[Stage, Stage]
    samples: tuple[Sample, Sample]  # what they show; their paths are from their own run folders
    images: tuple[str, str]

    def vote(self, answer: Answer, left: Literal[0, 1], rater: str, seconds: float) -> Vote:
        (first, second), (one, two) = self.samples, self.stages
        return Vote(
            prompt=first.prompt, image_0=self.images[0], image_1=self.images[1], answer=answer, left=left, run_0=one.run,
            iteration_0=first.iteration, seed_0=first.seed, run_1=two.run, iteration_1=second.iteration, seed_1=second.seed,
            rater=rater, seconds=seconds,
        )  # fmt: skip


def iterations(folder: Path) -> list[int]:
    """The iterations whose pictures a run folder holds, by the names of its folders."""
    found = [re.fullmatch(r"iteration_(\d{4,9})", entry.name) for entry in (folder / "samples").glob("iteration_*")]
    return sorted(int(match[1]) for match in found if match)


def duels(folder: Path, stages: tuple[Stage, Stage], folder_of: Callable[[str], Path]) -> list[Duel]:
    """The pairs of equal prompt and seed; of one stage twice, the pairs of two seeds.

    Args:
        folder: of the run whose votes these are.
        folder_of: another run's folder, by its name.

    Raises:
        ValueError: there are no such pictures, or no pair of them; or an index is damaged, or leads out of its folder.
    """
    drawn = [_drawn(folder if s.run is None else folder_of(s.run), s) for s in stages]
    if stages[0] == stages[1]:
        by_prompt: dict[str, list[Sample]] = {}
        for sample in drawn[0].values():
            by_prompt.setdefault(sample.prompt, []).append(sample)
        found = [two for some in by_prompt.values() for two in itertools.combinations(some, 2)]
    else:
        found = [(drawn[0][key], drawn[1][key]) for key in drawn[0] if key in drawn[1]]
    if not found:
        raise ValueError(f"{stages[0]} and {stages[1]} have no prompt and seed in common; choose others")
    homes = [folder if s.run is None else folder_of(s.run) for s in stages]
    places = [os.path.relpath(home.resolve(), folder.resolve()) for home in homes]
    made = []
    for two in found:
        images = [Path(os.path.normpath(Path(p) / s.path)).as_posix() for p, s in zip(places, two, strict=True)]
        made.append(Duel(stages, two, (images[0], images[1])))
    return made


def _drawn(folder: Path, stage: Stage) -> dict[tuple[str, int], Sample]:
    """A stage's pictures by prompt and seed."""
    home = (folder / "samples").resolve()
    try:
        found = [sample for sample in samples(folder) if sample.iteration == stage.iteration]
    except TypeError as error:  # an index of another version
        raise ValueError(f"{folder.name}: samples/index.jsonl is not of this version: {error}") from error
    if not found:
        raise ValueError(f"{folder.name} holds no pictures of {stage}; choose another iteration")
    for sample in found:
        if not (folder / sample.path).resolve().is_relative_to(home):
            raise ValueError(f"{folder.name}: samples/index.jsonl names {sample.path!r}, which lies outside of it")
    return {(sample.prompt, sample.seed): sample for sample in found}


def choose(
    pairs: Sequence[Duel], votes: Sequence[Vote], rater: str, shown: Collection[tuple[str, str]] = ()
) -> tuple[Duel, Literal[0, 1]]:
    """The next pair for a rater, and which of its pictures stands left.

    Args:
        pairs: all that may come, one at least.
        votes: the standing ones.
        shown: images of the pairs that this rater has before them; they come again only where there are no others.
    """
    counts = Counter(vote.images for vote in votes)
    waiting = [pair for pair in pairs if pair.images not in shown] or list(pairs)
    pair = min(waiting, key=lambda p: (counts[p.images], _chance(rater, "order", counts[p.images], p)))
    return pair, _left(pair, pairs, votes, rater)


def _left(pair: Duel, pairs: Sequence[Duel], votes: Sequence[Vote], rater: str) -> Literal[0, 1]:
    """The picture that stood left less often; where that is equal, a side that half of the pairs get, by chance."""
    before = Counter(vote.left for vote in votes if vote.images == pair.images)
    if before[0] != before[1]:
        return 0 if before[0] < before[1] else 1
    own = _chance(rater, "side", before[0], pair)
    return 1 if sum(_chance(rater, "side", before[0], other) < own for other in pairs) % 2 else 0


def _chance(rater: str, purpose: str, turn: int, pair: Duel) -> bytes:
    return hashlib.blake2b("\0".join((rater, purpose, str(turn), *pair.images)).encode(), digest_size=8).digest()
