"""Keys and values of a sampling batch, and which rows of them are free."""

from __future__ import annotations

from bisect import bisect
from typing import Any

import torch

from cosmo_fast import ops


class Rows:
    """Intervals of the rows [0, size), first fit.

    Prompts are taken from below and responses, which all have the same length, from above, so that a response fits
    exactly where another one was.
    """

    def __init__(self, size: int):
        self.free = [(0, size)]

    def take(self, length: int, above: bool = False) -> int | None:
        """The start of ``length`` rows, or None where no free interval is long enough."""
        for i in range(len(self.free))[:: -1 if above else 1]:
            start, stop = self.free[i]
            if stop - start >= length:
                cut = stop - length if above else start + length
                self.free[i : i + 1] = [x for x in [(start, cut) if above else (cut, stop)] if x[0] < x[1]]
                return cut if above else start
        return None

    def give(self, start: int, length: int) -> None:
        """The interval is free again, joined with its free neighbours."""
        i, stop = bisect(self.free, (start, start)), start + length
        if i < len(self.free) and self.free[i][0] == stop:
            stop = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == start:
            i, start = i - 1, self.free.pop(i - 1)[0]
        self.free.insert(i, (start, stop))


class Store:
    """Attention of a step whose queries are new tokens, over the keys and values of every token that is alive.

    Args:
        size: rows. A layer's keys and its values (size, Hk, D) are allocated once, at the first forward.
        below, layer: rows of the layers below ``layer``, where prompts are not pruned yet.
    """

    def __init__(self, size: int, below: int = 0, layer: int = 0):
        self.size, self.size_below, self.layer = size, below, layer
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def begin(self, rows: torch.Tensor, table, below: tuple[torch.Tensor, Any] | None = None) -> None:
        """The next forward: ``rows`` (T,) where its tokens' keys go, ``table`` (s, 6) who sees what; ``below``: both
        for the layers below ``layer``.
        """
        self.above = rows, ops.Segments(table)
        self.below = below and (below[0], ops.Segments(below[1]))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q (T, H, D), k and v (T, Hk, D) of the new tokens -> (T, H, D)."""
        if layer == len(self.keys):
            self._allocate(k, self.size if layer >= self.layer else self.size_below)
        rows, segments = self.above if layer >= self.layer else self.below
        keys = self.keys[layer].index_copy_(0, rows, k)
        values = self.values[layer].index_copy_(0, rows, v)
        return ops.prefix_attention(q, keys, values, segments, scale=scale)

    def _allocate(self, like: torch.Tensor, size: int) -> None:
        shape = (size, *like.shape[1:])
        try:
            # Not empty: where attention multiplies rows that nobody sees by 0, they must be finite.
            self.keys.append(like.new_zeros(shape))
            self.values.append(like.new_zeros(shape))
        except RuntimeError as error:
            mib = 2 * like.element_size() * like[0].numel() * size / 2**20
            raise MemoryError(
                f"keys and values of {size} tokens need {mib:.0f} MiB a layer, and layer {len(self.values)} found "
                "no memory; lower kv_cache_mib"
            ) from error
