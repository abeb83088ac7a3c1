"""Attention over shared prompts: causal inside every segment, and from each response to all of its prompt.

CPU: three batched calls of PyTorch's own flash op (prompts, responses, responses to prompts), the last two merged by
their log-sum-exp, in one autograd node: PyTorch's varlen backward drops the gradient of the log-sum-exp, so a merge
by plain autograd would be silently wrong. As in ring attention, each part's backward gets the merged output and the
merged log-sum-exp. Elsewhere: dense scores under a mask made from the plan (:func:`prefix_attention_reference`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the segments of ``[all prompts | all responses]`` lie: host int64 arrays, responses by prompt.

    ``prompt_starts`` (g,), ``prompt_lengths`` (g,), ``response_starts`` (n,), ``response_lengths`` (n,),
    ``response_prompt`` (n,): the prompt that each response answers.
    """

    prompt_starts: np.ndarray
    prompt_lengths: np.ndarray
    response_starts: np.ndarray
    response_lengths: np.ndarray
    response_prompt: np.ndarray

    @cached_property
    def layout(self) -> _Layout:
        """The gather tables of the CPU calls, made once for all layers."""
        return _Layout.build(self)


def _padded_rows(starts: np.ndarray, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers (b, longest), and where the real ones are; a short segment is filled up with its own first row.

    Padding with a segment's own row keeps a poisoned neighbour out.
    """
    width = int(lengths.max(initial=0))
    column = np.arange(width)
    real = column[None, :] < lengths[:, None]
    rows = np.where(real, starts[:, None] + column[None, :], starts[:, None])
    return torch.from_numpy(rows), torch.from_numpy(np.flatnonzero(real))


@dataclass
class _Layout:
    """Gather tables of the three calls; ``*_slots`` are the places of the real rows in the padded layout."""

    prompt_rows: torch.Tensor
    prompt_slots: torch.Tensor
    prompt_flat: torch.Tensor
    own_rows: torch.Tensor | None
    own_slots: torch.Tensor | None
    cross_rows: torch.Tensor | None
    cross_slots: torch.Tensor | None
    cross_keys: torch.Tensor | None
    key_bias: torch.Tensor | None
    responses: slice

    @classmethod
    def build(cls, segments: Segments) -> _Layout:
        prompt_starts, prompt_lengths = segments.prompt_starts, segments.prompt_lengths
        response_starts, response_lengths = segments.response_starts, segments.response_lengths
        owner = segments.response_prompt
        prompt_rows, prompt_slots = _padded_rows(prompt_starts, prompt_lengths)
        total, prompts = int(response_lengths.sum()), int(prompt_lengths.sum())
        flat = prompt_rows.flatten()[prompt_slots]
        if total == 0:
            return cls(prompt_rows, prompt_slots, flat, None, None, None, None, None, None, slice(prompts, prompts))
        filled = response_lengths > 0
        own_rows, own_slots = _padded_rows(response_starts[filled], response_lengths[filled])
        per_prompt = np.bincount(owner, weights=response_lengths, minlength=len(prompt_lengths)).astype(np.int64)
        asked = per_prompt > 0
        starts = prompts + np.cumsum(per_prompt) - per_prompt
        cross_rows, cross_slots = _padded_rows(starts[asked], per_prompt[asked])
        lengths = prompt_lengths[asked]
        cross_keys, _ = _padded_rows(prompt_starts[asked], lengths)
        bias = None
        if (lengths != lengths.max()).any():
            hidden = np.arange(lengths.max())[None, :] >= lengths[:, None]
            bias = torch.from_numpy(np.where(hidden, -np.inf, 0.0))[:, None, None, :]
        rows = slice(prompts, prompts + total)
        return cls(
            prompt_rows, prompt_slots, flat, own_rows, own_slots, cross_rows, cross_slots, cross_keys, bias, rows
        )


def _gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(T, H, D) -> (b, H, l, D) without a copy of the result's layout."""
    return x[rows].transpose(1, 2)


def _flatten(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(b, H, l[, D]) -> the real rows (t, H[, D])."""
    return x.transpose(1, 2).flatten(0, 1)[slots]


def _spread(x: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The real rows (t, H[, D]) -> (b, H, l[, D]) with zeros in the padding."""
    out = x.new_zeros((rows.numel(), *x.shape[1:]))
    out[slots] = x
    return out.unflatten(0, rows.shape).transpose(1, 2)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: _Layout, scale: float):
        out = torch.empty_like(q)
        parts = _flash(*(_gather(x, layout.prompt_rows) for x in (q, k, v)), 0.0, True, scale=scale)
        out[layout.prompt_flat] = _flatten(parts[0], layout.prompt_slots)
        saved = [q, k, v, out, parts[1]]
        if layout.own_rows is not None:
            own = _flash(*(_gather(x, layout.own_rows) for x in (q, k, v)), 0.0, True, scale=scale)
            cross = _flash(*_cross_inputs(q, k, v, layout), 0.0, False, attn_mask=_bias(layout, q), scale=scale)
            own_lse, cross_lse = _flatten(own[1], layout.own_slots), _flatten(cross[1], layout.cross_slots)
            lse = torch.logaddexp(own_lse, cross_lse)
            merged = _flatten(own[0], layout.own_slots) * (own_lse - lse).exp().unsqueeze(-1)
            merged += _flatten(cross[0], layout.cross_slots) * (cross_lse - lse).exp().unsqueeze(-1)
            out[layout.responses] = merged
            saved.append(lse)
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, prompt_lse, *rest = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        sides = [layout.prompt_rows, layout.prompt_slots]
        inputs = [_gather(x, layout.prompt_rows) for x in (q, k, v)]
        given = _spread(grad[layout.prompt_flat], *sides)
        parts = _flash_backward(given, *inputs, _gather(out, layout.prompt_rows), prompt_lse, 0.0, True, scale=scale)
        for total, part in zip(grads, parts, strict=True):
            total[layout.prompt_flat] = _flatten(part, layout.prompt_slots)
        if rest:
            rows, (lse,) = layout.responses, rest
            given, merged = grad[rows], out[rows]
            own = [layout.own_rows, layout.own_slots]
            inputs = [_gather(x, layout.own_rows) for x in (q, k, v)]
            tail = (_spread(merged, *own), _spread(lse, *own), 0.0, True)
            for total, part in zip(
                grads, _flash_backward(_spread(given, *own), *inputs, *tail, scale=scale), strict=True
            ):
                total[rows] = _flatten(part, layout.own_slots)
            across = [layout.cross_rows, layout.cross_slots]
            tail = (_spread(merged, *across), _spread(lse, *across), 0.0, False)
            dq, dk, dv = _flash_backward(
                _spread(given, *across), *_cross_inputs(q, k, v, layout), *tail, attn_mask=_bias(layout, q), scale=scale
            )
            grads[0][rows] += _flatten(dq, layout.cross_slots)
            # A padded key repeats its prompt's first row and has weight 0, so adding it changes nothing.
            keys = layout.cross_keys.flatten()
            for total, part in ((grads[1], dk), (grads[2], dv)):
                total.index_add_(0, keys, part.transpose(1, 2).flatten(0, 1).to(total.dtype))
        return *grads, None, None


def _cross_inputs(q, k, v, layout: _Layout):
    return _gather(q, layout.cross_rows), _gather(k, layout.cross_keys), _gather(v, layout.cross_keys)


def _bias(layout: _Layout, q: torch.Tensor) -> torch.Tensor | None:
    return None if layout.key_bias is None else layout.key_bias.to(q.dtype)


def prefix_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of packed groups ``[all prompts | all responses]``, differentiable.

    A prompt's row sees the rows of its prompt up to itself; a response's row sees all of its prompt and its own
    response up to itself; nothing else is seen.

    Args:
        q: (T, H, D) fp64, fp32 or bf16. k, v: (T, Hk, D), H a multiple of Hk.
        segments: where prompts and responses lie, as :attr:`cosmo_fast.plan.Plan.segments` gives them.
        scale: defaults to D ** -0.5.

    Returns:
        (T, H, D), the dtype of q.

    Raises:
        ValueError: H not a multiple of Hk, or T not covered by the segments.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    covered = int(segments.prompt_lengths.sum() + segments.response_lengths.sum())
    if covered != q.shape[0]:
        raise ValueError(f"the plan covers {covered} rows, the batch has {q.shape[0]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type != "cpu":
        return prefix_attention_reference(q, k, v, segments, scale=scale)
    return _PrefixAttention.apply(q, k, v, segments.layout, scale)


def prefix_attention_reference(q, k, v, segments: Segments, *, scale: float | None = None) -> torch.Tensor:
    """The same in dense PyTorch under a (T, T) mask; shapes and errors as :func:`prefix_attention`."""
    rows = np.arange(q.shape[0])
    prompt = np.full(q.shape[0], -1)
    segment = np.full(q.shape[0], -1)
    for index, (start, length) in enumerate(zip(segments.prompt_starts, segments.prompt_lengths, strict=True)):
        prompt[start : start + length] = index
    spans = zip(segments.response_starts, segments.response_lengths, segments.response_prompt, strict=True)
    for index, (start, length, owner) in enumerate(spans):
        prompt[start : start + length] = owner
        segment[start : start + length] = index
    seen = (prompt[:, None] == prompt[None, :]) & (rows[None, :] <= rows[:, None])
    seen &= (segment[None, :] == -1) | (segment[None, :] == segment[:, None])
    hidden = torch.from_numpy(~seen).to(q.device)
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
