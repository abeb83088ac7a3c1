"""Triton twin of csrc/group_advantages.cpp: one program a group, statistics in fp64, no atomics, no host sync.

The number of groups is known on the device only, so a program starts at every reward and all but those at the start of
a group end at once. What the whole batch knows (its deviation, how many groups differ) is summed in PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # a fused product would leave residues where rewards are equal
BLOCK = 128  # rewards at a time
_GROUP, _LEAVE_ONE_OUT, _BATCH, _CENTRED = 1, 2, 3, 4  # positions in ops.group_advantages.SCALES


@triton.jit
def _group_kernel(
    rewards, groups, centred, known_groups, varied_groups, n,
    SCALE: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + start)
    before = tl.load(groups + start - 1, mask=start > 0, other=0)
    known_group = tl.full((), 0, tl.int32)
    varied_group = tl.full((), 0, tl.int32)
    if (start == 0) | (before != group):
        lane = tl.arange(0, BLOCK)
        end = start
        last = start  # where the next block begins; a block that is not full is the group's last
        lowest = tl.full((), float("inf"), tl.float64)
        highest = tl.full((), float("-inf"), tl.float64)
        total = tl.full((), 0.0, tl.float64)
        count = tl.full((), 0, tl.int64)
        while last == end:
            at = end + lane
            inside = at < n
            inside &= tl.load(groups + at, mask=inside, other=0) == group
            r = tl.load(rewards + at, mask=inside, other=float("nan")).to(tl.float64)
            there = r == r
            lowest = tl.minimum(lowest, tl.min(tl.where(there, r, float("inf")), 0))
            highest = tl.maximum(highest, tl.max(tl.where(there, r, float("-inf")), 0))
            total += tl.sum(tl.where(there, r, 0.0), 0)
            count += tl.sum(there.to(tl.int64), 0)
            last += BLOCK
            end += tl.sum(inside.to(tl.int64), 0)
        known = tl.maximum(count, 1).to(tl.float64)
        mean = total / known
        factor = tl.full((), 1.0, tl.float64)
        if SCALE == 1:
            square = tl.full((), 0.0, tl.float64)
            for block in range(start, end, BLOCK):
                r = tl.load(rewards + block + lane, mask=block + lane < end, other=float("nan")).to(tl.float64)
                square += tl.sum(tl.where(r == r, (r - mean) * (r - mean), 0.0), 0)
            factor = 1.0 / (tl.sqrt(square / tl.maximum(known - 1.0, 1.0)) + EPSILON)
        if SCALE == 2:
            factor = known / tl.maximum(known - 1.0, 1.0)
        varied = highest > lowest
        for block in range(start, end, BLOCK):
            r = tl.load(rewards + block + lane, mask=block + lane < end, other=float("nan")).to(tl.float64)
            a = tl.where(varied, tl.where(r == r, (r - mean) * factor, 0.0), 0.0)
            tl.store(centred + block + lane, a.to(centred.dtype.element_ty), mask=block + lane < end)
        known_group = (count > 0).to(tl.int32)
        varied_group = varied.to(tl.int32)
    tl.store(known_groups + start, known_group)
    tl.store(varied_groups + start, varied_group)


def variants():
    """(kernel, label, signature by argument, compile-time values) of every variant, for `kernels.check`."""
    for rewards in ("fp32", "fp64"):
        for label, scale in (("", 0), (" group", _GROUP), (" leave_one_out", _LEAVE_ONE_OUT)):
            signature = {"rewards": f"*{rewards}", "groups": "*i64", "centred": "*fp64"}
            signature |= {"known_groups": "*i32", "varied_groups": "*i32", "n": "i64"}
            yield _group_kernel, rewards + label, signature, {"SCALE": scale, "EPSILON": 1e-4, "BLOCK": BLOCK}


def group_advantages(rewards: Tensor, groups: Tensor, scale: int, epsilon: float, weight_cap: float) -> Tensor:
    """factor·(rewards − mean of the group), (S,): see `ops.group_advantages`."""
    if rewards.dim() != 1 or groups.shape != rewards.shape or groups.dtype != torch.int64:
        shapes = f"{tuple(rewards.shape)} and {tuple(groups.shape)} of {groups.dtype}"
        raise RuntimeError(f"rewards and groups (int64) must be vectors of one length, got {shapes}")
    n = rewards.shape[0]
    ids, order = groups.sort(stable=True)
    values = rewards[order]
    centred = torch.empty_like(values, dtype=torch.float64)
    known, varied = (torch.empty_like(values, dtype=torch.int32) for _ in range(2))
    if n:
        own = scale if scale in (_GROUP, _LEAVE_ONE_OUT) else 0
        constants = {"SCALE": own, "EPSILON": float(epsilon), "BLOCK": BLOCK}
        _group_kernel[(n,)](values, ids, centred, known, varied, n, **constants, **OPTIONS)
    if scale in (_BATCH, _CENTRED):
        there = ~values.isnan()
        x = torch.where(there, values.double() if scale == _BATCH else centred, 0.0)
        count = there.sum()
        x = torch.where(there, x - x.sum() / count, 0.0)
        factor = 1 / ((x.square().sum() / (count - 1)).sqrt() + epsilon)
        centred = torch.where(varied.sum() > 0, centred * factor, centred)
    elif scale not in (0, _GROUP, _LEAVE_ONE_OUT):
        centred = centred * (known.sum() / varied.sum().clamp(min=1).double()).clamp(max=weight_cap)
    result = torch.empty_like(rewards)
    result[order] = centred.to(rewards.dtype)
    return result
