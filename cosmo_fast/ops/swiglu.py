"""The gated activation of Llama and Qwen (https://arxiv.org/abs/2002.05202), forward and backward in one pass each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cosmo_fast.ops.vocab_stats import DTYPES


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(``gate``) · ``up``, differentiable; (..., d) fp32, bf16 or fp64, worked on in fp32 (fp64), rounded once.

    Nothing is kept for the backward but the two arguments.

    Raises:
        ValueError: another dtype, or arguments unlike each other.
    """
    if gate.dtype not in DTYPES or up.dtype != gate.dtype or up.shape != gate.shape:
        raise ValueError(
            "gate and up of one shape and dtype, float32, bfloat16 or float64, are wanted, not "
            f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    if gate.device.type != "cpu":
        return swiglu_reference(gate, up)
    return torch.ops.cosmo_fast.swiglu(gate.contiguous(), up.contiguous())


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in eager PyTorch, as in transformers."""
    return functional.silu(gate) * up


@torch.library.register_fake("cosmo_fast::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("cosmo_fast::swiglu_backward")
def _(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _backward(ctx, grad):
    return torch.ops.cosmo_fast.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


torch.library.register_autograd(
    "cosmo_fast::swiglu", _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
