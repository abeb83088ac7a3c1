"""The two attention functions that the packed forward registers with transformers; no model file is forked.

``cosmo_packed`` (language model): the plan given to the forward does the attention. ``cosmo_flash_segments`` (vision
tower; the name holds "flash" because transformers then passes all segment boundaries in one call): equal segments of
any number of pictures in one batched call. What they cannot do is refused before work begins or at the call.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

TEXT = "cosmo_packed"
VISION = "cosmo_flash_segments"


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


def packed(module, query, key, value, attention_mask, *, scaling, plan=None, dropout=0.0, sliding_window=None, **_):
    """``query`` (1, H, T, D), ``key``/``value`` (1, Hk, T, D) -> ((1, T, H, D), None), by ``plan.attend``.

    Raises:
        ValueError: no plan was passed to the forward, attention dropout, or a sliding window.
    """
    if plan is None:
        raise ValueError(
            "the packed forward got no plan: call Policy.hidden, not the model, or reload the model for plain use"
        )
    if dropout or sliding_window is not None:
        raise ValueError(
            f"attention_dropout={dropout} and sliding_window={sliding_window} are not supported; set 0 and null"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return plan.attend(module.layer_idx, q, k, v, scaling).unsqueeze(0), None


def vision_segments(module, query, key, value, attention_mask, *, cu_seq_lens_q, scaling, dropout=0.0, **_):
    """Full attention inside each segment of ``cu_seq_lens_q`` (s + 1,): (1, H, T, D) -> ((1, T, H, D), None).

    Raises:
        ValueError: attention dropout.
    """
    if dropout:
        raise ValueError(f"vision_config.attention_dropout={dropout} is not supported; set it to 0")
    lengths = cu_seq_lens_q.diff().tolist()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = torch.empty_like(q) if len(set(lengths)) > 1 else None
    for length in sorted(set(lengths)):
        if out is None:
            rows = slice(None)
        else:
            chosen = torch.tensor([n == length for n in lengths], device=q.device)
            rows = (cu_seq_lens_q[:-1][chosen, None] + torch.arange(length, device=q.device)).flatten()
        parts = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        part = functional.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).flatten(0, 1)
        out = part if out is None else out.index_copy(0, rows, part)
    return out.unsqueeze(0), None


AttentionInterface.register(TEXT, packed)
AttentionInterface.register(VISION, vision_segments)
