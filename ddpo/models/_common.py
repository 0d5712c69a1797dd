"""What every family shares: precision, devices, helpers that come to work only when called, pictures through the VAE."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddpo
from ddpo.models import Cond
from ddpo.models._files import UnusableModel, read_index, require_usable, told
from ddpo.models._kind import network_class, refuse_other_family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHIPPED = Path(ddpo.__file__).parent / "menagerie"
BUILT_IN = {"menagerie": _SHIPPED / "weights", "menagerie-flow": _SHIPPED / "weights-flow"}  # model.path: folder


class Networks(ABC):
    """A denoiser and its helpers, on a device, with an `AutoencoderKL` between latents and pictures."""

    network: Any
    vae: Any
    pipe: Any  # diffusers' pipeline, for its tokenizers and its encode_prompt
    lora_prefix: str
    pipeline: str  # diffusers' class
    latent_shape: tuple[int, int, int]
    source: str
    dtype: torch.dtype
    offload: bool
    device: torch.device
    assumed = False

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

    @abstractmethod
    def _output(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One call of the denoiser, in its own dtype."""

    def load(self, path: str, revision: str | None, dtype: str, gradient_checkpointing: bool, offload: bool) -> Any:
        """Set the networks, frozen, from a folder, a hub id, or a built-in model; returns the scheduler's config.

        Raises:
            UnusableModel: its files are not there, or damaged.
            ValueError: it is none of this family.
        """
        self.source, self.dtype, self.offload = path, DTYPES[dtype], offload
        place = BUILT_IN.get(path, path)
        with told(place):
            require_usable(place, tuple(BUILT_IN))
            _quiet()
            pipe = self._open(place, revision)
            self._take(pipe)
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

    def _networks(self, path: str | Path, revision: str | None, *without: str) -> dict[str, nn.Module]:
        """The pipeline's networks but these, by name, read one by one: of a pipeline nobody tells which tensors are made up.

        Raises UnusableModel where a tensor is not there. diffusers and transformers would draw it at random, and only warn.
        """
        found = {}
        index = read_index(path, revision, local_files_only=True)  # the hub was asked which family it is: it is here
        for part, entry in index.items():
            if part in without or not (kind := network_class(entry)):
                continue
            place, dtype = self._place(part, path, revision), self._stored(part)
            found[part], seen = kind.from_pretrained(**place, dtype=dtype, use_safetensors=True, output_loading_info=True)
            if missing := sorted(seen["missing_keys"]):
                where = "/".join(str(place[key]) for key in ("pretrained_model_name_or_path", "subfolder") if key in place)
                raise UnusableModel(f"{where} lacks {missing[0]} ({len(missing)} tensors in all); copy the model again")
        return found

    def _stored(self, part: str) -> torch.dtype:
        """What a network is read in."""
        return self.dtype

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

    def denoise(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's raw output, float32. Autocast ends here: outside, it would keep half-precision copies of the
        LoRA weights, and an earlier self would silently act as the present one."""
        # On a CPU, at few tokens, attention written out is faster than the fused kernel's backward pass. Checkpointing
        # computes its second forward pass outside of this context, where the kernel would be another.
        plain = x.device.type == "cpu" and x[0, 0].numel() <= 256 and not self.network.is_gradient_checkpointing
        with self._half(x.device), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return self._output(network, x.to(self.dtype), t, cond).float()

    def decode(self, latents: Tensor) -> Tensor:
        half = self._half(latents.device) if self.vae.dtype == self.dtype else nullcontext()
        with self._at_work(self.vae), half:
            images = self.vae.decode(self._unscaled(latents.to(self.vae.dtype))).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], of `image_size` -> (B, C, h, w) float32, what `decode` makes them of: the posterior's mean."""
        images = (2 * images - 1).to(self.device, self.vae.dtype)
        half = self._half(self.device) if self.vae.dtype == self.dtype else nullcontext()
        with self._at_work(self.vae), half:
            latents = self.vae.encode(images).latent_dist.mean.float()
        zero = self._unscaled(torch.zeros_like(latents[:1]))  # each channel's scale and shift, whatever the family
        return (latents - zero) / (self._unscaled(torch.ones_like(zero)) - zero)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """From the denoiser's units to the VAE's."""
        return latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its pictures, in pixels."""
        return self.latent_shape[1] * self._pixels, self.latent_shape[2] * self._pixels

    @property
    def _pixels(self) -> int:
        """On the side of a latent's element."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _side(self, resolution: int | None, own: int, patch: int = 1, most: int | None = None) -> int:
        """Of the latent, for pictures of this many pixels; `own` where it is None.

        Raises ValueError where the network cannot draw them: it cuts a latent into patches, of which at most so many fit on a side.
        """
        if resolution is None:
            return own
        unit = self._pixels * patch
        if resolution % unit or (most and resolution > unit * most):
            limit = f", at most {unit * most}" if most else ""
            raise ValueError(f"resolution is {resolution}; it must be a multiple of {unit}{limit}")
        return resolution // self._pixels

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
