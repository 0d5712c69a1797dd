"""What every family's networks share: precision, devices, and helpers that come to work only when called."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ddpo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHIPPED = Path(ddpo.__file__).parent / "menagerie"
BUILT_IN = {"menagerie": _SHIPPED / "weights", "menagerie-flow": _SHIPPED / "weights-flow"}  # model.path: folder


class Networks(ABC):
    """The denoiser and its helpers, on a device."""

    network: nn.Module
    dtype: torch.dtype
    offload: bool
    device: torch.device

    @property
    @abstractmethod
    def helpers(self) -> list[nn.Module]:
        """All networks but the denoiser."""

    def to(self, device: torch.device) -> None:
        self.device = device
        for module in (self.network, *([] if self.offload else self.helpers)):
            module.to(device)

    def _half(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _at_work(self, module: nn.Module) -> AbstractContextManager[None]:
        return _visit(module.to(self.device), self.offload)


class OnMeta:
    """Of an outline, before the family in its bases: its networks are on torch's meta device."""

    def _half(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()  # the meta device has no autocast; whoever walks through an outline sees to it

    def _at_work(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # there is nothing to move


@contextmanager
def _visit(module: nn.Module, offload: bool) -> Iterator[None]:
    """Where a gradient is wanted, the module stays until it is next called without: the graph holds on to weights where they are."""
    try:
        yield
    finally:
        if offload and not torch.is_grad_enabled():
            module.to("cpu")


def quiet() -> None:
    """No progress bars while loading: the parts of one model need none of their own."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
