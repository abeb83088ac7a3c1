"""A random Qwen2.5-VL of a few thousand parameters, its pictures and prompts, for tests that need no tokenizer."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cosmo_fast.models import Policy, qwen2_5_vl
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Media, Prompt

IMAGE, END, VOCAB = 5, 1, 97


def tiny_policy(seed=0, **text):
    """The policy and a copy of its model with transformers' own attention."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**settings, **text},
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=14,
            spatial_merge_size=2, window_size=56, fullatt_block_indexes=[1], initializer_range=0.2,
        ),
        image_token_id=IMAGE, vision_start_token_id=3, vision_end_token_id=4, video_token_id=6,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = END
    plain = copy.deepcopy(model)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 140 * 140})
    return Policy(model, SimpleNamespace(eos_token_id=END), processor, qwen2_5_vl), plain


def save_pictures(folder, sizes=((56, 56), (28, 84), (112, 56)), seed=0):
    """Random pictures of (width, height); returns their paths."""
    rng = np.random.default_rng(seed)
    paths = []
    for i, (width, height) in enumerate(sizes):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def make_prompt(policy, pieces, columns=None):
    """A prompt of ints (text tokens) and paths (pictures between vision-start and vision-end tokens)."""
    ids, media = [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        with Image.open(piece) as image:
            thw = qwen2_5_vl.grid_after_merge(policy.image_processor, image.height, image.width)
        ids.append(3)
        media.append(Media(str(piece), len(ids), thw))
        ids += [IMAGE] * media[-1].rows + [4]
    return Prompt(np.array(ids), tuple(media), columns or {}, "", "test")


def padded_logits(plain, policy, prompt, response):
    """(R + 1, V): transformers' own logits for each token of a response and the one after it."""
    ids = torch.tensor([[*prompt.ids.tolist(), *response.tolist()]])
    slots = torch.zeros_like(ids)
    for m in prompt.media:
        slots[0, m.offset : m.offset + m.rows] = 1
    extra = {}
    if prompt.media:
        vision = Vision(policy)
        vision.features([*{m.key: m for m in prompt.media}.values()])
        extra["pixel_values"] = torch.cat([vision._patches[m.key] for m in prompt.media])
        extra["image_grid_thw"] = torch.stack([vision._grids[m.key] for m in prompt.media])
        extra["mm_token_type_ids"] = slots
    logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits[0]
    return logits[len(prompt.ids) - 1 :]


def padded_logps(plain, policy, prompt, response):
    """Log-probs (R,) of one response by transformers' own forward over the whole sequence."""
    logp = padded_logits(plain, policy, prompt, response)[:-1].log_softmax(-1)
    return logp.gather(1, torch.from_numpy(response)[:, None])[:, 0]
