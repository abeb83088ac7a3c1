"""JSONL rows -> validated rows. All that can be known without decoding a picture is checked here, before work begins.

One JSON object a line:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
                  {"role": "assistant", "content": "<think>two rows of two</think>\\\\boxed{4}"}],
     "images": ["images/00012.png"], "label": "general_rule", "answer": "4", ...}

`prompt` (a string or a list of messages) may stand in place of `messages`. A plain string may hold `<image>` where a
picture goes (ms-swift, ShareGPT). Pictures are paths under the file's folder or `image_root`, in the order of the image
parts. Every other column is handed to the rewards untouched.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from PIL import Image, ImageOps

MAX_IMAGE_PIXELS = 50_000_000
MAX_IMAGE_BYTES = 64 * 2**20
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
ROLES = ("system", "user", "assistant", "tool")
_OWN_COLUMNS = frozenset({"messages", "prompt", "images"})
_OTHER_MEDIA = ("videos", "audios", "video", "audio")
# Written out in a text these become control tokens: a picture slot without a picture, or a turn that nobody took.
_CONTROL_TOKEN = re.compile(
    r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad|im_start|im_end|endoftext)\|>|<IMG_CONTEXT>|<video>|<audio>"
)


class DataError(ValueError):
    """A row or picture that cannot be used; the message names the row, the picture and what to change."""


@dataclass(frozen=True)
class Row:
    """One validated row.

    source: "file.jsonl:17". messages: role and content, content always a list of typed parts ({"type": "image"} or
    {"type": "text", "text": str}). images: resolved paths, one for each image part, in order. columns: everything else.
    """

    source: str
    messages: list[dict[str, Any]]
    images: tuple[Path, ...]
    columns: dict[str, Any]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages without a closing assistant message: what a policy is asked."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def response(self) -> str | None:
        """The text of the closing assistant message (the SFT target), None in a row that only asks."""
        last = self.messages[-1]
        return "".join(part["text"] for part in last["content"]) if last["role"] == "assistant" else None


@dataclass
class _ImageFolder:
    """The jail: names are resolved under `root` only, each distinct name is checked once."""

    root: Path
    max_pixels: int
    max_bytes: int
    checked: dict[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        if name not in self.checked:
            path = self._resolve(name)
            with _open_regular(path, self.max_bytes) as file:
                _check_header(file, path, self.max_pixels)
            self.checked[name] = path
        return self.checked[name]

    def _resolve(self, name: str) -> Path:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:|file:", name):
            raise DataError(f"{name[:80]!r} is a URL: pictures are read from disk only; download it under {self.root}")
        parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts or "\0" in name:
            raise DataError(f"{name!r} must be a relative path without '..' under image_root ({self.root})")
        try:
            path = (self.root / name).resolve(strict=True)
        except FileNotFoundError:
            raise DataError(f"{name!r} does not exist under image_root ({self.root})") from None
        except (OSError, RuntimeError) as error:  # a loop of links, a name too long, a folder without permission
            raise DataError(f"{name!r} cannot be reached under image_root ({self.root}): {error}") from error
        if not path.is_relative_to(self.root):
            raise DataError(f"{name!r} is a link that leaves image_root ({self.root}); copy the file or set image_root")
        return path


def load_rows(
    path: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    needs_answer: bool = False,
    limit: int | None = None,
    problems: list[str] | None = None,
) -> list[Row]:
    """Reads and checks a JSONL file; no picture is decoded.

    image_root: folder of the pictures, the file's own folder by default. max_image_pixels (width x height) and
    max_image_bytes bound each picture. needs_answer: each row must close with an assistant message (SFT).
    limit: read the first `limit` rows only. Raises DataError on the first row that cannot be used; with `problems`,
    each such row's message goes in there instead, and the rows that can be used are returned.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".parquet", ".arrow", ".csv"):
        raise DataError(f"{path}: only JSONL is read so far (one JSON object a line), no parquet, no `datasets` folder")
    root = Path(image_root) if image_root is not None else path.parent
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not root.is_dir():
        raise DataError(f"image_root {str(root)!r} is not a folder")
    folder = _ImageFolder(root.resolve(), max_image_pixels, max_image_bytes)
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            source = f"{path.name}:{number}"
            try:
                rows.append(_row(source, parse_line(line), folder, needs_answer))
            except DataError as error:
                if problems is None:
                    raise DataError(f"{source}: {error}") from error.__cause__
                problems.append(f"{source}: {error}")
    if not rows and not problems:
        raise DataError(f"{path}: no rows" + (f" (limit is {limit})" if limit is not None else ""))
    return rows


def check_row(value: dict[str, Any], image_root: Path, *, needs_answer: bool = False) -> None:
    """DataError where a line with this object could not be used."""
    _row("", value, _ImageFolder(image_root.resolve(), MAX_IMAGE_PIXELS, MAX_IMAGE_BYTES), needs_answer)


def single_row(text: str, images: Sequence[str | os.PathLike] = (), *, source: str = "prompt") -> Row:
    """A row that a user types: pictures from anywhere on disk, then the text. Checked as rows are, less the jail."""
    paths = []
    for name in images:
        path = Path(name)
        with _open_regular(path, MAX_IMAGE_BYTES) as file:
            _check_header(file, path, MAX_IMAGE_PIXELS)
        paths.append(path.resolve())
    content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": text}]
    return Row(source, [_message({"role": "user", "content": content}, bool(paths))], tuple(paths), {})


def open_image(path: str | os.PathLike, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes one picture to RGB, upright by its EXIF orientation, transparent pixels on white.

    The header is checked again before the decode (the file may have changed since load_rows).
    Raises DataError when it is too large, damaged, or no longer a single PNG, JPEG or WebP picture.
    """
    path = Path(path)
    with _open_regular(path, max_bytes=None) as file:
        _check_header(file, path, max_image_pixels)
        file.seek(0)
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as picture:
                upright = ImageOps.exif_transpose(picture)
                if upright.mode == "RGB":
                    upright.load()
                    return upright
                if upright.has_transparency_data:
                    white = Image.new("RGBA", upright.size, "white")
                    return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
                return upright.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """One JSON object; DataError for anything else."""

    def constant(name: str):
        raise ValueError(f"{name} is not JSON; write null")

    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"a line must be one JSON object, not a {type(value).__name__} (is the file one JSON array?)")
    return value


def _row(source: str, value: dict[str, Any], folder: _ImageFolder, needs_answer: bool) -> Row:
    names = value.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"'images' must be a list of paths, not {str(names)[:80]}")
    for column in _OTHER_MEDIA:
        if value.get(column):
            raise DataError(f"column {column!r}: only pictures are read; remove it or the row")
    messages = [_message(message, bool(names)) for message in _messages(value)]
    slots = sum(part["type"] == "image" for message in messages for part in message["content"])
    if slots != len(names):
        hint = "; a single picture also goes into the list 'images'" if "image" in value and not names else ""
        raise DataError(f"{slots} image parts in the messages but {len(names)} entries in 'images' {names[:4]}{hint}")
    if not any(message["role"] == "user" for message in messages):
        raise DataError("no user message")
    if needs_answer and messages[-1]["role"] != "assistant":
        raise DataError("no closing assistant message to learn from (SFT needs one; RL takes prompts alone)")
    images = tuple(folder.path(name) for name in names)
    return Row(source, messages, images, {k: v for k, v in value.items() if k not in _OWN_COLUMNS})


def _messages(value: dict[str, Any]) -> list:
    messages, prompt = value.get("messages"), value.get("prompt")
    if messages is not None and prompt is not None:
        raise DataError("both 'messages' and 'prompt' are given; keep one")
    chosen = messages if messages is not None else prompt
    if chosen is None:
        columns = ", ".join(sorted(value)[:12])
        raise DataError(f"neither 'messages' nor 'prompt' (columns: {columns})")
    if isinstance(chosen, str) and chosen is prompt:
        chosen = [{"role": "user", "content": chosen}]
    if not isinstance(chosen, list) or not chosen:
        raise DataError(f"messages must be a list with at least one message, not {str(chosen)[:80]!r}")
    return chosen


def _message(message: Any, has_images: bool) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"a message needs a 'role' out of {', '.join(ROLES)}: {str(message)[:80]}")
    role = message["role"]
    unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if unknown:  # dropping "tool_calls" or "reasoning_content" in silence would train on half a message
        raise DataError(f"{role} message: key {unknown[0]!r} is not read; put it into 'content' or into a column")
    content = message.get("content")
    if isinstance(content, str):
        parts = _split(content, role, has_images)
    elif isinstance(content, list):
        parts = [_part(part) for part in content]
    else:
        raise DataError(f"{role} message: content must be a string or a list of parts, not {type(content).__name__}")
    if role == "assistant" and any(part["type"] == "image" for part in parts):
        raise DataError("an assistant message cannot hold a picture")
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise DataError(
            "zero-length answer: empty assistant message" if role == "assistant" else f"empty {role} message"
        )
    return {"role": role, "content": parts}


def _split(text: str, role: str, has_images: bool) -> list[dict[str, str]]:
    """A string in which `<image>` marks the places of the pictures, as typed parts."""
    if "<image>" in text and not has_images:
        raise DataError(f"a literal <image> in the {role} message but no 'images': add the path, or remove the mark")
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split("<image>")):
        if index:
            parts.append({"type": "image"})
        if piece:
            parts.append(_text(piece))
    return parts


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "text"):
        raise DataError(f"unknown part {str(part)[:80]}: use {{'type': 'image'}} or {{'type': 'text', 'text': ...}}")
    extra = [key for key, value in part.items() if key != "type" and value is not None and key != kind]
    if extra or (kind == "image" and part.get("image") is not None):
        raise DataError(
            f"{kind} part with key {(extra or ['image'])[0]!r} is not read: paths go into the column 'images'"
        )
    if kind == "image":
        return {"type": "image"}
    if not isinstance(part.get("text"), str):
        raise DataError(f"a text part needs a string 'text': {str(part)[:80]}")
    if "<image>" in part["text"]:
        raise DataError(
            "a literal <image> in a text part would be read as text; write the part {'type': 'image'} instead"
        )
    return _text(part["text"])


def _text(text: str) -> dict[str, str]:
    if found := _CONTROL_TOKEN.search(text):
        raise DataError(f"the text holds the control token {found[0]!r}; pictures are {{'type': 'image'}} parts")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise DataError(f"the text holds half a surrogate pair, which no tokenizer can encode: {ascii(text)[:80]}")
    return {"type": "text", "text": text}


def _open_regular(path: Path, max_bytes: int | None) -> BinaryIO:
    """Opens a regular file; a pipe or device is refused before it could block."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is not a regular file")
        if max_bytes is not None and info.st_size > max_bytes:
            raise DataError(f"{path} has {info.st_size:,} bytes, above max_image_bytes = {max_bytes:,}")
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _check_header(file: BinaryIO, path: Path, max_pixels: int) -> None:
    """Format, size and number of frames from the header alone; raises DataError."""
    head = file.read(30)
    file.seek(0)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":  # Pillow reads the whole file and makes the canvas on open
        width, height, frames = _webp_header(head, path)
    else:
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as picture:
                width, height = picture.size
                frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
                if picture.mode[0] in "IF":  # Pillow clips these to white when it makes RGB of them
                    raise DataError(f"{path} has more than 8 bits a channel; save it with 8")
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(f"{path}: {error} max_image_pixels = {max_pixels:,}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} is not a readable picture of the formats {', '.join(IMAGE_FORMATS)}") from error
    if width * height > max_pixels:
        size = f"{width}x{height} = {width * height:,} pixels"
        raise DataError(f"{path} is {size}, above max_image_pixels = {max_pixels:,}")
    if frames > 1:
        raise DataError(f"{path} is an animation: save one frame as PNG, JPEG or WebP")


def _webp_header(head: bytes, path: Path) -> tuple[int, int, int]:
    """Width, height, frames (2 = animated); https://developers.google.com/speed/webp/docs/riff_container."""
    chunk = head[12:16]
    if chunk == b"VP8X" and len(head) == 30:
        size = [1 + int.from_bytes(head[start : start + 3], "little") for start in (24, 27)]
        return size[0], size[1], 2 if head[20] & 2 else 1
    if chunk == b"VP8L" and len(head) >= 25 and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    if chunk == b"VP8 " and len(head) == 30 and head[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF, 1
    raise DataError(f"{path} is not a readable picture of the formats {', '.join(IMAGE_FORMATS)} (damaged WebP header)")
