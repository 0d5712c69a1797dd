"""Energy-weighted flow matching: a sampler of the tilted density from the base model's own pictures (Zhang et al. 2025, ICLR).

The tilted density's belief is the mean of pictures that the base model draws, each with weight w = exp(r / lambda):

    x0_theta(x_t)  =  E_base[ w x0 | x_t ] / E_base[ w | x_t ],    which minimises    E_base[ w |x0_theta - x0|^2 ].

That is exact for any r and lambda, on the DDPM schedule too, and there is nothing to run away: what is learned from does not depend on
the policy, so its noise is not fed back, as it is with ram.py's path cost. The price is that a mode must be drawn by the base
model to be found; a weight is exp(1 / lambda) at most where rewards lie in [0, 1].

The base model's belief is the mean of its own pictures, E_base[ x0 - x0_base | x_t ] = 0, so a multiple of it may be taken away.
With d = x0_theta - x0_base the loss is then, but for what d has no part in,

    w |d|^2  -  2 (w - 1) <d, x0 - x0_base>,

whose gradient at the base model has no noise where rewards are alike, and which a network that is not quite the mean of what it
draws does not follow into its own errors, as the plain form does (docs/algorithms.md, "Why imitation loses").
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from ddpo.algorithms.forward import ForwardProcess
from ddpo.policy import Policy
from ddpo.views import Noised


@dataclass(frozen=True)
class EFM(ForwardProcess):
    """Regression on the base model's pictures, each with weight exp(A / temperature); the base model always acts.

    Rewards are in their own units, so advantages must be too: advantage: {name: "advantage:LeaveOneOut"}, whose baseline is a factor that
    a picture has no part in. The sampler should lead to the model's distribution (many steps, guidance 1), as with RAM. As the base
    model draws, the reward that training shows does not rise; evaluations show what was learned.

    Args:
        temperature: lambda, in units of the reward.
        max_advantage: clips what should not be clipped; it is there against outliers.
    """

    temperature: Annotated[float, Gt(0)] = 1.0
    max_advantage: Annotated[float, Gt(0)] = 1e6
    actor = "reference"
    needs_units = True

    def _surrogate(self, policy: Policy, view: Noised, now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        base = self._belief_of("reference", policy, view)
        weight = (self._clipped(view.advantage) / self.temperature).exp()
        moved, off = now - base, view.x0 - base
        gain = (moved * off).flatten(1).mean(1) / view.sigma**2
        return weight * view.velocity_distance(now, base) - 2 * (weight - 1) * gain, {"weight": weight}
