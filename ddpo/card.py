"""README.md of a run as a model card for the hub: what was tuned, what came of it, and what it cost, with pictures.

It is made from the run folder alone and contacts no one. Prompts and names are data: none of them can end the front
matter, break a table, load a picture or become markup.
"""

import importlib
import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

import yaml
from PIL import Image

from ddpo.durable import replace
from ddpo.figures import Comparison, chart, comparisons, means, number, percent
from ddpo.runs import CELL, Pair, Run, file_name, pairs

PAIRS = 4  # of different prompts, in the card
CURVES = 3  # scorers whose curves are in the card
SIDE = 768  # pixels of a picture in the card, at most
PROMPT_LENGTH = 300  # characters of a prompt in the card
TAGS = ["text-to-image", "diffusers", "lora", "template:sd-lora", "reinforcement-learning", "ddpo"]
# The style of a chart that stands alone, for light and dark pages.
STYLE = (
    "text{fill:#596167;font:11px system-ui,sans-serif}.side{text-anchor:end}.foot{text-anchor:middle}"
    ".rule{stroke:#8b909655;fill:none}.line{fill:none;stroke-width:2}.line.tuned{stroke:#0a8a84}"
    ".line.base{stroke:#84878c;stroke-dasharray:5 5}.band{opacity:.18}.band.tuned,.dot.tuned{fill:#0a8a84}"
    ".band.base,.dot.base{fill:#84878c}@media(prefers-color-scheme:dark){text{fill:#a5acb3}}"
)


def write_card(run: Run, target: Path, iteration: int) -> Path:
    """Write README.md and its images/ under `target`.

    Args:
        iteration: that the LoRA beside it is of. Its evaluation and pictures are shown, where it has any.

    Raises:
        ValueError: an index of the run's pictures is damaged.
    """
    final = next((m for m in run.evaluations if m["iteration"] == iteration), None)
    found = comparisons(final) if final else []
    shown = _saved(run, target / "images", _first_prompts(pairs(run.folder, iteration) if iteration else []))
    settings = yaml.safe_load(run.config) or {}
    text = Template((Path(__file__).parent / "assets" / "card.md").read_text("utf-8")).substitute(
        name=escaped(run.name),
        base=f"[{escaped(run.base)}](https://huggingface.co/{run.base})" if "/" in run.base else escaped(run.base),
        algorithm=escaped(run.facts.get("algorithm") or "not recorded"),
        rewards=escaped(" and ".join(run.trained) or "an unrecorded reward"),
        result=_result(run, iteration, final),
        table=_table(run, found),
        curves=_curves(run, target / "images"),
        pairs=_pairs(shown),
        failures=_bullets(_failures(run, final, found)),
        snippet=_snippet(run, settings),
        file=file_name(run.name),
        command=fenced(str(run.facts.get("command") or "not recorded"), "bash"),
        config=fenced(run.config or "config.yaml is missing", "yaml"),
        licences=_bullets(_licences(run)),
    )
    path = target / "README.md"
    replace(path, (_front_matter(run, shown) + text).encode("utf-8", "backslashreplace"))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Text from outside


def line(text: Any) -> str:
    """Text as one line of printable characters: no line ends, control characters, bidirectional overrides or surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def escaped(text: Any) -> str:
    """Text as Markdown that reads as the text, on one line, also in a table or a picture's description."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!:@])|(?<=www)(\.)", r"\\\1\2", line(text))


def fenced(text: str, language: str) -> str:
    """Text as a block of code; the fence is longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _front_matter(run: Run, shown: list[Pair]) -> str:
    """YAML with every text in JSON's quotes, so that nothing in it can end it."""
    entries: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": TAGS}
    if "/" in run.base:  # the hub refuses what is no model's id
        entries = {"base_model": run.base, "base_model_relation": "adapter", **entries}
    if shown:
        entries["widget"] = [{"text": _short(tuned.prompt), "output": {"url": tuned.path}} for _, tuned in shown]
    return "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items()) + "---\n"


def _short(prompt: str) -> str:
    plain = line(prompt)
    return plain if len(plain) <= PROMPT_LENGTH else plain[:PROMPT_LENGTH] + " ..."


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def _result(run: Run, iteration: int, final: dict | None) -> str:
    if final is None:
        return f"After iteration {iteration} the tuned model was not evaluated: no numbers compare it with the base model."
    count = len(pairs(run.folder, iteration))
    kl = next((m.get("kl/step_nats") for m in run.metrics if m["iteration"] == iteration), None)
    return textwrap.fill(
        f"After {iteration} iterations, on {count} pictures of held-out prompts, drawn from the same noise by both (training seed "
        f"{run.facts.get('seed', 'not recorded')}). Tuned beats base in {percent(final.get('eval/win_rate'))} of the pairs; KL to the "
        f"base model {number(kl)} nats a denoising step. Intervals: 95 %, paired bootstrap.",
        120,
    )


def _table(run: Run, found: list[Comparison]) -> str:
    if not found:
        return ""
    head = "| scorer | trained on | base | tuned | difference [95 % interval] | |\n|---|---|---|---|---|---|\n"
    rows = []
    for c in sorted(found, key=lambda c: c.scorer not in run.trained):
        base, tuned = means(c.base, c.tuned).split(" → ")
        trained = "yes" if c.scorer in run.trained else "no"
        rows.append(f"| {escaped(c.scorer)} | {trained} | {base} | {tuned} | {escaped(c.change)} | {c.verdict} |")
    return head + "\n".join(rows)


def _curves(run: Run, images: Path) -> str:
    """Charts of the first scorers, those trained on first, as SVG files of their own."""
    scorers = dict.fromkeys(c.scorer for m in run.evaluations for c in comparisons(m))
    for old in images.glob("curve-*.svg"):
        old.unlink()
    named = []
    for i, scorer in enumerate(sorted(scorers, key=lambda s: s not in run.trained)[:CURVES], 1):
        curves = [c for c in run.evaluated(scorer) if c.points]
        if len(run.evaluations) < 2 or not curves:
            continue
        drawn = chart(f"{line(scorer)} on held-out prompts", curves)
        alone = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="640" ', 1).replace(
            ">", f"><style>{STYLE}</style>", 1
        )
        images.mkdir(parents=True, exist_ok=True)
        (images / f"curve-{i}.svg").write_text(alone, "utf-8", "backslashreplace")
        named.append(
            f"![{escaped(scorer)} over the iterations, tuned and base](images/curve-{i}.svg)\n\n{escaped(scorer)} on held-out prompts, by "
            "iteration: tuned (solid), base (dashed), and the 95 % interval of the difference laid around the base."
        )
    return "\n\n".join(named)


def _failures(run: Run, final: dict | None, found: list[Comparison]) -> Iterable[str]:
    """What a reader should fear, in this run's own numbers."""
    untrained = [c for c in found if c.scorer not in run.trained]
    for c in untrained:
        if c.verdict == "lower":
            change = f"{means(c.base, c.tuned)} ({escaped(c.change)})"
            yield f"**{escaped(c.scorer)} fell** {change}, and it was not trained on: the reward is gamed."
    if final and not untrained:
        yield "No scorer was held out: nothing here can tell a better picture from one that only pleases the reward."
    elif final and not any(c.verdict == "lower" for c in untrained):
        kept = ", ".join(f"{escaped(c.scorer)} {escaped(c.change)}" for c in untrained)
        yield f"No scorer that was held out fell beyond its interval ({kept})."
    if final and (base := final.get("eval/diversity/base")):
        tuned = final.get("eval/diversity/tuned")
        change = "" if tuned is None else f", {percent(tuned / base)} of the base model's"
        yield f"Diversity of pictures of one prompt: {means(base, tuned)}{change}. Far below 100 % they have become alike."
    told = dict.fromkeys(alarm["text"] for m in run.metrics for alarm in m.get("alarms") or [])
    yield from (f"Alarm: {escaped(text)}" for text in told)
    for name, card in _cards(run, ["rewards"]):
        if card is not None:
            yield f"{escaped(name)}, maximised alone, is gamed by: {escaped(card.gamed_by)}."
    if final is None:
        yield "Not known: this iteration was not evaluated."


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def _first_prompts(found: list[Pair]) -> list[Pair]:
    """One pair of each of the first prompts: which ones has nothing to do with how they scored."""
    return list({pair[0].prompt: pair for pair in reversed(found)}.values())[::-1][:PAIRS]


def _saved(run: Run, images: Path, chosen: list[Pair]) -> list[Pair]:
    """The pairs with the paths of their copies under `images`, in place of the last card's. A pair with a bad picture is left out."""
    for old in images.glob("pair-*.png"):
        old.unlink()
    saved = []
    for i, pair in enumerate(chosen, 1):
        names = [f"pair-{i}-{side}.png" for side in ("base", "tuned")]
        try:
            copies = [_copy(run.folder, sample.path) for sample in pair]
        except OSError:
            continue
        images.mkdir(parents=True, exist_ok=True)
        for name, copy in zip(names, copies, strict=True):
            copy.save(images / name)
        base, tuned = (
            type(s)(s.iteration, s.prompt, s.seed, s.scores, f"images/{n}") for s, n in zip(pair, names, strict=True)
        )
        saved.append((base, tuned))
    return saved


def _copy(folder: Path, name: str) -> Image.Image:
    """A picture of the run folder, small ones enlarged by a whole number, large ones shrunk. Raises OSError where it is not."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise FileNotFoundError(path)
    with Image.open(path) as file:
        image = file.convert("RGB")
    factor = CELL // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    return image


def _pairs(shown: list[Pair]) -> str:
    if not shown:
        return "There are no pictures of this iteration."
    head = "One of each of the first prompts, not chosen by score.\n\n| base | tuned | prompt and scores |\n|---|---|---|\n"
    return head + "\n".join(_row(*pair) for pair in shown)


def _row(base: Any, tuned: Any) -> str:
    prompt = escaped(_short(tuned.prompt))
    scores = "; ".join(f"{escaped(name)} {means(base.scores.get(name), value)}" for name, value in tuned.scores.items())
    return f"| ![base]({base.path}) | ![tuned]({tuned.path}) | {prompt} (seed {tuned.seed}). {scores} |"


# ----------------------------------------------------------------------------------------------------------------------
# Use and licences


def _snippet(run: Run, settings: dict[str, Any]) -> str:
    rollout = settings.get("rollout") or {}
    steps = (settings.get("evaluation") or {}).get("num_steps") or rollout.get("num_steps") or 50
    revision = f", revision={json.dumps(run.facts['revision'])}" if run.facts.get("revision") else ""
    source = json.dumps(run.base)
    built_in = {"menagerie": "weights", "menagerie-flow": "weights-flow"}
    imports = "import torch\nfrom diffusers import DiffusionPipeline\n"
    if run.base in built_in:
        imports = f"from pathlib import Path\n\nimport ddpo\n{imports}"
        source = f'Path(ddpo.__file__).parent / "menagerie" / "{built_in[run.base]}"'
    kind = (settings.get("model") or {}).get("dtype") or "float32"
    size = (settings.get("model") or {}).get("resolution")
    sized = f", height={size}, width={size}" if size else ""
    return (
        f"{imports}\npipe = DiffusionPipeline.from_pretrained({source}{revision}, dtype=torch.{kind})\n"
        'pipe.load_lora_weights("lora", weight_name="pytorch_lora_weights.safetensors")  # or the id of this repository\n'
        f'picture = pipe("a prompt", num_inference_steps={steps}, guidance_scale={rollout.get("guidance", 5.0)}{sized}).images[0]'
    )


def _licences(run: Run) -> Iterable[str]:
    for name, card in _cards(run, ["rewards", "held_out_rewards"]):
        yield f"{escaped(name)}: {escaped(card.licence) if card else 'not known to ddpo'}"


def _cards(run: Run, keys: list[str]) -> Iterable[tuple[str, Any]]:
    """(name, its rewards.Card or None) of the run's scorers. Only scorers of this package are looked at: nothing is imported
    because a run's files say so."""
    for name in dict.fromkeys(name for key in keys for name in run.facts.get(key) or []):
        module, _, attribute = str(name).partition(":")
        yield name, _card(module, attribute)


def _card(module: str, attribute: str) -> Any:
    package = Path(importlib.import_module("rewards").__file__ or "").parent
    if not re.fullmatch("[a-z][a-z0-9_]*", module) or not (package / f"{module}.py").is_file():
        return None
    held = vars(importlib.import_module(f"rewards.{module}"))
    own = [c for c in held.values() if hasattr(c, "card") and getattr(c, "__module__", "") == f"rewards.{module}"]
    named = [c for c in own if c.__name__ == attribute] if attribute else own
    return named[0].card if named else None
