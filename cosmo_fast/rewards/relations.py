"""How the rewards of a rollout go together, and which of them the advantage is made of."""

from itertools import combinations

import numpy as np

from cosmo_fast.rewards.mix import MixedRewards

FEW = 8  # ours: the pairs of more rewards than this would drown the other metrics
PAIRS = ("corr", "rank_corr", "corr_n")


def relations(mixed: MixedRewards, each: int) -> dict[str, float]:
    """Metrics of S samples in groups of ``each``, side by side.

    rewards/NAME/share = cov(w·r, R)/var(R), both within groups, R = Σ w·r; below 0 where a reward works against the
    others; the shares sum to 1, and there are none where no group's rewards differ. An advantage is R less its group's
    mean, so this is the reward's share of its variance; kinds that divide by a group's std weigh the groups otherwise,
    and where other sums than R are taken (GDPO, gated, lagrangian) it is the share of R alone (ours). A group in which
    a reward failed is left out of it.
    rewards/corr/A,B (Pearson), rank_corr (Spearman) and corr_n over the samples to which both apply, 3 at least, where
    neither is constant and there are at most FEW rewards.
    """
    applies, names, logged = ~mixed.matrix.isnan(), mixed.names, {}
    total = mixed.total.view(-1, each)
    whole = ~total.isnan().any(1)
    total = total[whole]
    if (total.amax(1) > total.amin(1)).any():
        parts = (mixed.matrix.nan_to_num() * mixed.weights).double().view(-1, each, len(names))[whole]
        parts = parts - parts.mean(1, keepdim=True)
        joint = parts.sum(2, keepdim=True)
        shares = ((parts * joint).sum((0, 1)) / joint.square().sum()).tolist()
        logged = {f"rewards/{name}/share": shares[i] for i, name in enumerate(names) if applies[:, i].any()}
    for pair in combinations(range(len(names)), 2) if len(names) <= FEW else ():
        values = mixed.matrix[applies[:, pair].all(1)][:, pair].double().numpy()
        if len(values) > 2 and np.ptp(values, 0).all():
            ranks = np.stack([_ranks(column) for column in values.T])
            found = np.corrcoef(values.T)[0, 1], np.corrcoef(ranks)[0, 1], len(values)
            joint = ",".join(names[i] for i in pair)
            logged |= {f"rewards/{kind}/{joint}": float(x) for kind, x in zip(PAIRS, found, strict=True)}
    return logged


def _ranks(x: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their places."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
