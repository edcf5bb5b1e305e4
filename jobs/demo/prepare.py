"""What the demo needs: miniature models, built on the spot, and its pictures, which this module drew.

python -m jobs.demo.prepare models out/demo/models
python -m jobs.demo.prepare pictures jobs/demo/pictures      (how the shipped ones were made)
"""

import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

_SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((96, 160, 224), (214, 232, 244)),
    "dusk": ((70, 60, 120), (244, 160, 110)),
    "night": ((12, 16, 40), (52, 60, 100)),
    "dawn": ((150, 170, 210), (250, 214, 190)),
}
_WALLS: dict[str, Colour] = {"red": (196, 64, 52), "white": (236, 230, 220), "yellow": (232, 190, 80)}
_OVERSIZE = 3

# name, width, height, sky, wall, number of trees, alt text as it might come from the web (None: none)
_SCENES: tuple[tuple[str, int, int, str, str, int, str | None], ...] = (
    ("house_day", 384, 384, "day", "red", 3, "house pic"),
    ("house_dusk", 512, 340, "dusk", "white", 2, "IMG_2041 sunset over the village"),
    ("house_night", 340, 512, "night", "yellow", 1, "Night House - buy poster online"),
    ("cabin_dawn", 480, 360, "dawn", "red", 5, "cabin in the woods at dawn"),
    ("cabin_wide", 640, 200, "day", "white", 8, "panorama"),
    ("tower_tall", 180, 640, "dusk", "yellow", 1, None),
    ("orchard", 420, 420, "day", "yellow", 9, "orchard | stock photo"),
    ("farm", 560, 380, "dawn", "white", 4, "Farm house with trees"),
    ("hills", 600, 300, "day", "red", 6, "green hills"),
    ("street", 360, 480, "dusk", "red", 2, "small street, evening light"),
    ("lodge", 300, 300, "night", "white", 4, None),
    ("garden", 400, 500, "day", "white", 7, "garden (1024x768), photo.jpg"),
)


def draw_pictures(folder: Path) -> None:
    """Draw the demo's pictures with their alt texts; always the same ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, width, height, sky, wall, num_trees, text) in enumerate(_SCENES):
        picture = _scene((width, height), sky, _WALLS[wall], num_trees, random.Random(number))
        _save(picture, folder / name, number)
        if text is not None:
            (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def build_models(folder: Path) -> None:
    """Build the miniature models, which have random weights."""
    from transformers.utils import logging

    from pixart_data.miniatures import build

    logging.disable_progress_bar()
    build(folder)


def _save(picture: Image.Image, stem: Path, number: int) -> None:
    """Most are JPEG; some come as real collections do: rotated by EXIF, grey, with alpha, or CMYK."""
    kind = {3: "rotated", 6: "grey", 8: "alpha", 10: "cmyk"}.get(number, "jpeg")
    if kind == "alpha":
        picture.putalpha(Image.radial_gradient("L").resize(picture.size).point(lambda v: 255 if v < 230 else 0))
        picture.quantize(64).save(stem.with_suffix(".png"), optimize=True)
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(stem.with_suffix(".jpg"), quality=80, exif=exif)
    else:
        mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        picture.convert(mode).save(stem.with_suffix(".jpg"), quality=80)


def _scene(size: tuple[int, int], sky: str, wall: Colour, num_trees: int, chance: random.Random) -> Image.Image:
    width, height = size[0] * _OVERSIZE, size[1] * _OVERSIZE
    picture = _gradient(width, height, *_SKIES[sky])
    pen = ImageDraw.Draw(picture)
    unit = min(width, height)
    x, y, radius = chance.uniform(0.1, 0.9) * width, chance.uniform(0.1, 0.3) * height, 0.07 * unit
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 240, 200))
    for depth in range(3):
        _hill(pen, width, height, depth, chance, dark=sky == "night")
    ground = 0.8 * height
    for i in range(num_trees):
        _tree(
            pen,
            (i + chance.uniform(0.1, 0.9)) / num_trees * width,
            ground + chance.uniform(0, 0.1) * height,
            unit,
            chance,
        )
    _house(
        pen, chance.uniform(0.3, 0.6) * width, ground + 0.12 * height, 0.28 * unit, wall, lit=sky in ("night", "dusk")
    )
    return picture.resize(size, Image.Resampling.LANCZOS)


def _gradient(width: int, height: int, top: Colour, bottom: Colour) -> Image.Image:
    column = Image.new("RGB", (1, height))
    for y in range(height):
        share = y / height
        column.putpixel((0, y), tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True)))
    return column.resize((width, height))


def _hill(pen: ImageDraw.ImageDraw, width: int, height: int, depth: int, chance: random.Random, dark: bool) -> None:
    base, swing, phase = 0.55 + 0.1 * depth, 0.06, chance.uniform(0, 2 * math.pi)
    crest = [
        (x, (base + swing * math.sin(phase + (2 + depth) * math.pi * x / width)) * height)
        for x in range(0, width + 16, 16)
    ]
    shade = (40, 70, 60) if dark else (110 - 20 * depth, 160 - 15 * depth, 90 - 15 * depth)
    pen.polygon([*crest, (width + 16, height), (0, height)], fill=shade)


def _tree(pen: ImageDraw.ImageDraw, x: float, ground: float, unit: int, chance: random.Random) -> None:
    size = unit * chance.uniform(0.1, 0.18)
    pen.rectangle((x - size * 0.08, ground - size, x + size * 0.08, ground), fill=(96, 66, 44))
    leaf = (chance.randint(30, 70), chance.randint(90, 140), chance.randint(40, 70))
    pen.ellipse((x - size * 0.5, ground - 1.9 * size, x + size * 0.5, ground - 0.7 * size), fill=leaf)


def _house(pen: ImageDraw.ImageDraw, x: float, ground: float, size: float, wall: Colour, lit: bool) -> None:
    top = ground - 0.7 * size
    pen.rectangle((x, top, x + size, ground), fill=wall, outline=(60, 50, 48), width=_OVERSIZE)
    pen.polygon([(x - 0.1 * size, top), (x + 0.5 * size, top - 0.5 * size), (x + 1.1 * size, top)], fill=(110, 62, 52))
    pen.rectangle((x + 0.42 * size, ground - 0.4 * size, x + 0.6 * size, ground), fill=(84, 56, 40))
    glass = (252, 224, 130) if lit else (150, 190, 214)
    for left in (0.12, 0.7):
        box = (x + left * size, top + 0.15 * size, x + (left + 0.18) * size, top + 0.35 * size)
        pen.rectangle(box, fill=glass, outline=(60, 50, 48), width=_OVERSIZE)


if __name__ == "__main__":
    {"models": build_models, "pictures": draw_pictures}[sys.argv[1]](Path(sys.argv[2]))
