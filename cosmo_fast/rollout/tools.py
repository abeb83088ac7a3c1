"""Tool calls of the responses that are being sampled: results come in between what the policy says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmo_fast.rollout.stops import StopStrings
from cosmo_fast.search import CALLS, Search, last_call

COUNTED = ("search_calls", "read_calls", "failed")


class ToolCalls:
    """Answers calls by forced tokens, one a step, so that every other response goes on.

    A call over ``max_calls`` gets no answer. State by slot: ``forced`` (slots, steps), -1 where the policy says the
    token; ``own``, where its own tokens after the last call begin; ``counts`` in the order of :data:`COUNTED`.
    """

    def __init__(self, search: Search, tokenizer, slots: int, steps: int):
        self.search, self.tokenizer, self.steps = search, tokenizer, steps
        self.ends = StopStrings(tokenizer, [f"</{kind}>" for kind in CALLS])
        self.forced = np.full((slots, steps), -1, dtype=np.int64)
        self.own, self.counts = np.zeros(slots, dtype=np.int64), np.zeros((slots, len(COUNTED)), dtype=np.int64)

    def admit(self, slots: list[int]) -> None:
        """New responses in ``slots``."""
        self.forced[slots], self.own[slots], self.counts[slots] = -1, 0, 0

    def answer(self, slots: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Queues the results of the calls that the last tokens complete; ``ids`` (slots, steps) of all responses."""
        said = [ids[slot, self.own[slot] : n] for slot, n in zip(slots, lengths, strict=True)]
        for i in np.flatnonzero(self.ends.completed(said)):
            slot, n, known = slots[i], lengths[i], said[i][said[i] < len(self.tokenizer)]
            self.own[slot] = n
            call = last_call(self.tokenizer.decode(known, skip_special_tokens=True))
            if call is None:
                continue
            counts = self.counts[slot]
            counts[CALLS.index(call[0])] += 1
            if counts[: len(CALLS)].sum() > self.search.max_calls:
                counts[-1] += 1
                continue
            text, failed = self.search.result(*call, self.tokenizer)
            counts[-1] += failed
            result = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.forced[slot, n : n + len(result)] = result[: self.steps - n]
            self.own[slot] = n + len(result)


def tool_metrics(completions: Sequence) -> dict[str, float]:
    """Means a completion, as `tools/search_calls`; nothing where no tools were given."""
    counts = [c.calls for c in completions if c.calls is not None]
    return {f"tools/{name}": float(np.mean(counts, 0)[i]) for i, name in enumerate(COUNTED) if counts}
