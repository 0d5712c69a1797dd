"""What each step of a trajectory did for the reward, where a picture's own reward says only what all of them did together.

With V_k what is expected of the state that the k-th noisy step is taken from, and R what came of it,

    G_K = R;   G_k = (1 - lambda) V_{k+1} + lambda G_{k+1};   A_k = G_k - V_k

(Sutton & Barto 2018, 12.8, without discount; Schulman et al. 2016). V is fixed before the step's noise is drawn, so where lambda is
1 the policy gradient keeps its expectation, whatever V says.

V may be learned (ddpo/critic.py) or asked of the reward itself: before each step the network believes in a clean picture, which
can be decoded and scored. Then lambda = 0 pays a step for the gain in the reward of the predicted picture ("Stepwise-Flow-GRPO",
arXiv 2603.28718), in which no other step has a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from ddpo.advantage import Advantage


@dataclass(frozen=True)
class Gain:
    """Steps are paid for the gain in the reward of the picture that the network predicts. Asks the scorers of one more picture a
    noisy step.

    Args:
        trace: lambda. 0 is the gain of the step alone; 1 is the final reward less that of the prediction before the step.
    """

    trace: Annotated[float, Interval(ge=0, le=1)] = 0.0

    def __call__(self, values: Tensor, outcome: Tensor, advantage: Advantage, prompts: Sequence[str]) -> Tensor:
        """(N, K) advantages, each step's gains compared as the rewards of pictures are; NaN where a picture teaches nothing.

        Args:
            values: (N, K) rewards of the predictions before each noisy step, NaN where they could not be scored.
            outcome: (N,) rewards of the pictures.
        """
        gains = lambda_returns(values, outcome, self.trace) - values
        compared = torch.stack([advantage(step, prompts) for step in gains.unbind(1)], 1)
        teaches = compared.isfinite().any(1)  # no outcome, no target; a step without an advantage adds nothing to the others
        return compared.nan_to_num(0.0).where(teaches[:, None], torch.nan)


def lambda_returns(values: Tensor, outcome: Tensor, trace: float) -> Tensor:
    """(N, K) TD(lambda) targets G for the values (N, K) of successive states, where only the outcome (N,) pays."""
    targets = [outcome]
    for following in reversed(values.unbind(1)[1:]):
        targets.append((1 - trace) * following + trace * targets[-1])
    return torch.stack(targets[::-1], 1)


def explained_variance(values: Tensor, outcome: Tensor) -> float:
    """1 - Var(outcome - V) / Var(outcome) over all states (N, K): 1 is foresight, 0 a constant, below 0 is worse than none."""
    scored = outcome.isfinite()
    values, outcome = values[scored].double(), outcome[scored, None].double().expand_as(values[scored])
    known = values.isfinite()
    spread = outcome[known].var(correction=0)
    return (1 - (outcome - values)[known].var(correction=0) / spread).item() if spread > 0 else 0.0


def by_step(advantages: Tensor, stochastic: Sequence[int], steps: int) -> Tensor:
    """(N, steps) from (N, K) of the steps with noise. One without has no advantage, that is zero, or NaN where the row has NaN."""
    spread = advantages.new_zeros(len(advantages), steps)
    spread[:, list(stochastic)] = advantages
    return spread.where(advantages.isfinite().all(1)[:, None], torch.nan)
