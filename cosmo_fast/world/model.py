"""A tiny random vision-language model with a tokenizer and image processor, as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cosmo_fast.world.build import is_training
from cosmo_fast.world.draw import SIZE

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# InternVL's names of the same tokens; those around a picture are its processor's, not the chat template's.
INTERNVL = {"<|vision_start|>": "<img>", "<|vision_end|>": "</img>", "<|image_pad|>": "<IMG_CONTEXT>"}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl")
# Ordinary tokens, so that they are part of what a policy says.
WHOLE = ["<think>", "</think>", "\\boxed{"]
# Qwen2's rule: a word takes its leading space along, digits stand alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(
    texts: Iterable[str], tags: Iterable[str] = (), family: str = FAMILIES[0]
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of ``texts`` is one token, as is each of the ``tags`` (``<answer>``).

    Any other text still has tokens. A text has the same ids in every ``family``.
    """
    special, template = SPECIAL, CHAT_TEMPLATE
    if family == "internvl":
        special = [INTERNVL.get(token, token) for token in SPECIAL]
        template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", INTERNVL["<|image_pad|>"])
    whole_texts = [*WHOLE, *tags]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=50_000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [f"system\n user\n assistant\n {' '.join(whole_texts)}"]
    cleaned = set()
    for text in texts:
        for whole in whole_texts:
            text = text.replace(whole, "\n")  # what follows it starts without a space, and is a token of its own
        cleaned.add(text)
    tokenizer.train_from_iterator(sorted(cleaned) + words, trainer)
    tokenizer.add_tokens(whole_texts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def picture_statistics(paths: Iterable[Path]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour channel, in [0, 1], over all pixels of the pictures."""
    total, squares, pixels = np.zeros(3), np.zeros(3), 0
    for path in paths:
        values = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64).reshape(-1, 3) / 255
        total, squares, pixels = total + values.sum(0), squares + np.square(values).sum(0), pixels + len(values)
    mean = total / pixels
    return mean.tolist(), np.sqrt(squares / pixels - np.square(mean)).tolist()


def build_model(
    folder: str | Path,
    texts: Iterable[str],
    *,
    seed: int = 0,
    image_mean: list[float],
    image_std: list[float],
    tags: Iterable[str] = (),
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    vision_depth: int = 3,
    vision_hidden_size: int = 96,
    initializer_range: float = 0.05,
    rope_theta: float = 100.0,
    picture: int = SIZE,
    family: str = FAMILIES[0],
) -> Path:
    """Writes the folder: weights drawn from N(0, ``initializer_range``²), config, tokenizer, chat template, processor.

    With pixels normalised by the data's own statistics and this range a run of minutes learns colours and counts; with
    the usual 0.5 and 0.02 colours stay at chance. For a larger ``picture`` (pixels) the tower of Qwen2.5-VL looks at
    windows of 56 × 56, that of InternVL at tiles of them: a patch costs what it costs in a picture of that size, and
    what is learned on small pictures holds. Qwen3-VL's looks at all of the picture at once.
    """
    folder = Path(folder)
    tokenizer = build_tokenizer(texts, tags, family)
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    text = dict(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, initializer_range=initializer_range, tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )  # fmt: skip
    tower = dict(
        hidden_size=vision_hidden_size, intermediate_size=3 * vision_hidden_size, patch_size=14,
        initializer_range=initializer_range,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(_config(family, text, tower, vision_depth, picture, ids))
    _draw_weights(model, initializer_range, seed)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "internvl":  # tiles of what is drawn under a picture, too
        tiles = dict(size={"height": SIZE, "width": SIZE}, max_patches=max(4, (picture // SIZE) ** 2))
        processor = GotOcr2ImageProcessorPil(image_mean=image_mean, image_std=image_std, crop_to_patches=True, **tiles)
    else:
        processor = Qwen2VLImageProcessorPil(
            patch_size=14, merge_size=2, temporal_patch_size=2, image_mean=image_mean, image_std=image_std,
            size={"shortest_edge": SIZE * SIZE, "longest_edge": 1024 * 28 * 28},
        )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def _config(family: str, text: dict, tower: dict, depth: int, picture: int, ids: dict[str, int]) -> PreTrainedConfig:
    """The family's configuration from what all have in common: four vision tokens for 56 × 56 pixels, or a tile."""
    if family == "internvl":
        text |= dict(model_type="qwen2")
        tower |= dict(num_hidden_layers=depth, num_attention_heads=4, image_size=SIZE)
        tokens = dict(image_token_id=ids["<|image_pad|>"], image_seq_length=4)
    else:
        pairs = text["hidden_size"] // 8
        each = pairs // 3 if family == "qwen3_vl" else 3 * pairs // 8  # Qwen3-VL interleaves its three axes
        text["rope_parameters"]["mrope_section"] = [pairs - 2 * each, each, each]
        tower |= dict(depth=depth, num_heads=4, out_hidden_size=text["hidden_size"])
        tower |= dict(spatial_merge_size=2, temporal_patch_size=2)
        if family == "qwen3_vl":
            text |= dict(head_dim=2 * pairs)
            tower |= dict(num_position_embeddings=(SIZE // 14) ** 2, deepstack_visual_indexes=[depth // 2])
        else:
            full = list(range(depth)) if picture == SIZE else []
            tower |= dict(window_size=112 if picture == SIZE else SIZE, fullatt_block_indexes=full)
        names = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
        tokens = {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in names.items()}
    return CONFIG_MAPPING[family](text_config=text, vision_config=tower, tie_word_embeddings=False, **tokens)


def _draw_weights(model: nn.Module, deviation: float, seed: int) -> None:
    """Matrices from N(0, deviation²) in the order of their names; biases 0, norms 1, as transformers starts them.

    InternVL's layer scales start at 1 too, so that every tower is as deep from the first step (0.1 in transformers).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, deviation, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1)


def training_material(folder: Path) -> tuple[list[str], list[Path]]:
    """Every text and every picture of the training splits, for the tokenizer and the pixel statistics."""
    texts, pictures = [], set()
    for split in sorted(path for path in folder.glob("*.jsonl") if is_training(path.stem)):
        if split.stem == "small":  # the texts of train, over smaller pictures
            continue
        for line in split.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            pictures.update(row["images"])
            for message in row["messages"]:
                content = message["content"]
                texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return texts, [folder / name for name in sorted(pictures)]
