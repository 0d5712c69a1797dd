"""`ddpo rewards ...`: what scorers there are, what they say of a picture, whether they keep the contract."""

import argparse
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rewards
from ddpo import components
from ddpo.config import load
from ddpo.panel import summary
from ddpo.rewarding import Scorer, part


def main(words: list[str]) -> None:
    """Runs one verb. Raises what the scorer raises, or ValueError where something asked for is wrong."""
    verbs = _parsers()
    overall = argparse.ArgumentParser(prog="ddpo rewards", description=__doc__)
    overall.add_argument("verb", choices=list(verbs), metavar="|".join(verbs))
    run, parser = verbs[overall.parse_args(words[:1]).verb]
    run(parser.parse_intermixed_args(words[1:]))  # options of a scorer may stand before and behind ours


def _parsers() -> dict[str, tuple[Callable[[argparse.Namespace], None], argparse.ArgumentParser]]:
    """{verb: (what it does, what it takes)}"""
    verbs = {}

    def verb(run: Callable[[argparse.Namespace], None], summary: str, of_scorer: bool = True) -> argparse.ArgumentParser:
        name = run.__name__.strip("_")
        made = argparse.ArgumentParser(prog=f"ddpo rewards {name}", description=summary)
        verbs[name] = (run, made)
        if of_scorer:
            made.add_argument("name", help="as in a config: clip, jpeg:Compressibility, path/to/file.py:Name")
            made.add_argument("words", nargs="*", metavar="option=value", help="the scorer's options, as in a config")
        return made

    verb(_list, "All scorers.", of_scorer=False)
    verb(_info, "What a scorer measures, its options, its weights, and how it is gamed.")
    tried = verb(_score, "Score pictures: NAME picture.png ... -p PROMPT option=value ...")
    tried.add_argument("-p", "--prompt", required=True)
    tried.add_argument("-m", "--metadata", type=json.loads, default={}, help="a JSON object")
    checked = verb(_check, "Try the contract on a scorer: run this on your own.")
    checked.add_argument("-p", "--prompt", action="append", help="prompts that it can score, if it cannot take any")
    checked.add_argument("-m", "--metadata", type=json.loads, action="append", help="a JSON object for each prompt")
    served = verb(_serve, "Answer for a scorer over HTTP, to {name: remote} on another machine.")
    served.add_argument("--host", default="127.0.0.1")
    served.add_argument("--port", type=int, default=8000)
    served.add_argument("--token-env", help="the environment variable that holds the token; needed unless host is this machine")
    voted = verb(_train, "A reward from votes: fit a head on CLIP features to a preferences.jsonl.", of_scorer=False)
    voted.add_argument("votes", type=Path)
    voted.add_argument("output", type=Path, help="the head, a .safetensors file for {name: learned, head: FILE}")
    voted.add_argument("--model", default="ViT-L-14", help="an open_clip model, or menagerie")
    voted.add_argument("--pretrained", default="openai")
    voted.add_argument("--seed", type=int, default=0, help="of which votes are held out")
    for parser in (tried, checked, served, voted):
        parser.add_argument("--device", default="cpu")
    return verbs


@dataclass(frozen=True)
class _Choice:
    """What is chosen on the command line, checked as a config is."""

    reward: Scorer


def _chosen(args: argparse.Namespace) -> tuple[str, rewards.Part]:
    words = [f"reward.name={args.name}", *(f"reward.{word}" for word in args.words)]
    made = part(load(None, words, _Choice).recipe.reward)
    return rewards.name_of(made.reward), made


def _list(args: argparse.Namespace) -> None:
    rows = [("name", "range", "gradient", "needs", "what it measures")]
    for name, factory in _built_in():
        card: rewards.Card = factory.card
        gradient = "yes" if getattr(factory, "differentiable", False) else "no"
        rows.append((name, card.range, gradient, f"ddpo[{card.extra}]" if card.extra else "", summary(factory)))
    rows += [(name, "", "", e.value.split(":")[0], "from an installed package") for name, e in _offered().items()]
    print(_columns(rows))
    print("\nYour own: {name: path/to/file.py:Name} or {name: package.module:Name}, see docs/rewards.md")


def _info(args: argparse.Namespace) -> None:
    factory = components.find(args.name, "rewards", ("images", "prompts", "metadata"))
    print(f"{args.name}\n\n{inspect.getdoc(factory) or 'It has no docstring.'}\n")
    rows = [(key, "needed" if p.default is None else repr(p.default())) for key, p in components.parameters(factory).items()]
    if card := getattr(factory, "card", None):
        rows += [(key.replace("_", " "), str(value)) for key, value in vars(card).items() if value]
    rows.append(("gradient", "yes" if getattr(factory, "differentiable", False) else "no"))
    print(_columns(rows))


def _score(args: argparse.Namespace) -> None:
    from rewards._pictures import opened, to_tensor

    files = [Path(word) for word in args.words if "=" not in word or Path(word).is_file()]
    if not files:
        raise ValueError("name at least one picture: ddpo rewards score NAME picture.png -p PROMPT")
    args.words = [word for word in args.words if Path(word) not in files]
    name, made = _chosen(args)
    pictures = [to_tensor(opened(path.read_bytes())) for path in files]
    made.to(args.device)
    batches = [slice(0, len(files))] if made.groupwise else [slice(i, i + 1) for i in range(len(files))]
    try:
        for rows in batches:
            images = torch.stack(pictures[rows]).to(args.device)
            with torch.no_grad():
                scores = made.score(name, images, [args.prompt] * len(images), [args.metadata] * len(images))
            for path, score in zip(files[rows], scores.tolist(), strict=True):
                print(f"{path}  {name}  {'cannot be scored' if score != score else f'{score:.6g}'}")
    finally:
        rewards.Rubric({name: made}).close()


def _check(args: argparse.Namespace) -> None:
    name, made = _chosen(args)
    rubric = rewards.Rubric({name: made}).load().to(args.device)
    try:
        verdict = rewards.check(made.reward, args.prompt, args.metadata, args.device)
    finally:
        rubric.close()
    rows = [
        ("scores", f"{verdict.low:.4g} to {verdict.high:.4g} on random pictures"),
        ("noise", f"{verdict.noise:.2g}: the largest difference between two scores of one picture"),
        ("speed", f"{verdict.images_per_second:,.3g} images a second, 64 x 64, in batches of {len(args.prompt or [0, 0, 0])}"),
        ("gradient", "reaches the pictures" if verdict.gradient else "none"),
    ]
    print(f"{name} keeps the contract\n{_columns(rows)}")


def _serve(args: argparse.Namespace) -> None:
    from rewards._serve import serve

    name, made = _chosen(args)
    made.to(args.device)
    serve(made.reward, name, args.host, args.port, args.token_env)


def _train(args: argparse.Namespace) -> None:
    from rewards._preferences import train

    print(train(args.votes, args.output, args.model, args.pretrained, args.seed, args.device))


def _built_in() -> Iterator[tuple[str, Any]]:
    """(name in a config, class) of every scorer of the package."""
    for module in components.modules("rewards"):
        found = vars(importlib.import_module(f"rewards.{module}")).values()
        known = [c for c in found if hasattr(c, "card") and c.__module__ == f"rewards.{module}"]
        for factory in known:
            yield module if len(known) == 1 else f"{module}:{factory.__name__}", factory


def _offered() -> dict[str, Any]:
    return components.entry_points("rewards")


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
