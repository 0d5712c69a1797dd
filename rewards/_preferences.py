"""From votes on pairs of pictures to the head on CLIP features that `rewards.learned` scores by.

Utilities are fitted by `rewards._pairs`. A utility is linear in a picture's CLIP vector v and in its elementwise product with
the prompt's vector t. The first part is a taste that holds for all prompts. The second reweights the terms of the cosine:
with equal weights it is the CLIP score itself, so the head can say how much the match to the prompt counts, and in which
directions. A part in t alone would cancel, since both pictures of a vote share their prompt.

How many votes it takes depends on the number of directions in which the pictures differ, more than on CLIP's width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rewards._learning import content, embedded
from rewards._pairs import Fit, fit
from rewards._tensors import require_few
from rewards.clip import Tower, tower

KEY = "preference_head"  # of the metadata: one key only, because safetensors writes several in any order
VERSION = 1
LABELS = {(1.0, 0.0): 1, (0.0, 1.0): -1, (0.5, 0.5): 0, (0.0, 0.0): 0}  # both 0 is "both bad": no preference
LEAST = 50  # votes that are no ties


@dataclass(frozen=True)
class Head:
    """Utilities as a linear function: score = v . taste + (v * t) . match + bias.

    Scores have mean 0 and standard deviation 1 over the pictures it was fitted to.

    Args:
        taste, match: (D,) float64.
        bias: a number.
        probe: (D,) what its CLIP makes of `probed`, by which another CLIP is told.
        model, pretrained: that CLIP, as in `rewards.clip.Clip`.
        facts: of the fit, for whoever reads the file: numbers of votes, accuracy and so on. With "margin" and "spread",
            P(the first is preferred) = sigmoid(spread * difference of scores - margin).
    """

    taste: Tensor
    match: Tensor
    bias: float
    probe: Tensor
    model: str
    pretrained: str | None
    facts: dict[str, Any]

    def write(self, path: Path) -> None:
        """As .safetensors, whole or not at all."""
        tensors = {"taste": self.taste, "match": self.match, "probe": self.probe}
        named = {"version": VERSION, "model": self.model, "pretrained": self.pretrained, "bias": self.bias, "facts": self.facts}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, {KEY: json.dumps(named)}))
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Head":
        """What `write` wrote.

        Raises:
            ValueError: it is no such file.
        """
        if not path.is_file():
            raise ValueError(f"preference head {path}: there is no such file; `ddpo rewards train` makes one from votes")
        try:
            require_few(path)
            with safe_open(path, "pt") as file:
                named = json.loads((file.metadata() or {}).get(KEY, "{}"))
                if named.pop("version", None) != VERSION:
                    raise ValueError(f"preference head {path}: `ddpo rewards train` did not write it, or another version did")
                head = cls(**{name: file.get_tensor(name) for name in ("taste", "match", "probe")}, **named)
        except (SafetensorError, json.JSONDecodeError, AttributeError, TypeError) as error:
            raise ValueError(f"preference head {path} is damaged, or no .safetensors file: {error}") from error
        if not head.taste.shape == head.match.shape == head.probe.shape == (head.taste.numel(),):
            raise ValueError(f"preference head {path} is damaged: its shapes do not fit together")
        return head


@dataclass(frozen=True)
class Report:
    """What `train` found.

    Args:
        output: the head that was written.
        pictures: how many different ones the votes are on.
        fit: the figures.
    """

    output: Path
    pictures: int
    fit: Fit

    def __str__(self) -> str:
        return f"{self.pictures} pictures\n{self.fit}\n{self.output}"


def train(
    votes_file: str | Path,
    output: str | Path,
    model: str = "ViT-L-14",
    pretrained: str | None = "openai",
    seed: int = 0,
    device: str = "cpu",
) -> Report:
    """Fit a head to votes and write it: `ddpo rewards train`.

    About a fifth of the votes is held out, so that no picture is on both sides; the strength of the L2 penalty is chosen by
    cross-validation on the rest, and the head that is written is fitted to the rest. The same votes, CLIP and seed give
    the same head.

    Args:
        votes_file: JSON lines, a vote each: {"prompt": "a cat", "image_0": "a.png", "image_1": "b.png", "label_0": 1,
            "label_1": 0}, the columns of Pick-a-Pic (Kirstain et al. 2023). Labels 0.5 and 0.5 are a tie, and so are 0 and 0
            ("both bad"). Paths are relative to the file. A line {"withdraws": X} takes back the vote with "id": X, as the app
            writes it. Other keys are not looked at.
        output: the head, a .safetensors file; its folder is made if missing.
        model, pretrained: the CLIP, as in `rewards.clip.Clip`.
        seed: which votes are held out.
        device: where CLIP computes.

    Returns:
        what was found; `print` shows it.

    Raises:
        ValueError: a vote or picture cannot be read (file and line are named), or the votes are too few, nearly all ties,
            or so entangled that no pictures can be held out.
    """
    output, votes_file = Path(output), Path(votes_file)
    if output.suffix != ".safetensors":
        raise ValueError(f"the head {output} is written as .safetensors; give it that name")
    clip = tower(model, pretrained)
    votes, files = _read(votes_file)
    decided = sum(v.outcome != 0 for v in votes)
    if decided < LEAST:
        raise ValueError(
            f"{votes_file} has {len(votes)} votes, {decided} of which prefer a picture; it takes {LEAST} of these to fit "
            "and to hold out, and 500 are a good start"
        )
    clip.to(device)
    features = _features(clip, votes, files)
    differences = features[:, 0] - features[:, 1]
    units = _units(differences)
    outcomes = torch.tensor([vote.outcome for vote in votes])
    found = fit(differences * units, outcomes, _groups(votes), seed)
    weights = found.weights * units
    mean, spread = _standard(weights, votes, features, found.training)
    if spread < 1e-9:
        raise ValueError(f"{votes_file}: nothing could be learned; CLIP sees no difference that the votes agree on")
    facts = {"spread": spread} | {k: v for k, v in vars(found).items() if not isinstance(v, Tensor)} | {"votes": len(votes)}
    taste, match = (weights / spread).chunk(2)
    Head(taste, match, -mean / spread, probed(clip), model, pretrained, facts).write(output)
    return Report(output, len(files), found)


def probed(clip: Tower) -> Tensor:
    """(D,) float64, what a CLIP makes of one fixed picture: a slope of colours."""
    slope = torch.linspace(0, 1, 64)
    picture = torch.stack([slope.expand(64, 64), slope[:, None].expand(64, 64), 1 - slope.expand(64, 64)])
    return clip.images(picture[None])[0].to("cpu", torch.float64)


@dataclass(frozen=True)
class _Vote:
    prompt: str
    pictures: tuple[str, str]  # by their content: the same picture under two names must not be on both sides of the split
    outcome: int  # 1 the first, -1 the second, 0 neither


def _read(votes_file: Path) -> tuple[list[_Vote], dict[str, tuple[Path, str]]]:
    """The votes; and each picture's file and the line that first names it."""
    lines = [(f"{votes_file}:{i}", line) for i, line in enumerate(content(votes_file, "votes").split(b"\n"), 1) if line.strip()]
    records = [(place, _record(line, place)) for place, line in lines]
    withdrawn = {str(record["withdraws"]) for _, record in records if "withdraws" in record}
    votes: list[_Vote] = []
    files: dict[str, tuple[Path, str]] = {}
    for place, record in records:
        if "withdraws" not in record and not ("id" in record and str(record["id"]) in withdrawn):
            votes.append(_vote(record, votes_file, place, files))
    return votes, files


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not a line of JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a {type(record).__name__} where a JSON object belongs")
    return record


def _vote(record: dict[str, Any], votes_file: Path, place: str, files: dict[str, tuple[Path, str]]) -> _Vote:
    for key, kind in {"prompt": str, "image_0": str, "image_1": str, "label_0": int | float, "label_1": int | float}.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            raise ValueError(f"{place}: {key!r} is {record.get(key)!r}; {_WANTED}")
    labels = float(record["label_0"]), float(record["label_1"])
    if labels not in LABELS:
        raise ValueError(f"{place}: the labels are {labels[0]:g} and {labels[1]:g}; {_WANTED}")
    names = [_identity(votes_file.parent / record[key], place, files) for key in ("image_0", "image_1")]
    return _Vote(record["prompt"], (names[0], names[1]), LABELS[labels])


_WANTED = (
    'a vote is {"prompt": text, "image_0": path, "image_1": path, "label_0": 1, "label_1": 0}; '
    "labels are 1 and 0, 0 and 1, 0.5 and 0.5 (a tie) or 0 and 0 (both bad)"
)


def _identity(path: Path, place: str, files: dict[str, tuple[Path, str]]) -> str:
    name = hashlib.sha256(content(path, place)).hexdigest()
    files.setdefault(name, (path, place))
    return name


def _groups(votes: Sequence[_Vote]) -> list[str]:
    """For each vote a label that it shares with all votes to which a chain of pictures leads."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for vote in votes:
        parent[root(vote.pictures[0])] = root(vote.pictures[1])
    return [root(vote.pictures[0]) for vote in votes]


def _features(clip: Tower, votes: Sequence[_Vote], files: dict[str, tuple[Path, str]]) -> Tensor:
    """(N, 2, 2 D) float64: v and v * t of each vote's two pictures. Each picture is embedded once."""
    vectors = {name: embedded(clip, content(path, place), f"{place}: {path}") for name, (path, place) in files.items()}
    pictures = torch.stack([torch.stack([vectors[name] for name in vote.pictures]) for vote in votes])
    texts = clip.texts([vote.prompt for vote in votes]).to("cpu", torch.float64)
    return torch.cat([pictures, pictures * texts[:, None]], 2)


def _units(differences: Tensor) -> Tensor:
    """(2 D,) what makes either half of the features differ by 1/2 in the mean square, so that one penalty suits both.

    The entries of v * t are smaller than those of v by about the square root of D: unscaled, they would hardly be used.
    """
    halves = differences.unflatten(1, (2, -1))
    lengths = halves.square().sum(2).mean(0).sqrt()  # (2,)
    return (0.5**0.5 / lengths.clamp_min(1e-12)).repeat_interleave(halves.shape[2])


def _standard(weights: Tensor, votes: Sequence[_Vote], features: Tensor, training: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the utility over the pictures (each once with each of its prompts) it was fitted to."""
    utilities = (features @ weights).tolist()
    seen = {}
    for vote, pair, used in zip(votes, utilities, training.tolist(), strict=True):
        if used:
            seen.update({(vote.prompt, name): utility for name, utility in zip(vote.pictures, pair, strict=True)})
    values = torch.tensor(list(seen.values()), dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()
