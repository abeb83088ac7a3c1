"""General questions about a scene, each with one exact answer. Every task has training and held-out phrasings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cosmo_fast.world.draw import BACKGROUNDS, QUADRANTS, Scene
from cosmo_fast.world.objects import COUNTABLE, THINGS

# Held-out phrasings are made of words that training phrasings use.
PHRASINGS: dict[str, tuple[list[str], list[str]]] = {
    "name": (
        ["What is this?", "What do you see?", "Which object is this?", "Name the object in the picture."],
        ["Which object do you see in the picture?", "Name this object."],
    ),
    "category": (
        ["What kind of thing is this?", "What kind of object do you see?", "Which kind of thing is in the picture?",
         "Name the kind of this object."],
        ["Which kind of object is this?", "Name the kind of thing in the picture."],
    ),
    "colour": (
        ["What colour is the background?", "Which colour is behind the object?", "Name the colour of the background.",
         "What is the colour of the background?"],
        ["Which colour is the background?", "What is the colour behind the object?"],
    ),
    "count": (
        ["How many {As} are there?", "How many {As} do you see?", "Count the {As}.", "What is the number of {As}?"],
        ["How many {As} are in the picture?", "Name the number of {As}."],
    ),
    "sum": (
        ["How many {As} and {Bs} are there in all?", "Count the {As} and {Bs} together.",
         "How many {As} and {Bs} do you see together?", "What is the number of {As} and {Bs} in all?"],
        ["Count the {As} and {Bs} in all.", "How many {As} and {Bs} are there together?"],
    ),
    "total": (
        ["How many objects are there in all?", "Count the objects.", "How many objects do you see together?",
         "What is the number of objects?"],
        ["Count the objects in the picture.", "How many objects are in the picture?"],
    ),
    "presence": (
        ["Is there {a}?", "Do you see {a}?", "Is {a} in the picture?", "Does the picture show {a}?"],
        ["Is there {a} in the picture?", "Do you see {a} in the picture?"],
    ),
    "position": (
        ["Where is the {A}?", "Where do you see the {A}?", "In which corner is the {A}?",
         "Name the corner of the {A}."],
        ["In which corner do you see the {A}?", "Where in the picture is the {A}?"],
    ),
    "compare": (
        ["Are there more {As} than {Bs}?", "Do you see more {As} than {Bs}?",
         "Does the picture show more {As} than {Bs}?",
         "Is the number of {As} more than the number of {Bs}?"],
        ["Are more {As} than {Bs} in the picture?", "Do you see more {As} than {Bs} in the picture?"],
    ),
}  # fmt: skip
SINGLE = ("name", "category", "colour")
TASKS = tuple(PHRASINGS)


@dataclass(frozen=True)
class Question:
    """A question about ``scene``. ``steps``: the reasoning; ``wrong``: the off-by-one answer of a biased cold start."""

    scene: Scene
    task: str
    words: dict[str, str]
    steps: str
    answer: str
    combination: str
    wrong: tuple[str, str] | None = None
    visual: list[str] = field(default_factory=list)
    textual: list[str] = field(default_factory=list)

    def text(self, rng: np.random.Generator, held_out: bool) -> str:
        options = PHRASINGS[self.task][held_out]
        return options[rng.integers(len(options))].format(**self.words)

    def target(self, biased: bool) -> str:
        steps, answer = self.wrong if biased and self.wrong else (self.steps, self.answer)
        return f"<think>{steps}</think>\\boxed{{{answer}}}"


def single(name: str, background: str, variant: int, style: str = "colour") -> Scene:
    """A scene of one large object."""
    return Scene(((name, -1),), background, variant, style)


def several(rng: np.random.Generator, variant: int) -> Scene:
    """A scene of one to four small objects of at most two kinds, each in a quadrant of its own."""
    first, second = rng.choice(COUNTABLE, 2, replace=False).tolist()
    if rng.random() < 0.4:
        names = [first] * int(rng.integers(1, 5))
    else:
        total = int(rng.integers(2, 5))
        split = int(rng.integers(1, total))
        names = [first] * split + [second] * (total - split)
    quadrants = rng.permutation(4)[: len(names)].tolist()
    places = tuple(sorted(zip(names, quadrants, strict=True), key=lambda place: place[1]))
    return Scene(places, str(rng.choice(list(BACKGROUNDS))), variant)


def ask(task: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question of ``task`` about the scene, None where it cannot be asked."""
    if task in SINGLE:
        return _about_one(task, scene)
    names = list(dict.fromkeys(name for name, _ in scene.places))
    counts = {name: scene.count(name) for name in names}
    at = {quadrant: name for name, quadrant in scene.places}
    look = "I see " + ", ".join(at.get(quadrant, "nothing") for quadrant in range(4)) + "."
    seen = f"{look} {' and '.join(_some(name, counts[name]) for name in names)}."
    visual = [_some(name, counts[name]) for name in names]
    a = names[int(rng.integers(len(names)))]
    if task == "presence":
        asked = a if rng.random() < 0.5 else str(rng.choice([n for n in COUNTABLE if n not in names]))
        answer = "yes" if asked in names else "no"
        steps = f"{seen} There is {'' if answer == 'yes' else 'not '}{THINGS[asked].a}."
        return _question(scene, task, {"a": THINGS[asked].a}, steps, answer, asked, visual, [asked])
    if task == "position":
        if counts[a] != 1:
            return None
        answer = QUADRANTS[next(quadrant for name, quadrant in scene.places if name == a)]
        words = {"A": a}
        # The places are named, so that the answer can be read off: a list of four alone is hard to index.
        steps = "I see " + ", ".join(f"{place} {at.get(i, 'nothing')}" for i, place in enumerate(QUADRANTS)) + "."
        return _question(scene, task, words, steps, answer, a, [f"{a} {answer}"], [a])
    if task == "count":
        return _question(scene, task, {"As": THINGS[a].plural}, seen, str(counts[a]), a, visual, [a])
    if task == "total" and len(names) == 1:
        return _question(scene, task, {}, seen, str(counts[a]), "", visual, ["objects"])
    if task == "total":
        return _added(scene, task, {}, seen, *counts.values(), "", visual, ["objects"])
    b = next((name for name in names if name != a), None)
    if b is None:
        return None
    words = {"As": THINGS[a].plural, "Bs": THINGS[b].plural}
    if task == "sum":
        return _added(scene, task, words, seen, counts[a], counts[b], f"{a}+{b}", visual, [a, b])
    if counts[a] == counts[b] and rng.random() < 0.8:
        return None  # else "no" would be the answer far more often than "yes"
    more = counts[a] > counts[b]
    steps = f"{seen} {counts[a]} is {'' if more else 'not '}more than {counts[b]}."
    return _question(scene, task, words, steps, "yes" if more else "no", f"{a}>{b}", visual, [a, b])


def _about_one(task: str, scene: Scene) -> Question:
    thing = THINGS[scene.places[0][0]]
    steps, visual = f"I see {thing.a} on {scene.background}.", [thing.name, f"{scene.background} background"]
    answer = {"name": thing.name, "category": thing.category, "colour": scene.background}[task]
    return _question(scene, task, {}, steps, answer, "", visual, ["background"] if task == "colour" else [])


def _question(scene, task, words, steps, answer, asked, visual, textual, wrong=None) -> Question:
    content = sorted((name, quadrant) for name, quadrant in scene.places)
    if task not in ("position", *SINGLE):
        content = sorted(name for name, _ in scene.places)
    background = scene.background if task in SINGLE else ""
    combination = f"{task}|{asked}|{content}|{background}"
    return Question(scene, task, words, steps, answer, combination, wrong, visual, textual)


def _added(scene, task, words, seen, x, y, asked, visual, textual) -> Question:
    wrong = (f"{seen} {x} + {y} = {x + y + 1}.", str(x + y + 1))
    return _question(scene, task, words, f"{seen} {x} + {y} = {x + y}.", str(x + y), asked, visual, textual, wrong)


def _some(name: str, count: int) -> str:
    return f"{count} {name if count == 1 else THINGS[name].plural}"
