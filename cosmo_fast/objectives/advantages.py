"""Advantages of sampled sequences from their rewards, for all groups of a batch at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmo_fast.ops.group_advantages import group_advantages

# What each kind divides the differences to its group's mean by; cpgd's is its `weighting`.
_SCALES = {
    "group": "group",
    "batch": "batch",
    "dr_grpo": "none",
    "rloo": "leave_one_out",
    "reinforce_pp": "group",  # the whole batch is one group
    "reinforce_pp_baseline": "centred",
}
KINDS = (*_SCALES, "reinforce", "cpgd", "cale")
WEIGHTINGS = {"equal": "none", "std": "group", "clip_filter": "clip_filter"}
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum", "gated", "lagrangian")


def advantages(
    rewards: Tensor,
    groups: Tensor,
    kind: str = "group",
    *,
    epsilon: float = 1e-4,
    weighting: str = "clip_filter",
    weight_cap: float = 3.0,
    lengths: Tensor | None = None,
    mu: float = 1.0,
    a: float = 1.0,
    reward_weights: Sequence[float] | Tensor | None = None,
    multi_objective_aggregation: str = "sum_then_normalize",
    gate_threshold: float = 0.5,
    multipliers: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """(S,) advantages, in the rewards' dtype, of `rewards` (S,) or (S, K) within `groups` (S,) int64; no gradient.

    Kinds, R a sample's reward; std is over n − 1, and epsilon is added to it:
    - group: (R − mean)/std of the group (GRPO, arXiv 2402.03300; TRL's scale_rewards "group"). dr_grpo: R − mean
      (arXiv 2503.20783; TRL's "none"). batch: R − mean of the group, over the std of all rewards (TRL's "batch").
    - rloo: R − mean of the group's others (arXiv 2402.14740).
    - cpgd: ω·(R − mean), ω = 1 (weighting "equal"), 1/std of the group ("std"), or min(weight_cap, groups / groups
      whose rewards differ) ("clip_filter") (arXiv 2505.12504).
    - reinforce: R. reinforce_pp: (R − mean)/std of the whole batch. reinforce_pp_baseline: R − mean of the group, over
      the std of these differences in the whole batch (both arXiv 2501.03262).
    - cale: conditioned on `lengths` (S,), see `_conditioned`; an `a` below 1 favours short answers.
    Several rewards become one by `multi_objective_aggregation`, with `reward_weights` w (K,) or (S, K), 1 if None:
    - sum_then_normalize (TRL's default): the kind of Σ w·R.
    - normalize_then_sum (GDPO, arXiv 2601.05242; as in TRL): Σ w·(advantages of each reward), over the std of these
      sums in the batch.
    - gated (ours): the first reward is a gate. The kind of Σ w·R over all where it reaches gate_threshold or does not
      apply, of w·R of the gate alone elsewhere: nothing makes up for an unsafe answer.
    - lagrangian: the kind of (w·R of the first + Σ λ·w·R of the others)/(1 + Σ λ), with `multipliers` λ (K − 1,) ≥ 0
      that the caller adapts (Safe RLHF, arXiv 2310.12773, whose costs are rewards here, so the sign is plus).
    NaN, a reward that does not apply, is left out of every statistic and sum; a sample without any has advantage 0. For
    the kinds that subtract a group's mean, a group whose rewards are all equal has advantage 0 exactly. What is taken
    over the batch is taken over this call: give it every group of the optimiser step.
    Raises ValueError for shapes, dtypes and options.
    """
    _check(rewards, groups, kind, epsilon, weighting, weight_cap, multi_objective_aggregation)
    rewards, groups = rewards.detach(), groups.to(rewards.device, torch.int64)
    work = rewards if rewards.dtype == torch.float64 else rewards.float()
    one_group = kind in ("reinforce", "reinforce_pp")
    within = torch.zeros_like(groups) if one_group else groups

    def of(values: Tensor) -> Tensor:
        if kind == "reinforce":
            return torch.where(values.isnan(), 0.0, values)
        if kind == "cale":
            return _conditioned(values, groups, lengths, mu, a)
        scale = WEIGHTINGS[weighting] if kind == "cpgd" else _SCALES[kind]
        return group_advantages(values, within, scale, epsilon=epsilon, weight_cap=weight_cap)

    if rewards.dim() == 1 and reward_weights is None and multi_objective_aggregation == "sum_then_normalize":
        return of(work).to(rewards.dtype)
    columns = (work[:, None] if rewards.dim() == 1 else work).T.contiguous()  # (K, S): sums over K are quick
    weights = _weights(columns, reward_weights, multipliers, multi_objective_aggregation)
    unknown = columns.isnan()
    if multi_objective_aggregation == "normalize_then_sum":
        total = (torch.stack([of(column) for column in columns]) * weights).sum(0)
        # Every kind with a baseline sums to 0 in a group: what is subtracted here again is 0, and exact zeros stay.
        total, scale = total.masked_fill(unknown.all(0), torch.nan), "group" if one_group else "centred"
        return group_advantages(total, within, scale, epsilon=epsilon).to(rewards.dtype)
    parts = (columns * weights).masked_fill(unknown, 0.0)
    if multi_objective_aggregation == "gated":
        parts[1:] *= ~(columns[:1] < gate_threshold)
    return of(parts.sum(0).masked_fill(unknown.all(0), torch.nan)).to(rewards.dtype)


def _conditioned(rewards: Tensor, groups: Tensor, lengths: Tensor | None, mu: float, a: float) -> Tensor:
    """CALE, conditional on length, in the form that CANON published (arXiv 2509.23962 and its code), without its 1/L.

    S is the shorter half of a group, L the longer one, m their mean rewards:
    L: A = mu·(a·R − m_S) + (1 − mu)·(R − m_L);  S: A = mu·(R − a·m_L) + (1 − mu)·(R − m_S).
    Ours, where the paper has even groups and its code goes by the order of the samples: the middle one of an odd group
    belongs to both halves with weight 1/2, and samples of one length share the places that they take up equally; one
    with share s in S has s·(its A as S) + (1 − s)·(its A as L). So the order of the samples does not matter, both
    halves weigh the same, A sums to 0 over a group, and mu = 1/2, a = 1 is Dr. GRPO for every size. With a < 1 a group
    of equal rewards still prefers its shorter half, as published; where its lengths are equal too, A is exactly 0.
    """
    if lengths is None or lengths.shape != rewards.shape:
        raise ValueError(f"advantage 'cale' needs `lengths` {tuple(rewards.shape)}: the tokens of each sample")
    if not 0 <= mu <= 1:
        raise ValueError(f"mu must lie in [0, 1], got {mu}")
    lengths = lengths.to(rewards.device)
    index = (~rewards.isnan()).nonzero()[:, 0]
    if not index.numel():
        return torch.zeros_like(rewards)
    index = index[lengths[index].argsort(stable=True)]
    index = index[groups[index].argsort(stable=True)]
    r, length = rewards[index].double(), lengths[index]
    _, group, size = groups[index].unique_consecutive(return_inverse=True, return_counts=True)
    changes = (group.diff(prepend=group.new_zeros(1)) != 0) | (length.diff(prepend=length.new_zeros(1)) != 0)
    _, tie, ties = changes.cumsum(0).unique_consecutive(return_inverse=True, return_counts=True)
    first, half = size.cumsum(0) - size, size.double() / 2
    share = (((first + half)[group] - (ties.cumsum(0) - ties)[tie]) / ties[tie]).clamp(0, 1)

    def mean(weights: Tensor) -> Tensor:
        return (torch.segment_reduce(weights * r, "sum", lengths=size) / half)[group]

    short, long = mean(share), mean(1 - share)
    as_short = mu * (r - a * long) + (1 - mu) * (r - short)
    as_long = mu * (a * r - short) + (1 - mu) * (r - long)
    differs = r != r[first][group]
    if a != 1:
        differs |= length != length[first][group]
    varied = torch.zeros_like(size).index_add(0, group, differs.to(size.dtype))[group] > 0
    result = torch.zeros_like(rewards)
    result[index] = torch.where(varied, share * as_short + (1 - share) * as_long, 0.0).to(rewards.dtype)
    return result


def _weights(columns: Tensor, reward_weights, multipliers, aggregation: str) -> Tensor:
    """The factor of each reward of `columns` (K, S) in the sum, (K, 1) or (K, S)."""
    count, options = columns.shape[0], {"dtype": columns.dtype, "device": columns.device}
    weights = torch.ones(count, **options) if reward_weights is None else torch.as_tensor(reward_weights, **options)
    if weights.shape not in ((count,), columns.T.shape):
        raise ValueError(f"reward_weights has shape {tuple(weights.shape)}, but there are {count} rewards")
    weights = weights.T if weights.dim() == 2 else weights[:, None]
    if aggregation in ("gated", "lagrangian") and count < 2:
        raise ValueError(f"{aggregation} needs rewards (S, K) with K of 2 or more, got K = {count}")
    if (multipliers is None) == (aggregation == "lagrangian"):
        raise ValueError(f"multipliers belong to 'lagrangian', one for each reward but the first; got {multipliers}")
    if multipliers is None:
        return weights
    factors = torch.as_tensor(multipliers, **options)
    if factors.shape != (count - 1,) or not (factors >= 0).all():
        raise ValueError(f"multipliers must be {count - 1} numbers of at least 0, got {factors.tolist()}")
    return weights * (torch.cat([factors.new_ones(1), factors]) / (1 + factors.sum()))[:, None]


def _check(rewards, groups, kind, epsilon, weighting, weight_cap, aggregation) -> None:
    for name, value, values in (
        ("advantage", kind, KINDS),
        ("weighting", weighting, WEIGHTINGS),
        ("multi_objective_aggregation", aggregation, AGGREGATIONS),
    ):
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}")
    if not epsilon >= 0 or not weight_cap > 0:
        raise ValueError(f"epsilon must not be negative and weight_cap be positive, got {epsilon} and {weight_cap}")
    if rewards.dim() not in (1, 2) or groups.shape != rewards.shape[:1]:
        shapes = f"{tuple(rewards.shape)} and groups {tuple(groups.shape)}"
        raise ValueError(f"rewards {shapes}: rewards must be (S,) or (S, K), groups of one length with them, (S,)")
    if not rewards.is_floating_point() or groups.is_floating_point() or groups.is_complex():
        raise ValueError(f"rewards must be floating and groups integer, got {rewards.dtype} and {groups.dtype}")
