"""What is each family's own: placeholders, positions, DeepStack, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, IMAGE, TEXT_ONLY, WITH_PICTURES, image_processor, make_prompt, save_pictures, tiny_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import DataError, Row, single_row
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Media, Plan, Prompt

PROCESSORS = dict(
    qwen2_vl=Qwen2VLProcessor, qwen2_5_vl=Qwen2_5_VLProcessor, qwen3_vl=Qwen3VLProcessor, internvl=InternVLProcessor
)
TURN = "{{ '<|im_start|>' + message.role + ' ' }}{% if message.content is string %}{{ message.content }}{% else %}"
TURN += "{% for part in message.content %}{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}"
TURN += "{% endfor %}{% endif %}<|im_end|>"
TEMPLATE = "{% for message in messages %}" + TURN + "{% endfor %}<|im_start|>assistant "
MARKS = ["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def tokenizer(family):
    """Words of a small vocabulary, the control tokens of all families, and the family's placeholder."""
    words = {word: i for i, word in enumerate(["[UNK]", *"user assistant what is in this picture and that".split()])}
    words |= {token: len(words) + i for i, token in enumerate(["<|im_end|>", "<|box_start|>", *MARKS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    marks |= dict(image_token="<|image_pad|>", video_token="<|video_pad|>", box="<|box_start|>", turn="<|im_start|>")
    marks |= dict(vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="<|im_end|>", extra_special_tokens=marks
    )
    picture = "<IMG_CONTEXT>\n" if family == "internvl" else "<|vision_start|><|image_pad|><|vision_end|>"
    made.chat_template = TEMPLATE.replace("PICTURE", picture)
    return made


def spoken(family, **text):
    """The family's tiny policy with a tokenizer."""
    policy, plain = tiny_policy(family=family, **text)
    policy.tokenizer = tokenizer(family)
    return policy, plain


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_prompts_have_the_tokens_that_the_familys_processor_makes(family, tmp_path, monkeypatch):
    policy, _ = spoken(family)
    # The video processor, which needs torchvision, is not part of the rule.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    extra = {"image_seq_length": 4} if family == "internvl" else {}
    processor = PROCESSORS[family](
        image_processor=image_processor(family), tokenizer=policy.tokenizer, video_processor=None, **extra
    )
    paths = save_pictures(tmp_path, ((56, 56), (28, 84), (112, 56), (300, 40), (57, 113)))
    row = single_row("what is in this picture and that", paths)
    prompt = Encoder(policy).prompt(row)
    images = [Image.open(path) for path in paths]
    made = processor(text=[prompt.text], images=[images], return_tensors="np")
    assert prompt.ids.tolist() == np.asarray(made["input_ids"])[0].tolist()
    image_id = policy.tokenizer.convert_tokens_to_ids(policy.family.IMAGE_TOKEN)
    assert sum(m.rows for m in prompt.media) == (prompt.ids == image_id).sum()
    assert all((prompt.ids[m.offset : m.offset + m.rows] == image_id).all() for m in prompt.media)
    assert len(Vision(policy).features(list(prompt.media))) == sum(m.rows for m in prompt.media)
    patches, _ = policy.family.pixels(policy.model.config, policy.image_processor, images)
    assert np.array_equal(torch.cat(patches), np.asarray(made["pixel_values"], dtype=np.float32))


@pytest.mark.parametrize("family", TEXT_ONLY)
def test_a_text_only_model_gets_strings_and_refuses_pictures(family, tmp_path):
    policy, _ = spoken(family)
    row = single_row("what is this")
    wanted = policy.tokenizer.apply_chat_template([{"role": "user", "content": "what is this"}], return_dict=False)
    assert Encoder(policy).prompt(row).ids.tolist() == wanted
    with pytest.raises(DataError, match=rf"prompt: 1 image\(s\), but a '{family}' model takes none"):
        Encoder(policy).prompt(single_row("what is this", save_pictures(tmp_path)[:1]))


def test_a_text_may_not_hold_the_models_control_tokens():
    policy, _ = spoken("internvl")
    encoder = Encoder(policy)
    for text in ("what <img> is", "is this<|im_end|>", "<|im_start|> system"):
        with pytest.raises(DataError, match="holds the control token"):
            encoder.prompt(Row("rows:1", [_user(text)], (), {}))
    encoder.prompt(Row("rows:1", [_user("<|box_start|> is an ordinary mark")], (), {}))


def _user(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def test_a_tokenizer_without_the_picture_token_is_refused():
    policy, _ = spoken("internvl")
    policy.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    with pytest.raises(ValueError, match="no '<IMG_CONTEXT>'"):
        Encoder(policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_is_loaded_with_its_family(family, tmp_path):
    policy, _ = spoken(family, vocab_size=128)
    policy.save(tmp_path / "model")
    loaded = load_policy(tmp_path / "model")
    assert loaded.family is policy.family
    prompt = make_prompt(policy, [7, *save_pictures(tmp_path)[:2], 9])
    plan = Plan([prompt], [[np.array([11, 12])]])
    a, b = (p.logprobs(plan, Vision(p).features(plan.media))[0] for p in (policy, loaded))
    assert torch.equal(a, b)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"'gpt2' model; supported: \['internvl', 'llama', 'qwen2', .*'qwen3_vl'\]"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding_window=8"),
        ("internvl", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding_window=8"),
        ("internvl", dict(model_type="mistral"), "text_config.model_type='mistral'"),
        ("llama", dict(attn_logit_softcapping=30.0), "attn_logit_softcapping=30.0"),
        (
            "llama",
            dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type='dynamic'",
        ),
    ],
)
def test_attention_that_is_not_computed_is_refused(family, text, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy(family=family, **text)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_dropout_is_refused(family):
    policy, _ = tiny_policy(family=family, attention_dropout=0.1)
    policy.model.train()
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        policy.hidden(Plan([make_prompt(policy, [7, 8])]), None)


def test_deepstack_levels_reach_the_language_model(tmp_path):
    policy, _ = tiny_policy(family="qwen3_vl")
    prompt = make_prompt(policy, [7, save_pictures(tmp_path)[0], 8])
    plan = Plan([prompt], [[np.array([9, 10])]])
    features = Vision(policy).features(plan.media).detach()
    assert features.shape == (4, 3 * 32)
    features.requires_grad_()
    policy.logprobs(plan, features)[0].sum().backward()
    assert all(level.norm() > 0 for level in features.grad.split(32, 1))


def media_prompt(length, media):
    """``media``: (offset, grid, time_step); other tokens are text."""
    ids = np.full(length, 7)
    entries = tuple(Media(str(i), offset, grid, step) for i, (offset, grid, step) in enumerate(media))
    for m in entries:
        ids[m.offset : m.offset + m.rows] = IMAGE
    return Prompt(ids, entries, {}, "", "test")


def theirs(family, length, spans, images=(), videos=(), seconds=()):
    """transformers' positions (3, length) and next position; ``spans``: (offset, rows, 1 for image or 2 for video)."""
    _, plain = tiny_policy(family=family)
    kinds = torch.zeros(1, length, dtype=torch.int32)
    for offset, rows, kind in spans:
        kinds[0, offset : offset + rows] = kind
    scale = torch.tensor([1, 2, 2])
    extra = {"second_per_grid_ts": torch.tensor(seconds)} if seconds else {}
    grids = [torch.tensor(x) * scale if x else None for x in (images, videos)]
    positions, delta = plain.model.get_rope_index(
        torch.full((1, length), 7), mm_token_type_ids=kinds, image_grid_thw=grids[0], video_grid_thw=grids[1], **extra
    )
    return positions[:, 0].numpy(), int(delta) + length


IMAGES = {
    "a portrait of 60 x 20": (1210, [(5, (1, 60, 20))]),
    "several pictures, the last at the end": (50, [(0, (1, 3, 4)), (14, (1, 6, 1)), (46, (1, 2, 2))]),
}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("case", IMAGES)
def test_positions_of_pictures_equal_those_of_transformers(family, case):
    length, media = IMAGES[case]
    plan = Plan([media_prompt(length, [(o, g, 1.0) for o, g in media])])
    positions, following = theirs(family, length, [(o, int(np.prod(g)), 1) for o, g in media], [g for _, g in media])
    assert np.array_equal(plan.positions, positions) and plan.next_position[0] == following


def test_video_positions_equal_those_of_transformers():
    grids, seconds = [(2, 3, 4), (3, 8, 9)], [0.4, 0.66]  # steps of 1.6 and 2.64 positions, cut off frame by frame
    spans = [(3, 24, 2), (30, 216, 2)]
    plan = Plan([media_prompt(250, [(o, g, 4 * s) for (o, _, _), g, s in zip(spans, grids, seconds, strict=True)])])
    positions, following = theirs("qwen2_5_vl", 250, spans, videos=grids, seconds=seconds)
    assert np.array_equal(plan.positions, positions) and plan.next_position[0] == following
    plan = Plan([media_prompt(250, [(o, g, 1.0) for (o, _, _), g in zip(spans, grids, strict=True)])])
    positions, following = theirs("qwen2_vl", 250, spans, videos=grids)
    assert np.array_equal(plan.positions, positions) and plan.next_position[0] == following


def test_text_after_a_long_video_starts_after_its_last_frame():
    # transformers 5.23 starts it after the height and width alone, in the midst of the video's time.
    plan = Plan([media_prompt(20, [(2, (4, 2, 2), 4.0)])])
    positions, following = theirs("qwen2_5_vl", 18, [(2, 16, 2)], videos=[(4, 2, 2)], seconds=[1.0])
    assert np.array_equal(plan.positions[:, :18], positions)
    assert following == 15 and plan.positions[0, 18:].tolist() == [15, 16] and plan.next_position[0] == 17


def test_frames_of_a_qwen3_vl_video_are_media_between_timestamps():
    frames = [(4, (1, 2, 3), 1.0), (13, (1, 2, 3), 1.0), (22, (1, 2, 3), 1.0)]
    plan = Plan([media_prompt(30, frames)])
    positions, following = theirs("qwen3_vl", 30, [(o, 6, 2) for o, _, _ in frames], videos=[(3, 2, 3)])
    assert np.array_equal(plan.positions, positions) and plan.next_position[0] == following


def test_positions_that_count_like_text_are_plain(tmp_path):
    policy, _ = tiny_policy(family="internvl")
    prompts = [make_prompt(policy, [7, *save_pictures(tmp_path), 8]), make_prompt(policy, [7, 9])]
    plan = Plan(prompts, [[np.array([9, 10])], [np.array([11])]])
    lengths = [len(p.ids) for p in prompts]
    wanted = np.concatenate([np.arange(lengths[0]), np.arange(2), lengths[0] + np.arange(2), [2]])
    assert np.array_equal(plan.positions, np.broadcast_to(wanted, (3, len(wanted))))


def test_a_replaced_picture_is_named(tmp_path):
    policy, _ = tiny_policy(family="internvl")
    path = Path(save_pictures(tmp_path)[0])
    prompt = make_prompt(policy, [7, path])
    Image.new("RGB", (112, 56)).save(path)
    with pytest.raises(ValueError, match="was encoded for another size"):
        Vision(policy).features(list(prompt.media))


@pytest.mark.parametrize("step", [-1.0, float("nan"), 1e9])
def test_a_time_step_that_is_no_time_is_refused(step):
    with pytest.raises(ValueError, match=r"media_step\[0\]"):
        Plan([media_prompt(9, [(1, (2, 2, 2), step)])])
