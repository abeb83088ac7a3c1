"""Language models without pictures: Qwen2, Qwen3 and Llama, and with them the DeepSeek-R1 distillations."""

from __future__ import annotations

from torch import nn
from transformers import AutoModelForCausalLM

from cosmo_fast.models import attention

MODEL_TYPES = ("llama", "qwen2", "qwen3")
MODEL = AutoModelForCausalLM
IMAGE_TOKEN = None  # the encoder refuses rows with pictures
VISION_PARTS = ()
ROTARY_AXES = 1


def load_image_processor(name_or_path) -> None:
    """None."""


def register_attention(model: nn.Module) -> None:
    """The plan's attention."""
    attention.register_text(model)
