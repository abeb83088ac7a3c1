"""Exact KL between two vocabulary heads, over the full vocabulary: the gradient is made in the forward, chunk by chunk.

Two GEMMs make a chunk of logits of either side; one row kernel (`vocab_kl_`) turns both into the divergences and, in
place, into the gradients; two GEMMs more for each side that wants them. Nothing (N, V) is kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cosmo_fast.ops.linear_head import HandOut, HeadGradient, LinearHead, even_pieces
from cosmo_fast.ops.vocab_kl import KINDS, vocab_kl_, vocab_kl_reference


class KLOutput(NamedTuple):
    """loss: the scalar Σ weight·kl, differentiable. kl (N,): nats a token, 0 where its weight is 0, no gradient."""

    loss: Tensor
    kl: Tensor


def linear_kl(
    hidden: Tensor,
    head_weight: Tensor,
    ref_hidden: Tensor,
    ref_head_weight: Tensor,
    weight: Tensor | None = None,
    kind: str = "reverse",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    ref_logit_softcap: float | None = None,
    beta: float = 0.5,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int = 4096,
) -> KLOutput:
    """Divergence of softmax(hidden @ head_weight.T + bias), the policy p, and the same of the reference, q.

    hidden (N, d), head_weight (V, d), bias (V,); ref_hidden (N, e), ref_head_weight (V, e), ref_bias (V,): one of fp32,
    bf16, fp64, on one device, one dtype of logits. The loss is differentiable by those of the six that require it, once
    unless the graph is kept; both sides may share tensors. GEMMs (2N·V·d each): 1 a side, 2 more a side with gradients.
    weight (N,): the tokens' weights in the loss, without gradient; None: 1/N each. Rows of weight 0 cost nothing and
    are not read. kind: `reverse` KL(p‖q), `forward` KL(q‖p), or `js`: (1-β)·KL(p‖m) + β·KL(q‖m), m = (1-β)·p + β·q with
    0 < β < 1 (generalised Jensen-Shannon of GKD, arXiv 2306.13649; β = ½ is symmetric).
    temperature: a number or (N,), of both sides. logits_dtype: fp32 for fp32 logits of bf16 operands. chunk_rows: rows
    of logits that exist at a time, of either side. A token that only one side bans (logit -inf) makes KL infinite where
    the other draws it, and its row of the gradient NaN. Raises ValueError for shapes, dtypes and options.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}; for KL itself set kind to reverse or forward")
    sides = (hidden, head_weight, bias), (ref_hidden, ref_head_weight, ref_bias)
    grad = torch.is_grad_enabled()
    needs = [tuple(grad and p is not None and p.requires_grad for p in side) for side in sides]
    caps, options = (logit_softcap, ref_logit_softcap), {"temperature": temperature, "chunk_rows": chunk_rows}
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        heads = [
            LinearHead(*side, logits_dtype=logits_dtype, logit_softcap=cap, **options)
            for side, cap in zip(sides, caps, strict=True)
        ]
        output, gradients = _forward(heads, _weights(heads, weight), kind, beta, needs)
    # One side hands out its gradients with the value, the other with a zero: both see the same incoming factor.
    parts = (
        [output.loss, torch.zeros_like(output.loss)] if any(needs[0]) else [torch.zeros_like(output.loss), output.loss]
    )
    handed = [HandOut.apply(*sides[k], parts[k], gradients[k]) for k in range(2) if any(needs[k])]
    return output._replace(loss=sum(handed[1:], handed[0])) if handed else output


def _forward(heads: list[LinearHead], weight: Tensor, kind: str, beta: float, needs: list[tuple[bool, bool, bool]]):
    n, policy = weight.shape[0], heads[0]
    counted = (weight != 0).nonzero()[:, 0]
    pieces = even_pieces(0, counted.shape[0], policy.chunk_rows)
    wanted = (any(needs[0]), any(needs[1]))
    gradients = [
        HeadGradient(head, need, len(pieces)) if any(need) else None for head, need in zip(heads, needs, strict=True)
    ]
    kl, total = torch.zeros_like(weight), torch.zeros((), dtype=torch.float64, device=weight.device)
    for piece in pieces:
        where = slice(*piece) if counted.shape[0] == n else counted[slice(*piece)]
        parts = [head.rows(where) for head in heads]
        logits = [head.logits(part) for head, part in zip(heads, parts, strict=True)]
        part = vocab_kl_(
            *logits, kind, weight[where] if any(wanted) else None, wanted=wanted, beta=beta,
            temperature=policy.row_temperatures(where), softcap=policy.softcap, ref_softcap=heads[1].softcap,
        )  # fmt: skip
        kl[where] = part
        total += (part.double() * weight[where].double()).sum()
        for gradient, dz, rows_of in zip(gradients, logits, parts, strict=True):
            if gradient is not None:
                gradient.add_dz(dz, rows_of, where)
    logits = dz = None  # noqa: F841  (views of the chunks)
    for head in heads:
        head.release(keep=len(pieces) == 1)
    output = KLOutput(total.to(weight.dtype), kl)
    return output, [None if gradient is None else gradient.results() for gradient in gradients]


def _weights(heads: list[LinearHead], weight: Tensor | None) -> Tensor:
    """The weights (N,) in the statistics' dtype, once both sides fit each other."""
    (n, v), (ref_n, ref_v) = ((head.hidden.shape[0], head.weight.shape[0]) for head in heads)
    device, ref_device = (head.hidden.device for head in heads)
    if (n, v) != (ref_n, ref_v) or device != ref_device:
        raise ValueError(
            f"the policy has {n} rows over {v} tokens on {device}, the reference {ref_n} over {ref_v} on {ref_device}"
        )
    if heads[0].dtype != heads[1].dtype:
        raise ValueError(
            f"the policy's logits are {heads[0].dtype}, the reference's {heads[1].dtype}: cast one side, or set "
            "logits_dtype=torch.float32"
        )
    if weight is not None and weight.shape != (n,):
        raise ValueError(f"weight must have shape ({n},), got {tuple(weight.shape)}")
    if weight is None:
        return torch.full((n,), 1 / max(n, 1), dtype=heads[0].wide, device=device)
    return weight.detach().to(device, heads[0].wide).contiguous()


def linear_kl_reference(
    hidden: Tensor,
    head_weight: Tensor,
    ref_hidden: Tensor,
    ref_head_weight: Tensor,
    weight: Tensor | None = None,
    kind: str = "reverse",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options,
) -> Tensor:
    """The loss in eager PyTorch with all logits kept, differentiable by autograd. Options as `vocab_kl_reference`."""
    logits = torch.nn.functional.linear(hidden, head_weight, bias)
    kl = vocab_kl_reference(logits, torch.nn.functional.linear(ref_hidden, ref_head_weight, ref_bias), kind, **options)
    return kl.mean() if weight is None else (kl * weight).sum()
