"""Rewards minus the mean of their group, scaled, for all groups of a batch in one pass.

The kernel under `objectives.advantages`, where the kinds have their names and sources.
"""

import torch
from torch import Tensor

from cosmo_fast.ops import vocab_stats as _extension  # noqa: F401  loads the compiled ops

SCALES = ("none", "group", "leave_one_out", "batch", "centred", "clip_filter")  # the kernels know them by position
DTYPES = (torch.float32, torch.float64)


def group_advantages(
    rewards: Tensor, groups: Tensor, scale: str = "group", *, epsilon: float = 1e-4, weight_cap: float = 3.0
) -> Tensor:
    """factor·(rewards − mean of the group): (S,) of fp32 or fp64 `rewards` (S,), within `groups` (S,) int64.

    factor, by `scale`: none 1; group 1/(std + epsilon), std over n − 1; leave_one_out n/(n − 1); batch 1/(std of all
    rewards + epsilon); centred 1/(std of all differences + epsilon); clip_filter min(weight_cap, groups / groups whose
    rewards differ). NaN rewards are in no statistic and come out as 0, as does, exactly, a group whose rewards are all
    equal; an infinite one makes its group NaN, or all of them where the factor is the batch's. Ids may be any numbers
    in any order; sorted ones save a sort.
    Statistics are in fp64; the result does not depend on the number of threads. No gradient. CPU: C++; CUDA: Triton.
    Raises ValueError for a scale or dtype that is not there, RuntimeError for shapes.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if rewards.dtype not in DTYPES:
        raise ValueError(f"rewards must be float32 or float64, got {rewards.dtype}")
    arguments = (rewards.detach().contiguous(), groups.contiguous(), SCALES.index(scale))
    return torch.ops.cosmo_fast.group_advantages(*arguments, epsilon, weight_cap)


def group_advantages_reference(
    rewards: Tensor, groups: Tensor, scale: str = "group", *, epsilon: float = 1e-4, weight_cap: float = 3.0
) -> Tensor:
    """What `group_advantages` computes, group by group in eager PyTorch."""
    known = ~rewards.isnan()
    values, centred, factor = rewards.double(), torch.zeros_like(rewards, dtype=torch.float64), 1.0
    sizes, varied = [], []
    for group in groups[known].unique():
        members = known & (groups == group)
        mates = values[members]
        sizes.append(len(mates))
        varied.append(bool((mates != mates[0]).any()))
        if varied[-1]:
            own = {"group": 1 / (mates.std() + epsilon), "leave_one_out": sizes[-1] / (sizes[-1] - 1)}.get(scale, 1.0)
            centred[members] = own * (mates - mates.mean())
    if any(varied) and scale in ("batch", "centred"):
        factor = 1 / ((values if scale == "batch" else centred)[known].std() + epsilon)
    elif any(varied) and scale == "clip_filter":
        factor = min(weight_cap, len(varied) / sum(varied))
    return (factor * centred).to(rewards.dtype)


@torch.library.register_fake("cosmo_fast::group_advantages")
def _(rewards, groups, scale, epsilon, weight_cap):
    return torch.empty_like(rewards)


@torch.library.register_kernel("cosmo_fast::group_advantages", "cuda")
def _(rewards, groups, scale, epsilon, weight_cap):
    from cosmo_fast.kernels.group_advantages import group_advantages as launch  # imports Triton

    return launch(rewards, groups, scale, epsilon, weight_cap)
