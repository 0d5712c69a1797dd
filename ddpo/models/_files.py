"""A model's files, looked at before any weights are read: whether they are there, whole, and safe to open."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
MAY_LACK = ("safety_checker", "feature_extractor", "image_encoder", "vae", "text_encoder_3", "tokenizer_3")  # not loaded by all
PIPELINE = (
    "give a folder that a diffusers pipeline's save_pretrained wrote; a single file becomes one by "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
)


class UnusableModel(OSError):
    """A model is not there, or its files cannot be used. The message says which, why, and what to do."""


def require_usable(path: str | Path, built_in: tuple[str, ...] = ()) -> None:
    """Look at a folder's files without reading weights. Of what may be a hub id, nothing is said yet.

    Args:
        built_in: names that are models too, for the message.

    Raises:
        UnusableModel: there is no such folder, it holds no pipeline, or weights that are cut short or pickled.
    """
    folder = Path(path)
    if folder.is_dir():
        for name, part in read_index(folder).items():
            if (folder / name).is_dir():
                _require_whole(folder / name)
            elif isinstance(part, list) and part[:1] != [None] and name not in MAY_LACK:
                raise UnusableModel(f"{folder} lacks the folder {name} that its model_index.json lists; copy the model again")
    elif folder.is_file():
        raise UnusableModel(f"{path} is a file; {PIPELINE}")
    elif not HUB_ID.fullmatch(str(path)) or str(path).startswith("."):
        close = get_close_matches(str(path), built_in, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else "; mend the path, or write OWNER/NAME for a model of the hub"
        raise UnusableModel(f"there is no folder {path}{'' if folder.is_absolute() else f' in {Path.cwd()}'}{meant}")


def read_index(path: str | Path, revision: str | None = None, local_files_only: bool = False) -> dict[str, Any]:
    """The `model_index.json` of a folder or of a hub id.

    Raises:
        UnusableModel: it is not there (with `local_files_only`: not on this machine), or is none.
    """
    file = Path(path) / "model_index.json" if Path(path).is_dir() else _fetched(str(path), revision, local_files_only)
    if not file.is_file():
        raise UnusableModel(f"{path} holds no model_index.json; {PIPELINE}")
    try:
        index = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnusableModel(f"{file} is not JSON ({error}); copy the model again") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UnusableModel(f"{file} names no pipeline of diffusers' own; {PIPELINE}")
    return index


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Inside, what libraries say of files that they cannot use is told in one line, with what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        if isinstance(error, UnusableModel) or (isinstance(error, ValueError) and str(error).startswith(str(path))):
            raise  # said by us
        said = str(error).strip().partition("\n")[0].partition(". If you want")[0].removeprefix("Cannot load  because ")
        if "ignore_mismatched_sizes" in said:
            said = "a tensor has another shape than its config.json says (named above)"
        fix = (
            f"copy the model again, from the hub with `hf download {path}`" if HUB_ID.fullmatch(str(path)) else "copy it again"
        )
        if "remote code" in said or "custom code" in said:
            said, fix = "it wants to run code of its own", "take a model whose parts are all of diffusers and transformers"
        raise UnusableModel(f"{path}: {said.rstrip('.') or type(error).__name__}; {fix}") from error


def _require_whole(folder: Path) -> None:
    """Of one part of a pipeline."""
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UnusableModel(
            f"{folder} holds {pickled[0]} and no .safetensors; pickled weights can run code when they are opened, so they are "
            "not: take a copy with .safetensors, or where you trust it load it in diffusers and save_pretrained it"
        )
    for name in names:
        if name.endswith(".safetensors"):
            _names(folder / name)


def _names(file: Path) -> list[str]:
    """The tensors of a file, from its header, which also says where the file ends."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UnusableModel(f"{file} is damaged or cut short ({error}); copy it again") from error


def _fetched(path: str, revision: str | None, local_files_only: bool) -> Path:
    """The index of a hub id, asked for once: diffusers would ask again for each part of what is not there."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    local_files_only = local_files_only or not _hub_answers()
    command = f"hf download {path}" + (f" --revision {revision}" if revision else "")
    try:
        return Path(hf_hub_download(path, "model_index.json", revision=revision, local_files_only=local_files_only))
    except hub.HFValidationError as error:
        raise UnusableModel(f"{path!r} is neither a folder nor OWNER/NAME of a model of the hub") from error
    except hub.GatedRepoError as error:
        remedy = f"do so at https://huggingface.co/{path}, then run `hf auth login`"
        raise UnusableModel(f"{path} wants its licence accepted first: {remedy}") from error
    except hub.RepositoryNotFoundError as error:
        raise UnusableModel(f"{path} is not on the hub, or private: mend the name, or run `hf auth login`") from error
    except hub.RevisionNotFoundError as error:
        raise UnusableModel(f"{path} has no revision {revision!r}; mend model.revision, or leave it out") from error
    except hub.RemoteEntryNotFoundError as error:
        raise UnusableModel(f"{path} holds no model_index.json; {PIPELINE}") from error
    except OSError as error:  # not in the cache, and not to be had
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        remedy = f"run `{command}` where there is a network, or set model.path to a folder"
        raise UnusableModel(f"{path} is not in the cache {constants.HF_HUB_CACHE}, and {why}: {remedy}") from error


def _hub_answers() -> bool:
    """Asked once, for at most ten seconds: a download would try six times before it gave up."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # httpx's or requests' own, whichever the hub's library is made of
        return False
    return True
