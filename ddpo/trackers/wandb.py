"""Weights & Biases: offline files under the run folder's wandb/, to be sent with `wandb sync` by whoever wants to; or online."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ddpo.trackers import Session, Tracker


class Wandb(Tracker):
    """Offline unless WANDB_API_KEY or WANDB_MODE is set, or `mode` says otherwise. It is never asked for an account.

    Sent are the records, the config and the grids: no code, no console output, no facts about the machine.

    Args:
        mode: None is what the environment says, else offline.
        project, entity: where it is filed; an entity of None is the account's own.
    """

    package = "wandb"

    def __init__(self, mode: Literal["offline", "online"] | None = None, project: str = "ddpo", entity: str | None = None):
        self.mode, self.project, self.entity = mode, project, entity

    def start(self, session: Session) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its own crashes
        import wandb

        told = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        mode: Any = self.mode or told
        if mode == "online" and not wandb.api.api_key:  # else it would ask on the terminal, and wait
            raise RuntimeError("online, it needs an account: run `wandb login`, set WANDB_API_KEY, or set mode: offline")
        self._wandb: Any = wandb
        self._run = wandb.init(
            project=self.project, entity=self.entity, name=session.name, id=_identifier(session.folder), resume="allow",
            dir=session.folder, mode=mode, config=dict(session.settings),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
                x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
            ),
        )  # fmt: skip
        # Its own steps only ever grow: after a rewind it would drop records. The iteration is the axis instead.
        self._run.define_metric("iteration", hidden=True)
        self._run.define_metric("*", step_metric="iteration")

    def record(self, step: int, numbers: Mapping[str, float], pairs: Image.Image | None) -> None:
        picture = {} if pairs is None else {"pairs": self._wandb.Image(pairs)}
        self._run.log({**numbers, **picture, "iteration": step})

    def finish(self) -> None:
        self._run.finish()


def _identifier(folder: Path) -> str:
    """The run's id, kept in the folder: a resumed run has the same, also after the folder was moved."""
    path = folder / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
