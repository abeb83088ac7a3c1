"""Advantages of sampled sequences from their rewards, for all groups of a batch at once."""

import torch
from torch import Tensor

KINDS = ("group", "dr_grpo", "rloo", "cpgd")
WEIGHTINGS = ("equal", "std", "clip_filter")


def advantages(
    rewards: Tensor,
    groups: Tensor,
    kind: str = "group",
    *,
    epsilon: float = 1e-4,
    weighting: str = "clip_filter",
    weight_cap: float = 3.0,
) -> Tensor:
    """(S,) advantages of `rewards` (S,) within `groups` (S,) int64; groups may have any size and order.

    group: (R − mean) / (std + epsilon), std over n − 1 (GRPO as in TRL). dr_grpo: R − mean. rloo: R − mean of the
    others. cpgd: ω·(R − mean) with ω = 1 (weighting "equal"), 1/(std + epsilon) ("std"), or min(weight_cap, groups /
    groups whose rewards differ) ("clip_filter", arXiv 2505.12504).
    A NaN reward (a sample that no reward applied to) is left out of every statistic and has advantage 0. A group whose
    rewards are all equal has advantage 0 exactly, not a rounding residue blown up by the division.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage must be one of {', '.join(KINDS)}, got {kind!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must be vectors of one length"
        )
    _, group = torch.unique(groups, return_inverse=True)
    size = int(group.max()) + 1 if group.numel() else 0
    known = ~rewards.isnan()
    r = torch.where(known, rewards, 0.0).double()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(size).index_add(0, group, values)

    count = total(known.double())
    mean = total(r) / count.clamp(min=1)
    centred = torch.where(known, r - mean[group], 0.0)
    bound = torch.where(known, r, torch.inf)
    low = r.new_full((size,), torch.inf).scatter_reduce(0, group, bound, "amin")
    high = -r.new_full((size,), torch.inf).scatter_reduce(0, group, torch.where(known, -r, torch.inf), "amin")
    varied = (count > 1) & (high > low)
    scale = torch.ones_like(mean)
    if kind == "group" or (kind == "cpgd" and weighting == "std"):
        scale = 1 / ((total(centred.square()) / (count - 1).clamp(min=1)).sqrt() + epsilon)
    elif kind == "rloo":
        scale = count / (count - 1).clamp(min=1)
    elif kind == "cpgd" and weighting == "clip_filter":
        scale = scale * (varied.new_tensor(size, dtype=r.dtype) / varied.sum().clamp(min=1)).clamp(max=weight_cap)
    return torch.where(varied[group] & known, centred * scale[group], 0.0).to(rewards.dtype)
