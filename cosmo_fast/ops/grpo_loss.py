"""Rewards to gradients in one call: advantages of the groups, weights of the tokens, loss of the batch."""

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmo_fast import objectives  # as a module: its advantages need ops in turn
from cosmo_fast.objectives.base import Objective, TokenBatch
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss
from cosmo_fast.ops.vocab_stats import statistics_dtype


class GrpoLossOutput(NamedTuple):
    """The fields of `LossOutput`, and the advantage of each sequence, (S,)."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]
    dropped: dict[str, Tensor] | None
    advantages: Tensor


_ENGINE = {p.name for p in inspect.signature(linear_policy_loss).parameters.values() if p.kind is p.KEYWORD_ONLY}


def grpo_loss(
    hidden: Tensor,
    head_weight: Tensor,
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    *,
    loss_type: str = "grpo",
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    correction: Tensor | None = None,
    aggregation: str | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
    advantage: str | None = None,
    advantage_options: dict[str, Any] | None = None,
    **options: Any,
) -> GrpoLossOutput:
    """The loss `loss_type` of S sequences in groups, from hidden states (N, d) and the head (V, d): 3 GEMMs.

    tokens (N,) int64: what was sampled, sequence after sequence; hidden[i] is the state that predicts tokens[i].
    lengths (S,) int64: tokens of each sequence, Σ = N. rewards (S,) or (S, K), NaN for "does not apply"; groups (S,)
    integers: the prompt of each sample, in any order and number. mask (N,): False or 0 for tokens that do not count.
    loss_type: one of `objectives.policy.DEFAULTS`, which names its `aggregation` and `advantage` (a kind of
    `advantages`) too; both can be chosen otherwise. advantage_options go to `advantages`; **options are those of the
    loss (epsilon, beta, ...) and those of `linear_policy_loss` (bias, temperature, chunk_rows, ...).
    old_logp, ref_logp, correction (N,): see `TokenBatch`. Without old_logp the call is on-policy: π_old is π.
    weights (S,): `sequence_weights` of the whole optimiser step at these sequences, where the call is one of several
    micro-batches; None: the call is the step. A micro-batch must have whole groups, and an advantage that looks at the
    groups only: for "batch", "reinforce_pp*", "cpgd" with clip_filter or normalize_then_sum, make the advantages of the
    step first and call `linear_policy_loss`.
    Gradients are those of `linear_policy_loss`. Raises ValueError for shapes, dtypes and options.
    """
    known = objectives.DEFAULTS
    if loss_type not in known:
        raise ValueError(f"loss_type must be one of {', '.join(known)}, got {loss_type!r}")
    device, n = hidden.device, tokens.shape[0]
    rewards, groups, lengths = rewards.to(device), groups.to(device), lengths.to(device)
    _check(n, rewards, groups, lengths, mask, weights)
    if weights is not None and (aggregation is not None or max_length is not None):
        raise ValueError(f"weights are an aggregation already: leave out aggregation={aggregation!r} and max_length")
    engine = {name: options.pop(name) for name in _ENGINE & options.keys()}
    loss, kinds = objectives.objective(loss_type, **options), known[loss_type]
    how = {"lengths": lengths, **(advantage_options or {})}
    gains = objectives.advantages(rewards, groups, advantage or kinds[1], **how)

    sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=n)
    if weights is None:
        counted = lengths if mask is None else torch.zeros_like(lengths).index_add(0, sequence, (mask != 0).to(lengths))
        weights = objectives.sequence_weights(aggregation or kinds[0], counted, groups, max_length)
    weight = weights.to(device).float()[sequence]
    batch = TokenBatch(
        targets=tokens,
        weight=weight if mask is None else torch.where(mask != 0, weight, 0.0),
        sequence=sequence,
        advantage=gains.to(statistics_dtype(hidden.dtype))[sequence],
        old_logp=old_logp,
        ref_logp=ref_logp,
        correction=correction,
        position=objectives.sequence_position(sequence) if "epsilon_start" in options else None,
    )
    loss = _on_policy(loss) if old_logp is None else loss
    output = linear_policy_loss(hidden, head_weight, batch, loss, **engine)
    return GrpoLossOutput(*output, gains)


def _on_policy(loss: Objective) -> Objective:
    """`loss` with the log-probabilities of the forward as the old ones: every ratio is 1, its gradient is not."""

    def function(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        return loss(logp, entropy, replace(batch, old_logp=logp.detach()))

    return replace(loss, function=function)


def _check(n: int, rewards: Tensor, groups: Tensor, lengths: Tensor, mask: Tensor | None, weights: Tensor | None):
    count = len(lengths)
    if lengths.dim() != 1 or lengths.is_floating_point() or (lengths < 0).any() or int(lengths.sum()) != n:
        given = f"{lengths.dtype} {tuple(lengths.shape)} of sum {lengths.sum().item()}"
        raise ValueError(f"lengths must be integers (S,), none negative, that add up to the {n} tokens, got {given}")
    if rewards.shape[:1] != (count,) or groups.shape != (count,):
        shapes = f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)}"
        raise ValueError(f"{shapes} must have one element for each of the {count} sequences in `lengths`")
    if weights is not None and weights.shape != (count,):
        raise ValueError(f"weights must be one number a sequence ({count},), got shape {tuple(weights.shape)}")
    if mask is not None and mask.shape != (n,):
        raise ValueError(f"mask must be one element a token ({n},), got shape {tuple(mask.shape)}")
