"""trackio: a database under the run folder's trackio/. See it with: TRACKIO_DIR=RUN/trackio trackio show"""

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ddpo.trackers import Session, Tracker, numbers, pairs


class Trackio(Tracker):
    """Local, without an account. It goes to a Space only where the environment says so (TRACKIO_SPACE_ID).

    Args:
        project: under which trackio files the run.
    """

    package = "trackio"

    def __init__(self, project: str = "ddpo"):
        self.project = project

    def start(self, session: Session) -> None:
        folder = (session.folder / "trackio").resolve()
        os.environ["TRACKIO_DIR"] = str(folder)  # read when trackio is imported
        import trackio
        from trackio.utils import TRACKIO_DIR

        if TRACKIO_DIR.resolve() != folder:
            raise RuntimeError(f"it writes to {TRACKIO_DIR}, for it was imported before; start the run in a process of its own")
        # It writes in the background, so a killed run may have lost some: what is known of the run is recorded again.
        for run in trackio.Api().runs(self.project) if session.first and folder.exists() else []:
            if run.name == session.name:
                run.delete()
        self._trackio: Any = trackio
        with contextlib.redirect_stdout(io.StringIO()):  # its banner
            self._run = trackio.init(
                self.project, session.name, config=dict(session.settings), embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        for line in session.past():
            self.record(line["iteration"], numbers(line), pairs(session.folder, line))

    def record(self, step: int, numbers: Mapping[str, float], pairs: Image.Image | None) -> None:
        picture = {} if pairs is None else {"pairs": self._trackio.Image(pairs)}
        self._run.log({**numbers, **picture}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()
