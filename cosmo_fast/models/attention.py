"""Attention of language models by the plan of a forward, and of vision towers in batches of equal segments.

:class:`Attention` and :class:`VisionAttention` take the place of transformers' own where theirs are known. ``packed``,
registered with transformers as ``cosmo_packed``, does the plan's attention inside any other class. What they cannot do
is refused before work begins or at the call.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from cosmo_fast import ops

TEXT = "cosmo_packed"

# Language models whose attention is known to be what `packed` computes.
KNOWN = ("llama", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")


def register_text(model: nn.Module) -> None:
    """The language model of ``model`` attends by the plan.

    Raises:
        ValueError: an unknown language model, a sliding window in force, logit softcapping, or rotary frequencies that
            depend on the longest sequence of the batch.
    """
    config = model.get_decoder().config
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if config.model_type not in KNOWN:
        raise ValueError(f"text_config.model_type={config.model_type!r} is not supported; supported: {list(KNOWN)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"sliding_window={config.sliding_window} is in force and not supported; set use_sliding_window to false"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"attn_logit_softcapping={config.attn_logit_softcapping} is not supported; set it to null")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_parameters.rope_type={rope!r} is not supported: a token would depend on the longest sequence of its "
            "batch; use 'default', 'linear', 'yarn' or 'llama3'"
        )
    config._attn_implementation = TEXT


class Attention(nn.Module):
    """Attention of a decoder layer by the plan: (1, T, d) -> ((1, T, d), None); every head lies where it is projected.

    Raises:
        ValueError: no plan was passed to the forward, or attention dropout.
    """

    def forward(self, hidden_states: torch.Tensor, *, position_embeddings, plan=None, **_):
        x = hidden_states.squeeze(0)
        q, k, v = (p(x).unflatten(1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rotary(q, k, *(table.squeeze(0) for table in position_embeddings))
        return self.o_proj(_attend(self, q, k, v, plan).flatten(1)).unsqueeze(0), None


class VisionAttention(nn.Module):
    """Full attention inside each segment of ``cu_seqlens`` (s + 1,): (T, d) -> (T, d); equal segments in one call."""

    def forward(self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, *, position_embeddings, **_):
        lengths = cu_seqlens.diff().tolist()
        q, k, v = self.qkv(hidden_states).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q, k = ops.rotary(q, k, *position_embeddings)
        out = torch.empty_like(q) if len(set(lengths)) > 1 else None
        for length in sorted(set(lengths)):
            if out is None:
                rows = slice(None)
            else:
                chosen = torch.tensor([n == length for n in lengths], device=q.device)
                rows = (cu_seqlens[:-1][chosen, None] + torch.arange(length, device=q.device)).flatten()
            parts = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
            part = functional.scaled_dot_product_attention(*parts, scale=self.scaling).transpose(1, 2).flatten(0, 1)
            out = part if out is None else out.index_copy(0, rows, part)
        return self.proj(out.flatten(1))


# Classes of transformers and what computes the same.
_TEXT = ("Llama", "Qwen2", "Qwen3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VLText")
CLASSES = dict.fromkeys((f"{name}Attention" for name in _TEXT), Attention)
CLASSES |= dict.fromkeys(("VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention"), VisionAttention)


def packed(module, query, key, value, attention_mask, *, plan=None, **_):
    """``query`` (1, H, T, D), ``key``/``value`` (1, Hk, T, D) -> ((1, T, H, D), None), as :class:`Attention`."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return _attend(module, q, k, v, plan).unsqueeze(0), None


def _attend(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan) -> torch.Tensor:
    if plan is None:
        raise ValueError(
            "the packed forward got no plan: call Policy.hidden, not the model, or reload the model for plain use"
        )
    if module.training and module.attention_dropout:
        raise ValueError(f"attention_dropout={module.attention_dropout} is not supported; set it to 0")
    return plan.attend(module.layer_idx, q, k, v, module.scaling)


AttentionInterface.register(TEXT, packed)
