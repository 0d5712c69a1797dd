"""Pictures of a run as data URIs: what the page shows comes out of the run's own folder and is a picture, or is not shown."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from ddpo.runs import Sample, webp

FORMATS = ("WEBP", "PNG", "JPEG")
WHOLE = 2_000_000  # bytes of a picture that is looked at closely; a larger one is shown smaller
THUMB = 160  # pixels of a gallery's picture, the longer side
SMALL = 200  # pixels under which a picture is shown with sharp edges


@dataclass(frozen=True)
class Picture:
    """A picture for the page."""

    source: str  # data URI
    size: tuple[int, int]

    @property
    def style(self) -> str:
        return "small" if max(self.size) < SMALL else "large"


def whole(folder: Path, sample: Sample | None) -> Picture | None:
    """The picture as it was saved, or None where it is missing, unreadable or not in the run's folder."""
    return _read(folder, sample, _whole)


def thumb(folder: Path, sample: Sample | None) -> Picture | None:
    """The same, of at most THUMB pixels a side."""
    return _read(folder, sample, _thumb)


def _read(folder: Path, sample: Sample | None, encode: Callable[[Path, int], Picture]) -> Picture | None:
    if sample is None:
        return None
    try:
        path = (folder / sample.path).resolve(strict=True)
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        return encode(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's words for "no whole picture"
        return None


@lru_cache(maxsize=16)
def _whole(path: Path, _changed: int) -> Picture:
    with Image.open(path, formats=FORMATS):
        content, size = webp(path, WHOLE)
    return Picture(_uri(content), size)


@lru_cache(maxsize=1024)
def _thumb(path: Path, _changed: int) -> Picture:
    with Image.open(path, formats=FORMATS) as file:
        image = file.convert("RGB")
        if max(file.size) <= THUMB and file.format == "WEBP":
            return Picture(_uri(path.read_bytes()), file.size)
    image = ImageOps.contain(image, (THUMB, THUMB))
    memory = io.BytesIO()
    image.save(memory, "WEBP", quality=80)
    return Picture(_uri(memory.getvalue()), image.size)


def _uri(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"
