"""report.html: what a run asked for, how it went and what came of it, on one page made from the run folder alone.

The page needs nothing but itself: its pictures are inside it, its policy forbids every request, and only its own script
may run.
"""

import base64
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpo.durable import replace
from ddpo.figures import Alarm, Comparison, Curve, alarms, chart, comparisons, duration, forest, means, number, percent, places
from ddpo.jsonl import append, read, truncate, write
from ddpo.page import Html, Page, join
from ddpo.runs import Pair, Run, Sample, grid, save_samples, webp

__all__ = ["Run", "Sample", "append", "cut", "grid", "read", "save_samples", "truncate", "write_report"]

GAINS, LOSSES = 8, 4  # pairs in the page
PICTURE_BYTES = 120_000  # of one picture in the page, at most: with base64, 24 of them stay under 4 MB
PROMPT_LENGTH = 400  # characters of a prompt in the page

_page = Page("report.html")


def cut(folder: Path, done: int, left: str = "") -> None:
    """Drop what the files of a run say of iterations after `done`, which will be done again; metrics go to the file `left`, if named."""

    def kept(line: dict) -> bool:
        return line["iteration"] <= done

    metrics = folder / "metrics.jsonl"
    if left:
        write(folder / left, [line for line in read(metrics) if not kept(line)])
    truncate(metrics, kept)
    truncate(folder / "samples" / "index.jsonl", kept)


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the run folder's report.html, there or under `target`: one page of at most 5 MB that opens from disk and loads nothing.

    A run that still goes on, or whose files are missing in part, gives a page that says so and shows what there is.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError, durable.DamagedFile: a file in it is damaged; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such run folder")
    run = Run.load(folder)
    page = _page.fill(
        "page",
        script_hash=_page.source("script"),
        script=Html(_page.parts["script"]),
        name=run.name,
        objective=f"tuned for {' and '.join(run.trained) or 'an unrecorded reward'}",
        status=_status(run),
        notes=_notes(run),
        result=_result(run),
        asked=_facts(_asked(run)),
        alarms=_alarms(alarms(run.metrics)),
        curves=_curves(run),
        pairs=_pairs(run),
        command=_text(run.facts.get("command")),
        resume=_text(run.facts.get("resume_command")),
        environment=_facts(_environment(run)),
        config=run.config or "config.yaml is missing.",
    )
    path = (target or folder) / "report.html"
    replace(path, page.encode("utf-8", "backslashreplace"))
    return path


def _status(run: Run) -> str:
    seconds = run.last("seconds")
    taken = "" if seconds is None else f" in {duration(seconds)}"
    parts = [run.facts.get("status"), run.facts.get("exit_reason"), f"{run.iteration} iterations{taken}"]
    return " · ".join(str(p) for p in parts if p)


def _notes(run: Run) -> Html:
    """What a reader must know before trusting the rest: a sentence for each thing that is not there."""
    renew = f"ddpo report {shlex.quote(str(run.folder))}"
    found = {
        "run.json is missing: the page cannot say how this run was made.": not run.facts,
        f"This run had not ended when the page was written. To renew it: {renew}": run.facts and not run.facts.get("ended"),
        "config.yaml is missing.": not run.config,
        "metrics.jsonl records no iteration yet, so there are no curves.": run.iteration == 0,
        "The tuned model has not been evaluated yet, so no numbers compare it with the base model.": not run.evaluations,
        _fired(alarms(run.metrics)): bool(alarms(run.metrics)),
        "There are no sample pictures of both the base and the tuned model, so no pairs are shown.": not run.pairs,
    }
    items = [_page.fill("note", text=text) for text, true in found.items() if true]
    return _page.fill("notes", items=join(items)) if items else Html()


def _result(run: Run) -> Html:
    if not run.evaluations:
        return _page.fill("plain", text="Not known yet: the tuned model has not been evaluated.")
    final = run.evaluations[-1]
    found = comparisons(final)
    trained = [c for c in found if c.scorer in run.trained]
    rest = [c for c in found if c not in trained]
    rows = [
        row
        for title, group in (("Trained on", trained), ("Held out: measured, never trained on", rest))
        for row in ([_page.fill("result_group", text=title), *map(_result_row, group)] if group else [])
    ]
    facts = {
        "Tuned beats base": f"{percent(final.get('eval/win_rate'))} of pairs",
        "Diversity": means(final.get("eval/diversity/base"), final.get("eval/diversity/tuned")),
        "KL to base, a step": f"{number(run.last('kl/step_nats'))} nats",
        "Evaluated after": f"iteration {final['iteration']}",
    }
    headline = _headline((trained + rest)[0])
    return join([headline, _page.fill("results", rows=join(rows)), _page.fill("facts", items=_facts(facts))])


def _headline(c: Comparison) -> Html:
    difference, _, interval = c.change.partition(" ")
    return _page.fill("headline", scorer=c.scorer, means=means(c.base, c.tuned), difference=difference, interval=interval)


def _result_row(c: Comparison) -> Html:
    picture = Html(forest(c)) if c.whole else Html()
    values = {"means": means(c.base, c.tuned), "change": c.change, "verdict": c.verdict, "style": c.verdict.replace(" ", "-")}
    return _page.fill("result", scorer=c.scorer, forest=picture, **values)


def _asked(run: Run) -> dict[str, str]:
    facts, prompts = run.facts, run.facts.get("prompts") or {}
    return {
        "Reward": _said(run.asked("rewards")) or ", ".join(run.trained) or "not recorded",
        "Held-out rewards": _said(run.asked("held_out_rewards")).removeprefix("[]") or "none",
        "Algorithm": _said(run.asked("algorithm")) or "not recorded",
        "Model": _text(facts.get("model")) + (f"\nrevision {facts['revision']}" if facts.get("revision") else ""),
        "Training prompts": _prompts(prompts.get("train")),
        "Held-out prompts": _prompts(prompts.get("held_out")),
    }


def _said(section: str) -> str:
    """Without the options that are left open: all of them are in the configuration below."""
    return "\n".join(line for line in section.split("\n") if not line.endswith((": null", ": []")))


def _environment(run: Run) -> dict[str, str]:
    kept = {"Seed": "seed", "Processes": "world_size", "Started": "started", "Ended": "ended"}
    return {title: _text(run.facts.get(key)) for title, key in kept.items()} | (run.facts.get("versions") or {})


def _prompts(file: dict | None) -> str:
    return f"{file['path']}\nsha256 {file['sha256'][:16]}..." if file else "not recorded"


def _text(value: Any) -> str:
    """A value of run.json in print; an argument list is a command."""
    return "not recorded" if value is None else shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(values: dict[str, str]) -> Html:
    return join(_page.fill("fact", term=term, text=text) for term, text in values.items())


def _fired(found: list[Alarm]) -> str:
    names = ", ".join(alarm.name for alarm in found)
    return f"Alarms fired while it ran: {names}. Their sentences are under “How it went”."


def _alarms(found: list[Alarm]) -> Html:
    """What fired, when, and what it said; those that stop a run first."""
    items = [
        _page.fill("alarm", level=alarm.level, name=alarm.name, text=alarm.text, when=_when(alarm))
        for alarm in sorted(found, key=lambda alarm: alarm.level != "stop")
    ]
    return _page.fill("alarms", items=join(items)) if items else Html()


def _when(alarm: Alarm) -> str:
    first, *more = alarm.iterations
    return f"{alarm.level}, iteration {first}" + (f" and {len(more)} more, last {more[-1]}" if more else "")


def _curves(run: Run) -> Html:
    fired = alarms(run.metrics)
    scorers = list(dict.fromkeys(c.scorer for m in run.metrics for c in comparisons(m)))
    drawn = [
        _chart(
            "Training reward",
            "mean of an iteration, band: one standard deviation",
            run.measured("reward/mean", "reward/std"),
            fired,
        ),
        *(_chart(f"{s}, held-out prompts", "band: 95 % interval of the difference", run.evaluated(s), fired) for s in scorers),
        _chart(
            "Diversity",
            "of held-out pictures",
            run.measured("eval/diversity/base") + run.measured("eval/diversity/tuned"),
            fired,
        ),
        _chart("KL to base", "a denoising step, nats", run.measured("kl/step_nats"), fired),
        _chart("Clip fraction", "share of ratios clipped", run.measured("clip_fraction"), fired),
        _chart("Gradient norm", "before it is limited", run.measured("grad_norm"), fired),
    ]
    shown = [c for c in drawn if c]
    return _page.fill("charts", items=join(shown)) if shown else _page.fill("plain", text="No iteration has been recorded yet.")


def _chart(title: str, text: str, curves: Sequence[Curve], fired: Sequence[Alarm]) -> Html:
    """A figure of these curves, or nothing where they have no points."""
    shown = [c for c in curves if c.points]
    if not shown:
        return Html()
    keys = [_page.fill("key", style=c.style, name=c.name) for c in shown if len(shown) > 1]
    return _page.fill("chart", title=title, text=text, keys=join(keys), drawing=Html(chart(f"{title}, {text}", shown, fired)))


def _pairs(run: Run) -> Html:
    """The largest gains and losses of the training reward; where nothing has changed or been scored, the first pairs."""
    if not run.pairs:
        return _page.fill("plain", text="There are no pairs to show yet.")
    scored = [(gain, pair) for pair, gain in zip(run.pairs, _gains(run), strict=True) if gain is not None]
    ranked = sorted(scored, key=lambda item: -item[0])
    gains = [pair for gain, pair in ranked if gain > 0]
    losses = [pair for gain, pair in reversed(ranked) if gain < 0]
    lists = {"Largest gains": gains[:GAINS], "Largest losses": losses[:LOSSES]}
    if not gains and not losses:
        lists = {"The first pairs": run.pairs[: GAINS + LOSSES]}
    counts = {"gained": len(gains), "lost": len(losses), "stayed as they were": len(scored) - len(gains) - len(losses)}
    counts["were not scored"] = len(run.pairs) - len(scored)
    sampled = run.pairs[0][1].iteration
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    text = f"{len(run.pairs)} pairs, each of one prompt and seed, after iteration {sampled}: by training reward, {told}."
    shown = [_page.fill("pair_list", title=t, items=join(_pair(run, p) for p in found)) for t, found in lists.items() if found]
    return _page.fill("pairs", text=text, lists=join(shown))


def _gains(run: Run) -> list[float | None]:
    """By pair: the change of the training reward; of several, the mean of their changes, each in its base's deviations."""
    names = run.trained or list(run.pairs[0][1].scores)
    base = {name: [v for b, _ in run.pairs if (v := b.scores.get(name)) is not None] for name in names}
    scale = {name: (statistics.pstdev(values) if values else 0.0) or 1.0 for name, values in base.items()}
    changes = [[c / scale[n] for n in names if (c := _change(pair, n)) is not None] for pair in run.pairs]
    return [statistics.fmean(c) if c else None for c in changes]


def _change(pair: Pair, scorer: str) -> float | None:
    base, tuned = (sample.scores.get(scorer) for sample in pair)
    return None if base is None or tuned is None else tuned - base


def _pair(run: Run, pair: Pair) -> Html:
    base, tuned = pair
    prompt = base.prompt if len(base.prompt) <= PROMPT_LENGTH else base.prompt[:PROMPT_LENGTH] + " ..."
    pictures = {side: _picture(run.folder, s, f"{side}: {prompt}") for side, s in zip(("base", "tuned"), pair, strict=True)}
    rows = join(_score(name, pair) for name in tuned.scores)
    return _page.fill("pair", prompt=prompt, seed=base.seed, rows=rows, **pictures)


def _score(name: str, pair: Pair) -> Html:
    values = [sample.scores.get(name) for sample in pair]
    change, digits = _change(pair, name), places(*values)
    style = "" if not change else "higher" if change > 0 else "lower"
    base, tuned = (number(v, digits) for v in values)
    return _page.fill("score", scorer=name, base=base, tuned=tuned, change=number(change, digits, "+"), style=style)


def _picture(folder: Path, sample: Sample, alt: str) -> Html:
    path = (folder / sample.path).resolve()
    try:
        if not path.is_relative_to(folder.resolve()):
            raise FileNotFoundError(path)
        content, size = webp(path, PICTURE_BYTES)
    except OSError:  # missing, torn or no picture: the page says so in its place
        return _page.fill("missing")
    source, style = f"data:image/webp;base64,{base64.b64encode(content).decode()}", "small" if max(size) < 200 else "large"
    return _page.fill("picture", source=source, alt=alt, width=size[0], height=size[1], style=style)
