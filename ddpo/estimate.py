"""What a run will need, found without weights: the networks are walked through on torch's meta device, where tensors have shapes
and no numbers.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ddpo.models import Family
from ddpo.policy import Policy

ADAM = 6 * 4  # bytes a trainable weight: itself, gradient, its flat copy, the reference self, two moments


@dataclass(frozen=True)
class Need:
    """Of one process. Memory in bytes, work in floating-point operations for one picture and one denoising step."""

    weights: int
    acting: int
    learning: int
    act_flops: float
    learn_flops: float

    @property
    def memory(self) -> int:
        return self.weights + max(self.acting, self.learning)


def need(policy: Policy, batch_size: int, micro_batch: int, through_decoder: bool = False) -> Need:
    """Walk once through acting and once through learning.

    Args:
        policy: over an outline: a family whose networks are on the meta device (`Family.outline`).
        batch_size, micro_batch: pictures at a time in acting, in learning.
        through_decoder: whether learning goes through the decoder to the pictures, as reward gradients do.
    """
    family, passes = policy.family, 1 if policy.guidance == 1 else 2
    trained = sum(w.numel() for w in policy.weights.values())
    resident = [family.network, *([] if family.offload else family.helpers)]
    weights = sum(p.nbytes for m in resident for p in m.parameters() if not p.requires_grad) + trained * ADAM

    def denoise(rows: int) -> Tensor:
        x, t = torch.empty(rows, *family.latent_shape, device="meta"), torch.zeros(rows, device="meta")
        return family.denoise(family.network, x, t, family.encode([""] * rows))

    with torch.no_grad():
        act_flops, acting = _walk(family, lambda: denoise(batch_size * passes))
        _, decoding = _walk(family, lambda: family.decode(torch.empty(batch_size, *family.latent_shape, device="meta")))

    def learn() -> None:
        out = denoise(micro_batch * passes)
        (family.decode(out[:micro_batch]) if through_decoder else out).square().mean().backward()

    learn_flops, learning = _walk(family, learn)
    return Need(weights, max(acting, decoding), learning, act_flops / batch_size, learn_flops / micro_batch)


def _walk(family: Family, act: Callable[[], object]) -> tuple[float, int]:
    """(floating-point operations, most bytes alive at a time)."""
    networks = (family.network, *family.helpers)
    with FlopCounterMode(display=False) as flops, _Alive(networks) as alive, _as_on_a_gpu(family.dtype):
        act()
    return flops.get_total_flops(), alive.peak


def _as_on_a_gpu(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What autocast does on a GPU and cannot do on the meta device, for the functions that matter to memory; and attention
    that does not write out its matrix. Put in the functions' place, so that checkpoints that are computed again see it too."""

    def cast(function: Callable[..., Any], to: torch.dtype) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*tree_map_only(Tensor, lambda v: v.to(to), args), **kwargs)

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(*(v.to(dtype) for v in (query, key, value)))[0]

    return mock.patch.multiple(
        F, conv2d=cast(F.conv2d, dtype), linear=cast(F.linear, dtype), scaled_dot_product_attention=attention,
        group_norm=cast(F.group_norm, torch.float32), layer_norm=cast(F.layer_norm, torch.float32),
    )  # fmt: skip


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed. Those of the networks' weights were there before: an
    operation that looks at one another way makes nothing."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(
            p.untyped_storage() for network in networks for p in network.parameters()
        )
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, bytes: int) -> None:
        self.now -= bytes


@torch.no_grad()
def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in this device's matrix products, measured in a moment."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    rounds = 3
    start = time.perf_counter()
    for _ in range(rounds):
        b = a @ a
    b.sum().item()  # waits for the device
    return rounds * 2 * size**3 / (time.perf_counter() - start)
