"""An optimizer's state goes through a checkpoint by parameter name, and the next step is the same to the bit.

pytest tests/test_checkpoint_optimizer.py
"""

import pytest
import torch

from ddpo import checkpoint
from ddpo.checkpoint import MismatchedCheckpoint


def make_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)


def make_amsgrad(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)


def make_momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("make", [make_adamw, make_amsgrad, make_momentum])
def test_the_next_optimizer_step_is_the_same_to_the_bit(tmp_path, make):
    labels = ["a.lora_A.weight", "a.lora_B.weight", "never.used"]

    def step(parameters, optimizer, seed):
        g = torch.Generator().manual_seed(seed)
        for p in parameters[:2]:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()

    ours = [torch.nn.Parameter(torch.ones(4, 3) * i) for i in range(3)]
    optimizer = make(ours)
    for seed in range(5):
        step(ours, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 3e-3
    tensors, packed = checkpoint.pack_optimizer(optimizer, labels)
    lora = dict(zip(labels, ours, strict=True))
    loaded = checkpoint.load(checkpoint.save(tmp_path, 5, {"lora": lora, "optimizer": tensors}, {"optimizer": packed}, {}), {})
    kept = {k: v.clone() for k, v in loaded.tensors["optimizer"].items()}

    theirs = [torch.nn.Parameter(loaded.tensors["lora"][n].clone()) for n in labels]
    resumed = make(theirs)
    checkpoint.unpack_optimizer(resumed, labels, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for seed in (5, 6):
        step(ours, optimizer, seed)
        step(theirs, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    after, _ = checkpoint.pack_optimizer(resumed, labels)
    assert after.keys() == tensors.keys() == kept.keys()
    assert all(torch.equal(v, after[k]) for k, v in checkpoint.pack_optimizer(optimizer, labels)[0].items())
    assert all(torch.equal(v, kept[k]) for k, v in loaded.tensors["optimizer"].items()), "stepping changed the checkpoint"


def test_optimizer_state_of_another_model_is_refused():
    parameters = [torch.nn.Parameter(torch.ones(4, 3))]
    optimizer = make_adamw(parameters)
    parameters[0].grad = torch.ones(4, 3)
    optimizer.step()
    tensors, packed = checkpoint.pack_optimizer(optimizer, ["a"])
    with pytest.raises(MismatchedCheckpoint, match=r"'a\.(step|exp_avg)'"):
        checkpoint.unpack_optimizer(optimizer, ["b"], tensors, packed)
    with pytest.raises(MismatchedCheckpoint, match=r"'a\.exp_avg'"):
        checkpoint.unpack_optimizer(make_adamw([torch.nn.Parameter(torch.ones(4, 5))]), ["a"], tensors, packed)
    with pytest.raises(ValueError, match="one group of the 2 named"):
        checkpoint.pack_optimizer(optimizer, ["a", "b"])
