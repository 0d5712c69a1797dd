"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents on the DDPM schedule, predicting eps or v."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpo.diffusion import from_eps, from_v
from ddpo.models import Cond
from ddpo.models._common import DTYPES, Networks
from ddpo.models._outline import OnMeta
from ddpo.schedule import Schedule, VariancePreserving


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
    assumed = False
    outline: ClassVar[type["StableDiffusion"]]

    schedule: Schedule
    text_encoder: Any
    pipe: Any  # diffusers' pipeline, for its tokenizers and its encode_prompt

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

        self.source, self.dtype, self.offload = path, DTYPES[dtype], offload
        noise = DDIMScheduler.from_config(self.load(path, revision, gradient_checkpointing))
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
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.network.config.sample_size if resolution is None else resolution // factor
        if resolution is not None and resolution % factor:
            raise ValueError(f"resolution is {resolution}; it must be a multiple of {factor}")
        self.latent_shape = (self.network.config.in_channels, side, side)

    def _open(self, path: str | Path, revision: str | None) -> Any:
        from diffusers import StableDiffusionPipeline

        self._refuse_other(path, revision)
        return StableDiffusionPipeline.from_pretrained(
            path, revision=revision, dtype=self.dtype, use_safetensors=True, safety_checker=None, requires_safety_checker=False,
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

    def denoise(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's raw output, float32. Autocast ends here: outside, it would keep half-precision copies of the
        LoRA weights, and an earlier self would silently act as the present one."""
        # On a CPU, at few tokens, attention written out is faster than the fused kernel's backward pass. Checkpointing
        # computes its second forward pass outside of this context, where the kernel would be another.
        plain = x.device.type == "cpu" and x[0, 0].numel() <= 256 and not self.network.is_gradient_checkpointing
        with self._half(x.device), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return self._output(network, x.to(self.dtype), t, cond).float()

    def _output(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return network(x, t, cond["text"]).sample

    def decode(self, latents: Tensor) -> Tensor:
        half = self._half(latents.device) if self.vae.dtype == self.dtype else nullcontext()
        with self._at_work(self.vae), half:
            images = self.vae.decode(self._unscaled(latents.to(self.vae.dtype))).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its pictures, in pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], of `image_size` -> (B, C, h, w) float32, what `decode` makes them of: the posterior's mean."""
        images = (2 * images - 1).to(self.device, self.vae.dtype)
        half = self._half(self.device) if self.vae.dtype == self.dtype else nullcontext()
        with self._at_work(self.vae), half:
            latents = self.vae.encode(images).latent_dist.mean.float()
        zero = self._unscaled(torch.zeros_like(latents[:1]))  # each channel's scale and shift, whatever the family
        return (latents - zero) / (self._unscaled(torch.ones_like(zero)) - zero)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """From the denoiser's units to the VAE's."""
        return latents / self.vae.config.scaling_factor


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
