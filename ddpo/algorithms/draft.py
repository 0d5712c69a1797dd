"""Reward gradients: where the reward can be differentiated, its gradient goes back through the last steps into the network.

    DRaFT       Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards": the last K steps
    DRaFTLV     ibid.: the last step, from several noisings of what was drawn, for a gradient of lower variance
    AlignProp   Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation": K at random
    ReFL        Xu et al. 2023, "ImageReward", algorithm 1: the clean latent as it is believed in at a random late step

All maximise E[r(x0)] itself. There is no advantage and no ratio, so one picture a prompt is enough, and any solver may act: where
it adds noise, that very noise is added again. Coefficients of the loss are the rewards' `weight` in the config; with AdamW they
matter only as far as optimizer.max_grad_norm binds.

Nothing holds these near the base model: they climb fastest and overshoot first. Their papers stop early, or scale the LoRA down
afterwards (DRaFT, section 5.3). Left out: ReFL's second loss, on pictures of its pretraining data, which are not here.

The memory is that of one denoising step, the VAE's decoder and the scorers, forward and backward, for optimizer.micro_batch
pictures; `--dry-run` says how much the first two need, and model.gradient_checkpointing makes both smaller.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from ddpo.algorithms import Algorithm
from ddpo.policy import Policy
from ddpo.rollout import Rollout
from ddpo.views import Tail


@dataclass(frozen=True)
class _RewardGradient(Algorithm[Tail]):
    """What all of them share: which pictures, and minus their reward."""

    needs_trajectory = True
    needs_gradient = True

    def views(self, batch: Rollout, size: int, draw: torch.Generator) -> Iterator[Tail]:
        """Every row that could be scored."""
        key = int(torch.randint(2**62, (), generator=draw))  # drawn once an update: what follows is alike in all micro-batches
        scored = batch.scored()
        if len(scored):
            for chunk in scored.chunks(size):
                yield from self._tails(chunk, key)

    @abstractmethod
    def _tails(self, chunk: Rollout, key: int) -> Iterator[Tail]:
        """A micro-batch's views. Random choices come from `key`."""

    def loss(self, policy: Policy, view: Tail) -> tuple[Tensor, dict[str, Tensor]]:
        reward = view.graded(policy, view.end(policy))
        return -reward, {"reward/graded": reward.detach()}


@dataclass(frozen=True)
class DRaFT(_RewardGradient):
    """DRaFT-K: through the last K steps of the trajectory that was taken.

    Args:
        steps: K. One is the cheapest, and reaches what one step can: the last steps set textures and colours, not the layout.
    """

    steps: Annotated[int, Ge(1)] = 1

    @property
    def last_steps(self) -> int:
        return self.steps

    def passes(self, stochastic_steps: int) -> int:
        return self.steps

    def _tails(self, chunk: Rollout, key: int) -> Iterator[Tail]:
        yield chunk.tail(self.steps)


@dataclass(frozen=True)
class DRaFTLV(_RewardGradient):
    """DRaFT-LV: what was drawn is noised again to where the last step begins, and that step taken, several times.

    Args:
        renoises: how often. The gradients are averaged, where the paper adds them up.
    """

    renoises: Annotated[int, Ge(1)] = 2

    @property
    def last_steps(self) -> int:
        return 1

    def passes(self, stochastic_steps: int) -> int:
        return self.renoises

    def _tails(self, chunk: Rollout, key: int) -> Iterator[Tail]:
        for draw in range(self.renoises):
            yield chunk.renoised(key, draw)


@dataclass(frozen=True)
class AlignProp(DRaFT):
    """DRaFT whose K is drawn anew for each update, evenly from 1 to `steps`: truncation without the bias of any one K.

    The authors' code draws it evenly, or from a normal distribution around 8 of 50.

    Args:
        steps: the largest K.
    """

    steps: Annotated[int, Ge(1)] = 10

    def passes(self, stochastic_steps: int) -> int:
        return (self.steps + 2) // 2  # the mean of 1 to steps, rounded up

    def _tails(self, chunk: Rollout, key: int) -> Iterator[Tail]:
        yield chunk.tail(1 + key % self.steps)


@dataclass(frozen=True)
class ReFL(_RewardGradient):
    """Reward feedback learning: from one of the last steps, drawn for each update, straight to the clean latent.

    Args:
        steps: among how many last steps it is; the authors take ten of forty.
        ceiling: a reward above it counts no more; the authors' is 2, in ImageReward's units. None is no ceiling.
    """

    steps: Annotated[int, Ge(1)] = 10
    ceiling: float | None = None

    @property
    def last_steps(self) -> int:
        return self.steps

    def passes(self, stochastic_steps: int) -> int:
        return 1

    def _tails(self, chunk: Rollout, key: int) -> Iterator[Tail]:
        yield chunk.tail(1 + key % self.steps)

    def loss(self, policy: Policy, view: Tail) -> tuple[Tensor, dict[str, Tensor]]:
        reward = view.graded(policy, view.belief(policy))
        loss = -reward if self.ceiling is None else F.relu(self.ceiling - reward)
        return loss, {"reward/graded": reward.detach()}
