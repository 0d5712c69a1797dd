"""A learned baseline: what reward to expect of a picture, by a noisy latent on the way to it.

A step's advantage is its target less V(x_t, t, prompt). V is fixed before x_next is drawn, so whatever it says, the policy
gradient keeps its expectation (where `trace` is 1) and, where V is right, loses the variance that the step has no part in.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, layer_norm, silu

from ddpo.checkpoint import pack_optimizer, unpack_optimizer
from ddpo.credit import by_step, lambda_returns
from ddpo.models import Family
from ddpo.noise import generator
from ddpo.rollout import Rollout

GRID = 8  # the latent is pooled to this many places a side, at most: what is settled early is coarse
WIDTH = 32  # channels
WAVES = 8  # sines and cosines of the noise level


class Value(nn.Module):
    """V(x_t, t, prompt): two convolutions over the pooled latent, with the noise level and the prompt added to each place.

    It is zero before it learns.
    """

    def __init__(self, channels: int, text_width: int):
        super().__init__()
        self.text, self.noise = nn.Linear(text_width, WIDTH), nn.Linear(2 * WAVES, WIDTH)
        self.shallow, self.deep = nn.Conv2d(channels, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.mix, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        """(B,) from pooled latents (B, C, h, w), shares of noise (B,) in [0, 1] and text (B, width), all float32."""
        angles = torch.pi * noise[:, None] * torch.arange(1, WAVES + 1, device=noise.device)
        context = self.noise(torch.cat([angles.sin(), angles.cos()], 1)) + self.text(text)
        seen = self.deep(silu(self.shallow(latents) + context[:, :, None, None]))
        mixed = self.mix(torch.cat([silu(seen).mean((2, 3)), silu(context)], 1))
        return self.head(silu(mixed))[:, 0]


@dataclass
class Lesson:
    """A rollout as a critic sees it, and what it said of it before learning from it. Rows are samples.

    The states are those that K steps with noise were taken from; where a picture has no score, `outcome`, `targets` and
    nothing else are NaN.
    """

    latents: Tensor  # (N, K, C, h, w) pooled
    noise: Tensor  # (N, K) share of noise
    text: Tensor  # (N, width)
    outcome: Tensor  # (N,) what each picture came to
    values: Tensor  # (N, K)
    targets: Tensor  # (N, K)

    def __len__(self) -> int:
        return len(self.outcome)

    def __getitem__(self, rows: Tensor) -> "Lesson":
        return Lesson(*(v[rows.to(v.device)] for v in vars(self).values()))

    @property
    def advantages(self) -> Tensor:
        """(N, K), zero where a picture has no score."""
        return (self.targets - self.values).nan_to_num(0.0)


class Critic:
    """A value network and its optimizer, the same on all processes. The learner trains it.

    Args:
        family: whose latents and prompts it sees.
        lr: learning rate.
        epochs: times that it learns from each rollout.
        trace: lambda of the targets, see `lambda_returns`.
        seed: of the first weights.
    """

    def __init__(self, family: Family, lr: float, epochs: int, trace: float, seed: int):
        self.epochs, self.trace = epochs, trace
        text_width = family.encode([""])["text"].shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "critic").initial_seed())
            self.network = Value(family.latent_shape[0], text_width).to(family.device)
        self.names, self.weights = (list(part) for part in zip(*self.network.named_parameters(), strict=True))
        self.optimizer = torch.optim.AdamW(self.weights, lr)

    @torch.no_grad()
    def study(self, rollout: Rollout) -> Lesson:
        """What it thinks of a rollout whose pictures have an advantage each, the outcome that it is to foretell."""
        assert rollout.advantages is not None, "advantages come before learning"
        outcome = rollout.advantages
        if rollout.rewards is not None:
            outcome = outcome.where(rollout.rewards.isfinite(), torch.nan)
        states = _states(rollout)
        values = self._values(*states)
        return Lesson(*states, outcome, values, lambda_returns(values, outcome, self.trace))

    def loss(self, lesson: Lesson) -> Tensor:
        """(N,) squared errors, averaged over the steps; without a target there is none."""
        values = self._values(lesson.latents, lesson.noise, lesson.text)
        return (values - lesson.targets.where(lesson.targets.isfinite(), values.detach())).square().mean(1)

    def _values(self, latents: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        steps = noise.shape[1]
        return self.network(latents.flatten(0, 1), noise.flatten(), text.repeat_interleave(steps, 0)).view_as(noise)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
        """The weights, the optimizer's tensors, and the rest of the optimizer as JSON."""
        tensors, scalars = pack_optimizer(self.optimizer, self.names)
        return self.network.state_dict(), tensors, scalars

    def load_state(self, weights: dict[str, Tensor], tensors: dict[str, Tensor], scalars: dict) -> None:
        """Take back what `state` returned."""
        self.network.load_state_dict(weights)
        unpack_optimizer(self.optimizer, self.names, tensors, scalars)


def with_advantages(rollout: Rollout, lesson: Lesson) -> Rollout:
    """The rollout with an advantage (N, S) for each step."""
    return replace(rollout, advantages=by_step(lesson.advantages, rollout.stochastic, rollout.log_probs.shape[1]))


def _states(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled latents (N, K, C, h, w), shares of noise (N, K) and text (N, width) of the steps with noise."""
    height, width = (min(GRID, side) for side in rollout.latents.shape[-2:])
    pooled = [adaptive_avg_pool2d(rollout.latents[:, step], (height, width)) for step in rollout.stochastic]
    noise = rollout.schedule.level(rollout.times[rollout.stochastic]).flow_time.to(rollout.latents)
    text = rollout.cond["text"].float().mean(1)
    text = layer_norm(text, text.shape[1:])[rollout.cond_rows]  # encoders differ in scale
    return torch.stack(pooled, 1), noise.expand(len(rollout), -1), text
