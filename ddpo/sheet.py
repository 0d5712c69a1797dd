"""A grid of pictures as one labelled PNG, and as a CSV of what was drawn and how it was scored. Imports no torch."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddpo.shots import Grid, Shot

LEAST, MOST, GAP, SIDE, INK, MUTED, PAPER = 192, 384, 8, 150, "#1d2026", "#5b6270", "#ffffff"  # in pixels; colours
TALL = 17  # of a line of text, in pixels

Scores = dict[str, list[float | None]]  # {scorer: one a cell; None: not scored}


def png(grid: Grid, pictures: Sequence[Image.Image], scores: Scores) -> bytes:
    """The sheet, with the axes' values at its sides and each picture's scores below it. It carries no metadata.

    Args:
        pictures: of one size, in the order of `grid.shots`.
    """
    cells = [_fitted(picture) for picture in pictures]
    wide, high, font = *cells[0].size, ImageFont.load_default(13)
    head = [_wrapped(label, font, wide, 3) for label in map(_label, grid.columns)]
    top = TALL * (2 + max(len(lines) for lines in head)) + GAP
    band = high + TALL * len(scores) + 2 * GAP
    sheet = Image.new("RGB", (SIDE + len(grid.columns) * (wide + GAP), top + len(grid.rows) * band), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((SIDE, GAP), f"{grid.across.title} across, {grid.down.title} down", MUTED, font)
    for i, lines in enumerate(head):
        _write(draw, SIDE + i * (wide + GAP), TALL + GAP, lines, INK, font)
    for i, label in enumerate(map(_label, grid.rows)):
        _write(draw, GAP, top + i * band, _wrapped(label, font, SIDE - 2 * GAP, 9), INK, font)
    for i, cell in enumerate(cells):
        x, y = SIDE + i % len(grid.columns) * (wide + GAP), top + i // len(grid.columns) * band
        sheet.paste(cell, (x, y))
        said = [_wrapped(f"{name} {_number(column[i])}", font, wide, 1)[0] for name, column in scores.items()]
        _write(draw, x, y + high, said, MUTED, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def table(shots: Sequence[Shot], scores: Scores) -> str:
    """CSV: a line a picture, with all that it was drawn with and each scorer's score; empty where it could not be scored."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow([*(f.name for f in fields(Shot)), *scores])
    for i, shot in enumerate(shots):
        rows.writerow([*astuple(shot), *("" if column[i] is None else column[i] for column in scores.values())])
    return buffer.getvalue()


def _fitted(picture: Image.Image) -> Image.Image:
    """Enlarged by a whole number to LEAST pixels a side or a little less, or shrunk to MOST."""
    factor = LEAST // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(picture, (MOST, MOST)) if max(picture.size) > MOST else picture


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(score: float | None) -> str:
    return "not scored" if score is None else f"{score:.4g}"


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], ink: str, font: Any) -> None:
    for i, line in enumerate(lines):
        draw.text((x, y + i * TALL), line, ink, font)


def _wrapped(words: str, font: Any, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels; what does not fit is cut, and says so."""
    lines = [""]
    for word in words[:400].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    kept = [*lines[: most - 1], lines[most - 1] + " ..."] if len(lines) > most else lines
    return [_cut(line, font, width) for line in kept]


def _cut(line: str, font: Any, width: int) -> str:
    while font.getlength(line) > width and len(line) > 4:
        line = f"{line[:-5]} ..."
    return line
