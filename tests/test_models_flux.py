"""FLUX.1: our pictures, gradients and LoRA files are those of diffusers' own pipeline. All weights are random."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from safetensors.torch import load_file

from ddpo import estimate
from ddpo.algorithms.ddpo import DDPO
from ddpo.diffusion import CPS, DDIM, DanceSDE, FlowSDE
from ddpo.export import save_lora
from ddpo.models.flux import Flux
from ddpo.noise import normal
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from ddpo.schedule import FlowMatching
from tests.test_rollout import ADDRESSES, PROMPTS, stir
from tests.tiny import save_flux, save_pipeline

START = normal([(*a, "start") for a in ADDRESSES], (8, 8, 8))
TOKENS = 40


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("schnell"), schnell=True)


def family_of(folder, build=Flux, dtype="float32", resolution=16, **options):
    return build(str(folder), dtype=dtype, resolution=resolution, max_sequence_length=TOKENS, **options)


def policy_of(folder, guidance=1.0, lora=None, **options):
    return Policy(family_of(folder, **options), lora or LoRA(rank=4), guidance)


def pipeline(folder):
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, output, prompts=PROMPTS, start=START, true_cfg=1.0, **options):
    """By plain diffusers, from an unpacked start; latents are unpacked again."""
    height, width = (2 * side for side in start.shape[2:])
    packed = pipe._pack_latents(start, *start.shape)
    out = pipe(
        prompts, negative_prompt=[""] * len(prompts), true_cfg_scale=true_cfg, height=height, width=width, latents=packed,
        max_sequence_length=TOKENS, output_type=output, **options,
    ).images  # fmt: skip
    return pipe._unpack_latents(out, height, width, pipe.vae_scale_factor) if output == "latent" else out


def believes(policy, x, t):
    return policy(x, t, policy.family.encode(["a cat", "a dog"])).x0


X, T = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0, 433.7], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("resolution", [16, 64, 256])
@pytest.mark.parametrize("which", ["dev", "schnell"])
def test_times_are_those_of_diffusers_pipeline(which, resolution, request):
    folder = request.getfixturevalue(which)
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    ours = family_of(folder, Flux.outline, resolution=resolution).schedule
    mu = calculate_shift((resolution // 4) ** 2)
    for steps in (1, 4, 28, 50):
        retrieve_timesteps(theirs, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        times = ours.times(steps)
        torch.testing.assert_close(times[:-1], theirs.timesteps.double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.level(times).sigma, theirs.sigmas.double(), rtol=1e-6, atol=0)
        assert times[0] == 1000 and times[-1] == 0 and (times.diff() < 0).all()


def test_the_shift_grows_with_the_picture_as_published(dev, schnell):
    """At 1024 pixels, 4096 tokens, it is exp(1.15); at 256, exp(0.5). Schnell's does not shift."""
    assert Flux.outline("nowhere/at-all").schedule == FlowMatching(math.exp(1.15), 1000, even=True)
    assert Flux.outline("nowhere/at-all", resolution=256).schedule.shift == pytest.approx(math.exp(0.5))
    assert family_of(schnell, Flux.outline).schedule == FlowMatching(1.0, 1000, even=True)
    shares = FlowMatching(1.0, even=True).times(5)
    torch.testing.assert_close(shares, torch.tensor([1000, 800, 600, 400, 200, 0], dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------------
# Acting


@pytest.mark.parametrize("which", ["dev", "schnell"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_without_noise_latents_and_pictures_are_those_of_diffusers_own_pipeline(which, guidance, request):
    folder = request.getfixturevalue(which)
    pipe, ours = pipeline(folder), collect(policy_of(folder, guidance), PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False)
    latents = drawn(pipe, "latent", true_cfg=guidance, num_inference_steps=6)
    torch.testing.assert_close(ours.latents[:, -1], latents, rtol=1e-4, atol=1e-4)
    pictures = drawn(pipe, "pt", true_cfg=guidance, num_inference_steps=6)
    assert (ours.images.float() / 255 - pictures).abs().max() <= 1 / 255


def test_embedded_guidance_is_told_to_the_network(dev):
    default, other = (
        collect(policy_of(dev, embedded_guidance=scale), PROMPTS, ADDRESSES, DDIM(0.0), 3, 4, False).latents[:, -1]
        for scale in (None, 1.5)
    )
    pipe = pipeline(dev)
    torch.testing.assert_close(other, drawn(pipe, "latent", num_inference_steps=3, guidance_scale=1.5), rtol=1e-4, atol=1e-4)
    assert (other - default).abs().max() > 1e-2  # the test could tell


def test_both_text_encoders_are_heard(dev):
    family = family_of(dev)
    cond = family.encode(["a cat", "a dog"])
    assert cond["text"].shape == (2, TOKENS, 48) and cond["pooled"].shape == (2, 16)
    network, x, t = family.network, X[:1].repeat(2, 1, 1, 1), T[:1].repeat(2)
    mixed = {"text": cond["text"][[0, 0]], "pooled": cond["pooled"]}, {"text": cond["text"], "pooled": cond["pooled"][[0, 0]]}
    with torch.no_grad():
        for heard in mixed:
            one, other = family.denoise(network, x, t, heard)
            assert (one - other).abs().max() > 1e-4
    assert Flux.outline("nowhere/at-all").encode(["a cat"])["text"].shape == (1, 512, 4096)


def test_a_higher_picture_is_drawn_as_diffusers_draws_it(dev):
    """Rows and columns are not mistaken for each other. No option asks for such pictures."""
    family = family_of(dev)
    family.latent_shape = (8, 12, 6)
    family.schedule = FlowMatching(math.exp(calculate_shift(18)), even=True)
    start = normal([(0, "start")], family.latent_shape)
    ours = collect(Policy(family, LoRA(4)), ["a cat"], [(0,)], DDIM(0.0), 3, 1, False)
    latents = drawn(pipeline(dev), "latent", ["a cat"], start, num_inference_steps=3)
    torch.testing.assert_close(ours.latents[:, -1], latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [DDIM(1.0), CPS(0.8), FlowSDE(0.7), DanceSDE(0.3)])
@pytest.mark.parametrize(("which", "dtype"), [("dev", "float32"), ("dev", "bfloat16"), ("schnell", "float32")])
def test_the_ratio_is_one_before_the_first_update(which, dtype, solver, request):
    policy = stir(policy_of(request.getfixturevalue(which), 3.0, dtype=dtype))
    rollout = collect(policy, PROMPTS, ADDRESSES, solver, 4, 4, True)
    rollout.advantages = torch.ones(4)
    assert rollout.stochastic == [0, 1, 2]
    for step in rollout.stochastic:
        _, metrics = DDPO().loss(policy, rollout.transition(step))
        assert torch.equal(metrics["log_ratio"], torch.zeros(4))


def test_half_precision_stays_near_full_precision(dev):
    """At a time and a scale that bfloat16 holds: this network rounds a thousandfold of both (3.5 becomes 3.504)."""
    at = torch.tensor([1000.0, 434.0])
    with torch.no_grad():
        full, half = (
            believes(stir(policy_of(dev, dtype=dtype, embedded_guidance=4.0)), X, at) for dtype in ("float32", "bfloat16")
        )
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).norm() < 0.02 * full.norm()


def test_offloaded_helpers_do_the_same_work(dev):
    family, plain = family_of(dev, offload=True), family_of(dev)
    family.to(torch.device("cpu"))
    for key, value in plain.encode(PROMPTS).items():
        assert torch.equal(family.encode(PROMPTS)[key], value)
    assert torch.equal(family.decode(START), plain.decode(START))


# ----------------------------------------------------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("which", ["dev", "schnell"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_lora_trains_in_float32_and_every_weight_gets_a_gradient(which, dtype, request):
    policy = stir(policy_of(request.getfixturevalue(which), dtype=dtype))
    believes(policy, X, T).square().sum().backward()
    assert len(policy.weights) == 2 * (8 * 2 + 3 * 2)  # two blocks with text of its own, two without
    assert {w.dtype for w in policy.weights.values()} == {torch.float32}
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in policy.weights.values())
    frozen = [p for n, p in policy.network.named_parameters() if n not in policy.weights]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_gradient_checkpointing_gives_the_same_gradient(dev):
    def gradient(**options):
        policy = stir(policy_of(dev, **options))
        believes(policy, X, T).square().sum().backward()
        return torch.cat([w.grad.flatten() for w in policy.weights.values()])

    torch.testing.assert_close(gradient(gradient_checkpointing=True), gradient(), atol=1e-4, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The LoRA files


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "mine.safetensors"])
@pytest.mark.parametrize(("which", "alpha"), [("dev", 9.0), ("schnell", None)])
def test_plain_diffusers_draws_the_tuned_policys_pictures(which, alpha, file, request, tmp_path):
    folder = request.getfixturevalue(which)
    policy = stir(policy_of(folder, lora=LoRA(4, alpha)))
    save_lora(policy, tmp_path, "mine")
    ours = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()
    with policy.acting_as("reference"):
        base = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()

    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=file)
    theirs = 255 * drawn(pipe, "pt", num_inference_steps=6)
    assert (ours - theirs).abs().max() <= 2
    assert (ours - base).abs().max() > 10  # the LoRA does something: the test could tell


def test_diffusers_gives_back_the_weights_of_the_comfyui_file(dev, tmp_path):
    """Its names are "lora_transformer_<diffusers' name with underscores>", which ComfyUI maps for FLUX too (its lora.py)."""
    policy = stir(policy_of(dev, lora=LoRA(4, 9.0)))
    save_lora(policy, tmp_path, "mine")
    layers = load_file(tmp_path / "lora" / "mine.safetensors")
    known = {f"lora_transformer_{name.replace('.', '_')}" for name, _ in pipeline(dev).transformer.named_modules()}
    assert {k.split(".")[0] for k in layers} <= known and len(layers) == 3 * len(policy.weights) // 2
    assert all(v == 9.0 for k, v in layers.items() if k.endswith(".alpha"))

    theirs = FluxPipeline.lora_state_dict(tmp_path / "lora", weight_name="mine.safetensors")
    ours = {f"transformer.{k}": v * (9.0 / 4 if "lora_A" in k else 1.0) for k, v in policy.lora_layers().items()}
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value)


# ----------------------------------------------------------------------------------------------------------------------
# The outline


@pytest.mark.parametrize("which", ["dev", "schnell"])
def test_the_outline_has_the_real_networks_weights_and_conditions(which, request):
    folder = request.getfixturevalue(which)
    real, outline = family_of(folder, dtype="bfloat16"), family_of(folder, Flux.outline, dtype="bfloat16")
    assert not outline.assumed and outline.latent_shape == real.latent_shape and outline.schedule == real.schedule
    for ours, theirs in zip((outline.network, *outline.helpers), (real.network, *real.helpers), strict=True):
        ours, theirs = ({k: (v.shape, v.dtype) for k, v in m.named_parameters()} for m in (ours, theirs))
        assert ours == theirs
    for key, value in real.encode(["a cat"]).items():
        like = outline.encode(["a cat"])[key]
        assert (like.shape, like.dtype) == (value.shape, value.dtype)


def test_work_and_memory_can_be_estimated(dev):
    def need(guidance=1.0, **options):
        return estimate.need(Policy(family_of(dev, Flux.outline, **options), LoRA(), guidance), 2, 2)

    plain, guided, again, large = need(), need(3.0), need(gradient_checkpointing=True), need(resolution=64)
    assert guided.act_flops == pytest.approx(2 * plain.act_flops)
    assert again.learn_flops > 1.2 * plain.learn_flops and large.act_flops > 2 * plain.act_flops
    assert need(offload=True).weights < plain.weights


def test_a_model_that_is_not_here_is_taken_for_flux_1_dev():
    family = Flux.outline("someone/nothing")
    vae, clip, t5 = (sum(p.numel() for p in m.parameters()) for m in family.helpers)
    assert family.assumed and family.latent_shape == (16, 128, 128)
    assert (vae, clip, t5) == (83_819_683, 123_060_480, 4_762_310_656)  # the published sizes
    assert sum(p.numel() for p in family.network.parameters()) == 11_901_408_320


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("build", [Flux, Flux.outline])
def test_another_familys_folder_is_refused(tmp_path, build):
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline, not a FluxPipeline: set model\.name=sd"):
        build(str(save_pipeline(tmp_path)))


@pytest.mark.parametrize("build", [Flux, Flux.outline])
def test_embedded_guidance_is_refused_where_the_network_does_not_ask(schnell, build):
    with pytest.raises(ValueError, match=r"takes no embedded guidance: leave out model\.embedded_guidance"):
        family_of(schnell, build, embedded_guidance=3.5)


@pytest.mark.parametrize(("option", "value"), [("time_shift_type", "linear"), ("shift_terminal", 0.1), ("invert_sigmas", True)])
def test_another_schedule_is_refused(tmp_path, option, value):
    config = save_flux(tmp_path) / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=option):
        family_of(tmp_path, Flux.outline)


def test_another_scheduler_is_refused(tmp_path):
    config = save_flux(tmp_path) / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "DPMSolverMultistepScheduler"}))
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        family_of(tmp_path, Flux.outline)


def test_a_resolution_that_the_network_cannot_draw_is_refused(dev):
    with pytest.raises(ValueError, match="resolution is 18; it must be a multiple of 4"):
        family_of(dev, Flux.outline, resolution=18)
