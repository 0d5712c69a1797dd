"""Reward scorers: one scorer a file, and one gate that every score passes on its way into training.

A reward is any callable `reward(images, prompts, metadata) -> scores`; `Reward` says what it is given and what it owes,
and `check(my_reward)` tries that on a scorer of your own. This package imports nothing of ddpo, so a scorer can be
tried in a notebook. Files whose names begin with "_" hold what scorers share.
"""

from rewards._contract import Card, Reward, RewardError, Verdict, check, name_of, score
from rewards._part import Part
from rewards._rubric import Rubric

__all__ = ["Card", "Part", "Reward", "RewardError", "Rubric", "Verdict", "check", "name_of", "score"]
