"""Stable Diffusion XL: what diffusers' own pipeline draws, on a tiny one in its own format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from ddpo import estimate
from ddpo.diffusion import DDIM, log_prob
from ddpo.export import save_lora
from ddpo.models.sd import StableDiffusion
from ddpo.models.sdxl import StableDiffusionXL
from ddpo.noise import normal
from ddpo.policy import LoRA, Policy
from ddpo.rollout import collect
from tests.test_export import TARGETS
from tests.test_rollout import ADDRESSES, PROMPTS, stir
from tests.tiny import save_sdxl

X, T = torch.randn(2, 4, 8, 8), torch.tensor([500, 21])


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """As SDXL base 1.0 is: epsilon, and zeros for the empty prompt."""
    return save_sdxl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def xl_v(tmp_path_factory):
    """All that a fine-tune may have otherwise: v-prediction, an empty prompt that is encoded, latents with mean and deviation."""
    return save_sdxl(tmp_path_factory.mktemp("xl_v"), "v_prediction", False, [0.1, -0.2, 0.3, 1.0], [0.5, 2.0, 1.5, 0.8])


@pytest.fixture(scope="module")
def whole(xl):
    """The first one loaded, for what changes nothing in it."""
    return StableDiffusionXL(str(xl), dtype="float32")


def plain_diffusers(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(size=8):
    return normal([(*a, "start") for a in ADDRESSES], (4, size, size))


@pytest.mark.parametrize(("which", "resolution"), [("xl", None), ("xl_v", 32)])
def test_without_noise_the_pictures_are_those_of_diffusers_own_pipeline(which, resolution, request):
    folder, size = request.getfixturevalue(which), (resolution or 16) // 2
    policy = Policy(StableDiffusionXL(str(folder), dtype="float32", resolution=resolution), LoRA(4))
    pipe, pictures = plain_diffusers(folder), []
    for policy.guidance in (1.0, 5.0):
        ours = policy.family.decode(collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).latents[:, -1])
        theirs = pipe(
            PROMPTS, latents=start(size), num_inference_steps=6, guidance_scale=policy.guidance, output_type="pt",
            height=resolution, width=resolution,
        ).images  # fmt: skip
        assert ours.shape == theirs.shape == (4, 3, 2 * size, 2 * size)
        assert (ours - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min())
        pictures.append(ours)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2  # guidance does something: the test could tell


def test_what_the_network_sees_of_prompt_and_size(whole):
    cond = whole.encode(["a cat on a red background", "", "two owls"])
    assert {k: tuple(v.shape) for k, v in cond.items()} == {"text": (3, 20, 16 + 24), "pooled": (3, 12), "time_ids": (3, 6)}
    assert cond["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    for key, value in whole.encode(["a cat on a red background"]).items():  # a prompt does not depend on its neighbours
        torch.testing.assert_close(value, cond[key][:1])


@pytest.mark.parametrize(("which", "zeros"), [("xl", True), ("xl_v", False)])
def test_the_empty_prompt_is_the_one_that_the_pipeline_guides_from(which, zeros, request):
    folder = request.getfixturevalue(which)
    cond = StableDiffusionXL(str(folder), dtype="float32").encode(["a cat", ""])
    text, no_text, pooled, no_pooled = plain_diffusers(folder).encode_prompt(["a cat"], device=torch.device("cpu"))
    torch.testing.assert_close(cond["text"], torch.cat([text, no_text]))
    torch.testing.assert_close(cond["pooled"], torch.cat([pooled, no_pooled]))
    assert (not no_text.any()) == (not no_pooled.any()) == zeros


@pytest.mark.parametrize(("which", "guidance"), [("xl", 3.0), ("xl_v", 1.0)])
def test_the_ratio_is_one_before_the_first_update(which, guidance, request):
    policy = stir(Policy(StableDiffusionXL(str(request.getfixturevalue(which)), dtype="float32"), LoRA(4), guidance))
    rollout = collect(policy, PROMPTS, ADDRESSES, DDIM(1.0), 5, 4, True)
    rollout.advantages = torch.ones(4)
    for step in rollout.stochastic:
        for part in rollout.chunks(2):  # learning's batches are smaller
            view = part.transition(step)
            with torch.no_grad():
                assert (log_prob(view.x_next, *view.replay(policy)) - view.log_prob).abs().max() <= 1e-4
    assert len(rollout.stochastic) == 5 and len(rollout.cond["pooled"]) == 3  # stored once a prompt


def gradient(folder, **options):
    policy = stir(Policy(StableDiffusionXL(str(folder), **options), LoRA(4, targets=TARGETS)))
    policy(X, T, policy.family.encode(["a cat", "a dog"])).eps.square().sum().backward()
    return policy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_lora_trains_in_float32_and_every_weight_gets_a_gradient(xl, dtype):
    policy = gradient(xl, dtype=dtype)
    assert {w.dtype for w in policy.weights.values()} == {torch.float32}
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in policy.weights.values())
    layers = {name.partition(".lora_")[0] for name in policy.weights}
    assert {"down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", "mid_block.attentions.0.proj_in"} <= layers
    assert all(p.grad is None for m in (policy.network, *policy.family.helpers) for p in m.parameters() if not p.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradient(xl):
    plain, again = gradient(xl, dtype="float32"), gradient(xl, dtype="float32", gradient_checkpointing=True)
    for one, other in zip(plain.weights.values(), again.weights.values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "mine.safetensors"])
def test_plain_diffusers_draws_the_tuned_policys_pictures(xl, tmp_path, file):
    # gently: at 0.3 this network is chaotic, and the last bit of the first latent moves pictures by 7 / 255
    policy = stir(Policy(StableDiffusionXL(str(xl), dtype="float32"), LoRA(4, 9.0, TARGETS), 3.0), 0.1)
    save_lora(policy, tmp_path, "mine")
    ours = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()
    with policy.acting_as("reference"):
        base = collect(policy, PROMPTS, ADDRESSES, DDIM(0.0), 6, 4, False).images.float()
    pipe = plain_diffusers(xl)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=file)
    theirs = 255 * pipe(PROMPTS, latents=start(), num_inference_steps=6, guidance_scale=3.0, output_type="pt").images
    assert (ours - theirs).abs().max() <= 2
    assert (ours - base).abs().max() > 10  # the LoRA does something: the test could tell


def test_the_comfyui_file_has_the_true_alpha_and_its_names(xl, tmp_path):
    policy = stir(Policy(StableDiffusionXL(str(xl), dtype="float32"), LoRA(4, 9.0, TARGETS)))
    save_lora(policy, tmp_path, "mine")
    layers = load_file(tmp_path / "lora" / "mine.safetensors")
    stems = {k.rsplit(".lora_", 1)[0].removesuffix(".alpha") for k in layers}
    assert stems == {"lora_unet_" + name.partition(".lora_")[0].replace(".", "_") for name in policy.weights}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in stems
    assert all(layers[f"{stem}.alpha"] == 9.0 and layers[f"{stem}.lora_down.weight"].shape[0] == 4 for stem in stems)
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as kept:
        assert json.loads(kept.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 9.0


def test_in_half_precision_the_vae_stays_what_it_was_published_as(xl, whole):
    half = StableDiffusionXL(str(xl), dtype="bfloat16")
    assert [m.dtype for m in (half.network, *half.helpers)] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    assert torch.equal(half.decode(start()), whole.decode(start()))  # its weights have not been through half precision
    drawn = collect(Policy(half, LoRA(4), 3.0), PROMPTS, ADDRESSES, DDIM(1.0), 4, 4, True)
    assert drawn.latents.dtype == torch.float32 and drawn.latents.isfinite().all() and drawn.images.float().std() > 1


def test_a_vae_that_is_mended_for_half_precision_is_known_by_its_config(xl, tmp_path):
    mended = AutoencoderKL.from_pretrained(xl / "vae")
    mended.register_to_config(force_upcast=False, scaling_factor=0.25)
    mended.save_pretrained(tmp_path)
    family = StableDiffusionXL(str(xl), dtype="bfloat16", vae=str(tmp_path))
    assert family.vae.dtype == torch.bfloat16 and family.vae.config.scaling_factor == 0.25
    theirs = mended.decode(start() / 0.25).sample.detach().div(2).add(0.5).clamp(0, 1)
    ours = family.decode(start())
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 0.05
    outline = StableDiffusionXL.outline(str(xl), dtype="bfloat16", vae=str(tmp_path))
    assert outline.vae.dtype == torch.bfloat16 and not outline.assumed


def test_a_picture_does_not_depend_on_those_decoded_beside_it(whole):
    assert torch.equal(whole.decode(start())[1:2], whole.decode(start()[1:2]))


def test_helpers_that_are_offloaded_draw_the_same(xl, whole):
    away = StableDiffusionXL(str(xl), dtype="float32", offload=True)
    away.to(torch.device("cpu"))
    for key, value in away.encode(PROMPTS).items():
        assert torch.equal(value, whole.encode(PROMPTS)[key])
    assert torch.equal(away.decode(start()), whole.decode(start()))


@pytest.mark.parametrize("outlined", [False, True])
def test_a_model_of_another_family_is_refused_with_the_name_of_its_own(xl, tiny, tmp_path, outlined):
    for asked, folder, name in (
        (StableDiffusion, xl, "sdxl"),
        (StableDiffusionXL, tiny, "sd"),
        (StableDiffusionXL, "menagerie", "sd"),
        (StableDiffusion, "menagerie-flow", "sd3"),
    ):
        kind = asked.outline if outlined else asked
        with pytest.raises(
            ValueError, match=rf"is a StableDiffusion\w*Pipeline, not a StableDiffusion.*: set model\.name={name}$"
        ):
            kind(str(folder), dtype="float32")
    shutil.copytree(xl, tmp_path / "strange")
    index = tmp_path / "strange" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"))
    with pytest.raises(ValueError, match=r"XLInpaintPipeline, .*: no family in ddpo\.models takes it"):
        (StableDiffusionXL.outline if outlined else StableDiffusionXL)(str(tmp_path / "strange"), dtype="float32")


def test_a_model_that_lacks_an_encoder_is_refused(xl, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(xl, text_encoder=None, tokenizer=None, add_watermarker=False)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks a text encoder"):
        StableDiffusionXL(str(tmp_path), dtype="float32")


def test_a_resolution_that_the_vae_cannot_draw_is_refused(xl):
    with pytest.raises(ValueError, match="resolution is 17; it must be a multiple of 2"):
        StableDiffusionXL(str(xl), dtype="float32", resolution=17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_outline_has_the_real_models_shapes(xl, dtype):
    def shapes(tensors):
        return {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}

    real, outline = StableDiffusionXL(str(xl), dtype=dtype), StableDiffusionXL.outline(str(xl), dtype=dtype)
    assert not outline.assumed and outline.latent_shape == real.latent_shape
    for one, other in zip((real.network, *real.helpers), (outline.network, *outline.helpers), strict=True):
        assert shapes(dict(one.named_parameters())) == shapes(dict(other.named_parameters()))
        assert {p.device.type for p in other.parameters()} == {"meta"}
    assert shapes(real.encode(PROMPTS)) == shapes(outline.encode(PROMPTS))
    assert torch.equal(real.schedule.alphas_cumprod, outline.schedule.alphas_cumprod)
    assert torch.equal(real.schedule.times(7), outline.schedule.times(7))


def test_the_plan_counts_what_the_real_network_computes(xl):
    policy = Policy(StableDiffusionXL(str(xl), dtype="float32"), LoRA(4))
    cond = policy.family.encode(["a cat"])
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        policy(X[:1], T[:1], cond)
    outline = Policy(StableDiffusionXL.outline(str(xl), dtype="float32"), LoRA(4))
    assert estimate.need(outline, 1, 1).act_flops == flops.get_total_flops()


def test_a_model_that_is_not_here_is_taken_for_sdxl_base():
    family = StableDiffusionXL.outline("someone/nothing")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (family.network, *family.helpers)]
    assert family.assumed and sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]  # as published
    assert family.latent_shape == (4, 128, 128) and family.encode(["a cat"])["text"].shape == (1, 77, 2048)
    assert family.vae.dtype == torch.float32 and family.network.dtype == torch.bfloat16
    assert family.schedule.times(50)[:2].tolist() == [981, 961]


def test_the_example_of_the_documentation_is_the_code():
    root = Path(__file__).parent.parent
    page, code = (root / name for name in ("docs/new-model.md", "ddpo/models/sdxl.py"))
    blocks = [block.split("```")[0] for block in page.read_text().split("```python\n")[1:]]
    assert len(blocks) >= 3
    for block in blocks:
        assert block in code.read_text()
