"""Stable Diffusion XL: a larger UNet of the same kind, which also sees a second text encoder and the picture's size."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ddpo.models import Cond
from ddpo.models._outline import OnMeta
from ddpo.models.sd import SCHEDULE, TEXT, VAE, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Any `StableDiffusionXLPipeline` with both text encoders, in diffusers' format (Podell et al. 2023).

    Args:
        path: hub id or local folder.
        revision: of a hub id; a commit pins the run.
        dtype: what the networks are stored and computed in. Step mathematics and LoRA weights stay float32, and so does a
            VAE whose config says `force_upcast`: the published one overflows in half precision.
        resolution: of the pictures, in pixels; None is the model's own (1024). The network is told it.
        vae: hub id or folder of another VAE. One that is mended for half precision, such as madebyollin/sdxl-vae-fp16-fix,
            says `force_upcast: false`, and is computed in `dtype`: half the memory, and faster.
        gradient_checkpointing: recompute activations in the backward pass: a third more compute for much less memory.
        offload: keep text encoders and VAE in main memory except while they work.

    Raises:
        ValueError: the model is not one of this family, or its noise schedule is not one that this file knows.
    """

    pipeline = "StableDiffusionXLPipeline"
    outline: ClassVar[type["StableDiffusionXL"]]

    text_encoder_2: Any

    def __init__(
        self,
        path: str = "stabilityai/stable-diffusion-xl-base-1.0",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        resolution: Annotated[int, Ge(8)] | None = None,
        vae: str | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
    ):
        self._other_vae = vae
        super().__init__(path, revision, dtype, resolution, gradient_checkpointing, offload)
        height, width = self.image_size
        self._time_ids = [height, width, 0, 0, height, width]  # original size, top and left of the crop, target size

    def _open(self, path: str | Path, revision: str | None) -> Any:
        from diffusers import StableDiffusionXLPipeline

        self._refuse_other(path, revision)
        return StableDiffusionXLPipeline.from_pretrained(
            path, revision=revision, use_safetensors=True, add_watermarker=False, **self._networks(path, revision)
        )

    def _stored(self, part: str) -> torch.dtype:
        return torch.float32 if part == "vae" else super()._stored(part)

    def _take(self, pipe: Any) -> None:
        super()._take(pipe)
        self.text_encoder_2 = pipe.text_encoder_2
        if self.text_encoder is None or self.text_encoder_2 is None:
            raise ValueError(f"{self.source} lacks a text encoder; this family needs both")
        nn.Module.to(self.vae, self._vae_dtype())  # from float32, not by way of half precision
        self.vae.enable_slicing()  # one picture at a time: at 1024 pixels each takes gigabytes

    def _place(self, part: str, path: str | Path, revision: str | None) -> dict[str, Any]:
        if part == "vae" and self._other_vae:
            return {"pretrained_model_name_or_path": self._other_vae}
        return super()._place(part, path, revision)

    def _vae_dtype(self) -> torch.dtype:
        return torch.float32 if self.vae.config.force_upcast else self.dtype

    @property
    def architecture(self) -> str:
        return "stable-diffusion-xl-v1-base"

    @property
    def helpers(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder, self.text_encoder_2]

    @property
    def reader(self) -> tuple[Any, int]:
        return self.pipe.tokenizer_2, self.pipe.tokenizer_2.model_max_length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """What StableDiffusionXLPipeline conditions on: "text" (B, tokens, both widths), the penultimate hidden states of
        both encoders side by side; "pooled" (B, width), the second's projection; "time_ids" (B, 6), in pixels.

        The empty prompt is the pipeline's own for guidance: zeros, where its config says `force_zeros_for_empty_prompt`.
        """
        with self._at_work(self.text_encoder), self._at_work(self.text_encoder_2):
            text, no_text, pooled, no_pooled = self.pipe.encode_prompt(
                prompts, device=self.device, do_classifier_free_guidance="" in prompts
            )
        for row in [i for i, prompt in enumerate(prompts) if not prompt]:
            text[row], pooled[row] = no_text[row], no_pooled[row]
        return {"text": text, "pooled": pooled, "time_ids": self._sizes(len(prompts), self.device)}

    def _sizes(self, rows: int, device: torch.device) -> Tensor:
        # float32 in every dtype: bfloat16 would round most sizes above 256
        return torch.tensor(self._time_ids, dtype=torch.float32, device=device).expand(rows, -1)

    def _output(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return network(x, t, cond["text"], added_cond_kwargs=seen).sample

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae = self.vae.config
        if vae.latents_mean is None or vae.latents_std is None:
            return super()._unscaled(latents)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (vae.latents_mean, vae.latents_std))
        return latents * std / vae.scaling_factor + mean


class _Outline(OnMeta, StableDiffusionXL):
    """The same model without its numbers; where its configs are not on this machine, in SDXL base 1.0's sizes."""

    def published(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return {
            "unet": (UNet2DConditionModel, UNET), "vae": (AutoencoderKL, VAE | FORCED), "text_encoder": (CLIPTextModel, TEXT),
            "text_encoder_2": (CLIPTextModelWithProjection, TEXT_2), "scheduler": (DDIMScheduler, SCHEDULE | LEADING),
        }  # fmt: skip

    def encode(self, prompts: list[str]) -> Cond:
        first, second = self.text_encoder.config, self.text_encoder_2.config
        rows, width = len(prompts), first.hidden_size + second.hidden_size
        with torch.device("meta"):
            text = torch.empty(rows, first.max_position_embeddings, width, dtype=self.dtype)
            pooled = torch.empty(rows, second.projection_dim, dtype=self.dtype)
        return {"text": text, "pooled": pooled, "time_ids": self._sizes(rows, text.device)}


StableDiffusionXL.outline = _Outline

# SDXL base 1.0, as far as it differs from the classes' defaults and from Stable Diffusion 1.5
UNET: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FORCED: dict[str, Any] = {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}
TEXT_2: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
LEADING: dict[str, Any] = {"timestep_spacing": "leading"}
