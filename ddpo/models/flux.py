"""FLUX.1: a transformer over packed 16-channel latents on a flow-matching schedule that depends on the picture's size."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from ddpo.diffusion import from_velocity
from ddpo.models import Cond
from ddpo.models._common import Networks
from ddpo.models._kind import refuse_other_schedule
from ddpo.models._outline import OnMeta
from ddpo.models.sd import TEXT, VAE
from ddpo.models.sd3 import SIXTEEN, T5
from ddpo.schedule import FlowMatching

SIDE = 128  # of FluxPipeline's own latents; the network's config does not say


class Flux(Networks):
    """Any `FluxPipeline` in diffusers' format: FLUX.1-dev, FLUX.1-Krea-dev, FLUX.1-schnell (Black Forest Labs 2024).

    Dev was distilled from a model with guidance, and is told the scale that it is to imitate: `embedded_guidance`. That costs
    nothing; `rollout.guidance` other than 1 is guidance in two passes on top of it, FluxPipeline's `true_cfg_scale`. Schnell
    knows no guidance, and was distilled to draw in 1 to 4 steps: `rollout.num_steps=4`, `max_sequence_length=256`. Noise levels
    off its few steps are strange to it, so algorithms that learn from all levels (`forward`) are for dev.

    Args:
        path: hub id or local folder.
        revision: of a hub id; a commit pins the run.
        dtype: what the networks are stored and computed in. Step mathematics and LoRA weights stay float32.
        embedded_guidance: the scale that a guidance-distilled network is told; None is 3.5, FluxPipeline's own, or nothing where
            the network does not ask (its config says `guidance_embeds: false`).
        max_sequence_length: T5's tokens of a prompt, padding included, which the network sees too.
        resolution: of the pictures, in pixels; None is FluxPipeline's own (1024). The schedule's shift follows it.
        gradient_checkpointing: recompute activations in the backward pass: a third more compute for much less memory.
        offload: keep text encoders and VAE in main memory except while they work.

    Raises:
        ValueError: the model is not one of this family, its schedule is not one that this file knows, it takes no embedded
            guidance and some is asked for, or `resolution` is not one that the network can draw.
    """

    # The attention that diffusers' own LoRA training tunes. All of it has an effect: the text goes on to the single blocks,
    # whose queries, keys and values are the picture's and the text's in one.
    lora_targets: ClassVar = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out",
    ]  # fmt: skip
    lora_prefix = "transformer"
    pipeline = "FluxPipeline"
    outline: ClassVar[type["Flux"]]

    text_encoder: Any  # CLIP
    text_encoder_2: Any  # T5

    def __init__(
        self,
        path: str = "black-forest-labs/FLUX.1-dev",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        embedded_guidance: Annotated[float, Ge(0)] | None = None,
        max_sequence_length: Annotated[int, Interval(ge=1, le=512)] = 512,
        resolution: Annotated[int, Ge(16)] | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
    ):
        self._tokens = max_sequence_length
        schedule, self.interpret = self.load(path, revision, dtype, gradient_checkpointing, offload), from_velocity
        side = self._side(resolution, SIDE, patch=2)
        self.latent_shape = (self.network.config.in_channels // 4, side, side)
        self.schedule = _schedule(path, schedule, (side // 2) ** 2)
        self._guidance = self._told(path, embedded_guidance)

    def _open(self, path: str | Path, revision: str | None) -> Any:
        from diffusers import FluxPipeline

        self._refuse_other(path, revision)
        return FluxPipeline.from_pretrained(path, revision=revision, use_safetensors=True, **self._networks(path, revision))

    def _take(self, pipe: Any) -> None:
        self.pipe, self.network, self.vae = pipe, pipe.transformer, pipe.vae
        self.text_encoder, self.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
        self.vae.enable_slicing()  # one picture at a time: at 1024 pixels each takes gigabytes

    def _told(self, path: str, scale: float | None) -> float | None:
        """The scale that the network is told."""
        if self.network.config.guidance_embeds:
            return 3.5 if scale is None else scale
        if scale is not None:
            raise ValueError(f"{path} takes no embedded guidance: leave out model.embedded_guidance")
        return None

    @property
    def architecture(self) -> str:
        return "flux-1-dev" if self.network.config.guidance_embeds else "flux-1-schnell"

    @property
    def helpers(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder, self.text_encoder_2]

    @property
    def reader(self) -> tuple[Any, int]:
        return self.pipe.tokenizer_2, self._tokens

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """What FluxPipeline conditions on: "text" (B, T5's tokens, width), and "pooled" (B, CLIP's width)."""
        with self._at_work(self.text_encoder), self._at_work(self.text_encoder_2):
            text, pooled, _ = self.pipe.encode_prompt(prompts, None, self.device, max_sequence_length=self._tokens)
        return {"text": text, "pooled": pooled}

    def _output(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        size = [side // 2 for side in x.shape[2:]]
        out = network(
            F.pixel_unshuffle(x, 2).flatten(2).mT,  # a token is 2 x 2 of the latent: (B, H/2 * W/2, 4 * C)
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            timestep=t.to(x.dtype) / 1000,  # the network rounds it in any case; so it is what FluxPipeline gives
            guidance=None if self._guidance is None else torch.full_like(t, self._guidance, dtype=torch.float32),
            img_ids=torch.cartesian_prod(
                *(torch.arange(n, device=x.device) for n in (1, *size))
            ),  # (tokens, 3): 0, row, column
            txt_ids=torch.zeros(cond["text"].shape[1], 3, dtype=torch.long, device=x.device),
        ).sample
        return F.pixel_shuffle(out.mT.unflatten(2, size), 2)


def _schedule(path: str, config: Any, tokens: int) -> FlowMatching:
    """For pictures of this many tokens: of one size, a dynamic shift is a constant one, exp(mu).

    Raises ValueError where the config asks for another schedule.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    refuse_other_schedule(path, config)
    shift = config["shift"]
    if config.get("use_dynamic_shifting"):
        if config.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"{path} has time_shift_type {config['time_shift_type']!r}; known is 'exponential'")
        known = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        shift = math.exp(calculate_shift(tokens, *(config.get(*option) for option in known)))
    return FlowMatching(shift, config["num_train_timesteps"], even=True)


class _Outline(OnMeta, Flux):
    """The same model without its numbers; where its configs are not on this machine, in FLUX.1-dev's sizes."""

    def published(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
        from transformers import CLIPTextModel, T5EncoderModel

        return {
            "transformer": (FluxTransformer2DModel, {"guidance_embeds": True}), "vae": (AutoencoderKL, VAE | SIXTEEN | SCALE),
            "text_encoder": (CLIPTextModel, TEXT), "text_encoder_2": (T5EncoderModel, T5),
            "scheduler": (FlowMatchEulerDiscreteScheduler, SCHEDULE),
        }  # fmt: skip

    def encode(self, prompts: list[str]) -> Cond:
        rows, sizes = len(prompts), self.network.config
        with torch.device("meta"):
            text = torch.empty(rows, self._tokens, sizes.joint_attention_dim, dtype=self.dtype)
            return {"text": text, "pooled": torch.empty(rows, sizes.pooled_projection_dim, dtype=self.dtype)}


Flux.outline = _Outline

# FLUX.1-dev, as far as it differs from the classes' defaults and from Stable Diffusion 3
SCALE: dict[str, Any] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SCHEDULE: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
}  # fmt: skip
