"""Learning from pictures that exist, with what was said of them, instead of drawing: `rollout.pictures`.

A .jsonl file of scored pictures holds a picture a line; those of one prompt are its group:

    {"prompt": "two owls", "path": "owls/a.png", "score": 0.8}

A .jsonl file of votes holds a vote a line, which is a group of two; ties are passed over:

    {"prompt": "two owls", "chosen": "owls/a.png", "rejected": "owls/b.png"}
    {"prompt": "two owls", "chosen": "owls/a.png", "rejected": "owls/b.png", "tie": true}
    {"prompt": "two owls", "image_0": "owls/a.png", "image_1": "owls/b.png", "label_0": 1, "label_1": 0}

The last are Pick-a-Pic's columns, as `ddpo rewards train` reads them and the app writes them; "both bad", 0 and 0, is passed
over as a tie is, and {"prompt": "two owls", "withdraws": X} takes back the vote with "id": X. Paths are relative to the file.
Pictures are PNG, JPEG or WebP; one of another size than the model's is cropped about its middle to the model's shape, and
resized. The files must stay as they are while a run goes on.
"""

import math
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ddpo import prompts
from ddpo.deal import Row
from ddpo.diffusion import Solver
from ddpo.noise import Address, permutation
from ddpo.policy import Policy
from ddpo.prompts import Prompt
from ddpo.rollout import Rollout, conditions
from rewards._pictures import FORMATS, LARGEST, opened, to_tensor

SHOWN = 10  # of the lines that are wrong


class PictureError(ValueError):
    """A file of pictures, or a picture, cannot be used. Each line of the message names file and line and what to do."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and what was said of it: a score, higher is better; of a vote, 1 or 0."""

    path: Path
    score: float
    place: str  # "file:line" that names it


@dataclass(frozen=True, slots=True)
class Group(Prompt):
    """A prompt and the pictures of it that are compared, two at least."""

    pictures: tuple[Picture, ...] = ()


def read(source: str) -> list[Group]:
    """The groups of a file of scored pictures or of votes. Pictures are looked for, and their kind and size, not decoded.

    Raises:
        PictureError: with everything that is wrong with the file, or the first of it.
    """
    if Path(source).suffix.lower() != ".jsonl":
        raise PictureError(f"{source}: pictures are listed in a .jsonl file, a picture or a vote a line")
    try:
        lines = list(prompts.numbered(source))
    except prompts.PromptError as error:
        raise PictureError(str(error)) from error
    wrong, groups = [], _Groups(Path(source).parent)
    withdrawn = {str(line.metadata["withdraws"]) for _, line in lines if "withdraws" in line.metadata}
    for place, line in lines:
        if "withdraws" in line.metadata or ("id" in line.metadata and str(line.metadata["id"]) in withdrawn):
            continue
        try:
            groups.add(line, place)
        except PictureError as error:
            wrong.append(f"{place}: {error}")
    wrong += groups.lonely() if not wrong else []
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise PictureError("\n".join(wrong[:SHOWN] + more))
    if not groups.groups:
        raise PictureError(f"{source}: every vote in it is a tie or withdrawn, which teaches nothing")
    return groups.groups


def scores(rows: Sequence[Row], address: Address) -> Tensor:
    """(N,) float64, what was said of the rows' pictures."""
    return torch.tensor([_picture(row, address).score for row in rows], dtype=torch.float64)


def rollout(
    policy: Policy, rows: Sequence[Row], address: Address, solver: Solver, num_steps: int, batch_size: int, advance: Callable[[int], None]
) -> Rollout:  # fmt: skip
    """The rows' pictures as if they had been drawn, without a trajectory.

    Args:
        rows: of a deal of groups.
        address: of the iteration's randomness: it decides which pictures of a large group are seen.
        batch_size: pictures that go through the VAE at a time.
        advance: told the number of pictures after each batch.

    Raises:
        PictureError: a picture has changed since `read`, or is damaged.
    """
    family = policy.family
    latents, images = [], []
    for batch in torch.arange(len(rows)).split(batch_size):
        pictures = torch.stack([_pixels(_picture(rows[i], address), family.image_size) for i in batch])
        latents.append(family.encode_images(pictures.to(family.device)))
        images.append(pictures.mul(255).round().byte())
        advance(len(batch))
    texts = [row.prompt.text for row in rows]
    cond, cond_rows = conditions(policy, texts)
    return Rollout(
        texts, [(*address, row.group, row.member) for row in rows], family.schedule, cond, cond_rows, torch.cat(latents)[:, None],
        family.schedule.times(num_steps), torch.empty(len(rows), 0), [], torch.cat(images), solver,
    )  # fmt: skip


def _picture(row: Row, address: Address) -> Picture:
    """A row's picture: no member of a group has another's, and in another iteration it may be another."""
    assert isinstance(row.prompt, Group)
    order = permutation(len(row.prompt.pictures), *address, row.group, "pictures")
    return row.prompt.pictures[order[row.member]]


def _pixels(picture: Picture, size: tuple[int, int]) -> Tensor:
    """(3, height, width) in [0, 1], turned as its EXIF says."""
    try:
        whole = ImageOps.exif_transpose(opened(picture.path.read_bytes())).convert("RGB")
    except (OSError, ValueError) as error:
        raise PictureError(f"{picture.place}: {picture.path}: {error}; mend the picture, or leave its line out") from error
    return to_tensor(ImageOps.fit(whole, size[::-1], Image.Resampling.LANCZOS))


# ----------------------------------------------------------------------------------------------------------------------
# A line -> pictures. What is wrong is raised without the place.

WANTED = (
    'a line is {"prompt": text, "path": path, "score": number} or a vote {"prompt": text, "chosen": path, "rejected": path}; '
    "all lines of a file are of one kind"
)
SCORED, VOTE, PICK_A_PIC = ("path", "score"), ("chosen", "rejected"), ("image_0", "image_1", "label_0", "label_1")


class _Groups:
    """Lines put together to groups."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.groups: list[Group] = []
        self._kind: str | None = None
        self._of: dict[str, int] = {}  # a prompt's group, where pictures are scored
        self._sound: set[Path] = set()

    def add(self, line: Prompt, place: str) -> None:
        keys = next((keys for keys in (SCORED, VOTE, PICK_A_PIC) if not line.metadata.keys().isdisjoint(keys)), None)
        if keys is None:
            raise PictureError(f"neither a scored picture nor a vote; {WANTED}")
        if missing := [key for key in keys if key not in line.metadata]:
            raise PictureError(f"there is no {missing[0]!r}; {WANTED}")
        kind = "scored picture" if keys is SCORED else "vote"
        if self._kind not in (None, kind):
            raise PictureError(f"this is a {kind}, and the lines before are {self._kind}s; {WANTED}")
        self._kind = kind
        if keys is SCORED:
            self._scored(line, place)
        elif (vote := _vote(line.metadata, keys)) is not None:
            if vote[0] == vote[1]:
                raise PictureError(f"{vote[0]!r} is both pictures of this vote; leave it out")
            two = (self._picture(path, score, place) for path, score in zip(vote, (1.0, 0.0), strict=True))
            self.groups.append(Group(line.text, {}, tuple(two)))

    def _scored(self, line: Prompt, place: str) -> None:
        picture = self._picture(line.metadata["path"], _number("score", line.metadata["score"]), place)
        at = self._of.setdefault(line.text, len(self.groups))
        if at == len(self.groups):
            self.groups.append(Group(line.text))
        self.groups[at] = Group(line.text, {}, (*self.groups[at].pictures, picture))

    def lonely(self) -> list[str]:
        return [
            f"{group.pictures[0].place}: {group.text[:60]!r} has this picture only, and pictures of one prompt are compared: add "
            "others of it, or leave it out"
            for group in self.groups
            if len(group.pictures) == 1
        ]

    def _picture(self, path: object, score: float, place: str) -> Picture:
        if not isinstance(path, str):
            raise PictureError(f"a picture's path is {path!r}; it should be a text")
        whole = self.folder / path
        if whole not in self._sound:
            _look(whole)
            self._sound.add(whole)
        return Picture(whole, score, place)


def _vote(record: dict, keys: tuple[str, ...]) -> tuple[str, str] | None:
    """(what won, what lost), or None for a tie."""
    if keys is VOTE:
        if not isinstance(record.get("tie", False), bool):
            raise PictureError(f"'tie' is {record['tie']!r}; it should be true or false")
        return None if record.get("tie") else (record["chosen"], record["rejected"])
    first, second = (_number(key, record[key]) for key in ("label_0", "label_1"))
    if first == second:
        return None
    won, lost = ("image_0", "image_1") if first > second else ("image_1", "image_0")
    return record[won], record[lost]


def _number(key: str, value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise PictureError(f"{key!r} is {str(value)[:20]}; it should be a finite number: leave out a picture without one")


def _look(path: Path) -> None:
    """Whether there is a picture, from its first bytes: opening a pipe would wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PictureError(f"{path} is not a file; name a PNG, JPEG or WebP picture")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
    except FileNotFoundError as error:
        raise PictureError(f"there is no picture {path}; paths are relative to this file: mend it, or leave it out") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{path} is not a PNG, JPEG or WebP picture ({error}); leave it out") from error
    if max(width, height) > LARGEST:
        raise PictureError(f"{path} is {width} x {height}; at most {LARGEST} pixels a side are read: make it smaller")
