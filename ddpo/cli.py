"""The console command: `ddpo train|generate|app|report|rewards`."""

import argparse
import sys
from pathlib import Path

from ddpo import train
from rewards import RewardError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 stopped with an error, 2 something asked for is wrong."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["train"]:  # its words are a config and its overrides: they have a parser of their own
        return train.main(words[1:])
    if words[:1] == ["app"]:
        from ddpo.app.frame import main as serve

        return serve(words[1:])
    parser = argparse.ArgumentParser(prog="ddpo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("train", help="train on one process; `accelerate launch -m ddpo.train` is for several", add_help=False)
    report = verbs.add_parser("report", help="write a run folder's report.html")
    report.add_argument("run", type=Path)
    generate = verbs.add_parser("generate", help="draw base | tuned pictures of a prompt from a run's LoRA")
    generate.add_argument("run", type=Path)
    generate.add_argument("-p", "--prompt", required=True)
    generate.add_argument("--seeds", type=int, default=4, help="pairs, from seed 0 on")
    generate.add_argument("-o", "--output", type=Path, default=Path("pairs.png"))
    verbs.add_parser("app", help="look at runs, compare, draw, vote and score in the browser", add_help=False)
    verbs.add_parser("rewards", help="list, try, serve and train reward scorers", add_help=False)
    try:
        if words[:1] == ["rewards"]:
            from ddpo import scorers

            scorers.main(words[1:])
            return 0
        args = parser.parse_args(words)
        if args.verb == "report":
            from ddpo.report import write_report

            print(write_report(args.run))
        else:
            from ddpo.experiment import generate_pairs

            print(generate_pairs(args.run, args.prompt, args.seeds, args.output))
    except (ValueError, FileNotFoundError, RewardError) as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
