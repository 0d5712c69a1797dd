"""`ddpo push`: what of a run is for others, to the Hugging Face hub. The only place that uploads, and only when asked to."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpo.progress import printable

# For others. Never: checkpoints, rewards.jsonl, preferences.jsonl, logs, trackers' files.
ALLOWED = ["README.md", "images/*", "lora/*.safetensors", "report.html", "config.yaml"]


def push(folder: Path, repo: str, private: bool, sure: bool, api: Any = None, ask: Callable[[str], str] = input) -> int:
    """Say what would be uploaded and how large it is, ask, and upload it. Returns the exit code: 0 done, 1 refused.

    Args:
        repo: "user/name"; made if there is none, public unless `private`.
        sure: do not ask.
        api: what stands in for huggingface_hub.HfApi(), which uses the token that `hf auth login` left.

    Raises:
        ValueError: `repo` is no name of a repository, or the hub refuses.
        FileNotFoundError: the folder holds no LoRA or no model card yet.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo, re.ASCII):
        raise ValueError(f"{repo!r} is no repository's name; write user/name")
    files = uploads(folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    if "README.md" not in names or not any(name.startswith("lora/") for name in names):
        raise FileNotFoundError(f"{folder} has no LoRA or model card yet; write them with: ddpo export {folder}")
    print(f"To https://huggingface.co/{repo} ({'private' if private else 'public'} where it has to be made):")
    for path, name in zip(files, names, strict=True):
        print(f"  {path.stat().st_size:>12,}  {printable(name)}")
    print(
        f"  {sum(path.stat().st_size for path in files):>12,}  bytes in all. Prompts are in README.md, images/ and report.html."
    )
    if not sure and not _agreed(ask):
        print("nothing was uploaded")
        return 1
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            repo_type="model",
            commit_message=f"{folder.resolve().name}, by ddpo",
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"the hub refused: {error}\nIs there a connection, and did you log in with `hf auth login`?"
        ) from error
    print(f"done: {getattr(done, 'commit_url', repo)}")
    return 0


def uploads(folder: Path) -> list[Path]:
    """The files of a run folder that are for others: plain files, no links."""
    found = (path for pattern in ALLOWED for path in sorted(folder.glob(pattern)))
    return [path for path in found if path.is_file() and not path.is_symlink() and not path.parent.is_symlink()]


def _agreed(ask: Callable[[str], str]) -> bool:
    try:
        return ask("Upload these? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # nobody is there
        return False
