"""TensorBoard: event files under the run folder's tb/. See them with: tensorboard --logdir runs"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ddpo.trackers import Session, Tracker


class TensorBoard(Tracker):
    """Scalars under the keys of metrics.jsonl, pairs as "pairs", the config as text. Nothing leaves the machine."""

    package = "tensorboard"

    def start(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was recorded at the first step or later was lost with the process that wrote it: purged, it is not shown.
        self._writer: Any = SummaryWriter(str(session.folder / "tb"), purge_step=session.first)
        if session.first == 0:
            text = yaml.safe_dump(dict(session.settings), sort_keys=False)
            self._writer.add_text("config", "    " + text.replace("\n", "\n    "), 0)

    def record(self, step: int, numbers: Mapping[str, float], pairs: Image.Image | None) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        if pairs is not None:
            self._writer.add_image("pairs", np.asarray(pairs), step, dataformats="HWC")
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()
