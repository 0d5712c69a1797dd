"""The menagerie's world: captioned pictures whose content is known exactly.

A scene is one to three animals of one kind on a coloured background. The animals are Noto Color Emoji (SIL Open Font
License, see glyphs/OFL.txt), kept as one sprite sheet so that the world is the same on every machine and needs no font.
`python -m ddpo.menagerie.scenes` draws the sheet again from the font (Debian: fonts-noto-color-emoji).
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewards.scene import PALETTE

SIZE = 64  # pixels, both ways
SPRITE = 64
SHEET = Path(__file__).parent / "glyphs" / "animals.png"
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"

ANIMALS: dict[str, str] = dict(
    cat="🐈", dog="🐕", horse="🐎", monkey="🐒", rabbit="🐇", pig="🐖", cow="🐄", sheep="🐑", goat="🐐", camel="🐫",
    elephant="🐘", mouse="🐁", rooster="🐓", penguin="🐧", dove="🕊", eagle="🦅", duck="🦆", owl="🦉", frog="🐸",
    crocodile="🐊", turtle="🐢", lizard="🦎", snake="🐍", whale="🐋", dolphin="🐬", fish="🐟", blowfish="🐡",
    octopus="🐙", butterfly="🦋", bee="🐝", ladybug="🐞", spider="🕷", giraffe="🦒", zebra="🦓", kangaroo="🦘",
    peacock="🦚", parrot="🦜", swan="🦢", flamingo="🦩", hedgehog="🦔", bat="🦇", fox="🦊", bear="🐻", panda="🐼",
    lion="🦁", tiger="🐅",
)  # fmt: skip
PLURALS = {"sheep": "sheep", "fish": "fish", "blowfish": "blowfish", "mouse": "mice", "butterfly": "butterflies",
           "octopus": "octopuses", "fox": "foxes", "ladybug": "ladybugs"}  # fmt: skip
WORDS = {2: "two", 3: "three"}
LONGER = {1: (40, 48), 2: (24, 28), 3: (20, 24)}  # an animal's longer side in pixels, by the number of animals
# Sizes and places lie on the VAE's grid: its latents are one to 4 x 4 pixels, so an animal has the same latents wherever
# it stands, and a model of two cores' training can learn to draw it.
GRID = 4
GAP = BORDER = 4  # pixels between two animals, and to the border: less, and the count rule could not tell them apart


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    animal: str
    colour: str
    count: int

    @property
    def caption(self) -> str:
        """ "a cat on a blue background", "two owls on an orange background"."""
        return f"{self.subject} on {article(self.colour)} {self.colour} background"

    @property
    def subject(self) -> str:
        if self.count == 1:
            return f"{article(self.animal)} {self.animal}"
        return f"{WORDS[self.count]} {PLURALS.get(self.animal, self.animal + 's')}"

    @cached_property
    def held_out(self) -> bool:
        """One combination in eight never appears in training: the same ones for the model and for fine-tuning."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % 8 == 0


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def all_scenes() -> list[Scene]:
    """Every combination of animal, colour and number: 46 x 10 x 3."""
    return [Scene(a, c, n) for a in ANIMALS for c in PALETTE for n in (1, 2, 3)]


def sample(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene from one side of the split. Half of them show a single animal."""
    while True:
        scene = Scene(rng.choice(list(ANIMALS)), rng.choice(list(PALETTE)), rng.choice((1, 1, 2, 3)))
        if scene.held_out == held_out:
            return scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """One picture of the scene, (SIZE, SIZE) RGB: tint, size, place and flip at random."""
    tint = rng.uniform(-18, 18)
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(int(min(255, max(0, v + tint))) for v in PALETTE[scene.colour]))
    while (placed := _place(scene, rng)) is None:
        pass  # an unlucky start leaves no room for the last animal: start over
    for sprite, x, y in placed:
        canvas.paste(sprite, (x, y), sprite)
    return canvas


def _place(scene: Scene, rng: random.Random) -> list[tuple[Image.Image, int, int]] | None:
    placed: list[tuple[Image.Image, int, int]] = []
    for _ in range(scene.count):
        sprite = _pose(glyphs()[scene.animal], rng.choice(LONGER[scene.count]), rng)
        for _ in range(30):
            x = rng.randrange(BORDER, SIZE - BORDER - sprite.width + 1, GRID)
            y = rng.randrange(BORDER, SIZE - BORDER - sprite.height + 1, GRID)
            if all(_apart(x, y, sprite, *other) for other in placed):
                placed.append((sprite, x, y))
                break
        else:
            return None
    return placed


def _pose(glyph: Image.Image, longer: int, rng: random.Random) -> Image.Image:
    """The animal, flipped at random, with its longer side this many pixels."""
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = longer / max(glyph.size)
    return glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)


def _apart(x: int, y: int, sprite: Image.Image, other: Image.Image, ox: int, oy: int) -> bool:
    across = x >= ox + other.width + GAP or ox >= x + sprite.width + GAP
    return across or y >= oy + other.height + GAP or oy >= y + sprite.height + GAP


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """(B, 3, SIZE, SIZE) uint8."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


@cache
def glyphs() -> dict[str, Image.Image]:
    """Each animal's sprite, RGBA, cropped to what is drawn."""
    sheet = Image.open(SHEET, formats=("PNG",)).convert("RGBA")
    cells = [sheet.crop((i * SPRITE, 0, (i + 1) * SPRITE, SPRITE)) for i in range(len(ANIMALS))]
    return {name: cell.crop(cell.getbbox()) for name, cell in zip(ANIMALS, cells, strict=True)}


def draw_sheet(font: str = FONT) -> Image.Image:
    """The sprite sheet, one SPRITE x SPRITE cell an animal, from the emoji font."""
    face = ImageFont.truetype(font, 109)  # the only size this bitmap font has
    sheet = Image.new("RGBA", (SPRITE * len(ANIMALS), SPRITE))
    for i, emoji in enumerate(ANIMALS.values()):
        cell = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(cell).text((12, 12), emoji, font=face, embedded_color=True)
        glyph = cell.crop(cell.getbbox())
        glyph.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        sheet.paste(glyph, (i * SPRITE, 0))
    return sheet


if __name__ == "__main__":
    SHEET.parent.mkdir(exist_ok=True)
    draw_sheet().save(SHEET, optimize=True)
    print(f"{SHEET}: {len(ANIMALS)} animals")
