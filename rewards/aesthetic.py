"""LAION's aesthetic predictors: what people would rate a picture, from about 1 to 10, whatever it shows.

A small head on CLIP's embedding of the picture, of which there are two:

    v1  one linear layer, trained on SAC (Schuhmann 2022, github.com/LAION-AI/aesthetic-predictor):
        sa_0_4_vit_l_14_linear.pth, and sa_0_4_vit_b_32_linear.pth for the smaller CLIP
    v2  five layers, trained on SAC, LAION-Logos and AVA (Schuhmann 2022,
        github.com/christophschuhmann/improved-aesthetic-predictor): sac+logos+ava1-l14-linearMSE.pth. DDPO's aesthetic reward.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rewards import Card
from rewards._tensors import read_tensors
from rewards._weights import checked, fetched, tower


class Aesthetic:
    """The predicted rating. Differentiable in the pictures. Prompts are not looked at.

    Args:
        head: the predictor's weights as they are published, or as safetensors: a file, or "hf-hub:OWNER/NAME/FILE", such as
            hf-hub:trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth (v2). Which of the two it is shows in its names.
        model, pretrained: the CLIP that the head was trained on, as in `rewards.clip.Clip`.

    A .pth is a pickle: it is read as bare tensors (`weights_only`) and kept as a .safetensors beside it, or in
    ~/.cache/ddpo/weights, from then on. Head and CLIP are loaded when the first picture is scored, or by `load()`.

    Raises:
        ValueError: the head or the CLIP is not there; or, when they are loaded, is no such head or does not fit this CLIP.
    """

    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        range="about 1 to 10, not bounded",
        gamed_by="one glossy, painterly style for every prompt; in the end the subject goes",
        watch="clip, diversity",
        weights="LAION's head, which you name, on OpenAI's ViT-L-14",
        size="a few MB, and 1.7 GB for the CLIP",
        licence="Apache-2.0 (v2; v1 not looked up); the CLIP's as in clip",
    )

    def __init__(self, head: str, model: str = "ViT-L-14", pretrained: str | None = "openai"):
        self.head = checked(head, "aesthetic head")
        self.tower = tower(model, pretrained)
        self._head: nn.Module | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        head, features = self._loaded(), self.tower.images(images)
        with torch.autocast(features.device.type, enabled=False):
            return head.to(features.device)(features)[:, 0]

    def load(self) -> None:
        self._loaded()

    def to(self, device: torch.device | str) -> "Aesthetic":
        self.tower.to(device)  # the head follows
        return self

    def _loaded(self) -> nn.Module:
        if self._head is None:
            with torch.inference_mode(False):  # weights made in inference mode could never carry a gradient
                head, width = _read(self.head)
            if width != self.tower.width:
                raise ValueError(
                    f"aesthetic head {self.head} wants embeddings of {width} numbers; those of {self.tower.source} have "
                    f"{self.tower.width}. Name the CLIP that it was trained on: ViT-L-14 has 768, ViT-B-32 has 512."
                )
            self._head = head
        return self._head


class _MLP(nn.Module):
    """v2: (B, D) unit vectors -> (B, 1). There is no activation between the layers: as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def _read(source: str) -> tuple[nn.Module, int]:
    """The head, frozen, and the width of the embeddings that it takes."""
    try:
        weights = read_tensors(fetched(source))
    except SafetensorError as error:
        raise ValueError(f"aesthetic head {source} is no safetensors file: {error}") from error
    first = weights.get("weight", weights.get("layers.0.weight"))
    if first is None or first.ndim != 2:
        raise ValueError(
            f"aesthetic head {source} is none of LAION's: v1 holds weight and bias, v2 layers.0.weight to layers.7.bias; "
            f"this holds {', '.join(sorted(weights)[:4]) or 'nothing'}"
        )
    width = first.shape[1]
    head = nn.Linear(width, 1) if "weight" in weights else _MLP(width)
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"aesthetic head {source} is not as LAION published it: {error}") from error
    return head.eval().requires_grad_(False), width
