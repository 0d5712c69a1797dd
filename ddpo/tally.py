"""What votes amount to: win rates with intervals, whether a side of the screen is favoured, how many more settle it.

Intervals are Wilson's (1927), of 95 %. They take votes as independent, and hold for a number of votes that was chosen beforehand:
who looks after each vote, and stops when one half is excluded, will exclude it more often than once in twenty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo import votes as files
from ddpo.votes import Stage, Vote

Z = 1.959964  # two-sided 95 %
MOST = 10_000  # more votes than this are not promised to settle anything


@dataclass(frozen=True)
class Share:
    """A share of votes.

    Args:
        wins: how many; a tie, or "both bad", is half a win of either side, which makes the interval wider than it need be.
        number: of how many, 1 at least.
    """

    wins: float
    number: int

    @property
    def rate(self) -> float:
        return self.wins / self.number

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        extra = Z**2 / self.number
        centre = (self.rate + extra / 2) / (1 + extra)
        half = Z / (1 + extra) * math.sqrt(self.rate * (1 - self.rate) / self.number + extra / (4 * self.number))
        return max(0.0, centre - half), min(1.0, centre + half)

    @property
    def settled(self) -> bool:
        """The interval excludes one half."""
        low, high = self.interval
        return low > 0.5 or high < 0.5

    @property
    def more(self) -> int | None:
        """How many more votes, at this rate, until the interval excludes one half; None where that takes over 10,000.

        Wilson's interval holds the rates that a score test does not reject, and that of one half is rejected where
        (rate - 1/2)^2 > Z^2 / (4 n).
        """
        if self.settled:
            return 0
        distance = abs(self.rate - 0.5)
        if distance == 0 or (needed := math.floor(Z**2 / (4 * distance**2)) + 1) - self.number > MOST:
            return None
        return max(1, needed - self.number)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {self.number}"


@dataclass(frozen=True)
class Tally:
    """The votes on one comparison.

    Args:
        stages: what is compared; where both are one, pictures of two seeds, it has no win rate.
        overall: how often the second, the tuned model, wins; None without votes, or without a win rate.
        prompts: the same for each prompt, the surest first.
        left: how often decided votes went to the left picture; None without decided votes.
        ties, both_bad: votes for neither.
    """

    stages: tuple[Stage, Stage]
    overall: Share | None
    prompts: dict[str, Share]
    left: Share | None
    ties: int
    both_bad: int

    @property
    def outlook(self) -> str:
        """How many more votes settle it, as a sentence."""
        if self.overall is None:
            return "No votes yet." if self.stages[0] != self.stages[1] else "Two seeds of one model: votes to learn from."
        if self.overall.settled:
            return f"Settled: {self.stages[self.overall.rate > 0.5]} is preferred."
        if self.overall.more is None:
            return "Not settled, and at this rate it will not be within 10,000 more votes."
        return f"Not settled; at this rate about {self.overall.more:,} more votes would."

    @property
    def bias(self) -> str:
        """Whether a side of the screen is favoured, as a sentence; empty where it is not."""
        if self.left is None or not self.left.settled:
            return ""
        side = "left" if self.left.rate > 0.5 else "right"
        return f"The {side} picture is favoured whatever it shows: {self.left} decided votes went left. Are both looked at?"

    def __str__(self) -> str:
        first, second = self.stages
        lines = [f"{second} against {first}" if first != second else f"two seeds of {first}"]
        if self.overall:
            lines += [f"win rate {self.overall} votes; ties and both bad count half", self.outlook]
        lines.append(f"ties: {self.ties}, both bad: {self.both_bad}; left picture: {self.left or 'no decided votes'}")
        lines += [self.bias] if self.bias else []
        return "\n".join(lines + [f"  {share}  {prompt}" for prompt, share in self.prompts.items()])


def tally(stages: tuple[Stage, Stage], votes: Sequence[Vote]) -> Tally:
    """Count the votes on these stages, of those given."""
    own = [vote for vote in votes if vote.stages == stages]
    decided = [vote for vote in own if vote.winner is not None]
    by_prompt: dict[str, list[Vote]] = {}
    for vote in own if stages[0] != stages[1] else []:
        by_prompt.setdefault(vote.prompt, []).append(vote)
    shares = {prompt: _wins(some) for prompt, some in by_prompt.items()}
    surest = sorted(shares.items(), key=lambda item: (-abs(item[1].rate - 0.5) * math.sqrt(item[1].number), item[0]))
    return Tally(
        stages,
        _wins(own) if shares else None,
        dict(surest),
        Share(sum(vote.answer == "a" for vote in decided), len(decided)) if decided else None,
        sum(vote.answer == "tie" for vote in own),
        sum(vote.answer == "both_bad" for vote in own),
    )


def _wins(votes: Sequence[Vote]) -> Share:
    return Share(sum(0.5 if vote.winner is None else vote.winner for vote in votes), len(votes))


def main(folder: Path, output: Path | None) -> str:
    """`ddpo votes`: what is said of a run folder's votes, or of their export.

    Raises:
        ValueError: the folder is none, or the export is of another kind than .jsonl and .csv.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    found = files.read(folder)
    said = [*found.notes, f"{len(found.standing)} votes" + (f", {found.withdrawn} withdrawn" if found.withdrawn else "")]
    if output is None:
        said += [f"\n{tally(stages, some)}" for stages, some in files.of_stages(found.standing).items()]
    else:
        said.append(f"{files.export(found.standing, folder, output)} written to {output}")
    return "\n".join(said)
