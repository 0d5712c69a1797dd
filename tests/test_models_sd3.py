"""Stable Diffusion 3: our pictures, gradients and LoRA files are those of diffusers' own pipeline. All weights are random."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file

from ddpo import estimate
from ddpo.algorithms.ddpo import DDPO
from ddpo.diffusion import CPS, DDIM, DanceSDE, FlowSDE
from ddpo.export import save_lora
from ddpo.models.sd3 import StableDiffusion3
from ddpo.noise import normal
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from ddpo.schedule import VariancePreserving
from tests.test_rollout import ADDRESSES, PROMPTS, stir
from tests.tiny import save_pipeline, save_sd3

START = normal([(*a, "start") for a in ADDRESSES], (16, 8, 8))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def sd3_without_t5(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3_without_t5"), t5=False)


def policy_of(folder, guidance=3.0, dtype="float32", lora=None, **options):
    return Policy(StableDiffusion3(str(folder), dtype=dtype, **options), lora or LoRA(rank=4), guidance)


def pipeline(folder, **parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def believes(policy, x, t):
    return policy(x, t, policy.family.encode(["a cat", "a dog"])).x0


X, T = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0, 433.7], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Acting


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_without_noise_latents_and_pictures_are_those_of_diffusers_own_pipeline(sd3, guidance, t5):
    parts = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = pipeline(sd3, **parts)
    ours = collect(policy_of(sd3, guidance, text_encoder_3=t5), PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False)
    same = {"latents": START.clone(), "num_inference_steps": 6, "guidance_scale": guidance}
    latents = pipe(PROMPTS, output_type="latent", **same).images
    torch.testing.assert_close(ours.latents[:, -1], latents, rtol=1e-4, atol=1e-4)
    pictures = pipe(PROMPTS, output_type="pt", **same).images
    assert (ours.images.float() / 255 - pictures).abs().max() <= 1 / 255


def test_t5_is_heard(sd3):
    """The test above could not tell otherwise."""
    with_t5, without = (policy_of(sd3, text_encoder_3=t5).family.encode(["a cat", "a dog"])["text"] for t5 in (True, False))
    assert with_t5.shape == without.shape and not without[:, 20:].any()
    assert not torch.equal(with_t5[0, 20:], with_t5[1, 20:]) and torch.equal(with_t5[:, :20], without[:, :20])


def test_t5_reads_as_many_tokens_as_diffusers_is_told_to_read(sd3):
    ours = collect(policy_of(sd3, max_sequence_length=24), PROMPTS, ADDRESSES, DDIM(0.0), 3, 4, False).latents[:, -1]
    same = {"latents": START.clone(), "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    torch.testing.assert_close(ours, pipeline(sd3)(PROMPTS, max_sequence_length=24, **same).images, rtol=1e-4, atol=1e-4)


def test_a_folder_without_t5_needs_to_be_told_so(sd3_without_t5):
    for build in (StableDiffusion3, StableDiffusion3.outline):
        with pytest.raises(ValueError, match=r"set model\.text_encoder_3=false"):
            build(str(sd3_without_t5))
    policy = policy_of(sd3_without_t5, text_encoder_3=False)
    assert len(policy.family.helpers) == 3
    assert collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 2, 4, False).images.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("solver", [DDIM(1.0), CPS(0.8), FlowSDE(0.7), DanceSDE(0.3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_one_before_the_first_update(sd3, solver, dtype):
    policy = stir(policy_of(sd3, dtype=dtype))
    rollout = collect(policy, PROMPTS, ADDRESSES, solver, 5, 4, True)
    rollout.advantages = torch.ones(4)
    assert rollout.stochastic == [0, 1, 2, 3]
    for step in rollout.stochastic:
        _, metrics = DDPO().loss(policy, rollout.transition(step))
        assert torch.equal(metrics["log_ratio"], torch.zeros(4))


def test_half_precision_stays_near_full_precision(sd3):
    with torch.no_grad():
        full, half = (believes(stir(policy_of(sd3, dtype=dtype)), X, T) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).norm() < 0.03 * full.norm()


def test_another_resolution_is_drawn_as_diffusers_draws_it(sd3):
    family = StableDiffusion3(str(sd3), dtype="float32", resolution=24)
    assert family.latent_shape == (16, 12, 12)
    start = normal([(0, "start")], family.latent_shape)
    ours = collect(Policy(family, LoRA(4)), ["a cat"], [(0,)], DDIM(0.0), 3, 1, False)
    same = {"latents": start, "num_inference_steps": 3, "guidance_scale": 1.0, "height": 24, "width": 24}
    latents = pipeline(sd3)(["a cat"], output_type="latent", **same).images
    torch.testing.assert_close(ours.latents[:, -1], latents, rtol=1e-4, atol=1e-4)


def test_offloaded_helpers_do_the_same_work(sd3):
    family, plain = StableDiffusion3(str(sd3), dtype="float32", offload=True), StableDiffusion3(str(sd3), dtype="float32")
    family.to(torch.device("cpu"))
    for key, value in plain.encode(PROMPTS).items():
        assert torch.equal(family.encode(PROMPTS)[key], value)
    assert torch.equal(family.decode(START), plain.decode(START))


# ----------------------------------------------------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_lora_trains_in_float32_and_every_weight_gets_a_gradient(sd3, dtype):
    policy = stir(policy_of(sd3, dtype=dtype))
    believes(policy, X, T).square().sum().backward()
    assert len(policy.weights) == 2 * (8 * 3 - 1 - 1)  # the last block's text has no output, and its queries no effect
    assert {w.dtype for w in policy.weights.values()} == {torch.float32}
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in policy.weights.values())
    frozen = [p for n, p in policy.network.named_parameters() if n not in policy.weights]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_queries_that_are_left_out_would_learn_nothing(sd3):
    policy = stir(policy_of(sd3, lora=LoRA(4, targets=["attn.add_q_proj"])))
    believes(policy, X, T).square().sum().backward()
    idle = {name.split(".")[1] for name, w in policy.weights.items() if w.grad is None or not w.grad.any()}
    assert idle == {"2"}  # the last block


def test_gradient_checkpointing_gives_the_same_gradient(sd3):
    def gradient(**options):
        policy = stir(policy_of(sd3, **options))
        believes(policy, X, T).square().sum().backward()
        return torch.cat([w.grad.flatten() for w in policy.weights.values()])

    torch.testing.assert_close(gradient(gradient_checkpointing=True), gradient(), atol=1e-4, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The LoRA files


@pytest.mark.parametrize("alpha", [None, 9.0])
def test_plain_diffusers_draws_the_tuned_policys_pictures(sd3, tmp_path, alpha):
    policy = stir(policy_of(sd3, lora=LoRA(4, alpha)))
    save_lora(policy, tmp_path, "mine")
    ours = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()
    with policy.acting_as("reference"):
        base = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()

    pipe = pipeline(sd3)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    theirs = 255 * pipe(PROMPTS, latents=START, num_inference_steps=6, guidance_scale=3.0, output_type="pt").images
    assert (ours - theirs).abs().max() <= 2
    assert (ours - base).abs().max() > 10  # the LoRA does something: the test could tell


def test_the_comfyui_file_names_every_tuned_layer_as_comfyui_does(sd3, tmp_path):
    """ComfyUI maps "lora_transformer_<diffusers' name with underscores>" of Stable Diffusion 3 (its lora.py)."""
    policy = stir(policy_of(sd3, lora=LoRA(4, 9.0)))
    save_lora(policy, tmp_path, "mine")
    layers = load_file(tmp_path / "lora" / "mine.safetensors")
    known = {f"lora_transformer_{name.replace('.', '_')}": m for name, m in pipeline(sd3).transformer.named_modules()}
    stems = {k.split(".")[0] for k in layers}
    assert stems <= known.keys() and len(stems) == len(policy.weights) // 2
    for stem in stems:
        up, down = layers[f"{stem}.lora_up.weight"], layers[f"{stem}.lora_down.weight"]
        assert (up @ down).shape == known[stem].weight.shape and layers[f"{stem}.alpha"] == 9.0


# ----------------------------------------------------------------------------------------------------------------------
# The outline


@pytest.mark.parametrize("t5", [True, False])
def test_the_outline_has_the_real_networks_weights_and_conditions(sd3, t5):
    real = StableDiffusion3(str(sd3), text_encoder_3=t5)
    outline = StableDiffusion3.outline(str(sd3), text_encoder_3=t5)
    assert not outline.assumed and outline.latent_shape == real.latent_shape and outline.schedule == real.schedule
    for ours, theirs in zip((outline.network, *outline.helpers), (real.network, *real.helpers), strict=True):
        ours, theirs = ({k: (v.shape, v.dtype) for k, v in m.named_parameters()} for m in (ours, theirs))
        assert ours == theirs
    for key, value in real.encode(["a cat"]).items():
        like = outline.encode(["a cat"])[key]
        assert (like.shape, like.dtype) == (value.shape, value.dtype)


def test_work_and_memory_can_be_estimated(sd3):
    def need(guidance=1.0, **options):
        return estimate.need(Policy(StableDiffusion3.outline(str(sd3), **options), LoRA(), guidance), 2, 2)

    plain, guided, again, small = need(), need(3.0), need(gradient_checkpointing=True), need(text_encoder_3=False)
    assert guided.act_flops == pytest.approx(2 * plain.act_flops)
    assert again.learn_flops > 1.2 * plain.learn_flops
    assert small.weights < plain.weights and need(offload=True).weights < small.weights


def test_a_model_that_is_not_here_is_taken_for_stable_diffusion_3_5_medium():
    family = StableDiffusion3.outline("someone/nothing")
    clip, big, t5 = (sum(p.numel() for p in m.parameters()) for m in family.text_encoders)
    assert family.assumed and family.latent_shape == (16, 128, 128)
    assert (clip, big, t5) == (123_650_304, 694_659_840, 4_762_310_656)  # the published sizes
    assert sum(p.numel() for p in family.network.parameters()) == 2_243_171_520


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("build", [StableDiffusion3, StableDiffusion3.outline])
def test_another_familys_folder_is_refused(tmp_path, build):
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        build(str(save_pipeline(tmp_path)))


@pytest.mark.parametrize(
    "option, value", [("use_dynamic_shifting", True), ("use_karras_sigmas", True), ("shift_terminal", 0.1)]
)
def test_another_schedule_is_refused(tmp_path, option, value):
    config = save_sd3(tmp_path, t5=False) / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=option):
        StableDiffusion3.outline(str(tmp_path), text_encoder_3=False)


@pytest.mark.parametrize("resolution", [18, 36])
def test_a_resolution_that_the_network_cannot_draw_is_refused(sd3, resolution):
    with pytest.raises(ValueError, match=f"resolution is {resolution}; it must be a multiple of 4, at most 32"):
        StableDiffusion3.outline(str(sd3), resolution=resolution)


def test_a_solver_of_flows_is_refused_by_a_model_of_another_schedule(tiny):
    from tests.test_rollout import policy_of as other

    policy = other(tiny)
    assert isinstance(policy.family.schedule, VariancePreserving)
    with pytest.raises(ValueError, match=r"rollout\.solver"):
        collect(policy, PROMPTS, ADDRESSES, FlowSDE(), 3, 4, True)


def test_the_schedule_is_the_configs(sd3):
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(sd3, subfolder="scheduler")
    ours = StableDiffusion3.outline(str(sd3)).schedule
    assert (ours.shift, ours.length) == (theirs.shift, theirs.config.num_train_timesteps) == (3.0, 1000)
