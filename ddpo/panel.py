"""Scorers that can be asked about any picture, each made when it is first asked."""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpo.config import Component, load
from ddpo.rewarding import Scorer, part
from rewards import Card, Part, RewardError, Rubric

Entry = dict[str, Any]  # a scorer as a config has it: {"name": "clip", "model": "menagerie"}


class Opinion(NamedTuple):
    """What a scorer says of a picture: a score, or why there is none."""

    score: float | None
    trouble: str = ""


@dataclass(frozen=True)
class Choice:
    """One scorer, checked as a config is."""

    reward: Scorer


class Panel:
    """Scorers by what a config says of them, kept once made.

    A scorer is code that a config names. It is imported when it is asked, and not before.

    Args:
        device: where they compute, unless their entries say otherwise.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self._made: dict[str, Part] = {}

    def ask(self, entry: Entry, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[Opinion]:
        """One opinion a picture. What goes wrong is told in the opinions: one scorer never spoils another's.

        Args:
            images: (B, 3, H, W) float32 in [0, 1]. Scorers that share a network compute its features once if all are given
                the same tensor.
        """
        try:
            scorer = self._scorer(entry)
            if scorer.groupwise:
                return [
                    Opinion(None, "it compares the pictures of a prompt with each other and has nothing to say of one")
                ] * len(images)
            with torch.no_grad():
                scores = scorer.score(str(entry["name"]), images, prompts, metadata).tolist()
        except (RewardError, ValueError, OSError, ImportError) as e:
            return [Opinion(None, brief(e))] * len(images)
        return [Opinion(s) if math.isfinite(s) else Opinion(None, "this picture cannot be scored") for s in scores]

    def close(self) -> None:
        """Let go of networks, processes and connections."""
        for scorer in self._made.values():
            Rubric({"": scorer}).close()
        self._made.clear()

    def _scorer(self, entry: Entry) -> Part:
        key = json.dumps(entry, sort_keys=True, default=str)
        if key not in self._made:
            component = chosen(entry)
            made = part(component)
            try:
                Rubric({str(entry["name"]): made}).load().to(self.device)
            except RewardError as e:
                raise RewardError(f"{brief(e)}{_needs(component)}") from e
            if callable(getattr(made.reward, "refresh", None)):
                raise ValueError("it learns while a run trains, and what it had learnt then is not at hand here")
            self._made[key] = made
        return self._made[key]


def chosen(entry: Entry) -> Component:
    """Raises ConfigError where there is no such scorer, or it takes no such option."""
    return load(None, [f"reward={json.dumps(entry)}"], Choice).recipe.reward


def about(entry: Entry) -> tuple[str, str]:
    """(the range of its scores, what it measures), as far as the scorer says."""
    try:
        factory = chosen(entry).factory
    except ValueError:
        return "", ""
    card: Card | None = getattr(factory, "card", None)
    return card.range if card else "", summary(factory)


def summary(factory: Any) -> str:
    """The first sentence of what a scorer says of itself."""
    return (inspect.getdoc(factory) or "").partition("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")


def brief(error: Exception) -> str:
    """The first line, cut at 300 characters."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return said if len(said) <= 300 else f"{said[:297]}..."


def _needs(component: Component) -> str:
    """What has to be there before it can be loaded."""
    card: Card | None = getattr(component.factory, "card", None)
    wanted = f" It needs {card.weights} ({card.size})" if card and card.weights != "none" else ""
    package = f'; install it with pip install "ddpo[{card.extra}]"' if card and card.extra else ""
    return f".{wanted}{package}" if wanted or package else ""
