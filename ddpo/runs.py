"""A run folder: its sample pictures as training writes them, and all of it as it is read back.

The same held-out prompts and seeds are drawn by the base model and again as training goes on, so pictures pair up.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddpo.durable import read_json
from ddpo.figures import Curve, comparisons
from ddpo.jsonl import read, truncate, write

FORMATS = ("WEBP", "PNG", "JPEG")  # of a run folder, which may be a stranger's
CELL, GAP, MARGIN, LABEL, INK = 192, 6, 44, 50, "#333333"  # of a grid, in pixels: a picture, between them, left, below


@dataclass(frozen=True)
class Sample:
    """One picture of a held-out prompt. Iteration 0 is the base model; every iteration has the same prompts and seeds."""

    iteration: int
    prompt: str
    seed: int
    scores: dict[str, float | None]  # by scorer, higher is better; None: not scored
    path: str  # from the run folder, with forward slashes


Pair = tuple[Sample, Sample]  # base and tuned, equal prompt and seed


def samples(folder: Path) -> list[Sample]:
    """Every sample of the run folder's index, in its order."""
    return [Sample(**record) for record in read(folder / "samples" / "index.jsonl")]


def pairs(folder: Path, iteration: int | None = None) -> list[Pair]:
    """Base and tuned samples of equal prompt and seed, after this iteration (the last one sampled, if None)."""
    seen = samples(folder)
    chosen = max((s.iteration for s in seen), default=0) if iteration is None else iteration
    base = {(s.prompt, s.seed): s for s in seen if s.iteration == 0}
    return [(base[s.prompt, s.seed], s) for s in seen if s.iteration == chosen > 0 and (s.prompt, s.seed) in base]


@dataclass(frozen=True)
class Run:
    """What is in a run folder, as far as it is there.

    Raises:
        ValueError, durable.DamagedFile: from `load`, where a file is damaged; the message names it.
    """

    folder: Path
    facts: dict  # run.json
    config: str  # config.yaml
    metrics: list[dict]  # metrics.jsonl
    pairs: list[Pair]  # after the last iteration that was sampled

    @classmethod
    def load(cls, folder: Path) -> "Run":
        facts, config = folder / "run.json", folder / "config.yaml"
        return cls(
            folder,
            read_json(facts) if facts.exists() else {},
            config.read_text("utf-8") if config.exists() else "",
            read(folder / "metrics.jsonl"),
            pairs(folder),
        )

    @property
    def name(self) -> str:
        return self.facts.get("name") or self.folder.resolve().name

    @property
    def base(self) -> str:
        """The base model: its hub id, or the last part of its path. Where it lies on whose disk is no one's business."""
        model = str(self.facts.get("model") or "an unrecorded model")
        return model if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not Path(model).exists() else Path(model).name

    @property
    def trained(self) -> list[str]:
        """The scorers trained on: those whose training reward is recorded."""
        found = [re.fullmatch("reward/(.+)/mean", key) for key in (self.metrics[-1] if self.metrics else {})]
        return [match[1] for match in found if match] or list(self.facts.get("rewards") or [])

    @property
    def evaluations(self) -> list[dict]:
        """Of the tuned model: that of iteration 0 compares the base model with itself."""
        return [m for m in self.metrics if m["iteration"] > 0 and comparisons(m)]

    @property
    def iteration(self) -> int:
        return self.metrics[-1]["iteration"] if self.metrics else 0

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next((m[key] for m in reversed(self.metrics) if m.get(key) is not None), None)

    def measured(self, key: str, spread: str = "") -> list[Curve]:
        """One metric over the iterations, with another either side of it."""
        found = [(m["iteration"], m[key], m.get(spread) or 0.0) for m in self.metrics if m.get(key) is not None]
        name = "base" if key.endswith("/base") else "tuned"
        return [Curve(name, name, [(x, y, y - s, y + s) for x, y, s in found])]

    def evaluated(self, scorer: str) -> list[Curve]:
        """Means of base and tuned; the interval of their difference is laid around the base's mean, so it clears it or not."""
        found = [(m["iteration"], c) for m in self.metrics for c in comparisons(m) if c.scorer == scorer and c.whole]
        base = [(x, c.base, c.base, c.base) for x, c in found]
        tuned = [(x, c.tuned, c.base + c.low, c.base + c.high) for x, c in found]
        return [Curve("base", "base", base), Curve("tuned", "tuned", tuned)]

    def asked(self, section: str) -> str:
        """A section of config.yaml as it stands there."""
        found = re.search(rf"^{section}:(.*\n(?:(?:[ -].*)?\n)*)", self.config + "\n", re.M)
        return textwrap.dedent(found[1]).strip() if found else ""


def file_name(name: str) -> str:
    """A name as a file's: what is not letter, digit, dot, dash or underscore is an underscore, and no dot comes first."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".") or "lora"


def save_samples(
    folder: Path,
    iteration: int,
    images: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    scores: Mapping[str, Sequence[float | None]],
) -> list[Sample]:
    """Write the pictures as lossless WebP and enter them in samples/index.jsonl, in place of this iteration's old entries.

    Args:
        images: tensor or array (B, 3, H, W), float in [0, 1]; rounded to 8 bits.
        scores: B numbers a scorer.

    Raises:
        ValueError: the lengths differ, or the images have another shape or range.
    """
    _demand_equal({"images": images, "prompts": prompts, "seeds": seeds} | {f"scores of {k}": v for k, v in scores.items()})
    pixels = _pixels(images)
    index = folder / "samples" / "index.jsonl"
    truncate(index, lambda record: record["iteration"] != iteration)
    place = Path("samples") / f"iteration_{iteration:04d}"
    (folder / place).mkdir(parents=True, exist_ok=True)
    saved = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        path = place / f"{i:04d}.webp"
        Image.fromarray(pixels[i]).save(folder / path, lossless=True)
        own = {name: _number(column[i]) for name, column in scores.items()}
        saved.append(Sample(iteration, prompt, int(seed), own, path.as_posix()))
    write(index, [*read(index), *map(asdict, saved)])
    return saved


def grid(folder: Path, iteration: int, columns: int = 8, most: int | None = None) -> Image.Image:
    """The first `most` pairs of this iteration as one picture: the base row above the tuned row, `columns` pairs wide.

    Raises:
        ValueError: the run folder holds no pair of this iteration.
    """
    found = pairs(folder, iteration)[:most]
    if not found:
        held = sorted({s.iteration for s in samples(folder)})
        raise ValueError(f"{folder}: no pictures of both iteration 0 and iteration {iteration}; it holds iterations {held}")
    cells = [[_cell(folder / sample.path) for sample in pair] for pair in found]
    wide, high = (max(c.size[axis] for pair in cells for c in pair) for axis in (0, 1))
    columns, band = min(columns, len(found)), 2 * (high + GAP) + LABEL
    sheet = Image.new("RGB", (MARGIN + columns * (wide + GAP), -(-len(found) // columns) * band), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (pair, (base, tuned)) in enumerate(zip(found, cells, strict=True)):
        x, y = MARGIN + i % columns * (wide + GAP), i // columns * band
        sheet.paste(base, (x, y))
        sheet.paste(tuned, (x, y + high + GAP))
        draw.multiline_text((x, y + 2 * (high + GAP)), _caption(pair[0], font, wide), INK, font, spacing=2)
        if i % columns == 0:
            draw.text((4, y + high // 2), "base", INK, font, anchor="lm")
            draw.text((4, y + high + GAP + high // 2), "tuned", INK, font, anchor="lm")
    return sheet


def webp(path: Path, limit: int) -> tuple[bytes, tuple[int, int]]:
    """A picture as WebP of at most `limit` bytes, and its size: the file as it is, or else the largest and finest that fits.

    Raises:
        OSError: there is no such file, or it is no whole picture.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = file.convert("RGB")
        if file.format == "WEBP" and path.stat().st_size <= limit:
            return path.read_bytes(), image.size
    for side, quality in ((768, 90), (512, 90), (512, 75), (384, 75), (256, 75), (256, 20)):
        memory = io.BytesIO()
        smaller = ImageOps.contain(image, (side, side)) if max(image.size) > side else image
        smaller.save(memory, "WEBP", quality=quality)
        if memory.tell() <= limit:
            break
    return memory.getvalue(), smaller.size


def _demand_equal(columns: dict[str, Any]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"each image has one prompt, one seed and one score of each scorer, but there are {lengths}")


def _number(score: Any) -> float | None:
    return None if score is None else float(score)


def _pixels(images: Any) -> np.ndarray:
    """(B, H, W, 3) uint8 from a tensor on any device or an array."""
    values = np.asarray(images.detach().cpu().float() if hasattr(images, "detach") else images, dtype=np.float32)
    if values.ndim != 4 or values.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), not {values.shape}")
    if values.size and not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
        raise ValueError(f"images must lie in [0, 1], not [{values.min()}, {values.max()}]; scale them first")
    return (values.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def _cell(path: Path) -> Image.Image:
    """The picture, enlarged by a whole number or shrunk, so that it fits CELL pixels."""
    with Image.open(path, formats=FORMATS) as file:
        image = file.convert("RGB")
    factor = CELL // max(image.size)
    return image.resize((image.width * factor, image.height * factor), 0) if factor else ImageOps.contain(image, (CELL, CELL))


def _caption(sample: Sample, font: Any, width: int) -> str:
    """As much of the prompt as fits into two lines, and the seed."""
    lines = [""]
    for word in sample.prompt[:200].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:2]) + (" ..." if len(lines) > 2 else "") + f"\nseed {sample.seed}"
