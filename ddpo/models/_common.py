"""What every family's networks share: precision, devices, and helpers that come to work only when called."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ddpo
from ddpo.models._files import require_all, require_usable, told
from ddpo.models._kind import refuse_other_family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHIPPED = Path(ddpo.__file__).parent / "menagerie"
BUILT_IN = {"menagerie": _SHIPPED / "weights", "menagerie-flow": _SHIPPED / "weights-flow"}  # model.path: folder


class Networks(ABC):
    """The denoiser and its helpers, on a device."""

    network: Any
    vae: Any
    lora_prefix: str  # also the folder of its weights
    pipeline: str  # diffusers' class
    dtype: torch.dtype
    offload: bool
    device: torch.device

    @property
    @abstractmethod
    def helpers(self) -> list[nn.Module]:
        """All networks but the denoiser."""

    @abstractmethod
    def _open(self, path: str | Path, revision: str | None) -> Any:
        """diffusers' pipeline of a folder or hub id."""

    @abstractmethod
    def _take(self, pipe: Any) -> None:
        """Set the networks from a pipeline's parts."""

    def load(self, path: str, revision: str | None, gradient_checkpointing: bool) -> Any:
        """Set the networks, frozen, from a folder, a hub id, or a built-in model; returns the scheduler's config.

        Raises:
            UnusableModel: its files are not there, or damaged.
            ValueError: it is none of this family.
        """
        place = BUILT_IN.get(path, path)
        with told(place):
            require_usable(place, tuple(BUILT_IN))
            _quiet()
            pipe = self._open(place, revision)
            self._take(pipe)
            require_all(place, self.lora_prefix, self.network)
        for module in (self.network, *self.helpers):
            module.eval().requires_grad_(False)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()  # where a reward is differentiated
        self.device = next(self.network.parameters()).device
        return pipe.scheduler.config

    def _refuse_other(self, path: str | Path, revision: str | None, local_files_only: bool = False) -> None:
        """Raises ValueError where the model is another family's; OSError where it is not."""
        refuse_other_family(path, revision, self.pipeline, local_files_only)

    def _place(self, part: str, path: str | Path, revision: str | None) -> dict[str, Any]:
        """Where a part of the pipeline is read from, as `from_pretrained` takes it."""
        return {"pretrained_model_name_or_path": path, "subfolder": part, "revision": revision}

    @property
    @abstractmethod
    def reader(self) -> tuple[Any, int]:
        """Of the tokenizers the one that reads most of a prompt, and how many tokens that is."""

    def unread(self, prompts: Sequence[str]) -> str | None:
        """A warning where prompts are longer than the text encoders read, or None."""
        tokenizer, most = self.reader
        lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
        if not (cut := [i for i, length in enumerate(lengths) if length > most]):
            return None
        longest = max(cut, key=lambda i: lengths[i])
        return (
            f"{len(cut)} of {len(lengths)} prompts are longer than the {most} tokens that this model reads, and are cut off there; "
            f"the longest has {lengths[longest]}: {prompts[longest][:60]!r}"
        )

    def to(self, device: torch.device) -> None:
        self.device = device
        for module in (self.network, *([] if self.offload else self.helpers)):
            module.to(device)

    def _half(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _at_work(self, module: nn.Module) -> AbstractContextManager[None]:
        return _visit(module.to(self.device), self.offload)


@contextmanager
def _visit(module: nn.Module, offload: bool) -> Iterator[None]:
    """Where a gradient is wanted, the module stays until it is next called without: the graph holds on to weights where they are."""
    try:
        yield
    finally:
        if offload and not torch.is_grad_enabled():
            module.to("cpu")


def _quiet() -> None:
    """No progress bars while loading: the parts of one model need none of their own."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
