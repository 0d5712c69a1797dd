"""The policy: a family's network with its trainable weights, guidance, and the earlier selves it can act as."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import Tensor

from ddpo.diffusion import Prediction
from ddpo.models import Cond, Family
from ddpo.noise import generator


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2021): W + alpha / rank * B A, with A Gaussian and B zero at the start.

    Args:
        rank: of the update.
        alpha: its scale; None is the rank itself, that is scale 1, the one value that every loader agrees on.
        targets: names of the modules that get one; None is the family's own choice (attention).
    """

    rank: Annotated[int, Ge(1), Le(4096)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    targets: Annotated[list[str], MinLen(1)] | None = None


class Policy:
    """A network that acts and learns.

    Args:
        family: the model; its network is given LoRA weights, the only ones that train. They are float32.
        lora: their shape.
        guidance: scale of classifier-free guidance; 1 is none. It lives here, so acting and learning cannot disagree.
        seed: of the first LoRA weights.
    """

    def __init__(self, family: Family, lora: LoRA, guidance: float = 1.0, seed: int = 0):
        from peft import LoraConfig  # here: it takes seconds, and a typo in a config should not

        self.family, self.guidance = family, guidance
        self.network = cast(Any, family.network)  # a module with diffusers' adapter methods
        self.lora_config = LoraConfig(
            r=lora.rank, lora_alpha=lora.rank if lora.alpha is None else lora.alpha, init_lora_weights="gaussian",
            target_modules=lora.targets or family.lora_targets,
        )  # fmt: skip
        family.network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "lora").initial_seed())
            try:
                self.network.add_adapter(self.lora_config)
            except ValueError as e:
                raise ValueError(f"lora.targets: {self.lora_config.target_modules}: {e}") from e
        self.weights: dict[str, torch.nn.Parameter] = {}
        for name, weight in self.network.named_parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
                self.weights[name] = weight
        self._selves: dict[str, list[Tensor]] = {}
        self._null: Cond | None = None
        self.remember("reference")

    def to(self, device: torch.device) -> None:
        self.family.to(device)
        self._selves = {name: [w.to(device) for w in kept] for name, kept in self._selves.items()}

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, guidance: float | None = None) -> Prediction:
        """What the network believes about x (B, C, H, W) at time t (B,). The same call serves acting and learning.

        Args:
            guidance: scale of classifier-free guidance, 1 for the conditional belief alone; None is the policy's own.
        """
        scale = self.guidance if guidance is None else guidance
        if scale == 1.0:
            out = self.family.denoise(self.network, x, t, cond)
        else:
            null = {k: v.expand_as(cond[k]) for k, v in self._nothing().items()}
            both = {k: torch.cat([null[k], cond[k]]) for k in cond}
            without, out = self.family.denoise(self.network, x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            out = without + scale * (out - without)
        return self.family.interpret(out, x, self.family.schedule.level(t))

    def _nothing(self) -> Cond:
        """The empty prompt, encoded once."""
        if self._null is None:
            self._null = self.family.encode([""])
        return self._null

    # An earlier self is a copy of the trainable weights under a name: "reference", "old", "ema".

    @torch.no_grad()
    def remember(self, name: str, decay: float = 0.0) -> None:
        """Earlier self <- decay * earlier self + (1 - decay) * now; the first call stores the weights as they are."""
        if name not in self._selves:
            self._selves[name] = [w.detach().clone() for w in self.weights.values()]
        for kept, w in zip(self._selves[name], self.weights.values(), strict=True):
            kept.lerp_(w, 1 - decay)

    @contextmanager
    def acting_as(self, name: str) -> Iterator[None]:
        """Be an earlier self, or "now", without gradients. Nothing is copied: the weights only point elsewhere."""
        weights = list(self.weights.values())
        now = [w.data for w in weights]
        try:
            if name != "now":
                for w, kept in zip(weights, self._selves[name], strict=True):
                    w.data = kept
            with torch.no_grad():
                yield
        finally:
            for w, data in zip(weights, now, strict=True):
                w.data = data

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Act with W + scale * alpha / rank * B A: at 1 it is the LoRA itself, to the bit, and at 0 the base model."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        factors: list[dict[str, float]] = [m.scaling for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        before = [dict(factor) for factor in factors]
        try:
            for factor in factors:
                factor.update({adapter: value * scale for adapter, value in factor.items()})
            yield
        finally:
            for factor, kept in zip(factors, before, strict=True):
                factor.update(kept)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take these trainable weights, by name."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])

    def selves(self) -> dict[str, Tensor]:
        """The earlier selves that a resumed run cannot make again: all but the reference, as "self/weight"."""
        kept = {name: weights for name, weights in self._selves.items() if name != "reference"}
        return {f"{name}/{w}": v for name, weights in kept.items() for w, v in zip(self.weights, weights, strict=True)}

    def load_selves(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `selves` returned, and no other."""
        self._selves = {"reference": self._selves["reference"]}
        for name in {key.partition("/")[0] for key in tensors}:
            self._selves[name] = [tensors[f"{name}/{w}"].to(v.device).clone() for w, v in self.weights.items()]

    def lora_layers(self) -> dict[str, Tensor]:
        """The LoRA as peft names it: {"down_blocks.0...to_q.lora_A.weight": ...}, float32 on the CPU."""
        from peft import get_peft_model_state_dict

        return {k: v.detach().float().cpu().contiguous() for k, v in get_peft_model_state_dict(self.network).items()}

    def lora_metadata(self) -> dict[str, Any]:
        """peft's own description of the LoRA, as JSON."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in self.lora_config.to_dict().items()}
