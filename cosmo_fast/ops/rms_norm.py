"""Root-mean-square norm (https://arxiv.org/abs/1910.07467), forward and backward in one read of the rows each."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmo_fast.ops.vocab_stats import DTYPES, statistics_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight`` · x / sqrt(mean(x²) + ``eps``) over the last axis; differentiable by both.

    Args:
        x: (..., d) fp32, bf16 or fp64. weight: (d,), the dtype of x.

    Returns:
        The shape and dtype of x. Work is in fp32 (fp64 for fp64); the normalised x is rounded to its dtype before the
        weight, as Llama and Qwen do. The weight's gradient does not depend on the number of threads.

    Raises:
        ValueError: another dtype, or a weight unlike x.
    """
    if x.dtype not in DTYPES or weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        raise ValueError(
            "x (..., d) and weight (d,) of one dtype, float32, bfloat16 or float64, are wanted, not "
            f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if x.device.type != "cpu":
        return rms_norm_reference(x, weight, eps)
    return torch.ops.cosmo_fast.rms_norm(x.contiguous(), weight.contiguous(), eps)[0]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in eager PyTorch, operation by operation as in transformers."""
    wide = x.to(statistics_dtype(x.dtype))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.library.register_fake("cosmo_fast::rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=statistics_dtype(x.dtype))


@torch.library.register_fake("cosmo_fast::rms_norm_backward")
def _(grad, x, weight, scale, weight_wanted):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if weight_wanted else 0)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx, grad, _scale):
    wanted = ctx.needs_input_grad[1]
    dx, dweight = torch.ops.cosmo_fast.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors, wanted)
    return dx, dweight if wanted else None, None


torch.library.register_autograd("cosmo_fast::rms_norm", _backward, setup_context=_save)
