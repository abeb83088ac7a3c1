"""Rotary position embedding (https://arxiv.org/abs/2104.09864) of queries and keys, in one pass and one call."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmo_fast.ops.vocab_stats import DTYPES, statistics_dtype, unit_stride


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + (-x₂, x₁) · sin for ``q`` and ``k``, x₁ and x₂ the halves of a head; differentiable by both.

    Args:
        q: (T, H, D), k: (T, Hk, D), fp32, bf16 or fp64, D even. Rows and heads may have any stride.
        cos, sin: (T, D), any floating dtype; their second half is the first once more, as transformers makes it.

    Returns:
        The shapes and dtype of q and k, contiguous. Work is in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError: another dtype, or shapes that do not fit each other.
    """
    shapes = {q.shape[::2], k.shape[::2], cos.shape, sin.shape}
    if q.dtype not in DTYPES or k.dtype != q.dtype or len(shapes) > 1 or q.shape[-1] % 2:
        raise ValueError(
            "q (T, H, D), k (T, Hk, D) of one dtype, float32, bfloat16 or float64, and cos, sin (T, D), D even, are "
            "wanted, not " + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, cos, sin))
        )
    if q.device.type != "cpu":
        return rotary_reference(q, k, cos, sin)
    cos, sin = (x.to(statistics_dtype(q.dtype)) for x in (cos, sin))
    return torch.ops.cosmo_fast.rotary(*map(unit_stride, (q, k, cos, sin)), False)


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in eager PyTorch."""
    cos, sin = (x.to(statistics_dtype(q.dtype)).unsqueeze(1) for x in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        first, second = (wide := x.to(cos.dtype)).chunk(2, -1)
        return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return turn(q), turn(k)


@torch.library.register_fake("cosmo_fast::rotary")
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    grads = map(unit_stride, (dq, dk))
    return *torch.ops.cosmo_fast.rotary(*grads, *ctx.saved_tensors, not ctx.inverse), None, None, None


torch.library.register_autograd("cosmo_fast::rotary", _backward, setup_context=_save)
