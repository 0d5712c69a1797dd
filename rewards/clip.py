"""CLIP score: how well a picture fits its prompt, by any CLIP that open_clip can load (Radford et al. 2021)."""

import difflib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Clip:
    """The cosine similarity of a picture and its prompt, from -1 to 1. Differentiable in the pictures.

    Args:
        model: an open_clip architecture ("ViT-L-14"), "hf-hub:OWNER/NAME", "local-dir:PATH", or "menagerie": the small CLIP
            that ships with ddpo, found in the folder of that package (which is not imported).
        pretrained: which weights of an architecture, an open_clip tag or a file; the other kinds of model bring their own.
        prompt: score every picture against this text instead of its own prompt.

    Weights are loaded when the first picture is scored, or by `load()`. Nothing is unpickled: open_clip takes
    safetensors where the model has them, and reads other files as bare tensors (`weights_only`).

    Raises:
        ValueError: there is no such model or no such weights.
    """

    def __init__(self, model: str = "ViT-L-14", pretrained: str | None = "openai", prompt: str | None = None):
        self.tower, self.prompt = tower(model, pretrained), prompt

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        texts = prompts if self.prompt is None else [self.prompt] * len(prompts)
        return (self.tower.images(images) * self.tower.texts(texts)).sum(1)

    def load(self) -> None:
        self.tower.load()

    def to(self, device: torch.device | str) -> "Clip":
        self.tower.to(device)
        return self


class Tower:
    """An open_clip model: unit vectors in float32 for pictures and for texts. Loaded when first used."""

    def __init__(self, model: str, pretrained: str | None):
        self.source, self.pretrained = _resolve(model, pretrained)
        self.device = torch.device("cpu")
        self._model: Any = None  # the classes that open_clip makes share no base that has encode_image
        self._texts: dict[str, Tensor] = {}

    def load(self) -> Any:
        """The model, frozen. The first call reads it from disk, or downloads it."""
        if self._model is None:
            import open_clip  # here: it takes seconds, and a typo in a config should not

            # Weights of OpenAI's models want QuickGELU, which open_clip only warns of when the architecture lacks it.
            quick = bool(self.pretrained and open_clip.get_pretrained_cfg(self.source, self.pretrained).get("quick_gelu"))
            with torch.inference_mode(False):  # weights made in inference mode could never carry a gradient
                model = open_clip.create_model(self.source, self.pretrained, force_quick_gelu=quick, require_pretrained=True)
            self._tokenize = open_clip.get_tokenizer(self.source)
            self._preprocessing = open_clip.get_model_preprocess_cfg(model)
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._texts.clear()
        if self._model is not None:
            self._model.to(self.device)

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        model = self.load()
        pixels = preprocess(images.to(self.device, torch.float32), self._preprocessing)
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(model.encode_image(pixels), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, D). Each is computed once and alone, so that it does not depend on its neighbours."""
        model = self.load()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for text in set(texts) - self._texts.keys():
                tokens = self._tokenize([text]).to(self.device)
                self._texts[text] = F.normalize(model.encode_text(tokens), dim=1)[0]
        return torch.stack([self._texts[t] for t in texts])


@cache
def tower(model: str, pretrained: str | None) -> Tower:
    """The one Tower of this model: two scorers that use it hold its weights once."""
    return Tower(model, pretrained)


def preprocess(images: Tensor, config: dict) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, h, w) as the model was trained on: resized, cropped in the centre, normalised.

    The same as open_clip's own transform of PIL images, but differentiable and without its rounding to 8 bits.

    Args:
        images: any height and width.
        config: the model's `preprocess_cfg`: size, interpolation, resize_mode, mean, std.
    """
    size = config["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = _resized(images.shape[-2], images.shape[-1], height, width, config["resize_mode"])
    if shape != images.shape[-2:]:
        images = F.interpolate(images, shape, mode=config["interpolation"], antialias=True).clamp(0, 1)  # bicubic overshoots
    top, left = round((shape[0] - height) / 2), round((shape[1] - width) / 2)
    images = images[..., top : top + height, left : left + width]
    mean, std = (torch.tensor(config[k], device=images.device).view(-1, 1, 1) for k in ("mean", "std"))
    return (images - mean) / std


def _resized(height: int, width: int, wanted_height: int, wanted_width: int, mode: str) -> tuple[int, int]:
    """The size before the crop: "squash" ignores the aspect ratio, "shortest" lets the longer side stick out."""
    if mode == "squash":
        return wanted_height, wanted_width
    if mode != "shortest":
        raise ValueError(f"this CLIP wants resize_mode {mode!r}; only 'shortest' and 'squash' are known")
    if height * wanted_width > width * wanted_height:
        return height * wanted_width // width, wanted_width
    return wanted_height, width * wanted_height // height


def _resolve(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """What open_clip is asked for, checked before anything loads."""
    if model == "menagerie":
        model = f"local-dir:{_menagerie()}"
    if model.startswith("local-dir:") and not Path(model.removeprefix("local-dir:"), "open_clip_config.json").is_file():
        raise ValueError(f"CLIP model {model!r}: there is no open_clip_config.json in that folder")
    if model.startswith(("local-dir:", "hf-hub:")):
        return model, None
    import open_clip

    if model not in open_clip.list_models():
        raise ValueError(f"CLIP model {model!r} is unknown to open_clip{_meant(model, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or not (open_clip.get_pretrained_cfg(model, pretrained) or Path(pretrained).is_file()):
        meant = _meant(str(pretrained), tags)
        raise ValueError(f"CLIP weights {pretrained!r} are neither a tag of {model} nor a file{meant}; tags: {', '.join(tags)}")
    return model, pretrained


def _menagerie() -> Path:
    package = find_spec("ddpo")
    if package is None or not package.submodule_search_locations:
        raise ValueError("CLIP model 'menagerie' ships with ddpo, which is not installed")
    return Path(package.submodule_search_locations[0], "menagerie", "weights", "clip")


def _meant(wrong: str, right: list[str]) -> str:
    close = difflib.get_close_matches(wrong, right, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
