"""The real thing: `accelerate launch -m ddpo.train configs/NAME.yaml key.path=value ...`

Exit codes (a launcher may give its own in their place; run.json has `status` and `exit_reason`):

    0    done
    1    training stopped with an error
    2    the config or what it names is wrong (nothing was loaded)
    3    numbers that are not finite: three in ten updates, or a weight
    4    an alarm (ddpo/health.py, run.on_alarm): over-optimisation, collapse, ...
    130  interrupted by Ctrl-C, 143 by SIGTERM; a second signal ends the process at once

After each of them the same command goes on where it stopped.
"""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

USAGE = "usage: accelerate launch -m ddpo.train CONFIG.yaml [--dry-run] [section.key=value ...]"


def main(argv: list[str]) -> int:
    # Checked first, with little imported: a misspelt key should cost seconds.
    from ddpo import experiment
    from ddpo.config import ConfigError

    words = [word for word in argv if word != "--dry-run"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    try:
        config = experiment.read(words[0], words[1:], int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as e:
        if int(os.environ.get("RANK", "0")) == 0:
            print(e, file=sys.stderr)
        return 2
    if len(words) < len(argv):
        from ddpo.plan import plan

        try:
            print(plan(config.recipe))
        except (ValueError, OSError) as e:  # the model is of another family, or cannot be drawn with at that size
            print(e, file=sys.stderr)
            return 2
        return 0
    return experiment.run(config.recipe, words)


def command(argv: list[str]) -> int:
    """`main` as a program of its own, which is told of signals from the first import on. It returns where all went well; elsewhere
    it ends the process, without waiting for what other threads and processes may be waiting for."""
    _at_signals(_leave)  # while libraries are imported; experiment.run takes over from there
    # Python gives signals their default back while it ends: whoever asked a finished run to end would see it killed. Registered
    # before what libraries register, this is called after it.
    atexit.register(_at_signals, signal.SIG_IGN)
    try:
        code = main(argv)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    _at_signals(lambda *_: os._exit(0))  # all is done; what other threads and libraries still do need not be waited for
    return code


def _at_signals(do: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, do)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{signal.Signals(number).name}: stopped outside of training; nothing is lost\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
