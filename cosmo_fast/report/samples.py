"""What the policy said: step-000123.jsonl in full, and step-000123.png, a sheet of pictures, texts and rewards."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from cosmo_fast.data.rows import open_image
from cosmo_fast.report.metrics import finite

WIDTH, PICTURE, MARGIN, LINE = 1000, 200, 16, 22  # pixels
_MAX_LINES = {"prompt": 8, "response": 14}
_INK, _QUIET, _FRAME = "#111111", "#5a5a5a", "#d0d0d0"


def write_samples(
    folder: str | os.PathLike, step: int, samples: Sequence[Mapping[str, Any]], *, on_sheet: int = 6
) -> tuple[Path, Path]:
    """Writes step-<step>.jsonl (every sample, in full) and step-<step>.png (the first `on_sheet`); returns both paths.

    A sample: "prompt" and "response" (strings), "images" (paths), "reward", "rewards" ({name: value}, None or NaN where
    one does not apply), and any other JSON column; "id" and "label" are shown. On the sheet long texts are cut, and the
    cut is said; it is drawn with DejaVu Sans, where a script without glyphs (CJK) shows as boxes: the JSONL has the
    text. ValueError without samples.
    """
    if not samples:
        raise ValueError(f"step {step}: no samples to write")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / f"step-{step:06}.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = {"step": step} | dict(sample) | {"images": [str(path) for path in sample.get("images", ())]}
            file.write(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n")
    picture = folder / f"step-{step:06}.png"
    sheet(samples[:on_sheet], title=f"step {step}: {min(on_sheet, len(samples))} of {len(samples)} samples").save(
        picture
    )
    return lines, picture


def sheet(samples: Sequence[Mapping[str, Any]], *, title: str) -> Image.Image:
    """One RGB picture with a block a sample: its pictures on the left, prompt, response and rewards on the right."""
    regular, bold = (_font(name, 16) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    left = MARGIN * 2 + PICTURE
    blocks = [(sample, _lines(sample, regular, bold, WIDTH - left - MARGIN)) for sample in samples]
    heights = [max(PICTURE, len(lines) * LINE) + 2 * MARGIN for _, lines in blocks]
    page = Image.new("RGB", (WIDTH, 3 * MARGIN + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, font=bold, fill=_INK)
    top = 3 * MARGIN
    for (sample, lines), height in zip(blocks, heights, strict=True):
        draw.line((MARGIN, top, WIDTH - MARGIN, top), fill=_FRAME)
        _paste(page, draw, sample.get("images", ()), (MARGIN, top + MARGIN), regular)
        for row, (text, font, colour) in enumerate(lines):
            draw.text((left, top + MARGIN + row * LINE), text, font=font, fill=colour)
        top += height
    return page


def _lines(sample: Mapping[str, Any], regular: Any, bold: Any, width: int) -> list[tuple[str, Any, str]]:
    reward = "reward -" if sample.get("reward") is None else f"reward {float(sample['reward']):.3f}"
    rewards = finite(sample.get("rewards") or {})  # None or NaN: does not apply
    parts = [f"{name} {value:.2f}" for name, value in rewards.items() if value is not None]
    names = [str(sample[key]) for key in ("label", "id") if sample.get(key) is not None]
    head = "   ".join([reward, *([f"({', '.join(parts)})"] if parts else []), *names])
    lines = [(line, bold, _INK) for line in wrap(head, bold, width, 2)]
    for key, colour in (("prompt", _QUIET), ("response", _INK)):
        lines.append((key, bold, _QUIET))
        lines += [
            (line, regular, colour) for line in wrap(str(sample.get(key) or "(empty)"), regular, width, _MAX_LINES[key])
        ]
    return lines


def wrap(text: str, font: Any, width: int, max_lines: int) -> list[str]:
    """Text as lines of at most `width` pixels, words kept whole where they fit; the last line says what was cut."""
    lines: list[str] = []
    used = 0
    for paragraph in _printable(text).split("\n"):
        rest = paragraph
        while True:
            if len(lines) == max_lines:
                lines[-1] = _cut(lines[-1], len(text) - used, font, width)
                return lines
            end = _fitting(rest, font, width)
            lines.append(rest[:end].rstrip())
            used += end
            rest = rest[end:]
            if not rest:
                break
        used += 1
    return lines


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def _fitting(text: str, font: Any, width: int) -> int:
    """How many leading characters fit, up to the last space before the edge where there is one."""
    low, high = min(1, len(text)), min(len(text), width)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    if low == len(text):
        return low
    space = text.rfind(" ", 1, low + 1)
    return space + 1 if space > 0 else low


def _cut(line: str, left: int, font: Any, width: int) -> str:
    note = f" … ({left:,} more characters)"
    while line and font.getlength(line + note) > width:
        line, left = line[:-1], left + 1
        note = f" … ({left:,} more characters)"
    return line + note


def _paste(page: Image.Image, draw: ImageDraw.ImageDraw, images: Sequence, corner: tuple[int, int], font: Any) -> None:
    """Up to four pictures in the square at `corner`; a fifth and later are counted under it."""
    left, top = corner
    if not images:
        draw.rectangle((left, top, left + PICTURE - 1, top + PICTURE - 1), outline=_FRAME)
        draw.text((left + PICTURE // 2, top + PICTURE // 2), "no picture", font=font, fill=_QUIET, anchor="mm")
        return
    side = PICTURE if len(images) == 1 else PICTURE // 2 - 2
    for index, item in enumerate(images[:4]):
        picture = open_image(item)
        scale = min(side / picture.width, side / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS  # small pictures: show the pixels
        place = left + index % 2 * (side + 4), top + index // 2 * (side + 4)
        page.paste(picture.resize(size, method), place)
        draw.rectangle((*place, place[0] + size[0] - 1, place[1] + size[1] - 1), outline=_FRAME)
    if len(images) > 4:
        draw.text((left + PICTURE - 6, top + PICTURE - 6), f"+{len(images) - 4}", font=font, fill=_INK, anchor="rs")


def _font(name: str, size: int) -> Any:
    import matplotlib  # it ships the font, so that a sheet looks alike on every machine

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
