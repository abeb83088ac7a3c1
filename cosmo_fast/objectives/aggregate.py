"""How token losses add up: weights with one global denominator, made once per optimiser step."""

import torch
from torch import Tensor

KINDS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "prompt-mean-token-mean")


def sequence_weights(
    kind: str, sequence_lengths: Tensor, groups: Tensor | None = None, max_length: int | None = None
) -> Tensor:
    """The weight of each token of every sequence, (S,) fp32.

    sequence_lengths (S,): unmasked tokens of *every* sequence of the optimiser step, over all micro-batches and ranks.
    A sequence without tokens (masked as truncated) counts in no denominator but that of seq-mean-token-sum-norm, which
    is the constant S·max_length by definition (Dr. GRPO). groups (S,): prompt ids, for prompt-mean-token-mean (CPGD).
    """
    if kind not in KINDS:
        raise ValueError(f"aggregation must be one of {', '.join(KINDS)}, got {kind!r}")
    lengths = torch.as_tensor(sequence_lengths, dtype=torch.float64)
    if (lengths < 0).any():
        raise ValueError(f"sequence_lengths must not be negative, got {lengths.min().item():.0f}")
    filled = lengths > 0
    if kind == "token-mean":
        weights = torch.ones_like(lengths) / lengths.sum()
    elif kind == "seq-mean-token-mean":
        weights = 1 / (lengths * filled.sum())
    elif kind == "seq-mean-token-sum":
        weights = torch.ones_like(lengths) / filled.sum()
    elif kind == "seq-mean-token-sum-norm":
        if not max_length or max_length <= 0:
            raise ValueError(f"seq-mean-token-sum-norm needs a positive max_length, got {max_length}")
        weights = torch.full_like(lengths, 1 / (max(1, lengths.numel()) * max_length))
    else:
        if groups is None or len(groups) != len(lengths):
            raise ValueError("prompt-mean-token-mean needs `groups`: one prompt id a sequence")
        _, group = torch.unique(torch.as_tensor(groups, device=lengths.device), return_inverse=True)
        tokens = lengths.new_zeros(int(group.max()) + 1 if group.numel() else 0).index_add(0, group, lengths)
        weights = 1 / (tokens[group] * (tokens > 0).sum())
    return torch.where(filled, weights, 0.0).float()


def token_weights(
    kind: str, sequence_lengths: Tensor, groups: Tensor | None = None, max_length: int | None = None
) -> Tensor:
    """`sequence_weights` laid out by token: (Σ lengths,) fp32, sequences one after the other."""
    lengths = torch.as_tensor(sequence_lengths, dtype=torch.int64)
    return sequence_weights(kind, lengths, groups, max_length).repeat_interleave(lengths)
