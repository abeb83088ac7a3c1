"""A random model of a few thousand parameters of each family, its pictures and prompts; no tokenizer is needed."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cosmo_fast.models import Policy
from cosmo_fast.models.policy import FAMILIES as MODULES
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Media, Prompt

IMAGE, END, VOCAB = 5, 1, 97
WITH_PICTURES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
TEXT_ONLY = ["qwen2", "qwen3", "llama"]
FAMILIES = WITH_PICTURES + TEXT_ONLY

TEXT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})
TOWER = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, spatial_merge_size=2, initializer_range=0.2)
PATCHED = dict(image_token_id=IMAGE, vision_start_token_id=3, vision_end_token_id=4, video_token_id=6)


def _settings(family, text):
    """Keywords of the family's configuration."""
    if family in TEXT_ONLY:
        return {**TEXT, **({"head_dim": 8} if family == "qwen3" else {}), **text}
    if family == "qwen2_vl":
        tower = dict(depth=2, embed_dim=16, hidden_size=32, mlp_ratio=2, num_heads=2, patch_size=14)
        return dict(text_config={**TEXT, **MROPE, **text}, vision_config=tower, **PATCHED)
    if family == "qwen2_5_vl":
        tower = dict(**TOWER, out_hidden_size=32, patch_size=14, window_size=56, fullatt_block_indexes=[1])
        return dict(text_config={**TEXT, **MROPE, **text}, vision_config=tower, **PATCHED)
    if family == "qwen3_vl":
        tower = dict(
            **{**TOWER, "depth": 3}, out_hidden_size=32, patch_size=14, num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        )  # fmt: skip
        text = {**TEXT, "num_hidden_layers": 3, "head_dim": 8, **MROPE, **text}  # a layer after the last level's
        return dict(text_config=text, vision_config=tower, **PATCHED)
    tower = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=56, patch_size=14,
    )  # fmt: skip
    text = {"model_type": "qwen2", **TEXT, **text}
    return dict(text_config=text, vision_config=tower, image_token_id=IMAGE, image_seq_length=4)


def image_processor(family):
    if family in TEXT_ONLY:
        return None
    if family == "internvl":
        return GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 140 * 140})


def tiny_policy(seed=0, family="qwen2_5_vl", **text):
    """The policy and a copy of its model with transformers' own attention; ``text``: settings of the language model."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**_settings(family, text), "tie_word_embeddings": False})
    config._attn_implementation = "sdpa"
    model = (AutoModelForCausalLM if family in TEXT_ONLY else AutoModelForImageTextToText).from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = END
    plain = copy.deepcopy(model)
    return Policy(model, SimpleNamespace(eos_token_id=END), image_processor(family), MODULES[family]), plain


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
    """A prompt of ints (text tokens) and paths (pictures between two tokens; a text-only family leaves them out)."""
    ids, media = [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        elif policy.family.IMAGE_TOKEN is not None:
            with Image.open(piece) as image:
                thw = policy.family.grid_after_merge(
                    policy.model.config, policy.image_processor, image.height, image.width
                )
            ids.append(3)
            media.append(Media(str(piece), len(ids), thw, 1.0 if policy.family.ROTARY_AXES == 3 else None))
            ids += [IMAGE] * media[-1].rows + [4]
    return Prompt(np.array(ids), tuple(media), columns or {}, "", "test")


def padded_logits(plain, policy, prompt, response):
    """(R + 1, V): transformers' own logits for each token of a response and the one after it."""
    ids = torch.tensor([[*prompt.ids.tolist(), *response.tolist()]])
    extra = {}
    if prompt.media:
        vision = Vision(policy)
        vision.features([*{m.key: m for m in prompt.media}.values()])
        extra["pixel_values"] = torch.cat([vision._patches[m.key] for m in prompt.media])
        if policy.family.ROTARY_AXES == 3:
            slots = torch.zeros_like(ids)
            for m in prompt.media:
                slots[0, m.offset : m.offset + m.rows] = 1
            grids = torch.stack([vision._grids[m.key] for m in prompt.media])
            extra |= {"image_grid_thw": grids * torch.tensor([1, 2, 2]), "mm_token_type_ids": slots}
    logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits[0]
    return logits[len(prompt.ids) - 1 :]


def padded_logps(plain, policy, prompt, response):
    """Log-probs (R,) of one response by transformers' own forward over the whole sequence."""
    logp = padded_logits(plain, policy, prompt, response)[:-1].log_softmax(-1)
    return logp.gather(1, torch.from_numpy(response)[:, None])[:, 0]
