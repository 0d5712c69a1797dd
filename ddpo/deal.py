"""Which process draws which pictures of an iteration, and what of.

The batch is global. Its prompt groups are dealt to (update, process) so that an update sees the same groups whatever the
number of processes, and a group never leaves its process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from annotated_types import Ge, Interval, Lt
from torch import Tensor

from ddpo.noise import Address, generator, permutation
from ddpo.prompts import Prompt


class Choice(Protocol):
    """Which prompts an iteration is about. All processes choose alike."""

    def __call__(self, prompts: Sequence[Prompt], groups: int, iteration: int, address: Address) -> list[Prompt]:
        """One prompt a group.

        Args:
            address: of the randomness of all iterations.
        """
        ...

    def learn(self, prompts: Sequence[str], rewards: Tensor) -> None:
        """See an iteration's (N,) rewards, NaN where a sample could not be scored."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers from one iteration to the next, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Shuffled:
    """Each prompt once, then each again in another order."""

    def __call__(self, prompts: Sequence[Prompt], groups: int, iteration: int, address: Address) -> list[Prompt]:
        turns = [divmod(iteration * groups + group, len(prompts)) for group in range(groups)]
        return [prompts[permutation(len(prompts), *address, "prompts", turn)[place]] for turn, place in turns]

    def learn(self, prompts: Sequence[str], rewards: Tensor) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class VarianceAdaptive:
    """More often those prompts whose samples' rewards differ, for only these teach a group-relative algorithm something
    (CGPO; the gradient's size goes with the spread). A prompt not seen yet counts as the average one.

    Args:
        uniform: the share of the probability that all prompts have alike.
        decay: of the past in the running variance of a prompt's rewards.
    """

    uniform: Annotated[float, Interval(ge=0, le=1)] = 0.25
    decay: Annotated[float, Ge(0), Lt(1)] = 0.5
    _variance: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, prompts: Sequence[Prompt], groups: int, iteration: int, address: Address) -> list[Prompt]:
        usual = sum(self._variance.values()) / len(self._variance) if self._variance else 1.0
        spread = torch.tensor([self._variance.get(p.text, usual) for p in prompts], dtype=torch.float64).sqrt()
        likely = spread / spread.sum() if spread.any() else torch.zeros_like(spread)
        # A prompt comes once in an iteration, unless there are more groups than prompts.
        draw = generator(*address, iteration, "prompts")
        chosen = torch.multinomial(
            self.uniform / len(prompts) + (1 - self.uniform) * likely + 1e-12, groups, groups > len(prompts), generator=draw
        )
        return [prompts[i] for i in chosen.tolist()]

    def learn(self, prompts: Sequence[str], rewards: Tensor) -> None:
        for prompt in dict.fromkeys(prompts):
            mine = rewards[torch.tensor([p == prompt for p in prompts])]
            mine = mine[mine.isfinite()]
            if len(mine) > 1:
                new = mine.var(correction=0).item()
                self._variance[prompt] = self.decay * self._variance.get(prompt, new) + (1 - self.decay) * new

    def state(self) -> dict[str, Any]:
        return {"variance": self._variance}

    def load_state(self, state: dict[str, Any]) -> None:
        self._variance = dict(state["variance"])


class Row(NamedTuple):
    """One picture of an iteration."""

    group: int
    member: int
    prompt: Prompt


@dataclass(frozen=True)
class Deal:
    """How a run's iterations are dealt out.

    Args:
        prompts: to train on.
        choice: which of them an iteration is about.
        groups: prompt groups an iteration, a multiple of updates x processes.
        group_size: pictures a group.
        updates: optimizer steps an epoch.
        processes: how many share the work.
        seed: of the prompts' order.
    """

    prompts: Sequence[Prompt]
    choice: Choice
    groups: int
    group_size: int
    updates: int
    processes: int
    seed: int

    def rows(self, iteration: int, salt: int, process: int) -> list[Row]:
        """A process's pictures, whole groups, those of the first update first."""
        share = self.groups // self.updates
        own = share // self.processes
        starts = [update * share + process * own for update in range(self.updates)]
        mine = [group for start in starts for group in range(start, start + own)]
        chosen = self.choice(self.prompts, self.groups, iteration, (self.seed, salt))
        return [Row(g, m, chosen[g]) for g in mine for m in range(self.group_size)]

    def all_rows(self, iteration: int, salt: int) -> list[Row]:
        """Every process's, in the order in which they are gathered."""
        return [row for process in range(self.processes) for row in self.rows(iteration, salt, process)]
