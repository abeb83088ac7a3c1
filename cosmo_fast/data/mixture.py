"""Which rows a step takes: several files at given weights, shuffled by epoch, a pure function of seed and position."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class Mixture(Generic[Item]):
    """Draws items from weighted sources without random state: the k-th draw is the same whoever asks.

    Every draw goes to the source that is furthest behind its share, so proportions are exact at every position; inside
    a source every epoch is a permutation of its own.

    Args:
        sources: name -> (items, weight). seed: of the permutations. difficulty: of an item, for a curriculum.

    Attributes:
        taken, skipped: items of each source that were drawn, and that were passed over as too difficult; with the seed
            they are the position.

    Raises:
        ValueError: no source, an empty one, or a weight that is not positive.
    """

    def __init__(
        self,
        sources: dict[str, tuple[Sequence[Item], float]],
        seed: int,
        difficulty: Callable[[Item], float] | None = None,
    ):
        if not sources:
            raise ValueError("train_dataset names no file")
        for name, (items, weight) in sources.items():
            if not items:
                raise ValueError(f"train_dataset {name!r} has no rows")
            if not weight > 0:
                raise ValueError(f"train_dataset {name!r} has weight {weight}; a weight must be above 0")
        self.sources, self.seed = sources, seed
        self.taken = dict.fromkeys(sources, 0)
        self.skipped = dict.fromkeys(sources, 0)
        self._place: dict[str, np.ndarray] = {}  # of an item among those of its source, the easiest first
        if difficulty is not None:
            for name, (items, _) in sources.items():
                order = np.argsort([difficulty(item) for item in items], kind="stable")
                self._place[name] = np.empty(len(items), dtype=np.int64)
                self._place[name][order] = np.arange(len(items))
        self._order: dict[str, tuple[int, np.ndarray]] = {}

    def draw(self, count: int, share: float = 1.0) -> list[Item]:
        """The next ``count`` items; with a difficulty, out of the easiest ``share`` of each source."""
        total = sum(weight for _, weight in self.sources.values())
        out = []
        for _ in range(count):
            drawn = sum(self.taken.values()) + 1
            name = max(self.sources, key=lambda n: self.sources[n][1] / total * drawn - self.taken[n])
            out.append(self._next(name, share))
        return out

    def _next(self, name: str, share: float) -> Item:
        items = self.sources[name][0]
        open_places = max(1, math.ceil(share * len(items)))
        while True:
            epoch, place = divmod(self.taken[name] + self.skipped[name], len(items))
            if name not in self._order or self._order[name][0] != epoch:
                source = list(self.sources).index(name)
                rng = np.random.default_rng([self.seed, source, epoch])
                self._order[name] = (epoch, rng.permutation(len(items)))
            index = self._order[name][1][place]
            if name not in self._place or self._place[name][index] < open_places:
                self.taken[name] += 1
                return items[index]
            self.skipped[name] += 1


def by_label(
    sources: dict[str, tuple[list[Item], float]],
    weights: Mapping[str, float],
    label: Callable[[Item], str | None],
    whole: bool = True,
) -> dict[str, tuple[list[Item], float]]:
    """The sources taken apart by label, so that what is drawn has the labels in these proportions.

    Args:
        sources: name -> (items, weight). weights: label -> its share; ``"*"`` stands for all other labels and none; 0
            leaves a label out. label: of an item. Within a label the sources keep their proportions. whole: these are
            all items, so that every label with a weight must be among them.

    Returns:
        ``name#label`` -> (items, weight).

    Raises:
        ValueError: a weight whose label no item has, or an item whose label has no weight.
    """
    parts: dict[str, dict[str, list[Item]]] = {}
    for name, (items, _) in sources.items():
        for item in items:
            kind = label(item) if label(item) in weights else "*"
            if kind not in weights:
                known = ", ".join(weights)
                raise ValueError(f"label_weights ({known}) has no weight for the label {label(item)!r} in {name}")
            parts.setdefault(kind, {}).setdefault(name, []).append(item)
    if whole and (missing := [kind for kind in weights if kind not in parts and kind != "*"]):
        raise ValueError(f"label_weights: no row of {', '.join(sources)} has the label(s) {missing}")
    result = {}
    for kind, held in parts.items():
        total = sum(sources[name][1] for name in held)
        for name, items in held.items() if weights[kind] else ():
            result[f"{name}#{kind}"] = (items, weights[kind] * sources[name][1] / total)
    return result
