"""How the rewards of a rollout go together, and which of them the advantage is made of."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from cosmo_fast.rewards.mix import MixedRewards

FEW = 8  # ours: with more rewards than this the pairs would drown the other metrics


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """Pearson's and Spearman's correlation of two (n,) vectors; None for n < 3 and where one of them is constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1]), float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def relations(mixed: MixedRewards, each: int) -> dict[str, float]:
    """Metrics of S samples in groups of ``each``, side by side.

    rewards/NAME/share = cov(w·r, R) / var(R), both within groups over all samples, R = Σ w·r: the shares sum to 1. The
    advantage of a sum is R less its group's mean, so this is the reward's share of the advantage's variance; kinds that
    divide by a group's std weigh the groups otherwise, and of GDPO's, the gate's and the multipliers' sums it is the
    share of the reward alone (ours). A share is negative where a reward works against the others. Nothing is logged
    where no group's rewards differ.
    rewards/corr/A,B (Pearson), rewards/rank_corr/A,B (Spearman) and rewards/corr_n/A,B over the samples to which both
    apply, where there are at most FEW rewards.
    """
    applies, logged = ~mixed.matrix.isnan(), {}
    total = mixed.total.view(-1, each)
    if (total.amax(1) > total.amin(1)).any():
        parts = (mixed.matrix.nan_to_num() * mixed.weights).double().view(-1, each, len(mixed.names))
        parts = parts - parts.mean(1, keepdim=True)
        whole = parts.sum(2, keepdim=True)
        shares = (parts * whole).sum((0, 1)) / whole.square().sum()
        used = applies.any(0)
        logged = {f"rewards/{name}/share": shares[i].item() for i, name in enumerate(mixed.names) if used[i]}
    for a, b in combinations(range(len(mixed.names)), 2) if len(mixed.names) <= FEW else ():
        both = applies[:, a] & applies[:, b]
        if found := correlation(*mixed.matrix[both][:, [a, b]].double().T.numpy()):
            values = (*found, float(both.sum()))
            pair = f"{mixed.names[a]},{mixed.names[b]}"
            logged |= {f"rewards/{k}/{pair}": v for k, v in zip(("corr", "rank_corr", "corr_n"), values, strict=True)}
    return logged


def _ranks(x: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their places."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
