"""GRPO on denoising steps, and the trust regions that were made for it since.

    GRPO        PPO's clip of the importance ratio rho, and a KL to the base model (Liu et al. 2025, "Flow-GRPO")
    GRPOGuard   a clip of the normalised ratio, and steps weighted alike (Wang et al. 2025, "GRPO-Guard")
    FlowDPPO    no gradient outward where the KL to the policy that acted is large ("Flow-DPPO", 2026, arXiv 2606.11025)

The group-relative advantages are the config's: `advantage: {name: "advantage:GroupRelative"}`.

A step is x_s = mu + std * z. Between the policy that acted and the one that learns only mu differs, by dmu, and with all
quantities averaged over the latent's elements,

    log rho  =  <z, dmu> / std - |dmu|^2 / (2 std^2).

The second term, minus the KL of the two steps, makes log rho negative on average, most where std is small: there PPO's
upper clip never binds. GRPO-Guard takes it out, Flow-DPPO looks at it alone. Both need the old mean. Two numbers that are
stored, x_s and its log-probability, give only the distance |x_s - mu_old|, which says nothing of a dmu across it; so the
policy that acted is remembered and asked again. That costs a copy of the LoRA weights, and a forward pass without gradient
for each view from the second update of a rollout on. (To keep the means would double a stored trajectory; to take the noise
away again, mu_old = x_s - std * z, leaves the rounding of another batch shape in dmu where the network is in half precision.)
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ddpo.algorithms import Replay, clipped_surrogate
from ddpo.algorithms.ddpo import DDPO, ScoreFunction
from ddpo.policy import Policy


@dataclass(frozen=True)
class GRPO(DDPO):
    """DDPO as Flow-GRPO sets it.

    Args:
        kl: weight of the exact KL to the base model, in the units of the log-probability. The authors' 0.04 leaves the
            step's length out of the variance it divides by: at their ten steps it is 0.004 of this.
    """

    kl: Annotated[float, Ge(0)] = 0.004
    smallest_group = 2


@dataclass(frozen=True)
class _Anchored(ScoreFunction):
    """An algorithm that compares with the mean of the policy that acted, its self "old"."""

    on_policy = False

    def start(self, policy: Policy, iteration: int) -> None:
        policy.remember("old")

    def _old_mean(self, step: Replay) -> Tensor:
        """(B, C, H, W), without gradient."""
        if not step.log_ratio.any():  # before the first update: the policy is the one that acted
            return step.mean.detach()
        return step.mean_of("old")


@dataclass(frozen=True)
class GRPOGuard(_Anchored):
    """The ratio normalised to log r = std * (log rho + |dmu|^2 / (2 std^2)), and each step's gradient divided by its length.

    What is left, log r = <z, dmu>, has mean zero under the policy that acted and one scale at all noise levels, so the clip
    binds on both sides and at every step. A step's length is the time that a flow takes for it, sigma / (alpha + sigma) before
    less after: on any schedule, a latent over alpha + sigma is a flow's latent. Gradients with respect to the velocity are then
    alike at all steps (within a factor of two, for DDIM at eta 1 in 50 steps on Stable Diffusion's schedule; DDPO's are within
    a factor of eighty). They grow with the number of steps, which Adam does not see, and `kl`, which is added, does.

    Args:
        clip: how far r may move from one: the mean over the latent's elements of noise times shift of the mean, in the
            latent's own units. Its spread falls as the root of their number: 2e-6 was chosen at 16 x 64 x 64, and smaller
            latents bear larger clips.
    """

    clip: Annotated[float, Gt(0)] = 2e-6

    def _surrogate(self, step: Replay, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        old, view = self._old_mean(step), step.view
        noise = (view.x_next - old) / step.std
        ratio = (noise * (step.mean - old)).flatten(1).mean(1).double().exp()  # float32 knows 1 + 2e-6 to 3 % only
        loss, metrics = clipped_surrogate(ratio, advantage, self.clip)
        level = step.policy.family.schedule.level
        length = level(view.t).flow_time - level(view.t_next).flow_time
        return (loss / length).to(step.log_ratio), metrics


@dataclass(frozen=True)
class FlowDPPO(_Anchored):
    """The importance ratio itself, without gradient where a sample that is farther than `delta` would move farther still.

    That is where A (rho - 1) > 0 and |dmu|^2 / (2 std^2) > delta. A ratio says how likely one draw has become; the KL says
    how far the step has moved, whatever was drawn. The way back is always open.

    Args:
        delta: KL of a step to the policy that acted, in nats an element of the latent, as the log-probability is an average
            over them: 1e-5 at 16 x 64 x 64 is 0.66 nats a step; smaller latents bear larger deltas.
    """

    delta: Annotated[float, Gt(0)] = 1e-5

    def _surrogate(self, step: Replay, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        moved = step.kl(self._old_mean(step)).detach()
        outward = advantage * step.log_ratio.detach() > 0
        stopped = outward & (moved > self.delta)
        loss = torch.where(stopped, 0.0, -advantage * step.log_ratio.exp())
        return loss, {"clip_fraction": stopped.float(), "kl/old": moved}
