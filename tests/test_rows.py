"""Rows: what is accepted, and that every bad input is one clear error at load time."""

import json
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from cosmo_fast.data import DataError, load_rows, open_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3), "red").save(tmp_path / "images" / "a.png")
    Image.new("RGB", (4, 3), "blue").save(tmp_path / "images" / "b.jpg")
    Image.new("RGB", (4, 3), "green").save(tmp_path / "images" / "c.webp")
    return tmp_path


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(images=("images/a.png",), text="How many?", **columns) -> dict:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "images": list(images), **columns}


def answered(content="<think>one</think>\\boxed{1}", **columns) -> dict:
    row = ask(**columns)
    row["messages"].append({"role": "assistant", "content": content})
    return row


def refuse(folder: Path, row: object, *words: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(write(folder, row), **options)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:1: ")
    for word in words:
        assert word in message, message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size in its header and holds no picture data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
    )


def test_a_row_keeps_its_columns_and_resolves_its_pictures_in_order(folder):
    row = ask(("images/b.jpg", "images/a.png"), label="general_rule", answer="3", facts={"visual": ["apple"]})
    (loaded,) = load_rows(write(folder, row))
    assert loaded.source == "rows.jsonl:1"
    assert loaded.images == (folder / "images/b.jpg", folder / "images/a.png")
    assert loaded.columns == {"label": "general_rule", "answer": "3", "facts": {"visual": ["apple"]}}
    assert loaded.prompt == loaded.messages and loaded.response is None


def test_prompt_as_string_or_list_stands_in_for_messages(folder):
    rows = load_rows(
        write(folder, {"prompt": "Hello"}, {"prompt": [{"role": "user", "content": "Hello"}]}, {"prompt": "Hello"})
    )
    assert all(row.messages == [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}] for row in rows)


def test_an_image_mark_in_a_string_becomes_an_image_part(folder):
    row = {"messages": [{"role": "user", "content": "<image>Left, <image>\nright"}], "images": ["images/a.png"] * 2}
    (loaded,) = load_rows(write(folder, row))
    assert loaded.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Left, "},
        {"type": "image"},
        {"type": "text", "text": "\nright"},
    ]


def test_the_closing_assistant_message_is_the_response(folder):
    (row,) = load_rows(write(folder, answered()), needs_answer=True)
    assert row.response == "<think>one</think>\\boxed{1}"
    assert [message["role"] for message in row.prompt] == ["user"]


def test_duplicated_ids_blank_lines_bom_and_arrow_nulls_are_accepted(folder):
    row = ask(id="x")
    row["messages"][0]["content"][0] |= {"text": None}
    path = write(folder, "\ufeff" + json.dumps(row), "", row)
    assert [loaded.source for loaded in load_rows(path)] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_limit_reads_no_further_than_asked(folder):
    assert len(load_rows(write(folder, ask(), ask(), "not json"), limit=2)) == 2


def test_image_root_moves_the_jail(folder):
    path = write(folder, ask(("a.png",)))
    assert load_rows(path, image_root=folder / "images")[0].images == (folder / "images/a.png",)


@pytest.mark.parametrize(
    "line, word",
    [
        ("{", "JSON"),
        ("[]", "list"),
        ("3", "int"),
        ('{"messages": NaN}', "NaN"),
        ("[" * 100_000, "JSON"),
        ('{"label": "x"}', "columns: label"),
        ('{"messages": []}', "at least one"),
        ('{"messages": "hello"}', "list"),
        ('{"messages": [{"role": "user", "content": "a"}], "prompt": "b"}', "both"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content"),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "tool_calls"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "no user message"),
        ('{"messages": [{"role": "user", "content": "  "}]}', "empty user message"),
        ('{"prompt": "a", "videos": ["v.mp4"]}', "videos"),
        ('{"prompt": "\\ud800"}', "surrogate"),
    ],
)
def test_a_malformed_line_is_refused(folder, line, word):
    refuse(folder, line, word)


@pytest.mark.parametrize(
    "part, word",
    [
        ({"type": "video"}, "unknown part"),
        ({"type": "image_url", "image_url": "x"}, "unknown part"),
        ("text", "unknown part"),
        ({"type": "image", "image": "a.png"}, "'images'"),
        ({"type": "image", "url": "a.png"}, "'url'"),
        ({"type": "text"}, "string 'text'"),
        ({"type": "text", "text": "see <image>"}, "literal <image>"),
    ],
)
def test_an_unknown_part_is_refused(folder, part, word):
    refuse(folder, {"messages": [{"role": "user", "content": [part]}], "images": ["images/a.png"]}, word)


def test_image_parts_and_pictures_must_be_equal_in_number(folder):
    row = ask()
    row["images"] = []
    refuse(folder, row, "1 image parts", "0 entries")
    refuse(folder, row | {"image": "images/a.png"}, "'images'")
    refuse(folder, {"prompt": "no mark", "images": ["images/a.png"]}, "0 image parts", "images/a.png")
    refuse(folder, ask() | {"images": "images/a.png"}, "list of paths")
    refuse(folder, ask() | {"images": [{"bytes": "x"}]}, "list of paths")


def test_a_literal_image_mark_without_a_picture_is_named(folder):
    refuse(folder, {"prompt": "<image>What is this?"}, "literal <image>", "no 'images'")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<video>"])
def test_a_control_token_in_a_text_is_refused_in_every_role(folder, token):
    refuse(folder, ask(text=f"Look: {token}"), token)
    refuse(folder, answered(f"It is {token}"), token)


def test_a_zero_length_answer_is_refused(folder):
    refuse(folder, answered(" \n"), "zero-length answer", needs_answer=True)
    refuse(folder, answered([]), "zero-length answer", needs_answer=True)
    refuse(folder, ask(), "no closing assistant message", needs_answer=True)


def test_a_picture_in_an_assistant_message_is_refused(folder):
    refuse(folder, answered([{"type": "image"}]) | {"images": ["images/a.png"] * 2}, "assistant")


def test_a_missing_picture_is_named(folder):
    refuse(folder, ask(("images/none.png",)), "images/none.png", "does not exist", "image_root")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.png", "images/../../secret.png", "..\\secret.png", "C:\\a.png", "a\0b.png"]
)
def test_a_path_out_of_the_jail_is_refused(folder, name):
    refuse(folder, ask((name,)), "relative path", "image_root")


@pytest.mark.parametrize("name", ["https://example.org/a.png", "file:///etc/passwd", "data:image/png;base64,AA=="])
def test_a_url_is_refused(folder, name):
    refuse(folder, ask((name,)), "URL")


def test_a_link_may_stay_in_the_jail_but_not_leave_it(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (2, 2)).save(outside / "secret.png")
    (folder / "images/inside.png").symlink_to("a.png")
    (folder / "images/file.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "images/loop.png").symlink_to("loop.png")
    assert load_rows(write(folder, ask(("images/inside.png",))))[0].images == (folder / "images/a.png",)
    refuse(folder, ask(("images/file.png",)), "leaves image_root")
    refuse(folder, ask(("linked/secret.png",)), "leaves image_root")
    refuse(folder, ask(("images/loop.png",)), "loop.png")


def test_something_that_is_no_regular_file_is_refused_without_blocking(folder):
    import os

    os.mkfifo(folder / "images/pipe.png")
    refuse(folder, ask(("images/pipe.png",)), "not a regular file")
    refuse(folder, ask(("images",)), "not a regular file")


def test_too_many_pixels_are_refused_from_the_header_alone(folder):
    (folder / "images/huge.png").write_bytes(png_header(60_000, 60_000))
    (folder / "images/large.png").write_bytes(png_header(9_000, 9_000))
    refuse(folder, ask(("images/huge.png",)), "max_image_pixels")
    refuse(folder, ask(("images/large.png",)), "9000x9000", "max_image_pixels = 50,000,000")
    for name in ("a.png", "b.jpg", "c.webp"):
        refuse(folder, ask((f"images/{name}",)), "4x3 = 12 pixels", "max_image_pixels = 11", max_image_pixels=11)


def test_too_many_bytes_are_refused(folder):
    refuse(folder, ask(), "max_image_bytes = 10", max_image_bytes=10)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"GIF89a" + bytes(40), b"RIFF\0\0\0\0WEBPVP8 " + bytes(20)])
def test_a_file_that_is_no_picture_of_the_listed_formats_is_refused(folder, content):
    (folder / "images/x.png").write_bytes(content)
    refuse(folder, ask(("images/x.png",)), "x.png", "PNG, JPEG, WEBP")


def test_other_formats_animations_and_deep_channels_are_refused(folder):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "x.bmp")
    frames[0].save(folder / "x.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "x.png", save_all=True, append_images=frames[1:])
    Image.new("I;16", (4, 4)).save(folder / "deep.png")
    refuse(folder, ask(("x.bmp",)), "PNG, JPEG, WEBP")
    refuse(folder, ask(("x.webp",)), "animation")
    refuse(folder, ask(("x.png",)), "animation")
    refuse(folder, ask(("deep.png",)), "8 bits")


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_webp_header_gives_the_size_that_pillow_decodes(folder, lossless, mode):
    Image.new(mode, (37, 23)).save(folder / "x.webp", lossless=lossless, exif=b"Exif\0\0" if mode == "RGBA" else b"")
    load_rows(write(folder, ask(("x.webp",))), max_image_pixels=37 * 23)
    refuse(folder, ask(("x.webp",)), "37x23", max_image_pixels=37 * 23 - 1)
    assert open_image(folder / "x.webp").size == (37, 23)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "."])
def test_formats_that_come_later_are_said_so(folder, name):
    with pytest.raises(DataError, match="only JSONL"):
        load_rows(folder / name)


def test_a_missing_or_empty_file_and_root_are_named(folder):
    with pytest.raises(DataError, match="no such file"):
        load_rows(folder / "none.jsonl")
    with pytest.raises(DataError, match="no rows"):
        load_rows(write(folder, ""))
    with pytest.raises(DataError, match="image_root .*none"):
        load_rows(write(folder, ask()), image_root=folder / "none")


def test_open_image_gives_upright_rgb_with_transparency_on_white(folder):
    assert open_image(folder / "images/b.jpg").mode == "RGB"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(folder / "clear.png")
    assert open_image(folder / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (2, 2), 7).save(folder / "grey.png")
    assert open_image(folder / "grey.png").getpixel((0, 0)) == (7, 7, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(folder / "turned.jpg", exif=exif)
    assert open_image(folder / "turned.jpg").size == (2, 4)


def test_open_image_refuses_what_changed_or_broke_since_the_load(folder):
    path = folder / "images/a.png"
    path.write_bytes(png_header(9_000, 9_000))
    with pytest.raises(DataError, match="max_image_pixels"):
        open_image(path)
    path.write_bytes(png_header(20, 20))
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_image(path)


def test_a_picture_used_by_many_rows_is_checked_once(folder, monkeypatch):
    from cosmo_fast.data import rows

    calls = []
    check = rows._check_header
    monkeypatch.setattr(rows, "_check_header", lambda *args: calls.append(args) or check(*args))
    load_rows(write(folder, *[ask()] * 50))
    assert len(calls) == 1


def test_ten_thousand_rows_load_in_seconds(folder):
    data = (folder / "images/a.png").read_bytes()
    for index in range(5_000):
        (folder / f"images/{index}.png").write_bytes(data)
    path = write(folder, *(answered(images=(f"images/{index % 5_000}.png",), id=str(index)) for index in range(10_000)))
    start = time.process_time()
    assert len(load_rows(path, needs_answer=True)) == 10_000
    assert time.process_time() - start < 10  # about 1 s; the bound only catches a check that runs once a row
