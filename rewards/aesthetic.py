"""LAION's improved aesthetic predictor: what people would rate a picture, from about 1 to 10, whatever it shows.

A small network on CLIP's embedding of the picture, trained on SAC, LAION-Logos and AVA (Schuhmann 2022,
github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE). DDPO's aesthetic reward.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rewards.clip import tower

WIDTH = 768  # of the CLIP embedding


class Aesthetic:
    """The predicted rating. Differentiable in the pictures. Prompts are not looked at.

    Args:
        head: the predictor's weights, a .safetensors file under the published names (layers.0.weight ... layers.7.bias). The
            published file is a pickle: convert it once, as the message says that refuses it.
        model, pretrained: the CLIP it was trained on, as in `rewards.clip.Clip`.

    CLIP is loaded when the first picture is scored, or by `load()`.

    Raises:
        ValueError: the head or the CLIP cannot be used.
    """

    def __init__(self, head: str, model: str = "ViT-L-14", pretrained: str | None = "openai"):
        self.head = _load_head(Path(head))
        self.tower = tower(model, pretrained)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        features = self.tower.images(images)
        if features.shape[1] != WIDTH:
            raise ValueError(
                f"{self.tower.source} has embeddings of {features.shape[1]} numbers; the aesthetic head wants {WIDTH}"
            )
        with torch.autocast(features.device.type, enabled=False):
            return self.head.to(features.device)(features)[:, 0]

    def load(self) -> None:
        self.tower.load()

    def to(self, device: torch.device | str) -> "Aesthetic":
        self.tower.to(device)  # the head follows
        return self


class Head(nn.Module):
    """(B, 768) unit vectors -> (B, 1). There is no activation between the layers: as published."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 1024),
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


def _load_head(path: Path) -> Head:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"aesthetic head {path}: only .safetensors is read, because other formats can run code. Convert it once:\n"
            '    python -c "import sys, torch, safetensors.torch as s; '
            's.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
            f"{path} {path.with_suffix('.safetensors')}"
        )
    if not path.is_file():
        raise ValueError(f"aesthetic head {path}: there is no such file")
    head = Head()
    try:
        head.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"aesthetic head {path} is not the published one: {error}") from error
    return head.eval().requires_grad_(False)
