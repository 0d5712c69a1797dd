"""Print what a user is told of each bad input: `python -m tests.reliability.show`. To be read aloud now and then."""

import os
import tempfile
import time

from ddpo import experiment, prompts
from ddpo.config import ConfigError
from tests.reliability.bad_configs import CONFIGS
from tests.reliability.bad_prompts import PROMPTS


def main() -> None:
    for name, bad in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            bad.place()
            started = time.perf_counter()
            try:
                experiment.read(bad.path, list(bad.words), 1)
                told = "ACCEPTED"
            except ConfigError as error:
                told = str(error)
            show(name, told, time.perf_counter() - started)
    for name, file in PROMPTS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            file.place()
            started = time.perf_counter()
            try:
                told = f"accepted: {prompts.load(file.path)[:3]}"
            except prompts.PromptError as error:
                told = str(error)
            show(name, told, time.perf_counter() - started)


def show(name: str, told: str, seconds: float) -> None:
    print(f"{name} ({seconds:.2f} s)", *told.splitlines(), sep="\n    ")


if __name__ == "__main__":
    main()
