"""Energy-weighted flow matching: a sampler of the tilted density from the base model's own pictures (Zhang et al. 2025, ICLR).

The tilted density's belief is the mean of pictures that the base model draws, each with weight w = exp(r / lambda):

    x0_theta(x_t)  =  E_base[ w x0 | x_t ] / E_base[ w | x_t ],    which minimises    E_base[ w |x0_theta - x0|^2 ].

That is exact for any r and lambda, on the DDPM schedule too, and there is nothing to run away: what is learned from does not depend on
the policy, so its noise is not fed back, as it is with ram.py's path cost. The price is that a mode must be drawn by the base
model to be found; a weight is exp(1 / lambda) at most where rewards lie in [0, 1].

One might take a multiple of the unweighted loss away, whose minimum is the base model where its belief is the mean of its own
pictures: less noise, nothing to learn where rewards are alike. But networks are not quite the mean of what they draw, and then
the point of rest is neither theirs nor the pictures' (docs/algorithms.md, "On pictures"). So it is the plain weighted loss, which
brings the belief in line with the pictures as it tilts it. That takes some thousand pictures, and a learning rate that ends at zero.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from ddpo.algorithms.forward import RWR


@dataclass(frozen=True)
class EFM(RWR):
    """Regression on the base model's pictures, each with weight exp(A / temperature); the base model always acts.

    Rewards are in their own units, so advantages must be too: advantage: {name: "advantage:LeaveOneOut"}, whose baseline is a factor that
    a picture has no part in. The sampler should lead to the model's distribution (many steps, guidance 1), as with RAM. As the base
    model draws, the reward that training shows does not rise; evaluations show what was learned. Set optimizer.lr_decay to 1.

    Args:
        temperature: lambda, in units of the reward.
        max_advantage, max_weight: clip what should not be clipped; they are there against outliers.
    """

    max_advantage: Annotated[float, Gt(0)] = 1e6
    max_weight: Annotated[float, Gt(0)] = 1e6
    actor = "reference"
    needs_units = True
