"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents on the DDPM schedule, predicting eps or v."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddpo
from ddpo.diffusion import VariancePreserving, from_eps, from_v
from ddpo.models import Cond

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MENAGERIE = Path(ddpo.__file__).parent / "menagerie" / "weights"


class StableDiffusion:
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

    def __init__(
        self,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        resolution: Annotated[int, Ge(8)] | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
    ):
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # here: it takes seconds, and a typo should not
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging

        logging.disable_progress_bar()  # five parts of one model need no bars of their own
        transformers_logging.disable_progress_bar()

        self.source, self.dtype, self.offload = path, DTYPES[dtype], offload
        pipe = StableDiffusionPipeline.from_pretrained(
            MENAGERIE if path == "menagerie" else path, revision=revision, dtype=self.dtype, use_safetensors=True,
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
        self.network, self.vae, self.text_encoder, self.tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
        for module in (self.network, self.vae, self.text_encoder):
            module.eval().requires_grad_(False)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        noise = DDIMScheduler.from_config(pipe.scheduler.config)
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
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.device = device
        self.network.to(device)
        if not self.offload:
            self.vae.to(device)
            self.text_encoder.to(device)

    @contextmanager
    def _at_work(self, module: nn.Module) -> Iterator[None]:
        module.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                module.to("cpu")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """{"text": (B, tokens, width)}, the text encoder's last hidden state, as StableDiffusionPipeline computes it."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )  # fmt: skip
        with self._at_work(self.text_encoder):
            return {"text": self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state}

    def denoise(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's raw output, float32. Autocast ends here: outside, it would keep half-precision copies of the
        LoRA weights, and an earlier self would silently act as the present one."""
        half = torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32)
        # On a CPU, at few tokens, attention written out is faster than the fused kernel's backward pass. Checkpointing
        # computes its second forward pass outside of this context, where the kernel would be another.
        plain = x.device.type == "cpu" and x[0, 0].numel() <= 256 and not self.network.is_gradient_checkpointing
        with half, sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return network(x.to(self.dtype), t, cond["text"]).sample.float()

    def decode(self, latents: Tensor) -> Tensor:
        half = torch.autocast(latents.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with self._at_work(self.vae), half:
            images = self.vae.decode(latents.to(self.dtype) / self.vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)


PREDICTIONS = {"epsilon": from_eps, "v_prediction": from_v}
