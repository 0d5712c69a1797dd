"""The built-in models' parts, untrained, and the folders they are shipped in: an SD 1.5 in small, and an SD 3."""

import json
from functools import cache
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ddpo.menagerie import scenes

WEIGHTS = Path(__file__).parent / "weights"
FLOW_WEIGHTS = Path(__file__).parent / "weights-flow"
CONTEXT = 20  # tokens in a prompt
WIDTH = 128  # of the text encoder
SECOND_WIDTH = 64  # of the flow model's second one
PADDING = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=(16, 48, 96),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=scenes.SIZE, mid_block_add_attention=False,
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 4, block_out_channels=(64, 128), layers_per_block=2, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's own."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with a small vocabulary: every word of the world is one token, all else is spelt out.

    The end of text has the highest number, because that is how CLIP's text tower finds it.
    """
    base = CLIPTokenizer()
    specials = [base.bos_token, base.eos_token]
    trainer = BpeTrainer(
        vocab_size=10_000,
        special_tokens=specials,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = base.backend_tokenizer
    bpe.train_from_iterator([s.caption for s in scenes.all_scenes()], trainer)
    model = json.loads(bpe.to_str())["model"]
    alphabet = sorted(ByteLevel.alphabet())
    pieces = alphabet + [c + "</w>" for c in alphabet] + sorted(k for k in model["vocab"] if k not in specials)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *specials]))}
    return CLIPTokenizer(vocabulary, [tuple(m) for m in model["merges"]], model_max_length=CONTEXT)


def text_encoder() -> CLIPTextModel:
    return CLIPTextModel(_text(WIDTH, layers=3))


def _text(width: int, layers: int) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=CONTEXT, projection_dim=width, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def transformer() -> SD3Transformer2DModel:
    """Stable Diffusion 3's kind: pictures and words attend to each other, side by side."""
    return SD3Transformer2DModel(
        sample_size=scenes.SIZE // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32,
        num_attention_heads=5, caption_projection_dim=160, joint_attention_dim=WIDTH + SECOND_WIDTH,
        pooled_projection_dim=WIDTH + SECOND_WIDTH, pos_embed_max_size=scenes.SIZE // 8, qk_norm="rms_norm",
    )  # fmt: skip


def flow_text_encoders() -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The first in the shape of the SD model's, to begin with its weights."""
    return CLIPTextModelWithProjection(_text(WIDTH, layers=3)), CLIPTextModelWithProjection(_text(SECOND_WIDTH, layers=2))


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def clip_config() -> dict:
    """open_clip_config.json: architecture and preprocessing."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": scenes.SIZE, "layers": [1, 2, 2, 1], "width": 24, "head_width": 32},
            "text_cfg": {
                "context_length": CONTEXT, "vocab_size": len(tokenizer()), "width": 128, "heads": 4, "layers": 2,
                "hf_tokenizer_name": "menagerie",
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }  # fmt: skip


def clip() -> nn.Module:
    config = clip_config()["model_cfg"]
    return open_clip.CLIP(**config)


def save(folder: Path, vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, clip: nn.Module) -> None:
    """Write the diffusers pipeline and, in clip/, the open_clip model, in half precision."""
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder)
    out = folder / "clip"
    out.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in clip.state_dict().items()}, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps(clip_config(), indent=2) + "\n")
    tokenizer().save_pretrained(out)


def save_flow(
    folder: Path, vae: AutoencoderKL, transformer: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module
) -> None:
    """Write the diffusers pipeline, without a T5, in half precision."""
    words = tokenizer()
    vae.register_to_config(shift_factor=0.0, _name_or_path="")  # SD 3's pipeline adds the shift; a folder's name is nobody's
    pipe = StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, text_encoder=text_encoder, text_encoder_2=text_encoder_2, text_encoder_3=None,
        tokenizer=words, tokenizer_2=words, tokenizer_3=None, scheduler=flow_scheduler(),
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder)
