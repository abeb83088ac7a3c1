"""The larger pictures and the clips of the embedded world, on which pruning is measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cosmo_fast.data import load_rows
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import single_row
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.world import build, clips, draw, ensure_world

TINY = {
    "train_general": 18, "train_safety": 4, "rl_general": 9, "rl_safety": 4, "validation_general": 9,
    "validation_safety": 4, "scenes_general": 18, "scenes_safety": 4, "held_general": 9, "held_safety": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A world of pictures of 392 × 392 with its model."""
    return ensure_world(cache_dir=tmp_path_factory.mktemp("cache"), picture=392, **TINY)


def test_the_same_rows_are_drawn_larger_and_only_they_have_clips(tmp_path, large):
    small = build(tmp_path / "56", **TINY)
    for split in ("rl", "rl_safety", "scenes", "concepts"):
        rows = [[json.loads(x) for x in (f / f"{split}.jsonl").read_text().splitlines()] for f in (small, large)]
        for a, b in zip(*rows, strict=True):
            assert {k: v for k, v in a.items() if k != "images"} == {k: v for k, v in b.items() if k != "images"}
            assert [Image.open(f / r["images"][0]).size for f, r in ((small, a), (large, b))] == [(56, 56), (392, 392)]
    assert not (small / "clips.jsonl").exists() and not (small / "small.jsonl").exists()
    clip = json.loads((large / "clips.jsonl").read_text().splitlines()[0])
    assert [Image.open(large / name).size for name in clip["images"]] == [(196, 196)] * 4
    few = json.loads((large / "small.jsonl").read_text().splitlines()[0])
    assert Image.open(large / few["images"][0]).size == (56, 56)
    with pytest.raises(ValueError, match="world.picture=100 must be a multiple of 56"):
        build(tmp_path / "odd", picture=100)


def _ink(scene, without, first=None):
    """Rows and columns where the two pictures differ."""
    a, b = (np.asarray(p, dtype=int) for p in (draw.render(scene, first), without))
    return np.argwhere((a != b).any(-1))


def test_an_object_of_a_large_picture_lies_in_its_quadrant_in_one_token(monkeypatch):
    for variant in range(8):
        scene = draw.Scene((("apple", variant % 4),), "blue", variant, side=392)
        with monkeypatch.context() as patch:
            patch.setattr(draw, "_glyph", lambda *a: Image.new("RGBA", (1, 1)))
            bare = draw.render(scene)
        ink = _ink(scene, bare)
        assert len({(y // 28, x // 28) for y, x in ink.tolist()}) == 1
        assert {(y // 196) * 2 + x // 196 for y, x in ink.tolist()} == {variant % 4}
        assert len(np.unique(np.asarray(bare).reshape(-1, 3), axis=0)) > 20  # a ground of many shades


def test_only_the_mover_of_a_clip_moves_and_its_answers_say_from_where_to_where():
    rng = np.random.default_rng(0)
    for variant in range(20):
        clip = clips.draw_clip(rng, variant, 196)
        frames = clip.frames
        changed = _ink(frames[-1], draw.render(frames[0]), frames[0])
        assert {int(y >= 98) * 2 + int(x >= 98) for y, x in changed.tolist()} == {clip.start, clip.end}
        assert len({(y // 28, x // 28) for y, x in changed.tolist()}) == 2
        assert clip.ask("start")[1] == draw.QUADRANTS[clip.start] and clip.ask("end")[1] == draw.QUADRANTS[clip.end]
        steps, answer, _ = clip.ask("mover")
        before, after = (part.split("end ")[-1].removeprefix("At the start ").rstrip(".").split(", ")
                         for part in steps.split(". "))  # fmt: skip
        assert {a for a, b in zip(before, after, strict=True) if a != b} == {answer, "nothing"} and answer == clip.mover


def test_a_larger_picture_is_196_vision_tokens_of_which_four_see_a_square_as_a_small_picture(tmp_path, large):
    policy = load_policy(large / "model")
    policy.freeze_vision_tower(True)
    prompts = [Encoder(policy).prompt(load_rows(large / f"{split}.jsonl")[0]) for split in ("scenes", "clips")]
    assert [sum(m.rows for m in prompt.media) for prompt in prompts] == [196, 196]
    [whole] = prompts[0].media
    Image.open(whole.key).convert("RGB").crop((112, 56, 168, 112)).save(tmp_path / "square.png")
    square = Encoder(policy).prompt(single_row("What is this?", [tmp_path / "square.png"])).media
    features = Vision(policy).features([whole]).reshape(14, 14, -1)[2:4, 4:6].flatten(0, 1)
    torch.testing.assert_close(features, Vision(policy).features(list(square)), rtol=1e-4, atol=1e-5)
