"""The polling booth: deals pairs under tokens, takes each answer once, tells what was behind it. Imports neither gradio nor torch.

A pair leaves as a prompt and two pictures: no name, path, iteration, seed or score goes with it before it is voted on.
"""

import base64
import re
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ddpo import votes
from ddpo.app.shelf import Shelf
from ddpo.ballot import Duel, choose, duels, iterations
from ddpo.runs import webp
from ddpo.tally import tally
from ddpo.votes import Answer, Stage, Vote

LARGEST = 8 << 20  # bytes of a picture; a lossless one of 1024 x 1024 has about 1.5 million
TOKENS = 4096  # outstanding; the oldest are forgotten
AHEAD = 4  # pairs that a rater's page may hold at a time


@dataclass(frozen=True)
class _Ticket:
    run: str
    rater: str
    duel: Duel
    left: Literal[0, 1]
    since: float  # when it was dealt, or when the rater's pair before it was answered: by time.monotonic()


class Booth:
    """All voting on the runs of a shelf; safe to call from several threads.

    Everything it is given may come from a browser, whatever its annotation says. Raises ValueError, with a message for the page,
    where it is not right, and OSError or durable.FileError where the disk refuses.
    """

    def __init__(self, shelf: Shelf):
        self._shelf = shelf
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()
        self._lock = threading.Lock()

    def stages(self, run: str) -> list[tuple[str, str]]:
        """(label, key) of all that can be compared: this run's iterations, then the others' last ones."""
        own = [(str(Stage(i)), str(i)) for i in iterations(self._folder(run))]
        others = [
            (name, found[-1]) for name in self._shelf.names() if name != run and (found := iterations(self._shelf.folder(name)))
        ]
        return own + [(str(Stage(last, name)), f"{name}@{last}") for name, last in others]

    def deal(self, run: str, rater: str, first: str = "0", second: str = "") -> dict[str, str]:
        """The rater's next pair.

        Args:
            first, second: keys of `stages`; an empty `second` is the last iteration.

        Returns:
            token (good for one answer), prompt, and the pictures `left` and `right` as data URIs.
        """
        _demand(
            isinstance(rater, str) and re.fullmatch(r"[\w-]{1,64}", rater, re.A), "a rater is 1 to 64 letters, digits, - or _"
        )
        folder = self._folder(run)
        pairs = duels(folder, self._stages(folder, first, second), self._shelf.folder)
        standing = votes.read(folder).standing
        with self._lock:
            shown = {t.duel.images for t in [t for t in self._tickets.values() if (t.run, t.rater) == (run, rater)][-AHEAD:]}
            while pairs:
                duel, left = choose(pairs, standing, rater, shown)
                try:
                    return self._issue(_Ticket(run, rater, duel, left, time.monotonic()), folder)
                except OSError:  # a folder that is half copied
                    pairs.remove(duel)
        raise ValueError(f"none of the pictures of {run} can be read; copy the run folder again")

    def answer(self, run: str, token: str, answer: str) -> dict[str, Any]:
        """Record an answer: "a" (left), "b" (right), "tie" or "both_bad". Returns what was behind the pictures."""
        _demand(isinstance(answer, str) and answer in get_args(Answer), f"an answer is one of {', '.join(get_args(Answer))}")
        with self._lock:
            ticket = self._tickets.get(token) if isinstance(token, str) else None
            if ticket is None or ticket.run != run:
                raise ValueError("this pair was answered before, or dealt before the app was started again; take the next one")
            now = time.monotonic()
            seconds = round(now - ticket.since, 2)
            vote = ticket.duel.vote(answer, ticket.left, ticket.rater, seconds)  # type: ignore[arg-type]
            votes.add(self._folder(run), vote)
            del self._tickets[token]  # not before it is on the disk
            for other, waiting in self._tickets.items():
                if waiting.rater == ticket.rater:
                    self._tickets[other] = replace(waiting, since=now)
        return _revealed(ticket, vote)

    def undo(self, run: str, rater: str) -> dict[str, str]:
        """Withdraw the rater's last vote on this run, and deal its pair again, sides as they were."""
        folder = self._folder(run)
        with self._lock:
            own = [vote for vote in votes.read(folder).standing if vote.rater == rater]
            _demand(own, "there is no vote of yours to undo")
            last = own[-1]
            votes.withdraw(folder, last)
            again = [d for d in duels(folder, last.stages, self._shelf.folder) if d.images == last.images]
            _demand(again, "the vote is withdrawn; its pictures are gone")
            return self._issue(_Ticket(run, rater, again[0], last.left, time.monotonic()), folder)

    def count(self, run: str, first: str = "0", second: str = "") -> dict[str, Any]:
        """The statistics of a comparison, for the page."""
        folder = self._folder(run)
        found = votes.read(folder)
        counted = tally(self._stages(folder, first, second), found.standing)
        overall = counted.overall
        return {
            "total": len(found.standing),
            "title": f"{counted.stages[1]} against {counted.stages[0]}",
            "rate": None if overall is None else [overall.rate, *overall.interval],
            "overall": "" if overall is None else f"{overall} votes",
            "outlook": counted.outlook,
            "bias": counted.bias,
            "left": "" if counted.left is None else f"{counted.left} decided votes",
            "neither": f"ties: {counted.ties}, both bad: {counted.both_bad}",
            "prompts": [[prompt, str(share)] for prompt, share in list(counted.prompts.items())[:200]],
            "notes": found.notes[:10],
        }

    def _folder(self, run: str) -> Path:
        _demand(isinstance(run, str) and run, "choose a run first")
        return self._shelf.folder(run)

    def _stages(self, folder: Path, first: str, second: str) -> tuple[Stage, Stage]:
        held = iterations(folder)
        _demand(held, f"{folder.name} holds no pictures yet; they come with its first evaluation")
        last = [str(held[-1])]
        return _stage(first or "0"), _stage(second or last[0])

    def _issue(self, ticket: _Ticket, folder: Path) -> dict[str, str]:
        left, right = (_data_uri(folder / ticket.duel.images[i]) for i in (ticket.left, 1 - ticket.left))
        token = secrets.token_urlsafe(18)
        self._tickets[token] = ticket
        if len(self._tickets) > TOKENS:
            self._tickets.popitem(last=False)
        return {"token": token, "prompt": ticket.duel.samples[0].prompt, "left": left, "right": right}


def _demand(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _stage(key: str) -> Stage:
    """A key of `stages`. Whether there is such a run is found when its folder is looked up."""
    found = re.fullmatch(r"(?:(.+)@)?([0-9]{1,9})", key) if isinstance(key, str) else None
    if found is None:
        raise ValueError("choose what to compare from the list")
    return Stage(int(found[2]), found[1])


def _data_uri(path: Path) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp(path, LARGEST)[0]).decode()


def _revealed(ticket: _Ticket, vote: Vote) -> dict[str, Any]:
    """What stood where; `preferred` is "left", "right" or None."""
    sides = {"left": ticket.left, "right": 1 - ticket.left}
    told: dict[str, Any] = {
        side: {"is": str(ticket.duel.stages[i]), "seed": ticket.duel.samples[i].seed, "scores": ticket.duel.samples[i].scores}
        for side, i in sides.items()
    }
    preferred = {"a": "left", "b": "right"}.get(vote.answer)
    return told | {"prompt": vote.prompt, "answer": vote.answer, "preferred": preferred}
