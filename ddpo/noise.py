"""Named randomness: every random number has an address.

A stream of random numbers must be saved, restored and kept in step on every process; an address need not. The noise of
one picture is drawn from its own generator, seeded by a hash of (run seed, salt, iteration, group, member, purpose,
step). So a picture does not depend on the batch it is drawn in or on how many processes there are, and an interrupted
iteration is simply done again.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

Address = tuple[int | str, ...]


def generator(*address: int | str) -> torch.Generator:
    """A CPU generator that belongs to this address and to no other.

    Drawing on the CPU makes the numbers the same on every kind of device.
    """
    digest = hashlib.sha256(json.dumps(address).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal(addresses: Sequence[Address], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, float32, (len(addresses), *shape): row i is drawn from `addresses[i]` alone."""
    rows = [torch.randn(*shape, generator=generator(*address)) for address in addresses]
    return torch.stack(rows).to(device)


def permutation(n: int, *address: int | str) -> list[int]:
    """The numbers 0 to n - 1 in an order that belongs to this address."""
    return torch.randperm(n, generator=generator(*address)).tolist()
