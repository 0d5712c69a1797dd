"""Print what a user is told of each bad input: `python -m tests.reliability.show`. To be read aloud now and then."""

import os
import tempfile
import time
from collections.abc import Callable

from ddpo import experiment, prompts
from ddpo.config import ConfigError
from tests.reliability.bad_configs import CONFIGS, Bad
from tests.reliability.bad_prompts import PROMPTS, File


def main() -> None:
    for name, bad in CONFIGS.items():
        show(name, bad, lambda bad=bad: experiment.read(bad.path, list(bad.words), 1) and "ACCEPTED")
    for name, file in PROMPTS.items():
        show(name, file, lambda file=file: f"accepted: {prompts.load(file.path)[:3]}")


def show(name: str, bad: Bad | File, ask: Callable[[], str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        bad.place()
        started = time.perf_counter()
        try:
            told = ask()
        except (ConfigError, prompts.PromptError) as error:
            told = str(error)
        print(f"{name} ({time.perf_counter() - started:.2f} s)", *told.splitlines(), sep="\n    ")


if __name__ == "__main__":
    main()
