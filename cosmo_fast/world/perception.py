"""The part `perception`: questions whose answers describe the picture first, in the forms of VTPerception-R1.

Arm by arm (arXiv 2509.24776): a description in the target, none (`plain`), or one given in the prompt (`notes`). What
the paper builds with a captioner, a detector and OCR the world knows exactly.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from cosmo_fast.world import questions
from cosmo_fast.world.build import _Writer, asked, bucket, described
from cosmo_fast.world.draw import BACKGROUNDS, QUADRANTS, Scene
from cosmo_fast.world.objects import COUNTABLE, THINGS
from cosmo_fast.world.questions import SINGLE, Question

ABOUT = """Targets: <description>, <think>, <answer>. The supervised rows are biased on purpose, in every arm alike:
over pictures of three objects and more, {bias_description:.0%} of the targets overlook all after the second (in
description, reasoning and answer, where the question can still be asked); {bias_sum:.0%} of the sums are one too high.
The rows of scenes.jsonl again: noise (normal, deviation 48 of 255, every channel alone), blur (Gaussian, radius 2 of 56
pixels), occlusion (a grey square of 22 × 22 pixels), swapped_objects (something in the picture is another, and so is
the right answer), notes (a right description in the prompt), swapped_description (one that contradicts the picture; the
answer is the picture's), followed_description (the same prompts; the answer is the description's: accuracy there says
how often a policy follows it).
"""
DISTURBANCES = ("noise", "blur", "occlusion")


def facts(question: Question) -> list[str]:
    """V: what the picture shows, one short phrase a fact."""
    background = [] if question.task in SINGLE else [f"{question.scene.background} background"]
    return question.visual + background


def description(question: Question) -> str:
    """All of V as a sentence."""
    return ", ".join(facts(question)) + "."


def steps(question: Question) -> dict[str, str]:
    """Fact -> the step of the reasoning that uses it."""
    if question.task in SINGLE:
        return dict.fromkeys(question.visual, question.steps)
    listed = question.steps.split(". ")[-1 if question.steps.startswith("I look") else 0]
    if question.task in ("sum", "total"):  # "I look for a cat. nothing no, cat yes, nothing no, frog no. 1."
        listed = question.steps.split(". ")[-2]
    items = listed.removeprefix("I see ").rstrip(".").split(", ")
    return {f"{name} {QUADRANTS[place]}": items[place] for name, place in question.scene.places}


def target(question: Question, wrong: bool = False, told: bool = True) -> str:
    thought, answer = question.wrong if wrong and question.wrong else (question.steps, question.answer)
    first = f"<description>{description(question)}</description>" if told else ""
    return f"{first}<think>{thought}</think><answer>{answer}</answer>"


def again(question: Question, scene: Scene) -> Question | None:
    """The same words asked about another scene; None where they cannot be."""
    asked_of = [*question.textual, "", ""] if question.task not in SINGLE else ["", ""]
    return questions.pose(question.task, scene, *asked_of[:2])


def contradict(question: Question, rng: np.random.Generator) -> Question | None:
    """The same question with another answer, over a held-out scene in which one thing is another."""
    for _ in range(200):
        other = again(question, _changed(question.scene, question.task, rng))
        if other is not None and other.answer != question.answer and bucket(other.combination) == "held_out":
            return other
    return None


def _changed(scene: Scene, task: str, rng: np.random.Generator) -> Scene:
    places = list(scene.places)
    if task == "colour":
        return replace(scene, background=str(rng.choice([name for name in BACKGROUNDS if name != scene.background])))
    if task in SINGLE:
        return replace(scene, places=((str(rng.choice(list(THINGS))), -1),))
    free = [place for place in range(4) if place not in {place for _, place in places}]
    index, kind = int(rng.integers(len(places))), int(rng.integers(4))
    if kind == 0 and free:  # one more
        places.append((str(rng.choice(COUNTABLE)), int(rng.choice(free))))
    elif kind == 1 and len(places) > 1:  # one fewer
        del places[index]
    elif kind == 2 and free:  # elsewhere
        places[index] = (places[index][0], int(rng.choice(free)))
    else:
        places[index] = (str(rng.choice(COUNTABLE)), places[index][1])
    return replace(scene, places=tuple(sorted(places, key=lambda place: place[1])))


def disturb(picture: Image.Image, kind: str, seed: int) -> Image.Image:
    """The picture with noise, blurred, or partly covered; the same for a seed."""
    rng = np.random.default_rng([seed, DISTURBANCES.index(kind)])
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(picture.width * 2 / 56))
    pixels = np.asarray(picture, dtype=np.float64)
    if kind == "noise":
        pixels = pixels + rng.normal(0, 48, pixels.shape)
    else:
        side = picture.width * 22 // 56
        top, left = rng.integers(picture.width - side + 1, size=2)
        pixels = pixels.copy()
        pixels[top : top + side, left : left + side] = 128
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _columns(question: Question) -> dict[str, Any]:
    textual = [] if question.task in SINGLE else question.textual  # nothing that reasoning could leave out
    return described(question) | {"facts": {"visual": facts(question), "textual": textual}, "steps": steps(question)}


def _pose(writers: dict[str, _Writer], count: int, where: str, size: dict[str, Any] | None = None) -> list:
    """``count`` questions into writers by arm ("", "plain", "notes"), with targets if ``size`` says their bias."""
    [first, *_], posed = writers.values(), []
    for scene, question in asked(first, count, where):
        said, shown, wrong = question.text(first.rng, False), question, False
        if size:
            if len(scene.places) > 2 and first.rng.random() < size["bias_description"]:
                shown = again(question, replace(scene, places=scene.places[:2])) or question
            wrong = bool(first.rng.random() < size["bias_sum"])
        for arm, writer in writers.items():
            answer = target(shown, wrong, told=arm == "") if size else None
            writer.add(scene, _noted(question, said) if arm == "notes" else said, answer, _columns(question))
        posed.append((scene, question, said))
    return posed


def _noted(question: Question, said: str) -> str:
    return f"The picture shows {description(question)} {said}"


def fill(folder: Path, seed: int, size: dict[str, Any]) -> dict[str, _Writer]:
    rendered: set[str] = set()
    training = ("train", "plain_train", "notes_train", "rl", "notes_rl")
    held = ("scenes", "notes", *DISTURBANCES, "swapped_objects", "swapped_description", "followed_description", "blank")
    splits = {name: _Writer(folder, name, seed, rendered) for name in (*training, "validation", *held)}
    arms = {"": splits["train"], "plain": splits["plain_train"], "notes": splits["notes_train"]}
    _pose(arms, size["perception_train"], "train", size)
    _pose({"": splits["rl"], "notes": splits["notes_rl"]}, size["perception_rl"], "train")
    _pose({"": splits["validation"]}, size["perception_validation"], "validation")
    posed = _pose({"": splits["scenes"], "notes": splits["notes"]}, size["perception_held"], "held_out")
    for scene, question, said in posed:
        for kind in DISTURBANCES:
            name = f"images/{scene.key}-{kind}.png"
            with Image.open(folder / f"images/{scene.key}.png") as picture:
                disturb(picture, kind, int(hashlib.sha256(scene.key.encode()).hexdigest()[:12], 16)).save(
                    folder / name, compress_level=1
                )
            splits[kind].add(scene, said, None, _columns(question))["images"] = [name]
        other = contradict(question, splits["scenes"].rng)
        if other is not None:
            columns, noted = _columns(question), _noted(other, said)
            splits["swapped_objects"].add(other.scene, said, None, _columns(other))
            splits["swapped_description"].add(scene, noted, None, columns)
            splits["followed_description"].add(scene, noted, None, columns | {"answer": other.answer})
    return splits
