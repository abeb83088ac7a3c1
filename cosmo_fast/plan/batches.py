"""Groups to micro-batches under a token budget, and to ranks by cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cosmo_fast import _host
from cosmo_fast.plan.layout import Prompt


class GroupSize(NamedTuple):
    """What one group holds: tokens of its prompt and of each response, rows of features that the tower makes for it."""

    prompt: int
    responses: tuple[int, ...] = ()
    vision: int = 0

    @classmethod
    def of(cls, prompt: Prompt, responses: Sequence[Sequence[int]]) -> GroupSize:
        """That of an encoded prompt and its responses, lists or arrays of ids."""
        return cls(prompt.length, tuple(map(len, responses)), prompt.vision_rows)

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)


class MicroBatch(list[int]):
    """The indices of its groups, ascending: one forward and backward.

    ``parts`` is set for a single group that is over the budget: lists of response indices, consecutive and in order.
    Its prompt goes forward once, each part forward and backward on the prompt's stored keys and values, which sum up
    their gradient, and the prompt backward once. Prompt and part together are within the budget.
    """

    parts: list[list[int]] | None = None


def micro_batches(sizes: Sequence[GroupSize | int], max_tokens: int) -> list[MicroBatch]:
    """Whole groups in micro-batches of at most ``max_tokens`` tokens, by best-fit decreasing; larger ones in parts.

    The budget bounds memory, so it counts what holds memory, and only that: a partition decides in which order floats
    are summed, and a resumed run must get the same one whatever this machine measured.

    Args:
        sizes: of every group; a plain number of tokens is a group that cannot be parted.
        max_tokens: the budget of one forward and backward.

    Returns:
        micro-batches ordered by their first group.

    Raises:
        ValueError: a prompt with its longest response alone is over the budget.
    """
    sizes = [GroupSize(s) if isinstance(s, int) else s for s in sizes]
    tokens = np.array([s.tokens for s in sizes], dtype=np.int64)
    batches = []
    for i in np.flatnonzero(tokens > max_tokens).tolist():
        prompt, responses, _ = sizes[i]
        longest = max(responses, default=0)
        if prompt + longest > max_tokens:
            what, lower = f"a prompt of {prompt} tokens with one response of {longest}", "max_prompt_length"
            if not longest:
                what, lower = f"a group of {prompt} tokens (one prompt and all its responses)", "num_generations"
            raise ValueError(
                f"{what} is over max_tokens_per_batch={max_tokens}; raise it, or lower {lower} / max_completion_length"
            )
        batches.append(MicroBatch([i]))
        batches[-1].parts = _host.even_parts(np.array(responses, dtype=np.int64), max_tokens - prompt)
    whole = np.flatnonzero(tokens <= max_tokens)
    for members in _host.best_fit_decreasing(tokens[whole], int(max_tokens)):
        batches.append(MicroBatch(sorted(whole[members].tolist())))
    return sorted(batches, key=lambda b: b[0])


def balance(costs: Sequence[float] | np.ndarray, ranks: int) -> list[list[int]]:
    """Whole groups on ``ranks`` ranks so that the heaviest is within about 5 % of the lightest possible.

    Karmarkar & Karp's differencing for several ranks (The differencing method of set partitioning, 1982), then, where a
    simple lower bound is more than 1 % away, Korf's complete greedy search (1998), a bounded number of nodes.

    Args:
        costs: (n,) of every group, as :meth:`cosmo_fast.plan.CostModel.of` gives them.

    Returns:
        a list of group indices a rank, ascending, ordered by their first group; a rank may be empty if n < ranks.

    Raises:
        ValueError: a negative cost, NaN, or no rank.
    """
    return _host.balance(np.asarray(costs, dtype=np.float64), ranks)
