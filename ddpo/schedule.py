"""Schedules: the levels along the way from noise to image, and the times that a sampler visits."""

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ddpo.diffusion import Level


class Schedule(Protocol):
    def level(self, t: Tensor) -> Level: ...

    def times(self, num_steps: int) -> Tensor:
        """(num_steps + 1,), falling: the times a sampler visits, the last one being the clean end."""
        ...

    def at(self, share: Tensor) -> Tensor:
        """The times at these shares, in [0, 1), of the way from clean to noise, as training draws them."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """Discrete DDPM schedule (SD 1.x, SD 2.x, SDXL): alpha^2 + sigma^2 = 1.

    Args:
        alphas_cumprod: (T,) alpha^2 at times 0 to T - 1.
        final_alpha_cumprod: alpha^2 past the last time: 1 where the config says `set_alpha_to_one`, else that of time 0.
        offset: `steps_offset` of diffusers' leading spacing.
        trailing: diffusers' `timestep_spacing="trailing"`; else "leading".
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    offset: int = 1
    trailing: bool = False

    def level(self, t: Tensor) -> Level:
        known = self.alphas_cumprod.to(t.device, torch.float64)
        abar = torch.where(t < 0, self.final_alpha_cumprod, known[t.clamp(min=0)])
        return Level(abar.sqrt(), (1 - abar).sqrt())

    def at(self, share: Tensor) -> Tensor:
        return (share * len(self.alphas_cumprod)).long()

    def times(self, num_steps: int) -> Tensor:
        length = len(self.alphas_cumprod)
        most = length if self.trailing else length - self.offset
        if not 1 <= num_steps <= most:
            raise ValueError(f"num_steps is {num_steps}; this schedule has 1 to {most} steps")
        if self.trailing:
            visited = torch.arange(num_steps, 0, -1, dtype=torch.float64).mul(length / num_steps).round().long() - 1
        else:
            visited = torch.arange(num_steps - 1, -1, -1) * (length // num_steps) + self.offset
        return torch.cat([visited, visited[-1:] - length // num_steps])


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow (SD 3, SD 3.5, FLUX.1): alpha = 1 - sigma, at the times of diffusers' FlowMatchEulerDiscreteScheduler.

    A time is what the network is given, `length` * sigma, a float64 from `length` (noise) to 0 (clean). So level(t) is a
    division, and holds between the times that a sampler visits too.

    Args:
        shift: moves times towards the noise: sigma = shift * u / (1 + (shift - 1) * u) (Esser et al. 2024, eq. 23).
        length: `num_train_timesteps` of the config.
        even: n steps start from u = 1, (n - 1) / n, ... 1 / n, as FluxPipeline has them; else from the scheduler's own
            spacing, which ends at the first training time, whatever n is.
    """

    shift: Annotated[float, Gt(0)] = 3.0
    length: Annotated[int, Ge(1)] = 1000
    even: bool = False

    def level(self, t: Tensor) -> Level:
        sigma = t.to(torch.float64) / self.length
        return Level(1 - sigma, sigma)

    def at(self, share: Tensor) -> Tensor:
        """Shifted, as the network was trained, and never below the first of its `length` training times."""
        return self.length * self._shifted(share.to(torch.float64).clamp(min=1 / self.length))

    def times(self, num_steps: int) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; a flow takes 1 step or more")
        first = self._shifted(torch.tensor(1 / self.length, dtype=torch.float64)).item()  # diffusers shifts this end twice
        u = torch.linspace(1, 1 / num_steps if self.even else first, num_steps, dtype=torch.float64)
        return torch.cat([self.length * self._shifted(u), torch.zeros(1, dtype=torch.float64)])

    def _shifted(self, u: Tensor) -> Tensor:
        return u / (u + (1 - u) / self.shift)  # eq. 23 in a form that is exactly 1 at 1
