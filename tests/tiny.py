"""A Stable Diffusion pipeline of random weights in diffusers' own format, small enough to load in a second."""

import copy
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from ddpo.menagerie import architecture
from ddpo.schedule import VariancePreserving

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
SIGNAL = (1 - BETAS).cumprod(0)  # alpha_t^2
DDPM = VariancePreserving(SIGNAL, float(SIGNAL[0]))


def save_pipeline(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """16 x 16 pictures, 8 x 8 latents. The output layer is random too: diffusers' own starts at values that matter."""
    torch.manual_seed(seed)
    words = architecture.tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=architecture.CONTEXT, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, mid_block_add_attention=False,
    )  # fmt: skip
    noise = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=noise, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def save_sdxl(
    folder: Path,
    prediction_type: str = "epsilon",
    zeros: bool = True,
    latents_mean: list[float] | None = None,
    latents_std: list[float] | None = None,
    seed: int = 0,
) -> Path:
    """The same sizes for Stable Diffusion XL: two text encoders of different widths, and the scheduler's config as published.

    Args:
        zeros: the pipeline's `force_zeros_for_empty_prompt`.
        latents_mean, latents_std: of the VAE's config, a number a channel.
    """
    torch.manual_seed(seed)
    words = architecture.tokenizer()
    words_2 = copy.deepcopy(words)
    words_2.pad_token = "!"  # as published: the second encoder sees other padding
    texts = [
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=architecture.CONTEXT, projection_dim=12, eos_token_id=words.eos_token_id,
            bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id,
        )
        for width in (16, 24)
    ]  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 12,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.13025,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latents_mean=latents_mean,
        latents_std=latents_std,
    )  # fmt: skip
    noise = EulerDiscreteScheduler.from_config({
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1,
        "prediction_type": prediction_type, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
        "sample_max_value": 1.0,
    })  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(texts[0]), text_encoder_2=CLIPTextModelWithProjection(texts[1]),
        tokenizer=words, tokenizer_2=words_2, scheduler=noise, force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def save_sd3(folder: Path, t5: bool = True, seed: int = 0) -> Path:
    """The same sizes for Stable Diffusion 3.5: three blocks, the first with the second attention of 3.5 medium, the last
    without text, as published. Without `t5` the folder is one that was saved without its third text encoder."""
    torch.manual_seed(seed)
    words = architecture.tokenizer()
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=architecture.CONTEXT, projection_dim=width, eos_token_id=words.eos_token_id,
                bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id,
            )
        )
        for width in (16, 24)
    ]  # fmt: skip
    third = T5Config(d_model=48, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=200, feed_forward_proj="gated-gelu")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=16 + 24, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, latent_channels=16, sample_size=16, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, mid_block_add_attention=False,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=clips[0],
        tokenizer=words, text_encoder_2=clips[1], tokenizer_2=words, text_encoder_3=T5EncoderModel(third) if t5 else None,
        tokenizer_3=_letters() if t5 else None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def save_flux(folder: Path, schnell: bool = False, seed: int = 0) -> Path:
    """The same sizes for FLUX.1: two blocks of each kind, rotary axes of three lengths, and dev's config of the scheduler as
    published, or schnell's, whose network knows no guidance."""
    torch.manual_seed(seed)
    words = architecture.tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=architecture.CONTEXT, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(d_model=48, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=200, feed_forward_proj="gated-gelu")
    transformer = FluxTransformer2DModel(
        in_channels=4 * 8, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=48,
        pooled_projection_dim=16, guidance_embeds=not schnell, axes_dims_rope=(2, 4, 6),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, latent_channels=8, sample_size=16, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, mid_block_add_attention=False,
    )  # fmt: skip
    noise = FlowMatchEulerDiscreteScheduler(shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell)
    pipe = FluxPipeline(
        transformer=transformer, scheduler=noise, vae=vae, text_encoder=CLIPTextModel(clip), tokenizer=words,
        text_encoder_2=T5EncoderModel(t5), tokenizer_2=_letters(),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def _letters() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are letters."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces = [*specials, *((letter, -3.0) for letter in string.ascii_lowercase)]
    return T5TokenizerFast(vocab=pieces)
