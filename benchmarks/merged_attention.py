"""prefix_attention from PyTorch's CPU flash op: every segment alone, then against its prefix, merged by log-sum-exp.

Whoever has no kernel of their own would write this; `bench_prefix_attention.py` measures it and the tests compare with
it. One autograd node: PyTorch's flash backward drops the gradient of the log-sum-exp, so that a merge by plain autograd
would be silently wrong. As in ring attention, each part's backward gets the merged output and log-sum-exp.
"""

import numpy as np
import torch

from cosmo_fast.ops import Segments

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Part:
    """Intervals of query and key rows as one padded batch; a short one is filled up with its own first row."""

    def __init__(self, queries, keys, causal: bool):
        self.causal = causal
        (self.rows, self.slots), (self.keys, _) = _padded(*queries), _padded(*keys)
        self.flat = self.rows.flatten()[self.slots]
        lengths = keys[1]
        hidden = np.arange(lengths.max())[None, :] >= lengths[:, None]
        self.bias = None
        if not causal and hidden.any():
            self.bias = torch.from_numpy(np.where(hidden, -np.inf, 0.0))[:, None, None, :]

    def inputs(self, q, k, v):
        return q[self.rows].transpose(1, 2), k[self.keys].transpose(1, 2), v[self.keys].transpose(1, 2)

    def options(self, dtype, scale):
        return {"attn_mask": None if self.bias is None else self.bias.to(dtype), "scale": scale}

    def forward(self, q, k, v, scale):
        """Output (t, H, D) and log-sum-exp (t, H) of the part's rows."""
        parts = _flash(*self.inputs(q, k, v), 0.0, self.causal, **self.options(q.dtype, scale))
        return tuple(x.transpose(1, 2).flatten(0, 1)[self.slots] for x in parts)

    def backward(self, grad, q, k, v, out, lse, scale, totals):
        """Adds to the gradients. A padded key is its interval's first and has weight 0: adding it changes nothing."""

        def spread(x):
            padded = x.new_zeros((self.rows.numel(), *x.shape[1:]))
            padded[self.slots] = x[self.flat]
            return padded.unflatten(0, self.rows.shape).transpose(1, 2)

        given = (spread(grad), *self.inputs(q, k, v), spread(out), spread(lse), 0.0, self.causal)
        dq, dk, dv = _flash_backward(*given, **self.options(q.dtype, scale))
        totals[0][self.flat] += dq.transpose(1, 2).flatten(0, 1)[self.slots].to(totals[0].dtype)
        for total, x in zip(totals[1:], (dk, dv), strict=True):
            total.index_add_(0, self.keys.flatten(), x.transpose(1, 2).flatten(0, 1).to(total.dtype))


def _padded(starts: np.ndarray, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    column = np.arange(lengths.max())
    real = column[None, :] < lengths[:, None]
    rows = np.where(real, starts[:, None] + column[None, :], starts[:, None])
    return torch.from_numpy(rows), torch.from_numpy(np.flatnonzero(real))


def _parts(segments: Segments) -> tuple[list[_Part], _Part | None]:
    table = segments.table[segments.table[:, 1] > 0]
    assert (table[:, 1] == table[:, 3]).all(), "PyTorch's causal mask is aligned at the start"
    own = []
    for chosen in (table[table[:, 5] == 0], table[table[:, 5] > 0]):
        if len(chosen):
            own.append(_Part(chosen[:, :2].T, chosen[:, 2:4].T, True))
    shared = table[table[:, 5] > 0]
    if not len(shared):
        return own, None
    new = np.ones(len(shared), dtype=bool)
    new[1:] = (shared[1:, 4:] != shared[:-1, 4:]).any(1)
    new[1:] |= shared[1:, 0] != shared[:-1, 0] + shared[:-1, 1]
    first = np.flatnonzero(new)
    return own, _Part((shared[first, 0], np.add.reduceat(shared[:, 1], first)), shared[first, 4:].T, False)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, parts, scale):
        own, cross = parts
        out, lse = (
            torch.empty_like(q),
            q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
        )
        for part in own:
            out[part.flat], lse[part.flat] = part.forward(q, k, v, scale)
        if cross is not None:
            other, other_lse = cross.forward(q, k, v, scale)
            mine, my_lse = out[cross.flat], lse[cross.flat]
            both = torch.logaddexp(my_lse, other_lse)
            mine = mine * (my_lse - both).exp().unsqueeze(-1) + other * (other_lse - both).exp().unsqueeze(-1)
            out[cross.flat], lse[cross.flat] = mine.to(q.dtype), both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        own, cross = ctx.parts
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        totals = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        for part in [*own, *([cross] if cross is not None else [])]:
            part.backward(grad, q, k, v, out, lse, ctx.scale, totals)
        return *(x.to(q.dtype) for x in totals), None, None


def merged_attention(q, k, v, segments: Segments, *, scale: float | None = None) -> torch.Tensor:
    """As `prefix_attention`, for segments whose keys are their own query rows; what it gathers is kept with them."""
    if not hasattr(segments, "_merged"):
        object.__setattr__(segments, "_merged", _parts(segments))
    return _Merged.apply(q, k, v, segments._merged, q.shape[-1] ** -0.5 if scale is None else scale)
