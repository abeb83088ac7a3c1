"""InternVL3 (checkpoints in transformers' own format, "-hf"): a picture is cut into tiles of one size.

https://arxiv.org/abs/2504.10479. Positions count features like text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from cosmo_fast.models import attention
from cosmo_fast.models.qwen2_vl import language_inputs  # noqa: F401

MODEL_TYPES = ("internvl",)
MODEL = AutoModelForImageTextToText
IMAGE_TOKEN = "<IMG_CONTEXT>"
AROUND_IMAGE = ("<img>", "</img>")  # the processor, not the chat template, writes them
VISION_PARTS = ("vision_tower", "multi_modal_projector")
ROTARY_AXES = 1


def load_image_processor(name_or_path):
    """The Pillow backend, with or without torchvision; tiles on, as InternVLProcessor always asks for them."""
    return GotOcr2ImageProcessorPil.from_pretrained(name_or_path, crop_to_patches=True)


def register_attention(model: nn.Module) -> None:
    """The plan's attention for the text; the tower's batch of equal tiles keeps transformers' own.

    Raises:
        ValueError: a language model that is none of :data:`cosmo_fast.models.text.MODEL_TYPES`.
    """
    attention.register_text(model)


def grid_after_merge(config, image_processor, height: int, width: int) -> tuple[int, int, int]:
    """Grid (tiles, h, w) of the features of one picture of ``height`` × ``width`` pixels, thumbnail included."""
    tiles = image_processor.get_number_of_image_patches(height, width)
    side = image_processor.size["height"] // config.vision_config.patch_size[0]
    return tiles, (kept := int(side * config.downsample_ratio)), kept


def pixels(config, image_processor, images: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tiles (tiles, C, height, width) fp32 of each PIL image, and the grids (images, 3) of their features."""
    done = image_processor(images=images, return_tensors="np")
    tiles = torch.from_numpy(np.asarray(done["pixel_values"], dtype=np.float32)).split(list(done["num_patches"]))
    grids = [grid_after_merge(config, image_processor, image.height, image.width) for image in images]
    return list(tiles), torch.tensor([(len(part), *grid[1:]) for part, grid in zip(tiles, grids, strict=True)])


def vision_features(model: nn.Module, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Features (m, d) of all tiles, in order, after pixel shuffle and projector."""
    return model.get_image_features(pixel_values=patches).pooler_output.flatten(0, 1)
