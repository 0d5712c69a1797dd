"""The exported LoRA, in plain diffusers, draws what the policy drew."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ddpo.diffusion import DDIM
from ddpo.export import save_card, save_lora
from ddpo.models.sd import StableDiffusion
from ddpo.noise import normal
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from tests.test_rollout import ADDRESSES, PROMPTS, stir

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj"]


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "mine.safetensors"])
@pytest.mark.parametrize("alpha", [None, 9.0])
def test_plain_diffusers_draws_the_tuned_policys_pictures(tiny, tmp_path, file, alpha):
    policy = stir(Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4, alpha, TARGETS), 3.0))
    save_lora(policy, tmp_path, "mine")
    ours = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()
    with policy.acting_as("reference"):
        base = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()

    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=file)
    start = normal([(*a, "start") for a in ADDRESSES], (4, 8, 8))
    theirs = 255 * pipe(PROMPTS, latents=start, num_inference_steps=6, guidance_scale=3.0, output_type="pt").images
    assert (ours - theirs).abs().max() <= 2
    assert (ours - base).abs().max() > 10  # the LoRA does something: the test could tell


def test_the_comfyui_file_has_the_true_alpha_and_its_names(tiny, tmp_path):
    policy = stir(Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4, 9.0, TARGETS)))
    save_lora(policy, tmp_path, "mine")
    layers = load_file(tmp_path / "lora" / "mine.safetensors")
    stems = {k.rsplit(".lora_", 1)[0].removesuffix(".alpha") for k in layers}
    assert all(s.startswith("lora_unet_") and "." not in s for s in stems)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in stems
    for stem in stems:
        assert layers[f"{stem}.alpha"] == 9.0 and layers[f"{stem}.lora_down.weight"].shape[0] == 4
    with safe_open(tmp_path / "lora" / "mine.safetensors", "pt") as file:
        assert file.metadata()["ss_network_alpha"] == "9.0"
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 9.0


def test_the_card_states_the_measured_difference(tmp_path):
    metrics = {
        f"eval/clip/{k}": v
        for k, v in zip(("base", "tuned", "delta", "delta_low", "delta_high"), (1, 2, 1, 0.5, 1.5), strict=True)
    }
    metrics |= {"iteration": 7, "eval/win_rate": 0.75, "eval/diversity/base": 0.2, "eval/diversity/tuned": 0.1}
    run = {"name": "mine", "model": "menagerie", "algorithm": "ddpo:DDPO", "rewards": ["clip"], "command": "accelerate launch"}
    card = save_card(tmp_path, run, metrics).read_text()
    assert "| clip | 1 | 2 | +1 | +0.5 to +1.5 |" in card and "75%" in card and "base_model: menagerie" in card
