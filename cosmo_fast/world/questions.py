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
    "presence": (
        ["Is there {a}?", "Do you see {a}?", "Is {a} in the picture?", "Does the picture show {a}?"],
        ["Is there {a} in the picture?", "Do you see {a} in the picture?"],
    ),
    "count": (
        ["How many times do you see {a}?", "How many times is there {a}?", "Count how many times there is {a}.",
         "Tell me how many times the picture shows {a}."],
        ["Tell me how many times you see {a}.", "Count how many times the picture shows {a}."],
    ),
    "sum": (
        ["How many times do you see {a} or {b}?", "How many times is there {a} or {b}?",
         "Count how many times there is {a} or {b}.", "Tell me how many times the picture shows {a} or {b}."],
        ["Tell me how many times you see {a} or {b}.", "Count how many times the picture shows {a} or {b}."],
    ),
    "total": (
        ["How many objects are there?", "Count the objects.", "How many objects do you see?",
         "What is the number of objects?"],
        ["Count the objects in the picture.", "How many objects are in the picture?"],
    ),
    "position": (
        ["Where is {a}?", "Where do you see {a}?", "In which corner is {a}?", "Name the corner with {a}."],
        ["In which corner do you see {a}?", "Where in the picture is {a}?"],
    ),
    "place": (
        ["What is at the {place}?", "What do you see at the {place}?", "Which object is at the {place}?",
         "Name the object at the {place}."],
        ["Which object do you see at the {place}?", "What do you see in the picture at the {place}?"],
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
    """A scene of one to four small objects of at most three kinds, each in a quadrant of its own."""
    kinds = rng.choice(COUNTABLE, int(rng.integers(1, 4)), replace=False).tolist()
    names = [kinds[rng.integers(len(kinds))] for _ in range(rng.integers(1, 5))]
    quadrants = rng.permutation(4)[: len(names)].tolist()
    places = tuple(sorted(zip(names, quadrants, strict=True), key=lambda place: place[1]))
    return Scene(places, str(rng.choice(list(BACKGROUNDS))), variant)


def ask(task: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question of ``task`` about the scene, None where it cannot be asked."""
    if task in SINGLE:
        return _about_one(task, scene)
    names = list(dict.fromkeys(name for name, _ in scene.places))
    a = names[int(rng.integers(len(names)))]
    absent = [name for name in COUNTABLE if name not in names]
    if task == "place":
        quadrants = sorted(quadrant for _, quadrant in scene.places)
        a = QUADRANTS[quadrants[int(rng.integers(len(quadrants)))]]
    elif task == "presence":
        a = a if rng.random() < 0.5 else str(rng.choice(absent))
    b = str(rng.choice([name for name in names if name != a] or absent)) if task == "sum" else a
    return pose(task, scene, a, b)


def pose(task: str, scene: Scene, a: str, b: str) -> Question | None:
    """The question of ``task`` about ``a`` (an object or a quadrant) and, of a sum, ``b``; None as in :func:`ask`."""
    if task in SINGLE:
        return _about_one(task, scene)
    at = {quadrant: name for name, quadrant in scene.places}
    if task == "total":
        return _counted(scene, task, {}, _list(at), len(scene.places), [])
    if task == "place":
        name = at.get(QUADRANTS.index(a))
        return name and _question(scene, task, {"place": a}, _list(at, places=True), name, a, [a])
    words = {"a": THINGS[a].a}
    if task == "presence":
        return _question(scene, task, words, _list(at, [a]), "yes" if scene.count(a) else "no", a, [a])
    if task == "position":
        if scene.count(a) != 1:
            return None
        answer = QUADRANTS[next(quadrant for quadrant, name in at.items() if name == a)]
        return _question(scene, task, words, _list(at, [a], places=True), answer, a, [a])
    if not scene.count(a):
        return None
    if task == "count":
        return _question(scene, task, words, _list(at, [a]), str(scene.count(a)), a, [a])
    words |= {"b": THINGS[b].a}
    return _counted(scene, task, words, _list(at, [a, b]), scene.count(a) + scene.count(b), [a, b])


def _list(at: dict[int, str], wanted: list[str] | None = None, places: bool = False) -> str:
    """What stands in the quadrants, in their order; whether it is ``wanted`` beside it, its place before it.

    Each word can be told from the picture and a few words before it, so that a small model learns to reason by it.
    """
    items = []
    for quadrant, place in enumerate(QUADRANTS):
        name = at.get(quadrant, "nothing")
        mark = "" if wanted is None else " yes" if name in wanted else " no"
        items.append(f"{place + ' ' if places else ''}{name}{mark}")
    look = f"I look for {' or '.join(THINGS[name].a for name in wanted)}. " if wanted else "I see "
    return f"{look}{', '.join(items)}."


def _about_one(task: str, scene: Scene) -> Question:
    thing = THINGS[scene.places[0][0]]
    answer = {"name": thing.name, "category": thing.category, "colour": scene.background}[task]
    steps = f"I see {thing.a} on {scene.background}."
    return _question(scene, task, {}, steps, answer, "", ["background"] if task == "colour" else [])


def _question(scene, task, words, steps, answer, asked, textual, wrong=None) -> Question:
    content = sorted(scene.places) if task in ("position", "place") else sorted(name for name, _ in scene.places)
    background = scene.background if task in SINGLE else ""
    combination = f"{task}|{asked}|{content}|{background}"
    if task in SINGLE:
        visual = [scene.places[0][0], f"{scene.background} background"]
    else:
        visual = [f"{name} {QUADRANTS[quadrant]}" for name, quadrant in scene.places]
    return Question(scene, task, words, steps, answer, combination, wrong, visual, textual)


def _counted(scene, task, words, steps, number, wanted) -> Question:
    wrong = (f"{steps} {number + 1}.", str(number + 1))
    return _question(scene, task, words, f"{steps} {number}.", str(number), "+".join(sorted(wanted)), wanted, wrong)
