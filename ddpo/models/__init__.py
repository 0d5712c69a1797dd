"""A model family: a pretrained text-to-image model cut into the pieces that RL needs. One file a family."""

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ddpo.diffusion import Level, Prediction
from ddpo.schedule import Schedule

Cond = dict[str, Tensor]  # whatever the network is conditioned on, batch first


class Family(Protocol):
    network: nn.Module  # the denoiser: the only part that ever trains
    schedule: Schedule
    interpret: Callable[[Tensor, Tensor, Level], Prediction]  # from_eps or from_v
    latent_shape: tuple[int, int, int]
    lora_targets: list[str]  # module names that get a LoRA unless the user names others
    lora_prefix: str  # what diffusers calls the network in a LoRA file: "unet" or "transformer"
    dtype: torch.dtype  # what the network computes in; the mathematics around it is float32
    source: str  # hub id or folder, for run.json and the model card
    device: torch.device
    assumed: bool  # of an outline: its sizes are a guess, since the model is not on this machine
    offload: bool  # whether the helpers leave the device while they have nothing to do
    outline: ClassVar[type]  # the same family, taking the same options, with networks of shapes and no numbers (meta device)

    @property
    def architecture(self) -> str: ...  # ModelSpec's name of it, for the LoRA files
    @property
    def image_size(self) -> tuple[int, int]: ...  # (height, width) of its pictures, in pixels
    @property
    def helpers(self) -> list[nn.Module]: ...  # all networks but the denoiser: text encoders, VAE
    def to(self, device: torch.device) -> None: ...
    def encode(self, prompts: list[str]) -> Cond: ...
    def denoise(self, network: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...  # (B, 3, H, W) float32 in [0, 1]
    def encode_images(self, images: Tensor) -> Tensor: ...  # (B, 3, height, width) in [0, 1] -> latents that `decode` to them
