"""Stable Diffusion 3 and 3.5: a transformer over 16-channel latents on the flow-matching schedule, predicting velocity."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from ddpo.diffusion import from_velocity
from ddpo.models import Cond
from ddpo.models._common import Networks
from ddpo.models._kind import refuse_other_schedule
from ddpo.models._outline import OnMeta
from ddpo.models.sd import TEXT, VAE
from ddpo.models.sdxl import TEXT_2
from ddpo.schedule import FlowMatching


class StableDiffusion3(Networks):
    """Any `StableDiffusion3Pipeline` in diffusers' format (Esser et al. 2024).

    Args:
        path: hub id, local folder, or "menagerie-flow" for the built-in model.
        revision: of a hub id; a commit pins the run.
        dtype: what the networks are stored and computed in. Step mathematics and LoRA weights stay float32.
        text_encoder_3: false leaves out the third text encoder, T5, which is larger than Stable Diffusion 3.5 medium itself.
            Zeros take its place, as in diffusers: short prompts lose little, and written words in pictures much.
        max_sequence_length: T5's tokens a prompt, as in diffusers' call. The built-in model has no T5 and was made without its
            tokens: there both options are False and 0, and plain diffusers must be told `max_sequence_length=0`.
        resolution: of the pictures, in pixels; None is the model's own (1024).
        gradient_checkpointing: recompute activations in the backward pass: a third more compute for much less memory.
        offload: keep text encoders and VAE in main memory except while they work.

    Raises:
        ValueError: the model is not one of this family, its schedule is not one that this file knows, it lacks the T5 that is
            asked for, or `resolution` is not one that the network can draw.
    """

    lora_targets: list[str]  # depends on the number of blocks
    lora_prefix = "transformer"
    pipeline = "StableDiffusion3Pipeline"
    outline: ClassVar[type["StableDiffusion3"]]

    text_encoders: list[Any]  # CLIP, CLIP and T5, as far as they are there

    def __init__(
        self,
        path: str = "stabilityai/stable-diffusion-3.5-medium",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        text_encoder_3: bool = True,
        max_sequence_length: Annotated[int, Interval(ge=0, le=512)] = 256,
        resolution: Annotated[int, Ge(16)] | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
    ):
        built_in = path == "menagerie-flow"
        self._with_t5, self._tokens = (False, 0) if built_in else (text_encoder_3, max_sequence_length)
        self.schedule = _schedule(path, self.load(path, revision, dtype, gradient_checkpointing, offload))
        self.interpret = from_velocity
        sizes = self.network.config
        side = self._side(resolution, sizes.sample_size, sizes.patch_size, sizes.pos_embed_max_size)
        self.latent_shape = (sizes.in_channels, side, side)
        self.lora_targets = _attention(sizes.num_layers)

    def _open(self, path: str | Path, revision: str | None) -> Any:
        from diffusers import StableDiffusion3Pipeline

        self._refuse_other(path, revision)
        without: dict[str, Any] = {} if self._with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        return StableDiffusion3Pipeline.from_pretrained(
            path, revision=revision, use_safetensors=True, **without, **self._networks(path, revision, *without)
        )

    def _take(self, pipe: Any) -> None:
        self.pipe, self.network, self.vae = pipe, pipe.transformer, pipe.vae
        encoders = (getattr(pipe, f"text_encoder{n}", None) for n in ("", "_2", "_3"))
        self.text_encoders = [e for e in encoders if e is not None]
        self.vae.enable_slicing()  # one picture at a time: at 1024 pixels each takes gigabytes

    def _refuse_other(self, path: str | Path, revision: str | None, local_files_only: bool = False) -> None:
        """Raises ValueError where the model is another family's, or lacks the T5 that is asked for; OSError where it is not."""
        from diffusers import StableDiffusion3Pipeline

        super()._refuse_other(path, revision, local_files_only)
        parts = StableDiffusion3Pipeline.load_config(path, revision=revision, local_files_only=local_files_only)
        if self._with_t5 and parts["text_encoder_3"][0] is None:
            raise ValueError(f"{path} was saved without its third text encoder: set model.text_encoder_3=false")

    @property
    def architecture(self) -> str:
        sizes = self.network.config
        known = {(24, False): "-m", (24, True): "-5-medium", (38, False): "-5-large"}
        return "stable-diffusion-3" + known.get((sizes.num_layers, bool(sizes.dual_attention_layers)), "")

    @property
    def helpers(self) -> list[nn.Module]:
        return [self.vae, *self.text_encoders]

    @property
    def reader(self) -> tuple[Any, int]:
        if self._with_t5:
            return self.pipe.tokenizer_3, self._tokens
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """What StableDiffusion3Pipeline conditions on: "text" (B, CLIP's tokens + T5's, width), and "pooled" (B, widths of
        both CLIPs), their projections side by side."""
        with self._at_work(nn.ModuleList(self.text_encoders)):
            text, _, pooled, _ = self.pipe.encode_prompt(
                prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self._tokens
            )
        return {"text": text, "pooled": pooled}

    def _output(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return network(x, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"], timestep=t.float()).sample


def _schedule(path: str, config: Any) -> FlowMatching:
    """Raises ValueError where the config asks for another schedule."""
    refuse_other_schedule(path, config, "use_dynamic_shifting")
    return FlowMatching(config["shift"], config["num_train_timesteps"])


def _attention(blocks: int) -> list[str]:
    """What diffusers' own LoRA training tunes: the attention of pictures and text, where it has an effect. The last block
    gives no text on, so nothing asks for its text's queries."""
    parts = ["add_k_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"]
    return [*(f"attn.{part}" for part in parts), *(f"transformer_blocks.{i}.attn.add_q_proj" for i in range(blocks - 1))]


class _Outline(OnMeta, StableDiffusion3):
    """The same model without its numbers; where its configs are not on this machine, in SD 3.5 medium's sizes."""

    def published(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        parts: dict[str, tuple[Any, dict[str, Any]]] = {
            "transformer": (SD3Transformer2DModel, TRANSFORMER), "vae": (AutoencoderKL, VAE | SIXTEEN),
            "text_encoder": (CLIPTextModelWithProjection, TEXT | {"projection_dim": 768}),
            "text_encoder_2": (CLIPTextModelWithProjection, TEXT_2), "text_encoder_3": (T5EncoderModel, T5),
            "scheduler": (FlowMatchEulerDiscreteScheduler, SCHEDULE),
        }  # fmt: skip
        return parts if self._with_t5 else {name: part for name, part in parts.items() if name != "text_encoder_3"}

    def encode(self, prompts: list[str]) -> Cond:
        sizes, tokens = self.network.config, self.text_encoders[0].config.max_position_embeddings + self._tokens
        with torch.device("meta"):
            text = torch.empty(len(prompts), tokens, sizes.joint_attention_dim, dtype=self.dtype)
            return {"text": text, "pooled": torch.empty(len(prompts), sizes.pooled_projection_dim, dtype=self.dtype)}


StableDiffusion3.outline = _Outline

# Stable Diffusion 3.5 medium, as far as it differs from the classes' defaults and from its forerunners
TRANSFORMER: dict[str, Any] = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SIXTEEN: dict[str, Any] = {
    "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
    "sample_size": 1024,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}  # fmt: skip
SCHEDULE: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
