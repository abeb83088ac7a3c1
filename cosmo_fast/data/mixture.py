"""Which rows a step takes: several files at given weights, shuffled by epoch, a pure function of seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class Mixture(Generic[Item]):
    """Draws items from weighted sources without random state: the k-th draw is the same whoever asks.

    Every draw goes to the source that is furthest behind its share, so proportions are exact at every position; inside
    a source every epoch is a permutation of its own.

    Args:
        sources: name -> (items, weight). seed: of the permutations.

    Raises:
        ValueError: no source, an empty one, or a weight that is not positive.
    """

    def __init__(self, sources: dict[str, tuple[Sequence[Item], float]], seed: int):
        if not sources:
            raise ValueError("train_dataset names no file")
        for name, (items, weight) in sources.items():
            if not items:
                raise ValueError(f"train_dataset {name!r} has no rows")
            if not weight > 0:
                raise ValueError(f"train_dataset {name!r} has weight {weight}; a weight must be above 0")
        self.sources, self.seed = sources, seed
        self.taken = dict.fromkeys(sources, 0)
        self._order: dict[str, tuple[int, np.ndarray]] = {}

    def draw(self, count: int) -> list[Item]:
        """The next ``count`` items."""
        total = sum(weight for _, weight in self.sources.values())
        out = []
        for _ in range(count):
            drawn = sum(self.taken.values()) + 1
            name = max(self.sources, key=lambda n: self.sources[n][1] / total * drawn - self.taken[n])
            out.append(self._next(name))
        return out

    def _next(self, name: str) -> Item:
        items = self.sources[name][0]
        epoch, place = divmod(self.taken[name], len(items))
        if name not in self._order or self._order[name][0] != epoch:
            source = list(self.sources).index(name)
            rng = np.random.default_rng([self.seed, source, epoch])
            self._order[name] = (epoch, rng.permutation(len(items)))
        self.taken[name] += 1
        return items[self._order[name][1][place]]
