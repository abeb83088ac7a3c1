"""Qwen2-VL and Qwen2.5-VL: how a picture becomes tokens, and their vision tower."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from cosmo_fast.models import attention

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
MODEL = AutoModelForImageTextToText
IMAGE_TOKEN = "<|image_pad|>"
AROUND_IMAGE = ("", "")  # the chat template writes the vision-start and vision-end tokens
VISION_PARTS = ("visual",)
ROTARY_AXES = 3


def load_image_processor(name_or_path):
    """The Pillow backend, with or without torchvision, so that results do not depend on what is installed."""
    return Qwen2VLImageProcessorPil.from_pretrained(name_or_path)


def register_attention(model: nn.Module) -> None:
    """The plan's attention for the text; the tower's needs no telling."""
    attention.register_text(model)


def grid_after_merge(config, image_processor, height: int, width: int) -> tuple[int, int, int]:
    """Grid (t, h, w) of the features of one picture of ``height`` × ``width`` pixels, after the spatial merge.

    Raises:
        ValueError: the picture is more than 200 times as long as wide.
    """
    unit, size = image_processor.patch_size * image_processor.merge_size, image_processor.size
    resized_height, resized_width = smart_resize(
        height, width, factor=unit, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
    )
    return 1, resized_height // unit, resized_width // unit


def pixels(config, image_processor, images: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Patches (patches, C·t·p·p) fp32 of each PIL image, and the grids (images, 3) of their features."""
    done = image_processor(images=images, return_tensors="np")
    grids = torch.from_numpy(np.asarray(done["image_grid_thw"]))
    merge = torch.tensor([1, image_processor.merge_size, image_processor.merge_size])
    patches = torch.from_numpy(np.asarray(done["pixel_values"])).split(grids.prod(-1).tolist())
    return list(patches), grids // merge


def tower(model: nn.Module, patches: torch.Tensor, grids: torch.Tensor):
    """The tower's output for the patches of all pictures, whose features have ``grids``, in one pass."""
    visual = model.get_encoder(modality="image")
    merge = grids.new_tensor([1, visual.spatial_merge_size, visual.spatial_merge_size])
    return visual(patches.to(visual.dtype), grid_thw=grids * merge)


def vision_features(model: nn.Module, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Merged vision features (m, d) of all pictures, in order."""
    return tower(model, patches, grids).pooler_output


def language_inputs(embeddings: torch.Tensor, rows: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Embeddings (T, d) with ``features`` (m, d) at ``rows`` (m,), and what else the language model is given."""
    return embeddings.index_copy(0, rows, features), {}
