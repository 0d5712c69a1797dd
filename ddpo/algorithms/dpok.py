"""DPOK: the policy gradient with a KL to the base model and a learned value as baseline (Fan et al. 2023).

    advantage of a step  =  target - V(x_t, t, prompt)

V is trained on the same pictures, after the policy has learned from them: a baseline fitted first would know the noise of
the very samples it is taken from, and bias the gradient (the authors' code fits first). What V foretells is the number that
`advantage` makes of a picture's reward. The method's own is `advantage: {name: "advantage:Standardised"}`, which leaves the
prompts' differences to V, so that groups may be of one. Group-relative numbers have mean zero given the prompt; on them V still
learns what the latent tells, more of it the later the step.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval

from ddpo.algorithms.ddpo import DDPO
from ddpo.critic import Critic
from ddpo.models import Family


@dataclass(frozen=True)
class DPOK(DDPO):
    """DDPO as an actor-critic.

    Args:
        kl: weight of the exact KL to the base model, in the units of the log-probability, as in the paper. (The authors' code has
            the mean squared distance of the predicted noise in its place.)
        trace: lambda of TD(lambda). 1 holds V to the pictures' own rewards, as published, and leaves the gradient unbiased. Lower
            values bootstrap: V at the next step stands in for what later noise did, with less variance and V's own errors.
        critic_lr: learning rate of V, by AdamW of its own; `optimizer.max_grad_norm` bounds its gradient by itself.
        critic_epochs: times that V learns from an iteration's pictures, in `optimizer.updates` steps each.
    """

    kl: Annotated[float, Ge(0)] = 0.01
    trace: Annotated[float, Interval(ge=0, le=1)] = 1.0
    critic_lr: Annotated[float, Gt(0)] = 1e-3
    critic_epochs: Annotated[int, Ge(1)] = 5
    credits_steps = False  # V does

    def critic(self, family: Family, seed: int) -> Critic:
        return Critic(family, self.critic_lr, self.critic_epochs, self.trace, seed)
