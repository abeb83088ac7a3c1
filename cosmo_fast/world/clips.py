"""Clips: four frames of half the side in which one object moves among others that stand still."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmo_fast.world.draw import BACKGROUNDS, QUADRANTS, Scene
from cosmo_fast.world.objects import COUNTABLE, THINGS

FRAMES = 4
PHRASINGS = {
    "mover": ("Which object moves?", "Name the object that moves."),
    "start": ("Where is {a} at the start?", "In which corner is {a} at the start?"),
    "end": ("Where is {a} at the end?", "In which corner is {a} at the end?"),
}


@dataclass(frozen=True)
class Clip:
    """``still``: (object, quadrant) of what stands still. ``mover`` changes from ``start`` to ``end`` in frame ``at``.

    The ground is the same in all frames.
    """

    still: tuple[tuple[str, int], ...]
    mover: str
    start: int
    end: int
    at: int
    background: str
    variant: int
    side: int

    @property
    def frames(self) -> list[Scene]:
        """One scene a frame; the object that moves stands last in each."""
        return [
            Scene(
                (*self.still, (self.mover, self.end if frame >= self.at else self.start)),
                self.background, FRAMES * self.variant + frame, side=self.side
            )
            for frame in range(FRAMES)
        ]  # fmt: skip

    def ask(self, task: str) -> tuple[str, str, str]:
        """(what is reasoned, answer, combination) of the question ``task``."""
        answer = self.mover if task == "mover" else QUADRANTS[self.end if task == "end" else self.start]
        first, last = (dict((*((q, name) for name, q in self.still), (q, self.mover))) for q in (self.start, self.end))
        seen = (", ".join(at.get(q, "nothing") for q in range(len(QUADRANTS))) for at in (first, last))
        steps = "At the start {}. At the end {}.".format(*seen)
        return steps, answer, f"clip {task}|{sorted(self.still)}|{self.mover}|{self.start}{self.end}"


def draw_clip(rng: np.random.Generator, variant: int, side: int) -> Clip:
    """A clip of two or three objects, frames of ``side`` pixels."""
    count = int(rng.integers(1, 3))
    names = rng.choice(COUNTABLE, count + 1, replace=False).tolist()
    start, end, *rest = rng.permutation(len(QUADRANTS)).tolist()
    still = tuple(sorted(zip(names[1:], rest, strict=False), key=lambda place: place[1]))
    at, background = int(rng.integers(1, FRAMES)), str(rng.choice(list(BACKGROUNDS)))
    return Clip(still, names[0], start, end, at, background, variant, side)


def question(task: str, clip: Clip, rng: np.random.Generator) -> str:
    """The question in one of its phrasings."""
    options = PHRASINGS[task]
    return options[rng.integers(len(options))].format(a=THINGS[clip.mover].a)
