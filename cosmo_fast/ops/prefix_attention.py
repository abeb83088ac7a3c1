"""Attention over shared prompts: causal inside every segment, and from a segment to all of its prefix.

CPU: one pass in C++ over each row's two intervals of keys, with the online softmax of FlashAttention-2 (Dao, 2023) and
the rows of all responses to a prompt beside each other, as in Hydragen (Juravsky et al., 2024), but without a merge.
fp64 and fp32 sum in their own dtype; bf16 sums in fp32, on AMX tiles where the processor has them. In the forward a
row's bits depend on its own query and keys alone; in the backward a prefix's dK and dV are summed over the responses in
the order of the table; neither depends on the number of threads. Elsewhere: dense (:func:`prefix_attention_reference`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cosmo_fast.ops.vocab_stats import statistics_dtype, unit_stride

COLUMNS = ("q_start", "q_length", "k_start", "k_length", "prefix_start", "prefix_length")


@dataclass(frozen=True, eq=False)
class Segments:
    """Who attends to whom: ``table`` (s, 6) int64 on the host, a row a segment with the columns ``COLUMNS``.

    Query row q_start + i, i < q_length, sees the keys prefix_start … prefix_start + prefix_length - 1 and its own keys
    k_start + j, j <= k_length - q_length + i (causal, aligned at the end), and nothing else. Neighbouring segments
    with the same prefix share it: its keys are read once for all of them.

    Raises:
        ValueError: not such a table, k_length < q_length, a negative entry, or query rows not covered exactly once.
    """

    table: np.ndarray

    def __post_init__(self):
        table = self.table
        if table.ndim != 2 or table.shape[1] != len(COLUMNS) or table.dtype != np.int64:
            raise ValueError(f"a table of segments is (s, {len(COLUMNS)}) int64, not {table.shape} {table.dtype}")
        object.__setattr__(self, "table", table := table.copy())
        table.setflags(write=False)  # the backward reads it again
        bad = np.flatnonzero(((table < 0) | (table > 1 << 40)).any(1) | (table[:, 3] < table[:, 1]))
        if len(bad):
            row = dict(zip(COLUMNS, table[bad[0]].tolist(), strict=True))
            raise ValueError(
                f"segment {bad[0]} is {row}: no entry may be negative or over 2^40, nor k_length less than q_length"
            )
        _, _, starts, lengths, prefix_starts, prefix_lengths = table.T
        both = (lengths > 0) & (prefix_lengths > 0)
        twice = both & (starts < prefix_starts + prefix_lengths) & (prefix_starts < starts + lengths)
        if twice.any():
            row = dict(zip(COLUMNS, table[np.flatnonzero(twice)[0]].tolist(), strict=True))
            raise ValueError(f"segment {np.flatnonzero(twice)[0]} is {row}: its own keys are also its prefix's")
        starts, lengths = table[table[:, 1] > 0, :2].T
        order = np.argsort(starts)
        if (starts[order] != np.cumsum(lengths[order]) - lengths[order]).any():
            raise ValueError("the segments must cover the query rows 0, 1, … exactly once")

    @cached_property
    def rows(self) -> tuple[int, int]:
        """Query rows, and key rows at least."""
        _, q_lengths, starts, lengths, prefix_starts, prefix_lengths = self.table.T
        last = np.maximum(
            np.where(lengths, starts + lengths, 0), np.where(prefix_lengths, prefix_starts + prefix_lengths, 0)
        )
        return int(q_lengths.sum()), int(last.max(initial=0))

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The table as the kernel reads it."""
        return torch.tensor(self.table)


def prefix_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of ``q`` to the keys and values that ``segments`` gives each of its rows; differentiable.

    Args:
        q: (Tq, H, D) fp32 or bf16; fp64 on the CPU only. Rows may have any stride.
        k, v: (Tk, Hk, D), H a multiple of Hk; a key row that no segment names is not read and gets gradient 0.
        segments: prompts, responses or decoded tokens, as :attr:`cosmo_fast.plan.Plan.segments` gives them.
        scale: defaults to D ** -0.5.

    Returns:
        (Tq, H, D), the dtype of q.

    Raises:
        ValueError: H not a multiple of Hk, k unlike v, or Tq or Tk not those of the segments.
    """
    _check(q, k, v, segments)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type != "cpu":
        return _Triton.apply(*map(unit_stride, (q, k, v)), segments, scale)
    return torch.ops.cosmo_fast.prefix_attention(*map(unit_stride, (q, k, v)), segments.tensor, scale)[0]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> None:
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q (Tq, H, D) and k, v (Tk, Hk, D) of one dtype are wanted, not {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    queries, keys = segments.rows
    if queries != q.shape[0]:
        raise ValueError(f"the segments cover {queries} rows, the batch has {q.shape[0]}")
    if keys > k.shape[0]:
        raise ValueError(f"the segments name {keys} key rows, there are {k.shape[0]}")


def prefix_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float | None = None
) -> torch.Tensor:
    """The same in dense PyTorch under a (Tq, Tk) mask; shapes and errors as :func:`prefix_attention`."""
    _check(q, k, v, segments)
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for q_start, q_length, k_start, k_length, prefix_start, prefix_length in segments.table.tolist():
        rows = seen[q_start : q_start + q_length]
        rows[:, prefix_start : prefix_start + prefix_length] = True
        own = torch.ones(q_length, k_length, dtype=torch.bool).tril(k_length - q_length)
        rows[:, k_start : k_start + k_length] |= own
    hidden = ~seen.to(q.device)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@torch.no_grad()
def prefix_lse(q: torch.Tensor, k: torch.Tensor, segments: Segments, *, scale: float | None = None) -> torch.Tensor:
    """(Tq, H): the natural log-sum-exp over the scores of all keys that a query sees, by the kernels' forward.

    fp64 for fp64, fp32 otherwise; shapes and errors as :func:`prefix_attention`, without gradient.
    """
    _check(q, k, k, segments)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = unit_stride(q), unit_stride(k)
    if q.device.type != "cpu":
        from cosmo_fast.kernels.prefix_attention import prefix_attention as kernel

        return kernel(q, k, k, segments, scale)[1]
    return torch.ops.cosmo_fast.prefix_attention(q, k, k, segments.tensor, scale)[1]


class _Triton(torch.autograd.Function):
    """The kernels of :mod:`cosmo_fast.kernels.prefix_attention`, whose schedules live with the segments."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        from cosmo_fast.kernels.prefix_attention import prefix_attention as kernel

        out, lse = kernel(q, k, v, segments, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        from cosmo_fast.kernels.prefix_attention import prefix_attention_backward as kernel

        return *kernel(unit_stride(grad), *ctx.saved_tensors, ctx.segments, ctx.scale), None, None


@torch.library.register_fake("cosmo_fast::prefix_attention")
def _(q, k, v, segments, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=statistics_dtype(q.dtype))


@torch.library.register_fake("cosmo_fast::prefix_attention_backward")
def _(grad, q, k, v, out, lse, segments, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, segments, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, segments)


def _backward(ctx, grad, _lse):
    q, k, v, out, lse, segments = ctx.saved_tensors
    given = unit_stride(grad), q, k, v, out, lse, segments
    return *torch.ops.cosmo_fast.prefix_attention_backward(*given, ctx.scale), None, None


def _no_second(ctx, *_):
    raise NotImplementedError("prefix_attention has no second derivative")


torch.library.register_autograd("cosmo_fast::prefix_attention", _backward, setup_context=_save)
torch.library.register_autograd("cosmo_fast::prefix_attention_backward", _no_second)
