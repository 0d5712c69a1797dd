"""Between tensors, PIL pictures and PNG files. Files of strangers are opened with limits."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

LARGEST = 4096  # pixels a side, of a picture that is read from outside
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_FILE = 4 * LARGEST**2  # bytes: such a picture with nothing compressed
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow reads forty more, and most of its security holes were in those


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8 on the CPU, rounded to the nearest of 256 levels."""
    return (images.detach() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> B pictures of 8 bits."""
    return [Image.fromarray(pixels) for pixels in to_bytes(images).numpy()]


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def upright(data: bytes) -> Tensor:
    """A picture file's content -> (3, H, W) in [0, 1], turned as its EXIF says, as photographs need it. Raises as `opened`."""
    return to_tensor(ImageOps.exif_transpose(opened(data)))


def in_folder(folder: Path) -> list[Path]:
    """The pictures in a folder, by name. Subfolders, hidden files and other files are not looked at."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file() and not f.name.startswith("."))


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """A picture from the bytes of a PNG, JPEG or WebP file.

    Raises:
        ValueError: it is none of these, is damaged, or has more than LARGEST pixels a side or LARGEST_FILE bytes.
    """
    if len(data) > LARGEST_FILE:
        raise ValueError(f"it has {len(data)} bytes; at most {LARGEST_FILE} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if max(picture.size) > LARGEST:
                raise ValueError(f"it is {picture.width} x {picture.height}; at most {LARGEST} pixels a side are read")
            picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"not a whole PNG, JPEG or WebP picture: {error}") from error
    return picture
