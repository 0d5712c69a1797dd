"""What came of acting. A loss looks at it through views (ddpo/views.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.diffusion import DDIM, DPMSolver, Level, Solver, log_prob, step_mean
from ddpo.memory import Batch
from ddpo.models import Cond
from ddpo.noise import Address, generator, normal
from ddpo.policy import Policy
from ddpo.schedule import Schedule
from ddpo.views import Differentiable, Noised, Tail, Transition


@dataclass
class Rollout:
    """N samples, row by row: rollout[rows] is a Rollout.

    `cond` is stored once a prompt, not once a sample: rows point into it.
    """

    prompts: list[str]
    addresses: list[Address]  # of each sample's randomness
    schedule: Schedule
    cond: Cond  # (number of different prompts, ...)
    cond_rows: Tensor  # (N,)
    latents: Tensor  # (N, S + 1, C, H, W), or (N, 1, C, H, W) where only the end was kept
    times: Tensor  # (S + 1,)
    log_probs: Tensor  # (N, S); of a deterministic step, which has no density, it is not finite
    stochastic: list[int]  # the steps that have a density
    images: Tensor  # (N, 3, height, width) uint8 on the CPU: the very pixels that are scored, saved and hashed
    solver: Solver
    beliefs: Tensor | None = None  # (N, number of stochastic steps, 3, height, width) uint8: the pictures predicted before them
    # What the judge says, and how to ask it again
    advantages: Tensor | None = None  # (N,), or (N, S) where each step has its own
    rewards: Tensor | None = None  # (N,) what the advantages were made of; NaN where a picture could not be scored
    metadata: list[dict] | None = None  # (N,) of the prompts
    reward: Differentiable | None = None  # where the algorithm asks for it

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor) -> Rollout:
        def pick(v: Tensor) -> Tensor:
            return v[rows.to(v.device)]

        return replace(
            self, prompts=[self.prompts[i] for i in rows], addresses=[self.addresses[i] for i in rows],
            cond_rows=pick(self.cond_rows), latents=pick(self.latents), log_probs=pick(self.log_probs), images=pick(self.images),
            beliefs=None if self.beliefs is None else pick(self.beliefs),
            advantages=None if self.advantages is None else pick(self.advantages),
            rewards=None if self.rewards is None else pick(self.rewards),
            metadata=None if self.metadata is None else [self.metadata[i] for i in rows],
        )  # fmt: skip

    def chunks(self, size: int) -> Iterator[Rollout]:
        for rows in torch.arange(len(self)).split(size):
            yield self[rows]

    def groups(self) -> list[list[int]]:
        """The rows of each prompt group: those whose addresses differ in their last part alone."""
        rows: dict[Address, list[int]] = {}
        for i, address in enumerate(self.addresses):
            rows.setdefault(address[:-1], []).append(i)
        return list(rows.values())

    def transition(self, step: int) -> Transition:
        """What happened at one step, for every row."""
        assert self.advantages is not None, "advantages come before learning"
        t, t_next = (v.to(self.latents.device).expand(len(self)) for v in self.times[step : step + 2])
        cond = {k: v[self.cond_rows] for k, v in self.cond.items()}
        return Transition(
            self.latents[:, step],
            self.latents[:, step + 1],
            t,
            t_next,
            self.log_probs[:, step],
            self.solver,
            cond,
            self.advantages if self.advantages.ndim == 1 else self.advantages[:, step],
        )

    def noised(self, key: int, stretch: int, stretches: int, shared: bool, lowest: float = 0.0) -> Noised:
        """Every row at a noise level drawn from one of equal stretches of the schedule, with noise of its own.

        Args:
            key: of the draw; rows have addresses, so it does not depend on batches or processes.
            shared: the rows of a group (addresses that differ in their last part alone) get the same level and noise.
            lowest: share of the way from clean to noise, at its clean end, that no level is drawn from.
        """
        assert self.advantages is not None, "advantages come before learning"
        x0 = self.latents[:, -1]
        own = [a[:-1] if shared else a for a in self.addresses]
        shares = torch.stack([torch.rand((), generator=generator(*a, "level", key, stretch)) for a in own])
        share = lowest + (1 - lowest) * (stretch + shares.double()) / stretches
        t = self.schedule.at(share).to(x0.device)
        level = self.schedule.level(t)
        x = level.noise(x0, normal([(*a, "noise", key, stretch) for a in own], x0.shape[1:], x0.device))
        cond = {k: v[self.cond_rows] for k, v in self.cond.items()}
        return Noised(x0, x, t, level.sigma.to(x0), cond, self.advantages)

    def tail(self, steps: int) -> Tail:
        """The last steps of every row, with the noise that was added, drawn again at its address."""
        first = len(self.times) - 1 - steps
        assert self.latents.shape[1] == len(self.times) and first >= 0, "there is no such trajectory"
        shape, device = self.latents.shape[2:], self.latents.device
        noise = [
            normal([(*a, "step", step) for a in self.addresses], shape, device)
            if step in self.stochastic
            else torch.zeros(len(self), *shape, device=device)
            for step in range(first, first + steps)
        ]
        return self._tail(self.latents[:, first], self.times[first:], torch.stack(noise), self.solver)

    def renoised(self, key: int, draw: int) -> Tail:
        """What was drawn, noised anew to where the last step begins, and that step, which adds no noise of its own.

        Args:
            key, draw: of the noise; rows have addresses, so it does not depend on batches or processes.
        """
        x0 = self.latents[:, -1]
        eps = normal([(*a, "renoise", key, draw) for a in self.addresses], x0.shape[1:], x0.device)
        x = self.schedule.level(self.times[-2:-1].to(x0.device).expand(len(self))).noise(x0, eps)
        return self._tail(x, self.times[-2:], torch.zeros_like(x)[None], DDIM(eta=0.0))

    def _tail(self, x: Tensor, times: Tensor, noise: Tensor, solver: Solver) -> Tail:
        assert self.reward is not None, "the algorithm must say needs_gradient"
        cond = {k: v[self.cond_rows] for k, v in self.cond.items()}
        return Tail(x, times, noise, solver, cond, self.reward, self.prompts, self.metadata or [{} for _ in self.prompts])

    def scored(self) -> Rollout:
        """Without the rows whose picture could not be scored."""
        return self if self.rewards is None else self[self.rewards.isfinite().nonzero()[:, 0].cpu()]

    @torch.no_grad()
    def recompute_log_probs(self, policy: Policy, together: Sequence[Tensor]) -> None:
        """Replay every step of these rows, each tensor's as one batch.

        In half precision kernels differ by batch shape. Where learning uses another shape than acting did, this keeps
        the ratio at one before the first update.
        """
        for rows in together:
            chunk = self[rows]
            chunk.advantages = torch.zeros(len(chunk))
            for step in self.stochastic:
                view = chunk.transition(step)
                self.log_probs[rows, step] = log_prob(view.x_next, *view.replay(policy))


def collect(
    policy: Policy,
    prompts: Sequence[str],
    addresses: Sequence[Address],
    solver: Solver,
    num_steps: int,
    batch_size: int | Batch,
    keep_trajectory: bool,
    advance: Callable[[int], None] = lambda rows: None,
    drawn: Callable[[Tensor], None] = lambda images: None,
    keep_beliefs: bool = False,
) -> Rollout:
    """Act: one image for each prompt, its noise drawn at its own address.

    Args:
        batch_size: rows that go through the network at a time; fewer from then on where the memory does not hold them. A sample
            does not depend on it (in float32, up to the last bits).
        advance: told the number of rows after each denoising step.
        drawn: given each batch's (B, 3, height, width) uint8 images as soon as they are there, in order.
        keep_beliefs: decode what the network believes in before each stochastic step, too.

    Raises:
        ddpo.memory.NoMemory: the memory does not hold a single row.
    """
    cond, cond_rows = conditions(policy, prompts)
    times = policy.family.schedule.times(num_steps)
    stochastic = stochastic_steps(policy.family.schedule, solver, num_steps)
    foretold = stochastic if keep_beliefs else []

    def sample(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch_cond = {k: v[cond_rows[rows]] for k, v in cond.items()}
        places = [addresses[i] for i in rows]
        return _sample(policy, batch_cond, places, solver, times, keep_trajectory, advance, foretold)

    parts = []
    for part in (batch_size if isinstance(batch_size, Batch) else Batch(batch_size)).pieces(len(prompts), sample):
        parts.append(part)
        drawn(part[2])
    latents, log_probs, images, beliefs = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rollout(
        list(prompts),
        list(addresses),
        policy.family.schedule,
        cond,
        cond_rows,
        latents,
        times,
        log_probs,
        stochastic,
        images,
        solver,
        beliefs if keep_beliefs else None,
    )


def conditions(policy: Policy, prompts: Sequence[str]) -> tuple[Cond, Tensor]:
    """(what the network is conditioned on, once a prompt; (N,) each prompt's row of it)."""
    distinct = list(dict.fromkeys(prompts))
    rows = torch.tensor([distinct.index(p) for p in prompts], device=policy.family.device)
    return policy.family.encode(distinct), rows


def stochastic_steps(schedule: Schedule, solver: Solver, num_steps: int) -> list[int]:
    """The steps at which the solver adds noise, so that they have a density to learn from."""
    levels = schedule.level(schedule.times(num_steps))
    now, then = (Level(*(v[part] for v in levels)) for part in (slice(None, -1), slice(1, None)))
    return (solver(now, then)[1] > 0).nonzero()[:, 0].tolist()


@torch.no_grad()
def _sample(
    policy: Policy,
    cond: Cond,
    addresses: Sequence[Address],
    solver: Solver,
    times: Tensor,
    keep_trajectory: bool,
    advance: Callable[[int], None],
    foretold: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latents, log-probabilities, images, what is believed before the `foretold` steps) of one batch.

    Latents are float32 from the draw on: the stored one, the one the network sees next and the one whose
    log-probability is recorded are the same bits.
    """
    family, device, n = policy.family, policy.family.device, len(addresses)
    x = normal([(*a, "start") for a in addresses], family.latent_shape, device)
    latents, log_probs, beliefs, last = [x], [], [], None
    for step, (t, t_next) in enumerate(zip(times[:-1].to(device), times[1:].to(device), strict=True)):
        t, now, then = t.expand(n), family.schedule.level(t.expand(n)), family.schedule.level(t_next.expand(n))
        belief = policy(x, t, cond)
        if step in foretold:
            beliefs.append(_pixels(family.decode(belief.x0)))
        if isinstance(solver, DPMSolver):
            ahead = solver.lean(belief, now, then, last if step + 2 < len(times) else None)
            belief, last = ahead, (belief, now)
        mean, std = step_mean(belief, now, then, solver)
        x = mean + std * normal([(*a, "step", step) for a in addresses], family.latent_shape, device) if std.any() else mean
        if keep_trajectory:
            latents.append(x)
            log_probs.append(log_prob(x, mean, std))
        advance(n)
    images = _pixels(family.decode(x))
    predicted = torch.stack(beliefs, 1) if beliefs else images[:, None][:, :0]
    if not keep_trajectory:
        return x[:, None], torch.empty(n, 0), images, predicted
    return torch.stack(latents, 1), torch.stack(log_probs, 1), images, predicted


def _pixels(images: Tensor) -> Tensor:
    """uint8 on the CPU, from [0, 1]."""
    return images.mul(255).round().byte().cpu()
