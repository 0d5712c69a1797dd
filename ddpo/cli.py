"""The console command: `ddpo VERB ...`; each verb imports what it needs."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ddpo import train
from ddpo.durable import FileError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 stopped with an error, 2 something asked for is wrong; those of `train` in ddpo/train.py."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] and (own := OWN.get(words[0])):
            return own[0](words[1:])
        args = _parser().parse_args(words)
        return args.do(args) or 0
    except (ValueError, OSError, FileError) as e:
        print(e, file=sys.stderr)
        return 2


def _app(words: list[str]) -> int:
    from ddpo.app.frame import main as serve

    return serve(words)


def _doctor(words: list[str]) -> int:
    from ddpo import doctor

    return doctor.main(words)


def _rewards(words: list[str]) -> int:
    from ddpo import scorers
    from rewards import RewardError

    try:
        scorers.main(words)
    except RewardError as e:
        raise ValueError(str(e)) from e
    return 0


OWN: dict[str, tuple[Callable[[list[str]], int], str]] = {  # verbs with a parser of their own, and a word on each
    "train": (train.command, "train on one process; `accelerate launch -m ddpo.train` is for several"),
    "app": (_app, "look at runs, compare, draw, vote and score in the browser"),
    "rewards": (_rewards, "list, try, serve and train reward scorers"),
    "doctor": (_doctor, "is this machine fit to train on, and if not, why"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ddpo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, (_, summary) in OWN.items():
        verbs.add_parser(name, help=summary, add_help=False)

    def verb(do: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        """A verb about a run folder."""
        made = verbs.add_parser(do.__name__.strip("_"), help=summary)
        made.set_defaults(do=do)
        made.add_argument("run", type=Path, help="a run folder")
        return made

    drawn = verb(_generate, "draw base | tuned pictures of a prompt from a run's LoRA")
    drawn.add_argument("-p", "--prompt", required=True)
    drawn.add_argument("--seeds", type=int, default=4, help="pairs, from seed 0 on")
    drawn.add_argument("--scale", type=float, default=1.0, help="of the LoRA, 0 to 1.5")
    drawn.add_argument("--iteration", type=int, help="after which the LoRA was saved; the last by default")
    drawn.add_argument("--steps", type=int, help="denoising steps; as in the run's evaluations by default")
    drawn.add_argument("--guidance", type=float, help="as in the run by default")
    drawn.add_argument("-o", "--output", type=Path, default=Path("pairs.png"))
    counted = verb(_votes, "what the votes on a run's pictures say; or their export")
    counted.add_argument("--export", type=Path, metavar="FILE", help="a .jsonl or .csv file, in Pick-a-Pic's columns")
    verb(_report, "write a run folder's report.html")
    exported = verb(_export, "write a checkpoint's LoRA files, model card and report.html")
    exported.add_argument("--checkpoint", default="latest", help="best, latest, or the number of an iteration")
    exported.add_argument("-o", "--output", type=Path, help="any folder; the run folder by default")
    pushed = verb(_push, "upload a run's LoRA, model card and report.html to the hub")
    pushed.add_argument("repo", help="user/name on the hub")
    pushed.add_argument("--private", action="store_true")
    pushed.add_argument("--yes", action="store_true", help="do not ask first")
    return parser


def _generate(args: argparse.Namespace) -> None:
    from ddpo.studio import generate_pairs

    how = (args.steps, args.guidance, args.scale, args.iteration)
    print(generate_pairs(args.run, args.prompt, args.seeds, args.output, *how))


def _votes(args: argparse.Namespace) -> None:
    from ddpo import tally

    print(tally.main(args.run, args.export))


def _report(args: argparse.Namespace) -> None:
    from ddpo.report import write_report

    print(write_report(args.run))


def _export(args: argparse.Namespace) -> None:
    from ddpo.finish import export_run

    print(export_run(args.run, args.checkpoint, args.output or args.run))


def _push(args: argparse.Namespace) -> int:
    from ddpo.push import push

    return push(args.run, args.repo, args.private, args.yes)


if __name__ == "__main__":
    sys.exit(main())
