"""Weight files are opened with limits: a small header can claim a million tensors, which take seconds and memory to list."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LARGEST_HEADER = 16 << 20  # bytes
MOST_TENSORS = 100_000


def require_few(path: Path) -> None:
    """Looks at a safetensors file's header, before the library does.

    Raises:
        SafetensorError: it is none, or has a header of more than LARGEST_HEADER bytes or MOST_TENSORS tensors.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise SafetensorError(f"{path}: its header would have {length} bytes; at most {LARGEST_HEADER} are read")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise SafetensorError(f"{path}: its header is no JSON") from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise SafetensorError(f"{path}: its header is no table of at most {MOST_TENSORS} tensors")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by name, on the CPU. Raises as `require_few`."""
    require_few(path)
    return load_file(path)
