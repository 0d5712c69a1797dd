"""What `--dry-run` says about memory and work, against what the networks are."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpo import estimate
from ddpo.models.sd import StableDiffusion
from ddpo.policy import LoRA, Policy


def need(guidance=1.0, micro_batch=2, **options):
    family = StableDiffusion.outline("menagerie", **options)
    assert not family.assumed
    return estimate.need(Policy(family, LoRA(), guidance), 2, micro_batch)


def test_a_forward_pass_costs_what_the_real_network_costs():
    real = StableDiffusion("menagerie", dtype="float32")
    policy = Policy(real, LoRA())
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        real.denoise(policy.network, torch.zeros(1, *real.latent_shape), torch.zeros(1), real.encode(["a cat"]))
    text = (
        20 * sum(p.numel() for p in real.text_encoder.parameters() if p.ndim == 2) * 2
    )  # an upper bound: embeddings multiply nothing
    assert 0 <= flops.get_total_flops() - need(dtype="float32").act_flops <= text


def test_work_and_memory_grow_as_they_must():
    plain, guided, larger, again = need(), need(guidance=3.0), need(micro_batch=4), need(gradient_checkpointing=True)
    assert guided.act_flops == pytest.approx(2 * plain.act_flops)
    assert 1.6 * plain.learning < larger.learning < 2 * plain.learning  # the gradients do not grow
    assert larger.learn_flops == pytest.approx(plain.learn_flops)
    assert again.learning < 0.8 * plain.learning and again.learn_flops > 1.2 * plain.learn_flops
    assert need(offload=True).weights < plain.weights == need(guidance=3.0).weights


def test_the_weights_are_those_of_the_files():
    real = StableDiffusion("menagerie", dtype="bfloat16")
    frozen = sum(p.nbytes for m in (real.network, *real.helpers) for p in m.parameters())
    trained = sum(w.numel() for w in Policy(real, LoRA()).weights.values())
    assert need().weights == frozen + trained * estimate.ADAM


def test_a_model_that_is_not_here_is_taken_for_stable_diffusion_1_5():
    family = StableDiffusion.outline("someone/nothing")
    assert family.assumed and sum(p.numel() for p in family.network.parameters()) == 859_520_964  # the UNet's published size


def test_a_weight_that_is_looked_at_another_way_is_not_counted_again():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(100, 50, bias=False), torch.empty(3, 100)
    with torch.no_grad(), estimate._Alive([layer]) as alive:
        y = x @ layer.weight.t()
    assert alive.peak == y.nbytes
