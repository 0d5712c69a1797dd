"""A model without its numbers: a family's networks on torch's meta device, in the sizes that its configs say."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ddpo.models import Cond
from ddpo.models._common import Networks


class OnMeta(Networks):
    """Of an outline, before the family in its bases. The configs are those on this machine, or else, because a hub id was not
    downloaded yet, the published model's: `assumed` is true then.
    """

    assumed: bool

    @abstractmethod
    def published(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        """The pipeline's parts: {name: (class, the published model's config as far as it differs from the class's defaults)}."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Cond:
        """Conditions of the right shapes."""

    def _open(self, path: str | Path, revision: str | None) -> Any:
        parts = self.published()
        try:
            self._refuse_other(path, revision, local_files_only=True)
            configs = {name: _read(kind, self._place(name, path, revision)) for name, (kind, _) in parts.items()}
        except OSError:
            self.assumed = True
            configs = {name: _config(kind)(**sizes) if _config(kind) else sizes for name, (kind, sizes) in parts.items()}
        scheduler = SimpleNamespace(config=configs.pop("scheduler"))
        with torch.device("meta"):
            networks = {name: _built(parts[name][0], config) for name, config in configs.items()}
        for network in networks.values():
            nn.Module.to(network, self.dtype)  # diffusers' own `to` warns, even where there is nothing to warn of
        return SimpleNamespace(**networks, scheduler=scheduler)

    def _half(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()  # the meta device has no autocast; whoever walks through an outline sees to it

    def _at_work(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # there is nothing to move


def _config(kind: Any) -> Any:
    """The class of its configs, of transformers' classes. diffusers' have dicts."""
    return getattr(kind, "config_class", None)


def _read(kind: Any, place: dict[str, Any]) -> Any:
    """Raises OSError where it is not on this machine."""
    return (_config(kind).from_pretrained if _config(kind) else kind.load_config)(**place, local_files_only=True)


def _built(kind: Any, config: Any) -> Any:
    return kind(config) if _config(kind) else kind.from_config(config)
