"""Qwen3-VL: pictures as in Qwen2-VL; features of several depths of the tower go into the first language layers."""

from __future__ import annotations

import torch
from torch import nn

# The rest of the family is Qwen2-VL's.
from cosmo_fast.models.qwen2_vl import (  # noqa: F401
    AROUND_IMAGE,
    IMAGE_TOKEN,
    MODEL,
    ROTARY_AXES,
    VISION_PARTS,
    grid_after_merge,
    load_image_processor,
    pixels,
    register_attention,
    tower,
)

MODEL_TYPES = ("qwen3_vl",)


def vision_features(model: nn.Module, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Features (m, d · (1 + levels)) of all pictures: those of the last block, then the DeepStack levels'.

    DeepStack: https://arxiv.org/abs/2406.04334. One tensor, so that nobody who stores features need know of levels.
    """
    out = tower(model, patches, grids)
    return torch.cat([out.pooler_output, *out.deepstack_features], 1)


def language_inputs(embeddings: torch.Tensor, rows: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Embeddings (T, d) with the first d of ``features`` at ``rows`` (m,), ascending; the levels for the layers."""
    first, *levels = features.split(embeddings.shape[1], 1)
    seen = torch.zeros(1, len(embeddings), dtype=torch.bool, device=rows.device).index_fill(1, rows, True)
    return embeddings.index_copy(0, rows, first), {"visual_pos_masks": seen, "deepstack_visual_embeds": levels}
