"""Networks that scorers share: CLIP towers, each held once, and weight files, of which nothing is unpickled."""

import difflib
import hashlib
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rewards._tensors import require_few

HUB = "hf-hub:"
CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")  # files of torch.save, which are pickles

# ----------------------------------------------------------------------------------------------------------------------
# CLIP


class Tower:
    """An open_clip model: unit vectors in float32 for pictures and for texts. Loaded when first used.

    Args:
        source: what open_clip calls the model: an architecture, "hf-hub:OWNER/NAME" or "local-dir:PATH".
        pretrained: the weights of an architecture: a tag, a file, or "hf-hub:OWNER/NAME/FILE".
        resize_mode: how pictures are made square, if not as the model's own configuration says.
    """

    def __init__(self, source: str, pretrained: str | None = None, resize_mode: str | None = None):
        self.source, self.pretrained, self.resize_mode = source, pretrained, resize_mode
        self.device = torch.device("cpu")
        self._model: Any = None  # the classes that open_clip makes share no base that has encode_image
        self._texts: dict[str, Tensor] = {}
        self._last: tuple[weakref.ref[Tensor], tuple[int, int], Tensor] | None = None  # pictures, their state, features

    def load(self) -> Any:
        """The model, frozen, and its tokenizer. The first call reads them from disk, or downloads them."""
        if self._model is None:
            import open_clip  # here: it takes seconds, and a typo in a config should not

            weights, quick = self.pretrained, False
            if weights and (weights.startswith(HUB) or Path(weights).is_file()):
                weights = str(fetched(weights))
            elif weights:  # OpenAI's want QuickGELU, which open_clip only warns of when the architecture lacks it
                quick = bool(open_clip.get_pretrained_cfg(self.source, weights).get("quick_gelu"))
            changed = {"resize_mode": self.resize_mode} if self.resize_mode else None
            with torch.inference_mode(False):  # weights made in inference mode could never carry a gradient
                model = open_clip.create_model(
                    self.source, weights, force_quick_gelu=quick, force_preprocess_cfg=changed, require_pretrained=True
                )
            self._tokenize = open_clip.get_tokenizer(self.source)
            self._preprocessing = open_clip.get_model_preprocess_cfg(model)
            self._width = open_clip.get_model_config(self.source)["embed_dim"]
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    @property
    def width(self) -> int:
        """D, the numbers in an embedding. Loads the model."""
        self.load()
        return self._width

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._texts.clear()
        self._last = None
        if self._model is not None:
            self._model.to(self.device)

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D).

        Scorers that share a tower are given the same tensor, one after the other: where no gradient is wanted, its
        features are kept until another comes, or it is changed in place.
        """
        if images.requires_grad and torch.is_grad_enabled():
            return self._embedded(images)
        if images.is_inference():  # PyTorch does not count the changes of such tensors
            return self._embedded(images)
        state = (images._version, images.data_ptr())
        if self._last is None or self._last[0]() is not images or self._last[1] != state:
            with torch.no_grad():
                self._last = weakref.ref(images), state, self._embedded(images)
        return self._last[2].clone()  # whoever changes it changes his own, and outside inference mode may train on it

    def _embedded(self, images: Tensor) -> Tensor:
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


def tower(model: str, pretrained: str | None) -> Tower:
    """The one Tower of this model: two scorers that use it hold its weights once.

    Args:
        model: an open_clip architecture, "hf-hub:OWNER/NAME", "local-dir:PATH" or "menagerie".
        pretrained: the weights of an architecture: a tag, a file, or "hf-hub:OWNER/NAME/FILE".

    Raises:
        ValueError: there is no such model or no such weights.
    """
    return shared(*_resolve(model, pretrained))


@cache
def shared(source: str, pretrained: str | None = None, resize_mode: str | None = None) -> Tower:
    """`tower` of names that are known to be right."""
    return Tower(source, pretrained, resize_mode)


def _resolve(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """What open_clip is asked for, checked before anything loads."""
    if model == "menagerie":
        model = f"local-dir:{_menagerie()}"
    if model.startswith("local-dir:") and not Path(model.removeprefix("local-dir:"), "open_clip_config.json").is_file():
        raise ValueError(f"CLIP model {model!r}: there is no open_clip_config.json in that folder")
    if model.startswith(("local-dir:", HUB)):
        return model, None
    import open_clip

    if model not in open_clip.list_models():
        raise ValueError(f"CLIP model {model!r} is unknown to open_clip{_meant(model, open_clip.list_models())}")
    if pretrained and pretrained.startswith(HUB):
        return model, checked(pretrained, "CLIP weights")
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


# ----------------------------------------------------------------------------------------------------------------------
# Pictures as a CLIP wants them


def preprocess(images: Tensor, config: dict, half: Callable[[float], int] = round) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, h, w) as the model was trained on: resized, cropped or padded, normalised.

    The same as open_clip's own transform of PIL images, but differentiable and without its rounding to 8 bits.

    Args:
        images: any height and width.
        config: the model's `preprocess_cfg`: size, interpolation, resize_mode, fill_color (0 if absent), mean, std.
        half: what makes half a pixel whole where a crop begins: open_clip rounds, transformers takes `math.floor`.
    """
    size = config["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = _resized(images.shape[-2], images.shape[-1], height, width, config["resize_mode"])
    if shape != images.shape[-2:]:
        images = F.interpolate(images, shape, mode=config["interpolation"], antialias=True).clamp(0, 1)  # bicubic overshoots
    images = _centred(images, height, width, config.get("fill_color", 0) / 255, half)
    mean, std = (torch.tensor(config[k], device=images.device).view(-1, 1, 1) for k in ("mean", "std"))
    return (images - mean) / std


def _resized(height: int, width: int, wanted_height: int, wanted_width: int, mode: str) -> tuple[int, int]:
    """The size before cropping or padding.

    "squash" ignores the aspect ratio, "shortest" lets the longer side stick out, "longest" leaves the shorter one short.
    """
    if mode == "squash":
        return wanted_height, wanted_width
    if mode not in ("shortest", "longest"):
        raise ValueError(f"this CLIP wants resize_mode {mode!r}; only 'shortest', 'longest' and 'squash' are known")
    if mode == "longest" or wanted_height != wanted_width:  # here open_clip rounds, and else it cuts off
        ratios = (height / wanted_height, width / wanted_width)
        ratio = max(ratios) if mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)
    shorter = min(height, width)
    return height * wanted_height // shorter, width * wanted_width // shorter


def _centred(images: Tensor, height: int, width: int, fill: float, half: Callable[[float], int]) -> Tensor:
    """The middle of each picture, or the picture in the middle of a frame."""
    down, right = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
    if down or right:
        images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2), value=fill)
    top, left = half((images.shape[-2] - height) / 2), half((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def checked(source: str, what: str) -> str:
    """The name of a weight file as it is, if it can be one: a path, or hf-hub:OWNER/NAME/FILE. Nothing is downloaded.

    Raises:
        ValueError: says what `what` must be.
    """
    if source.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+/.+", source.removeprefix(HUB)):
            raise ValueError(f"{what} {source!r}: a file of the Hugging Face hub is written hf-hub:OWNER/NAME/FILE")
    elif not Path(source).is_file():
        raise ValueError(f"{what} {source!r}: there is no such file; hf-hub:OWNER/NAME/FILE would download one")
    if Path(source).suffix not in (".safetensors", *CHECKPOINTS):
        raise ValueError(f"{what} {source!r}: only .safetensors, {', '.join(CHECKPOINTS)} are read")
    return source


def fetched(source: str) -> Path:
    """The file that a name stands for, downloaded if it is on the hub; as .safetensors if it was a PyTorch checkpoint."""
    path = Path(source)
    if source.startswith(HUB):
        from huggingface_hub import hf_hub_download

        owner, name, file = source.removeprefix(HUB).split("/", 2)
        path = Path(hf_hub_download(f"{owner}/{name}", file))
    return _converted(path) if path.suffix in CHECKPOINTS else path


def _converted(source: Path) -> Path:
    """A checkpoint's tensors as .safetensors: written once, beside it or in the cache folder, and read ever after.

    The copy keeps the checkpoint's SHA-256. One that does not match is made again.
    """
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    beside = source.with_name(source.name + ".safetensors")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ddpo", "weights", f"{digest}.safetensors")
    for copy in (beside, cached):
        if _source_of(copy) == digest:
            return copy
    tensors = _tensors(source)
    try:
        return _written(beside, tensors, digest)
    except OSError:  # a folder that only others may write
        cached.parent.mkdir(parents=True, exist_ok=True)
        return _written(cached, tensors, digest)


def _source_of(copy: Path) -> str | None:
    """The SHA-256 of what a copy was made from."""
    try:
        require_few(copy)
        with safe_open(copy, framework="pt") as file:
            return (file.metadata() or {}).get("source_sha256")
    except (OSError, SafetensorError):  # none yet, or a damaged one
        return None


def _tensors(source: Path) -> dict[str, Tensor]:
    """What is in a checkpoint, if it is tensors by name, maybe under the key "state_dict"."""
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{source} is refused: it is damaged, or holds more than tensors, which could run code. None of it was run."
        ) from error
    named = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(named, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in named.items()):
        raise ValueError(f"{source} holds no tensors by name, as weights are published; is it the right file?")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


def _written(target: Path, tensors: dict[str, Tensor], digest: str) -> Path:
    """The copy, whole or not at all, whoever else writes it meanwhile."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, {"format": "pt", "source_sha256": digest})
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target
