"""Earlier selves, guidance, and the exported LoRA."""

import pytest
import torch

from ddpo.models.sd import StableDiffusion
from ddpo.policy import LoRA, Policy
from tests.test_rollout import policy_of, stir

X, T = torch.randn(2, 4, 8, 8), torch.tensor([500, 21])


def believes(policy, prompts=("a cat", "a dog")):
    with torch.no_grad():
        return policy(X, T, policy.family.encode(list(prompts))).eps


def test_a_new_lora_changes_nothing(tiny):
    family = StableDiffusion(str(tiny), dtype="float32")
    cond = family.encode(["a cat", "a dog"])
    with torch.no_grad():
        before = family.denoise(family.network, X, T, cond)
        assert torch.equal(Policy(family, LoRA(4)).family.denoise(family.network, X, T, cond), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_earlier_self_acts_as_it_did_and_the_present_one_comes_back(tiny, dtype):
    policy = policy_of(tiny, dtype=dtype)
    first = believes(policy)
    stir(policy)
    now = believes(policy)
    assert not torch.equal(now, first)
    with policy.acting_as("reference"):
        assert torch.equal(believes(policy), first)
        with policy.acting_as("now"):
            assert torch.equal(believes(policy), first)
    assert torch.equal(believes(policy), now)
    with pytest.raises(KeyError), policy.acting_as("nobody"):
        pass
    assert torch.equal(believes(policy), now)


def test_remember_is_a_moving_average(tiny):
    policy = policy_of(tiny)
    start = [w.detach().clone() for w in policy.weights.values()]
    policy.remember("ema")
    stir(policy)
    policy.remember("ema", decay=0.75)
    with policy.acting_as("ema"):
        for w, new in zip(policy.weights.values(), policy._selves["ema"], strict=True):
            assert w.data_ptr() == new.data_ptr()
    for w, old, kept in zip(policy.weights.values(), start, policy._selves["ema"], strict=True):
        torch.testing.assert_close(kept, 0.75 * old + 0.25 * w.detach())


def test_going_back_to_before_a_self_was_made_forgets_it(tiny):
    policy = policy_of(tiny)
    none = policy.selves()
    policy.remember("old")
    policy.load_selves(none)
    assert policy.selves() == {}
    with policy.acting_as("reference"):
        pass


def test_guidance_extrapolates_from_the_empty_prompt(tiny):
    plain, guided = stir(policy_of(tiny, 1.0)), stir(policy_of(tiny, 4.0))
    without, with_prompt = believes(plain, ["", ""]), believes(plain)
    torch.testing.assert_close(believes(guided), without + 4 * (with_prompt - without), atol=1e-5, rtol=1e-4)


def test_only_the_lora_trains_in_float32_and_every_weight_gets_a_gradient(tiny):
    policy = policy_of(tiny, dtype="bfloat16")
    assert {w.dtype for w in policy.weights.values()} == {torch.float32}
    assert all(".lora_" in name for name in policy.weights)
    stir(policy)
    policy(X, T, policy.family.encode(["a cat", "a dog"])).eps.square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in policy.weights.values())
    frozen = [p for n, p in policy.network.named_parameters() if n not in policy.weights]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_gradient_checkpointing_gives_the_same_gradient(tiny):
    def gradient(**options):
        policy = stir(policy_of(tiny, **options))
        policy(X, T, policy.family.encode(["a cat", "a dog"])).eps.square().sum().backward()
        return torch.cat([w.grad.flatten() for w in policy.weights.values()])

    torch.testing.assert_close(gradient(gradient_checkpointing=True), gradient(), atol=1e-4, rtol=1e-3)


def test_the_seed_decides_the_first_weights(tiny):
    def first(seed):
        policy = Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4), seed=seed)
        return torch.cat([w.detach().flatten() for w in policy.weights.values()])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_unknown_targets_are_refused(tiny):
    with pytest.raises(ValueError, match=r"lora\.targets.*to_nowhere"):
        Policy(StableDiffusion(str(tiny), dtype="float32"), LoRA(4, targets=["to_nowhere"]))
