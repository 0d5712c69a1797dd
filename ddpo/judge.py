"""Asks the scorers: a batch at a time, each picture once; what they say is written down before it is used."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ddpo.advantage import zero_spread
from ddpo.deal import Row
from ddpo.journal import Journal, Key, image_hash
from ddpo.meters import to_float, to_json
from ddpo.prompts import Prompt
from rewards import Part, RewardError, Rubric

NOISE_TRIAL = 4  # pictures that are scored a second time when a run starts


class Judge:
    """Scores of one process's pictures.

    Args:
        trained, watched: what the run is rewarded for, and what is only looked at. No name is in both.
        device: where the pictures are brought for scoring.
        batch_size: pictures a call, of scorers that take each by itself.
        max_missing: the share of an iteration's pictures that may go unscored.
    """

    def __init__(
        self, trained: Rubric, watched: Rubric, journal: Journal, device: torch.device, batch_size: int, max_missing: float = 0.1
    ):  # fmt: skip
        self.trained, self.all = trained, Rubric(trained.parts | watched.parts)
        self.journal, self.device, self.batch_size, self.max_missing = journal, device, batch_size, max_missing
        self.pool = ThreadPoolExecutor(1, "scorers")  # one: scorers are asked in order, whatever the speed of drawing
        self.all.to(device)

    def hear(self, rows: Sequence[Row], iteration: int, salt: int, group_size: int) -> "Hearing":
        """For a rollout of these rows, whole prompt groups of `group_size` in a row."""
        return Hearing(self, rows, iteration, salt, group_size)

    def probe(self, images: Tensor, prompts: Sequence[Prompt], seeds: int) -> dict[str, Tensor]:
        """{scorer: (N,) float64} of every scorer on (N, 3, H, W) uint8 pictures, those of one prompt in a row."""
        pieces: dict[str, list[Tensor]] = {name: [] for name in self.all.parts}
        for groupwise, size in ((False, self.batch_size), (True, seeds)):
            parts = {name: part for name, part in self.all.parts.items() if part.groupwise == groupwise}
            for rows in _batches(len(prompts), size):
                for name, _, scores in self.ask(parts, images[rows], prompts[rows]):
                    pieces[name].append(scores)
        return {name: torch.cat(pieces[name]) for name in self.all.parts}

    def introduction(self, images: Tensor, prompts: Sequence[Prompt], seeds: int, scores: dict[str, Tensor]) -> list[str]:
        """A line on each scorer: its speed, and how much its score of the same picture differs the second time.

        Args:
            images, prompts, scores: a probe and what `probe` just said of it.
        """
        rows = slice(0, max(1, NOISE_TRIAL // seeds) * seeds)
        speeds = {name: part.images_per_second for name, part in self.all.parts.items()}
        again = self.probe(images[rows], prompts[rows], seeds)
        lines = []
        for name, speed in speeds.items():
            first = scores[name][: len(again[name])]
            noise = (again[name] - first).abs().nan_to_num().max().item()
            spread = scores[name][scores[name].isfinite()].std(correction=0).item()
            doubt = f", against {spread:.3g} between pictures: it is noisy" if noise > 1e-3 * max(spread, 1e-6) else ""
            lines.append(f"reward {name}: {speed:,.3g} images a second; the same picture twice differs by {noise:.2g}{doubt}")
        return lines

    def refresh(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Show an iteration's (N, 3, H, W) uint8 pictures to the scorers that learn from them."""
        self.trained.refresh(images.to(self.device).float() / 255, [p.text for p in prompts], [p.metadata for p in prompts])

    def check(self, wanted: Tensor, texts: Sequence[str]) -> str | None:
        """A warning where an iteration's (N,) objective teaches nothing.

        Raises:
            RewardError: too few pictures were scored.
        """
        if (share := wanted.isnan().double().mean().item()) > self.max_missing:
            raise RewardError(
                f"{share:.0%} of this iteration's pictures could not be scored, more than objective.max_missing={self.max_missing:g} "
                "allows. Mend the scorer, or raise it."
            )
        # A single picture is like itself: that says nothing.
        alike = len(texts) > 1 and zero_spread(wanted, texts) == 1
        return "all pictures of each prompt scored alike: this iteration teaches nothing" if alike else None

    def ask(
        self, parts: dict[str, Part], images: Tensor, prompts: Sequence[Prompt], keys: Sequence[Key] = ()
    ) -> Iterator[tuple[str, list[int], Tensor]]:
        """(scorer, rows, its scores of them) for the rows of one batch that the journal does not know under their keys."""
        # One tensor for all scorers: those that share a CLIP embed it once.
        pictures = images.to(self.device).float() / 255
        for name, part in parts.items():
            rows = [i for i in range(len(prompts)) if not (keys and self.knows(keys[i], name))]
            if rows and part.groupwise:
                rows = list(range(len(prompts)))
            if rows:
                chosen = pictures if len(rows) == len(prompts) else pictures[rows]
                with torch.no_grad():
                    scores = part.score(name, chosen, [prompts[i].text for i in rows], [prompts[i].metadata for i in rows])
                yield name, rows, scores

    def knows(self, key: Key, name: str) -> bool:
        return name in (self.journal.get(key) or {})

    def elsewhere(self, part: Part) -> bool:
        """Whether a scorer leaves the device alone on which pictures are drawn, so that it may work at the same time."""
        home = torch.device(part.device) if part.device else self.device
        on_cpu = not callable(getattr(part.reward, "to", None))
        return (
            getattr(part.reward, "elsewhere", False) or home.type != self.device.type or (on_cpu and self.device.type != "cpu")
        )


class Hearing:
    """An iteration's pictures, scored as they come: what computes elsewhere works while the next ones are drawn.

    All scores are in the journal before any is used. What the journal held before is read there, and no scorer asked again.
    """

    def __init__(self, judge: Judge, rows: Sequence[Row], iteration: int, salt: int, group_size: int):
        self.judge, self.rows, self.iteration, self.salt, self.group_size = judge, rows, iteration, salt, group_size
        self.keys: list[Key] = []
        self.images: list[Tensor] = []
        self.waiting: list[Future[None]] = []
        parts = judge.trained.parts
        self.aside = {name: part for name, part in parts.items() if judge.elsewhere(part) and not part.groupwise}
        self.pointwise = {name: part for name, part in parts.items() if name not in self.aside and not part.groupwise}
        self.groupwise = {name: part for name, part in parts.items() if part.groupwise}

    def add(self, images: Tensor) -> None:
        """(B, 3, H, W) uint8: the next pictures, in the order of the rows. Raises what has gone wrong so far."""
        rows = slice(len(self.keys), len(self.keys) + len(images))
        hashes = [image_hash(image.numpy().tobytes()) for image in images]
        drawn = zip(self.rows[rows], hashes, strict=True)
        self.keys += [Key(self.iteration, self.salt, row.group, row.member, image) for row, image in drawn]
        self.images.append(images)
        if self.aside:
            self.waiting.append(self.judge.pool.submit(self._ask, self.aside, rows, images))
        for future in self.waiting:
            if future.done():
                self._explained(future.result)

    def scores(self) -> dict[str, Tensor]:
        """{scorer: (N,) float64} when all pictures are there.

        Raises:
            RewardError: also says how many scores are kept.
        """
        images = torch.cat(self.images)
        for future in self.waiting:
            self._explained(future.result)
        for parts, size in ((self.pointwise, self.judge.batch_size), (self.groupwise, self.group_size)):
            for rows in _batches(len(self.rows), size) if parts else ():
                self._explained(functools.partial(self._ask, parts, rows, images[rows]))
        said = [self.judge.journal.get(key) or {} for key in self.keys]
        return {
            name: torch.tensor([to_float(scores[name]) for scores in said], dtype=torch.float64)
            for name in self.judge.trained.parts
        }

    def _ask(self, parts: dict[str, Part], rows: slice, images: Tensor) -> None:
        """Score a batch and write down each scorer's scores as they come."""
        prompts, keys = [row.prompt for row in self.rows[rows]], self.keys[rows]
        for name, places, scores in self.judge.ask(parts, images, prompts, keys):
            said = zip(places, scores.tolist(), strict=True)
            self.judge.journal.add([(keys[i], prompts[i].text, {name: to_json(score)}) for i, score in said])

    def _explained(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except RewardError as error:
            names = self.judge.trained.parts
            kept = sum(self.judge.knows(key, name) for key in self.keys for name in names)
            raise RewardError(
                f"{error}\nStopped before the update of iteration {self.iteration + 1}; {kept} of its {len(self.rows) * len(names)} "
                "scores are kept."
            ) from error


def _batches(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]
