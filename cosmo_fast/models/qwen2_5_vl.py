"""The Qwen2.5-VL family: where its parts are, how a picture becomes tokens, and its vision tower."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from cosmo_fast.models import attention

MODEL_TYPE = "qwen2_5_vl"
IMAGE_TOKEN = "<|image_pad|>"


def load(name_or_path) -> nn.Module:
    """The model in fp32. Raises OSError where there are no weights."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(name_or_path, dtype=torch.float32)


def load_image_processor(name_or_path):
    """The Pillow backend, with or without torchvision, so that results do not depend on what is installed."""
    return Qwen2VLImageProcessorPil.from_pretrained(name_or_path)


def register_attention(model: nn.Module) -> None:
    """The plan's attention for the text, batched segments for the vision tower."""
    model.model.language_model.config._attn_implementation = attention.TEXT
    model.model.visual.config._attn_implementation = attention.VISION


def language_model(model: nn.Module) -> nn.Module:
    """The part that takes embeddings to final hidden states."""
    return model.model.language_model


def vision_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the tower, its merger included."""
    return model.model.visual.parameters()


def merge(image_processor) -> tuple[int, int, int]:
    """Patches that become one feature, along (t, h, w)."""
    return 1, image_processor.merge_size, image_processor.merge_size


def grid_after_merge(image_processor, height: int, width: int) -> tuple[int, int, int]:
    """Grid (t, h, w) of the features of one picture of ``height`` × ``width`` pixels, after the spatial merge.

    Raises:
        ValueError: the picture is more than 200 times as long as wide.
    """
    resized_height, resized_width = _resized(image_processor, height, width)
    unit = image_processor.patch_size * image_processor.merge_size
    return 1, resized_height // unit, resized_width // unit


def _resized(image_processor, height: int, width: int) -> tuple[int, int]:
    size = image_processor.size
    unit = image_processor.patch_size * image_processor.merge_size
    return smart_resize(height, width, factor=unit, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])


def pixels(image_processor, images: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (patches, C·t·p·p) fp32 and grids (images, 3) before the merge of a list of PIL images."""
    done = image_processor(images=images, return_tensors="np")
    return torch.from_numpy(np.asarray(done["pixel_values"])), torch.from_numpy(np.asarray(done["image_grid_thw"]))


def vision_features(model: nn.Module, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Merged vision features (m, d) of all pictures, in order, in one pass of the tower."""
    return model.model.visual(patches.to(model.model.visual.dtype), grid_thw=grids).pooler_output
