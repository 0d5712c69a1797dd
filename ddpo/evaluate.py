"""Tuned against base: the same held-out prompts, the same noise, every time.

The base model's pictures are drawn once, at iteration 0. A difference is therefore paired, and its interval is that of
the prompts: they are what a new user would bring other ones of.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpo.diffusion import DDIM
from ddpo.memory import Batch
from ddpo.meters import to_float, to_json
from ddpo.noise import Address, generator
from ddpo.policy import Policy
from ddpo.prompts import Prompt
from ddpo.rollout import collect
from ddpo.sections import Evaluating
from rewards import Rubric

FLAT = 4.0  # of 255: a picture whose colours' standard deviations are below this shows nothing
LEAST_DISTANCE = 1e-4  # of pictures that are the same, for its logarithm


def probe_address(run_seed: int, prompt: str, seed: int) -> Address:
    """Where the noise of a picture is from that is drawn to look at: what `seed` means to a user, of one prompt and run."""
    return (run_seed, "probe", prompt, seed)


class Probe:
    """What every evaluation draws: held-out prompts, spread evenly over their list, each with every seed."""

    def __init__(self, held_out: Sequence[Prompt], evaluating: Evaluating, num_steps: int, seed: int):
        number = min(evaluating.prompts, len(held_out))
        chosen = [held_out[i * len(held_out) // number] for i in range(number)]
        self.rows = [(prompt, s) for prompt in chosen for s in range(evaluating.seeds)]
        self.seeds, self.num_steps, self.seed = evaluating.seeds, evaluating.num_steps or num_steps, seed

    def share(self, process: int, processes: int) -> list[tuple[Prompt, int]]:
        """A process's rows, as many as any other's, whole prompts: the last is repeated where they do not divide."""
        prompts = len(self.rows) // self.seeds
        size = -(-prompts // processes)
        chosen = [min(i, prompts - 1) for i in range(process * size, (process + 1) * size)]
        return [row for i in chosen for row in self.rows[i * self.seeds : (i + 1) * self.seeds]]

    def draw(
        self, policy: Policy, rows: list[tuple[Prompt, int]], batch_size: int | Batch, advance: Callable[[int], None]
    ) -> Tensor:
        """(N, 3, H, W) uint8 pictures by the deterministic sampler, which adds no noise of its own."""
        texts, addresses = [p.text for p, _ in rows], [probe_address(self.seed, p.text, s) for p, s in rows]
        return collect(policy, texts, addresses, DDIM(eta=0.0), self.num_steps, batch_size, False, advance).images


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def prompt_means(values: Tensor, prompts: Sequence[str]) -> Tensor:
    """(P,) float64 mean of (N,) values over each prompt's pictures, in the prompts' order. NaN values are left out; of a prompt with
    no other the mean is NaN."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values.tolist(), strict=True):
        by_prompt.setdefault(prompt, []).extend([value] if value == value else [])
    return torch.tensor([sum(v) / len(v) if v else math.nan for v in by_prompt.values()], dtype=torch.float64)


def paired_interval(differences: Tensor, prompts: Sequence[str], resamples: int = 4000) -> Interval:
    """Mean of (N,) paired differences, and its 95 % percentile-bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Prompts are resampled, not pictures: those of one prompt are not independent. NaN differences are left out.
    """
    means = prompt_means(differences, prompts)
    means = means[means.isfinite()]
    if not len(means):
        return Interval(float("nan"), float("nan"), float("nan"))
    draws = torch.randint(len(means), (resamples, len(means)), generator=generator("bootstrap", len(means)))
    low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(means.mean().item(), low, high)


class Look(NamedTuple):
    """What pictures are like, whatever they show."""

    spread: Tensor  # (P,) how different the pictures of each prompt are; NaN of a single one
    saturated: Tensor  # (N,) share of the pixel values that are 0 or 255
    blank: Tensor  # (N,) 1 where a picture is black, white or of one colour, else 0

    @classmethod
    def at(cls, images: Tensor, prompts: Sequence[str]) -> "Look":
        """Of (N, 3, H, W) uint8."""
        spread = [d.mean().item() if len(d) else math.nan for d in _distances(images, prompts)]
        ends = ((images == 0) | (images == 255)).double().flatten(1).mean(1)
        flat = (images.double().flatten(2).std(2, correction=0) < FLAT).all(1).double()
        return cls(torch.tensor(spread, dtype=torch.float64), ends, flat)


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """How different the pictures of one prompt are: root mean square pixel distance in [0, 1], averaged over all pairs.

    Pictures are compared at 32 x 32, so that fine noise does not pass for variety. NaN if no prompt has two pictures.

    Args:
        images: (N, 3, H, W) uint8.
    """
    distances = torch.cat(_distances(images, prompts))
    return distances.mean().item() if len(distances) else float("nan")


def _distances(images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
    """For each prompt, those of all pairs of its pictures."""
    small = F.adaptive_avg_pool2d(images.float() / 255, 32).flatten(1)
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    return [torch.pdist(small[group]) / small.shape[1] ** 0.5 for group in rows.values()]


def win_rate(base: Tensor, tuned: Tensor) -> float:
    """The share of pairs in which the tuned picture scores higher; a tie is half a win. NaN pairs are left out."""
    both = base.isfinite() & tuned.isfinite()
    return ((tuned > base).double() + 0.5 * (tuned == base).double())[both].mean().item()


def compare(
    base: dict[str, Tensor], tuned: dict[str, Tensor], objective: tuple[Tensor, Tensor], prompts: Sequence[str]
) -> dict[str, float]:
    """The evaluation's share of a line of metrics.jsonl.

    Args:
        base, tuned: (N,) scores of each scorer on the same prompts and noise.
        objective: (N,) the weighted total that training maximises, of base and tuned.
    """
    metrics = {"eval/win_rate": win_rate(*objective)}
    for name, before in base.items():
        change = paired_interval(tuned[name] - before, prompts)
        metrics |= {
            f"eval/{name}/base": before.nanmean().item(),
            f"eval/{name}/tuned": tuned[name].nanmean().item(),
            f"eval/{name}/delta": change.mean,
            f"eval/{name}/delta_low": change.low,
            f"eval/{name}/delta_high": change.high,
        }
    return metrics


class Baseline:
    """What the base model made of the probe, and which iterations have made the most of it since.

    Args:
        rubric: what is trained on. Its floors move with each comparison.
        untrained: names of the scorers that are watched, so that what they lose is a loss.

    Attributes:
        best: the iteration with the highest lower confidence bound of what training maximises, of those that keep the floors.
        safe: the one, of those that `rank` is told of, with the highest lower bound of the untrained scorers, in units of their
            spread; the lowest of theirs counts. Without such scorers it is that of what training maximises.
    """

    def __init__(self, rubric: Rubric, untrained: Collection[str] = ()):
        self.rubric, self.untrained = rubric, list(untrained)
        self.scores: dict[str, Tensor] = {}  # (N,) of every scorer
        self.diversity = math.nan
        self.look: Look | None = None
        self.best, self._gain = 0, -math.inf
        self.safe, self._held = 0, -math.inf

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """(N,) the weighted sum, each scorer in its unit, which the base model's scores give."""
        return self.rubric.total(scores, self.rubric.scales(self.scores))

    def differences(self, scores: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(N,) each picture's change of what training maximises, and of each untrained scorer, against the base model's."""
        base = {name: self.scores[name] for name in scores}
        return self.total(scores) - self.total(base), {name: scores[name] - base[name] for name in self.untrained}

    def compare(self, iteration: int, scores: dict[str, Tensor], images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The evaluation's share of a line of metrics.jsonl. At iteration 0 these are the base model's own.

        Args:
            scores: (N,) of every scorer, trained on or watched.
            images: (N, 3, H, W) uint8.
        """
        variety, look = diversity(images, prompts), Look.at(images, prompts)
        if iteration == 0 or self.look is None:
            self.scores, self.diversity, self.look = dict(scores), variety, look
        base = {name: self.scores[name] for name in scores}
        objective = (self.total(base), self.total(scores))
        margins = self.rubric.margins(base, scores, prompts)
        if iteration:
            self.rubric.adjust(margins)
        gain = self._gain_of(scores, prompts) if all(margin >= 0 for margin in margins.values()) else -math.inf
        if gain > self._gain:
            self.best, self._gain = iteration, gain
        return {
            **compare(base, scores, objective, prompts),
            "eval/diversity/base": self.diversity,
            "eval/diversity/tuned": variety,
            **{
                f"eval/{name}/{model}": value
                for model, seen in (("base", self.look), ("tuned", look))
                for name, value in _shares(seen)
            },
            **{f"floor/{name}/margin": margin for name, margin in margins.items()},
        }

    def _gain_of(self, scores: dict[str, Tensor], prompts: Sequence[str]) -> float:
        return paired_interval(self.differences(scores)[0], prompts).low

    def rank(self, iteration: int, scores: dict[str, Tensor], prompts: Sequence[str]) -> None:
        """See whether this is the safest iteration so far, nothing being wrong with it. After `compare`."""
        changes = self.differences(scores)[1]
        lows = [paired_interval(change, prompts).low / _unit(self.scores[name]) for name, change in changes.items()]
        held = min((low for low in lows if math.isfinite(low)), default=self._gain_of(scores, prompts))
        if held > self._held:
            self.safe, self._held = iteration, held

    def state(self) -> dict[str, Any]:
        scores = {name: [to_json(x) for x in v.tolist()] for name, v in self.scores.items()}
        look = None if self.look is None else [[to_json(x) for x in v.tolist()] for v in self.look]
        ranks = {name: value if math.isfinite(value) else None for name, value in (("gain", self._gain), ("held", self._held))}
        return {
            "scores": scores,
            "diversity": to_json(self.diversity),
            "look": look,
            "best": self.best,
            "safe": self.safe,
            **ranks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        def floats(values: list) -> Tensor:
            return torch.tensor([to_float(x) for x in values], dtype=torch.float64)

        self.scores = {name: floats(v) for name, v in state["scores"].items()}
        self.look = None if state["look"] is None else Look(*map(floats, state["look"]))
        self.diversity, self.best, self.safe = to_float(state["diversity"]), state["best"], state["safe"]
        self._gain, self._held = (-math.inf if state[name] is None else state[name] for name in ("gain", "held"))


def _shares(look: Look) -> list[tuple[str, float]]:
    return [("saturated", look.saturated.mean().item()), ("blank", look.blank.mean().item())]


def _unit(scores: Tensor) -> float:
    known = scores[scores.isfinite()]
    return max(known.std(correction=0).item(), 1e-12) if len(known) else 1.0
