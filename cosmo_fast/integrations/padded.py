"""Padded (B, T) batches, as Liger and TRL hold them, for the loss engine."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cosmo_fast.objectives import Objective, TokenBatch, objective

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass
class PaddedTokens(TokenBatch):
    """The B·T tokens of a padded batch, row after row. `weight` is the mask (0 or 1), so that every metric is a mean
    over tokens; `scale` (N,) weighs the loss. sampling_logp: log-probs of the sampler; row: the sequence of a token
    where `sequence` is not it.
    """

    scale: Tensor | None = None
    sampling_logp: Tensor | None = None
    row: Tensor | None = None


def padded_tokens(ids: Tensor, mask: Tensor, scale: Tensor, **vectors: Tensor | None) -> PaddedTokens:
    """The tokens `ids` (B, T). mask, scale and `vectors` (fields of a TokenBatch): (B, T) or broadcast to it."""
    rows, length = ids.shape
    sequence = torch.arange(rows, device=ids.device).repeat_interleave(length)
    given = {name: v.expand(rows, length).reshape(-1) for name, v in vectors.items() if v is not None}
    flat = scale.expand(rows, length).reshape(-1)
    return PaddedTokens(ids.reshape(-1), mask.reshape(-1).float(), sequence, scale=flat, **given)


def loss_scale(loss_type: str, mask: Tensor, max_completion_length: int | None, tokens: Tensor | None) -> Tensor:
    """What a token's loss is multiplied with, (B, 1) or (1, 1): TRL 1.16's and Liger 0.8.5's normalisers.

    mask (B, T), 0 or 1. tokens: the denominator of the types that count the tokens of the whole step.
    """
    one = mask.new_ones(1, 1, dtype=torch.float32)
    rows, lengths = mask.shape[0], mask.sum(1, keepdim=True).clamp(min=1)
    if loss_type in ("grpo", "sapo"):
        return one / (rows * lengths)
    if loss_type == "bnpo":
        return one / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return one / (rows * max_completion_length)
    return one / (rows if loss_type == "luspo" else tokens)


def correction(loss_type: str, ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """`ratio` of policy and sampler, (B, T) or (B, 1), as a TokenBatch has it. vespo multiplies it over the sequence:
    that of a whole one then stands at its first counted token only. mask: (B, T).
    """
    if loss_type != "vespo" or ratio is None or ratio.shape[1] == mask.shape[1]:
        return ratio
    return torch.where((mask.cumsum(1) == 1) & (mask != 0), ratio, 1.0)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` is multiplied here: autocast's where that is on, which leaves fp64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def padded_objective(
    loss_type: str,
    importance_sampling_level: str,
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    use_bias_correction_kl: bool,
    **own: float,
) -> Objective:
    """`objective` for the loss types that TRL and Liger share. own: `sapo_*` and `vespo_*`, of which a loss reads its.

    As there, epsilon and delta mean nothing to cispo, sapo and vespo. Raises ValueError for other types and for the
    sequence level of these three, which have none (TRL takes it, Liger refuses it).
    """
    if loss_type not in (*CLIPPED, "cispo", "sapo", "vespo"):
        raise ValueError(f"loss_type must be one of {', '.join(CLIPPED)}, cispo, sapo, vespo, got {loss_type!r}")
    options = {name: value for name, value in own.items() if name.startswith(f"{loss_type}_")}
    if loss_type in CLIPPED:
        level = {"importance_sampling_level": importance_sampling_level}
        options = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta, **level}
    elif importance_sampling_level != "token":
        level = f"importance_sampling_level={importance_sampling_level!r}"
        raise ValueError(f"loss_type {loss_type!r} does not support {level}: set it to 'token'")
    elif loss_type == "cispo":
        options = {"epsilon_high": epsilon_high}
    return objective(loss_type, beta=beta, use_bias_correction_kl=use_bias_correction_kl, **options)


def scaled(inner: Objective) -> Objective:
    """`inner` times `PaddedTokens.scale`. Where old or reference log-probs are missing, the policy is its own: every
    ratio is 1, every KL 0.
    """

    def loss(logp: Tensor, entropy: Tensor, batch: PaddedTokens):
        missing = {n: logp.detach() for n in ("old_logp", "ref_logp") if getattr(batch, n) is None}
        token_loss, metrics = inner(logp, entropy, replace(batch, **missing))
        return token_loss * batch.scale, metrics

    return Objective(inner.name, loss, inner.sequence_level)
