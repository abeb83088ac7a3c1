"""Groups to micro-batches under a token budget."""

from __future__ import annotations

import numpy as np

from cosmo_fast import _host


def micro_batches(group_tokens: list[int], max_tokens: int) -> list[list[int]]:
    """Bins of whole groups by best-fit decreasing, each at most ``max_tokens`` tokens.

    Args:
        group_tokens: tokens of every group, prompt once plus all responses.
        max_tokens: the budget of one forward and backward.

    Returns:
        Lists of group indices, each in ascending order, the bins ordered by their first group.

    Raises:
        ValueError: one group alone is over the budget.
    """
    largest = max(group_tokens, default=0)
    if largest > max_tokens:
        raise ValueError(
            f"a group of {largest} tokens (one prompt and all its responses) is over "
            f"max_tokens_per_batch={max_tokens}; raise it, or lower num_generations / max_completion_length"
        )
    bins = _host.best_fit_decreasing(np.asarray(group_tokens, dtype=np.int64), int(max_tokens))
    return sorted((sorted(b) for b in bins), key=lambda b: b[0])
