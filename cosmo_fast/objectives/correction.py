"""Importance weights for the gap between the engine that sampled and the policy that trains."""

import torch
from torch import Tensor

from cosmo_fast.objectives.base import sequence_sum
from cosmo_fast.objectives.terms import ratio_of

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_correction(
    old_logp: Tensor,
    sampling_logp: Tensor,
    sequence: Tensor,
    weight: Tensor,
    mode: str,
    cap: float | None = 3.0,
    floor: float | None = None,
) -> Tensor:
    """`TokenBatch.correction` (N,), detached: π_old / π_sampler, bounded; 0 under the mask.

    old_logp, sampling_logp (N,): of the trainer before the update and of the sampler, floating. sequence, weight (N,):
    as in `TokenBatch`. mode: as TRL's `vllm_importance_sampling_mode`. "token_*" takes each token's ratio, "sequence_*"
    the product over the counted tokens of its sequence; "*_truncate" (TIS) clamps it to [floor, cap], "*_mask" (MIS)
    sets it to 0 outside of them. cap, floor: TRL's `vllm_importance_sampling_clip_max` and `_clip_min`; None is none.
    A sampling_logp that is NaN (the sampler gave none) corrects nothing, as in TRL: its ratio is 1. Above e^20 a ratio
    is e^20. Raises ValueError for an unknown mode and for bounds that leave nothing between them.
    """
    if mode not in CORRECTIONS:
        raise ValueError(f"importance sampling mode must be one of {', '.join(CORRECTIONS)}, got {mode!r}")
    low, high = 0.0 if floor is None else floor, torch.inf if cap is None else cap
    if not 0 <= low < high:
        raise ValueError(f"the bounds of the importance ratio must have 0 <= floor < cap, got {floor} and {cap}")
    level, action = mode.split("_")
    counted = weight != 0
    log_ratio = torch.where(counted & ~sampling_logp.isnan(), old_logp - sampling_logp, 0.0).detach()
    ratio = ratio_of(sequence_sum(log_ratio, sequence) if level == "sequence" else log_ratio)
    if action == "truncate":
        ratio = ratio.clamp(low, high)
    else:
        ratio = torch.where((ratio < low) | (ratio > high), 0.0, ratio)
    return torch.where(counted, ratio, 0.0)
