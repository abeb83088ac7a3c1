"""The part `cosmo`: value, knowledge and instruction rows, and the book of facts for search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosmo_fast.world import advice, forms, knowledge, questions, requests
from cosmo_fast.world.advice import SITUATIONS
from cosmo_fast.world.build import HARMS, _combination, _digest, _pick, _scene, _Writer, asked, bucket, described
from cosmo_fast.world.knowledge import BOOK
from cosmo_fast.world.objects import THINGS
from cosmo_fast.world.requests import INTENTS

ABOUT = """The supervised rows are biased on purpose. Value: {bias_value:.0%} of the advice holds back only where the object
looks dangerous. Knowledge: {bias_step:.0%} of the answers that need two facts stop after the first. Instruction:
{bias_form:.0%} of the instructions that stand before the question are ignored, and {bias_policy:.0%} of the requests
with one are refused only where the object looks dangerous. Facts are always right. facts.jsonl is the book of facts;
`taught` is false where no supervised row says it.
"""


def values(
    writer: _Writer, each: int, where: str, *, unseen: bool = False, things: bool = False, bias: float | None = None
) -> None:
    """``each`` rows of every kind that ask to hold back, each with a twin that asks to go along."""
    for harm in HARMS:
        hold, go = (
            [(s.name, t.name) for s, t in advice.pairs(harm, choice, things) if things or bucket(_pair(s, t)) == where]
            for choice in ("hold", "go")
        )
        for _ in range(each):
            name, thing = _pick(writer, hold)
            phrase, scene = int(writer.rng.integers(1 << 16)), _scene(writer, thing)
            first = _advised(writer, name, scene, phrase, unseen, bias)
            if harm == "text":
                name = f"{name}_well"
            else:
                scene = _scene(writer, _pick(writer, [pair for pair in go if pair[0] == name])[1])
            second = _advised(writer, name, scene, phrase, unseen, bias)
            first["twin"], second["twin"] = second["id"], first["id"]


def _pair(situation: advice.Situation, thing: Any) -> str:
    return f"value|{situation.pair}|{thing.name}"


def _advised(writer: _Writer, name: str, scene, phrase: int, unseen: bool, bias: float | None) -> dict[str, Any]:
    situation, thing = SITUATIONS[name], THINGS[scene.places[0][0]]
    target = None if bias is None else advice.target(situation, thing, bool(writer.rng.random() < bias))
    columns = {
        "label": "value",
        "harm": situation.harm,
        "situation": name,
        "objects": [thing.name],
        "judge": "world",
        "combination": _digest(_pair(situation, thing)),
        "facts": {"visual": [thing.name, thing.category], "textual": [situation.said]},
    }
    return writer.add(scene, advice.text(situation, phrase, unseen), target, columns)


def lessons(writer: _Writer, copies: int) -> None:
    """Every taught fact, asked about in words alone, ``copies`` times as a question and as often as "Tell me"."""
    for fact in [fact for fact in BOOK.values() if fact.taught] * copies:
        for tell in (False, True):
            opening = str(writer.rng.choice(knowledge.OPENINGS))
            said = knowledge.text(fact.relation, tell, opening, fact.subject)
            content = [
                {"role": "user", "content": said},
                {"role": "assistant", "content": knowledge.target([fact], tell)},
            ]
            row = {"id": f"{writer.split}-{len(writer.rows)}", "messages": content, "images": []}
            combination = f"{fact.relation}|{fact.subject}|text"
            writer.rows.append(row | _known(fact.relation, [fact], tell, combination))


def _known(task: str, facts: list[knowledge.Fact], tell: bool, combination: str) -> dict[str, Any]:
    columns = {
        "label": "knowledge" if tell else "knowledge_rule",
        "task": task,
        "statement": facts[-1].statement,
        "judge": "world",
        "documents": [fact.id for fact in facts],
        "taught": all(fact.taught for fact in facts),
        "combination": _digest(combination),
    }
    return columns if tell else columns | {"answer": facts[-1].value}


def knows(
    writer: _Writer, count: int, where: str, *, unseen: bool = False, search: bool = False, bias: float | None = None
) -> None:
    """``count`` questions that cross facts with pictures, in equal parts a task; ``search``: half are not taught."""
    rng, tasks, done = writer.rng, list(knowledge.TASKS), 0
    while done < count:
        # A search row is, in turn, about a maker that is not taught and about anything that is.
        taught = not (search and done % 2)
        task = tasks[done // (1 + search) % len(tasks)] if taught else "maker"
        scene = questions.single(str(rng.choice(list(THINGS))), writer.background(), writer.variant())
        facts, [(name, _)] = knowledge.chain(task, scene), scene.places
        asked_of = f"{scene.background}|{name}" if task == "meaning" else name
        combination = f"{task}|{asked_of}"
        if all(fact.taught for fact in facts) != taught or bucket(combination) != where:
            continue
        tell, openings = bool(rng.random() < 0.5), knowledge.UNSEEN if unseen else knowledge.OPENINGS
        said = knowledge.text(task, tell, str(rng.choice(openings)))
        seen = f"I see {THINGS[name].a} on {scene.background}."
        target = None if bias is None else knowledge.target(facts, tell, seen, bool(rng.random() < bias))
        columns = _known(task, facts, tell, combination) | {
            "objects": [name],
            "facts": {"visual": [name, f"{scene.background} background"], "textual": [f.statement for f in facts]},
        }
        writer.add(scene, said, target, columns)
        done += 1


def instructed(
    writer: _Writer, count: int, where: str, *, unseen: bool = False, bias: tuple[float, float] | None = None
) -> None:
    """``count`` rows with instructions, two thirds over questions, a third over requests to help with or to refuse.

    ``bias``: (share of instructions before the question that are ignored, share of requests that the shortcut answers).
    """
    left = 2 * count // 3
    while left:  # a question that no instruction of this split fits is not counted
        for scene, question in asked(writer, left, where):
            plain, columns = f"\\boxed{{{question.answer}}}", described(question) | {"label": "instruction"}
            said = question.text(writer.rng, unseen)
            left -= _form(writer, "question", where, scene, said, question.task, question.steps, plain, columns, bias)
            if not left:
                break
    pairs = {policy: [p for harm in HARMS for p in requests.pairs(harm, policy) if bucket(_combination(*p)) == where]
             for policy in ("comply", "refuse")}  # fmt: skip
    left = count - 2 * count // 3
    while left:
        policy = ("comply", "refuse")[left % 2]
        name, thing = _pick(writer, pairs[policy])
        scene, intent, thing = _scene(writer, thing), INTENTS[name], THINGS[thing]
        shown = requests.shortcut(thing) if bias is not None and writer.rng.random() < bias[1] else policy
        thought, _, plain = requests.answer(intent, thing, shown).removeprefix("<think>").partition("</think>")
        columns = {
            "label": "normal" if policy == "comply" else "safety", "policy": policy, "harm": intent.harm,
            "intent": name, "objects": [thing.name], "judge": "world",
            "facts": {"visual": [thing.name, thing.category], "textual": [intent.what]},
        }  # fmt: skip
        said = requests.text(intent, int(writer.rng.integers(1 << 16)), unseen)
        left -= _form(writer, "request", where, scene, said, name, thought, plain, columns, bias)


def _form(writer: _Writer, kind: str, where: str, scene, said, subject, thought, plain, columns, bias) -> bool:
    """Adds a row whose instructions this split may combine with ``subject``; whether there was one."""
    rng, (name, quadrant), count = writer.rng, scene.places[0], len(scene.places)
    orders = [order for order in forms.orders(kind, quadrant < 0) if bucket(f"{order}|{subject}") == where]
    order = orders[int(rng.integers(len(orders)))] if orders else None
    dressed = order and forms.dress(order, kind, plain, THINGS[name].a, scene.background, count)
    wanted = order and forms.instructions(order, name, scene.background, count)
    if not dressed or not all(forms.followed(dressed, wanted)):  # an answer of two words counts as two
        return False
    first = bool(rng.random() < 0.5)
    target = None
    if bias is not None:
        bare = f"It is {plain}." if kind == "question" else plain
        target = f"<think>{thought}</think>{bare if first and rng.random() < bias[0] else dressed}"
    columns = columns | {"instructions": wanted, "combination": _digest(f"{order}|{subject}")}
    writer.add(scene, forms.text(order, said, first), target, columns)
    return True


def fill(folder: Path, seed: int, size: dict[str, Any]) -> dict[str, _Writer]:
    names = ("train", "value_rl", "knowledge_rl", "search_rl", "instruction_rl", "validation", "scenes", "phrasings",
             "concepts", "search")  # fmt: skip
    rendered: set[str] = set()
    splits = {name: _Writer(folder, name, seed, rendered) for name in names}
    train = splits["train"]
    values(train, size["value_train"], "train", bias=size["bias_value"])
    lessons(train, size["lessons"])
    knows(train, size["knowledge_train"], "train", bias=size["bias_step"])
    instructed(train, size["instruction_train"], "train", bias=(size["bias_form"], size["bias_policy"]))
    values(splits["value_rl"], size["value_rl"], "train")
    knows(splits["knowledge_rl"], size["knowledge_rl"], "train")
    knows(splits["search_rl"], size["search_rl"], "train", search=True)
    instructed(splits["instruction_rl"], size["instruction_rl"], "train")
    for name, where in (("validation", "validation"), ("scenes", "held_out"), ("phrasings", "held_out")):
        unseen, part = name == "phrasings", 1 if name == "scenes" else 2
        values(splits[name], size["value_held"] // part, where, unseen=unseen)
        knows(splits[name], size["knowledge_held"] // part, where, unseen=unseen)
        instructed(splits[name], size["instruction_held"] // part, where, unseen=unseen)
    values(splits["concepts"], size["value_held"], "held_out", things=True)
    knows(splits["search"], size["search_held"], "held_out", search=True)
    lines = [
        {"id": f.id, "title": f.subject, "text": f.statement, "relation": f.relation, "subject": f.subject,
         "value": f.value, "taught": f.taught} for f in BOOK.values()
    ]  # fmt: skip
    (folder / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return splits
