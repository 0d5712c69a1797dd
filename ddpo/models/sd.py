"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents on the DDPM schedule, predicting eps or v."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ddpo.diffusion import from_eps, from_v
from ddpo.models import Cond
from ddpo.models._common import Networks
from ddpo.models._outline import OnMeta
from ddpo.schedule import VariancePreserving


class StableDiffusion(Networks):
    """Any `StableDiffusionPipeline` in diffusers' format.

    Args:
        path: hub id, local folder, or "menagerie" for the built-in model.
        revision: of a hub id; a commit pins the run.
        dtype: what the networks are stored and computed in. Step mathematics and LoRA weights stay float32.
        resolution: of the pictures, in pixels; None is the model's own.
        gradient_checkpointing: recompute activations in the backward pass: a third more compute for much less memory.
        offload: keep text encoder and VAE in main memory except while they work.

    Raises:
        ValueError: the model is not one of this family, or its noise schedule is not one that this file knows.
    """

    lora_targets: ClassVar = ["to_q", "to_k", "to_v", "to_out.0"]
    lora_prefix = "unet"
    pipeline = "StableDiffusionPipeline"  # diffusers' class
    outline: ClassVar[type["StableDiffusion"]]

    text_encoder: Any

    def __init__(
        self,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        resolution: Annotated[int, Ge(8)] | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
    ):
        from diffusers import DDIMScheduler  # here: it takes seconds, and a typo should not

        noise = DDIMScheduler.from_config(self.load(path, revision, dtype, gradient_checkpointing, offload))
        if noise.config.prediction_type not in PREDICTIONS:
            raise ValueError(f"{path} predicts {noise.config.prediction_type!r}; known are {', '.join(PREDICTIONS)}")
        if noise.config.timestep_spacing not in ("leading", "trailing"):
            raise ValueError(f"{path} spaces its time steps {noise.config.timestep_spacing!r}; known are leading and trailing")
        self.interpret = PREDICTIONS[noise.config.prediction_type]
        self.schedule = VariancePreserving(
            noise.alphas_cumprod,
            float(noise.final_alpha_cumprod),
            noise.config.steps_offset,
            noise.config.timestep_spacing == "trailing",
        )
        side = self._side(resolution, self.network.config.sample_size)
        self.latent_shape = (self.network.config.in_channels, side, side)

    def _open(self, path: str | Path, revision: str | None) -> Any:
        from diffusers import StableDiffusionPipeline

        self._refuse_other(path, revision)
        return StableDiffusionPipeline.from_pretrained(
            path, revision=revision, use_safetensors=True, safety_checker=None, requires_safety_checker=False,
            **self._networks(path, revision),
        )  # fmt: skip

    def _take(self, pipe: Any) -> None:
        self.pipe, self.network, self.vae, self.text_encoder = pipe, pipe.unet, pipe.vae, pipe.text_encoder

    @property
    def architecture(self) -> str:
        second = "stable-diffusion-v2-768-v" if self.interpret is PREDICTIONS["v_prediction"] else "stable-diffusion-v2-512"
        known = {768: "stable-diffusion-v1", 1024: second}
        return known.get(self.network.config.cross_attention_dim, "latent-diffusion")

    @property
    def helpers(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder]

    @property
    def reader(self) -> tuple[Any, int]:
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """{"text": (B, tokens, width)}, the text encoder's last hidden state, as StableDiffusionPipeline computes it."""
        tokenizer, most = self.reader
        tokens = tokenizer(prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        with self._at_work(self.text_encoder):
            return {"text": self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state}

    def _output(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return network(x, t, cond["text"]).sample


class _Outline(OnMeta, StableDiffusion):
    """The same model without its numbers; where its configs are not on this machine, in Stable Diffusion 1.5's sizes."""

    def published(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel

        return {
            "unet": (UNet2DConditionModel, UNET), "vae": (AutoencoderKL, VAE), "text_encoder": (CLIPTextModel, TEXT),
            "scheduler": (DDIMScheduler, SCHEDULE),
        }  # fmt: skip

    def encode(self, prompts: list[str]) -> Cond:
        sizes = self.text_encoder.config
        return {
            "text": torch.empty(len(prompts), sizes.max_position_embeddings, sizes.hidden_size, device="meta", dtype=self.dtype)
        }


StableDiffusion.outline = _Outline
PREDICTIONS = {"epsilon": from_eps, "v_prediction": from_v}

# Stable Diffusion 1.5, as far as it differs from the classes' defaults
UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TEXT: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
