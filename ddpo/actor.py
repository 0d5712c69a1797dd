"""Acts: draws an iteration's pictures, or reads those that exist."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ddpo import offline
from ddpo.algorithms import Algorithm
from ddpo.deal import Row
from ddpo.diffusion import Solver
from ddpo.meeting import TrainingError
from ddpo.memory import Batch
from ddpo.noise import Address, generator
from ddpo.policy import Policy
from ddpo.rollout import Rollout, collect, stochastic_steps
from ddpo.sections import Acting
from ddpo.window import Window, within


class Actor:
    """What makes the rollouts of one process.

    Raises:
        TrainingError: the solver cannot sample this model, or adds no noise where the algorithm learns from it.
    """

    def __init__(self, policy: Policy, algorithm: Algorithm, settings: Acting):
        self.policy, self.algorithm, self.settings = policy, algorithm, settings
        self.solver: Solver = settings.solver.build()
        self.window: Window | None = settings.window.build() if settings.window else None
        try:
            stochastic = stochastic_steps(policy.family.schedule, self.solver, settings.num_steps)
        except ValueError as e:  # a solver for another kind of schedule
            raise TrainingError(str(e)) from e
        if algorithm.needs_density and not stochastic:
            raise TrainingError(
                f"{self.solver} adds noise to none of the {settings.num_steps} steps, so there is nothing to learn from: lower "
                "rollout.solver.min_sigma, or raise rollout.num_steps"
            )

    def draw(
        self,
        rows: Sequence[Row],
        address: Address,
        batch: Batch,
        advance: Callable[[int], None],
        drawn: Callable[[Tensor], None],
    ) -> Rollout:
        """The rows' pictures by the algorithm's acting self.

        Args:
            address: of the iteration's randomness; its last part is the iteration's number.
            batch: pictures at a time.
            advance, drawn: as in `collect`.
        """
        with self.policy.acting_as(self.algorithm.actor):
            return collect(
                self.policy, [row.prompt.text for row in rows], [(*address, row.group, row.member) for row in rows],
                self._solver(address), self.settings.num_steps, batch, self.algorithm.needs_trajectory, advance, drawn,
                keep_beliefs=self.settings.credit is not None,
            )  # fmt: skip

    def read(self, rows: Sequence[Row], address: Address, advance: Callable[[int], None]) -> Rollout:
        """The rows' pictures from `rollout.pictures`."""
        return offline.rollout(
            self.policy, rows, address, self.solver, self.settings.num_steps, self.settings.batch_size, advance
        )

    def _solver(self, address: Address) -> Solver:
        """With noise in this iteration's window only: all processes' alike, so that a group's pictures differ in their noise, not
        in where it is."""
        if self.window is None:
            return self.solver
        draw, iteration = generator(*address, "window"), int(address[-1])
        return within(self.window, self.solver, self.policy.family.schedule, self.settings.num_steps, iteration, draw)
