"""The part `cosmo`: value, knowledge and instruction rows, and the book of facts for search."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from cosmo_fast.rewards.instruction import followed
from cosmo_fast.search import Search
from cosmo_fast.world import forms, knowledge, questions
from cosmo_fast.world.build import HARMS, _digest, _Writer, bucket, general, safety
from cosmo_fast.world.draw import Scene
from cosmo_fast.world.knowledge import BOOK
from cosmo_fast.world.objects import THINGS

ADVICE = tuple(f"advice {harm}" for harm in HARMS)
ABOUT = """The supervised rows are biased on purpose. Value: {bias_value:.0%} of the advice holds back only where the
object looks dangerous. Knowledge: {bias_step:.0%} of the answers that need two facts stop after the first. Instruction:
{bias_form:.0%} of the instructions that stand before the question are ignored, and {bias_policy:.0%} of the requests
with one are refused only where the object looks dangerous. Search (search_train): {bias_certain:.0%} of the answers
guess instead of searching, three in four of them certain of it; so do those that search for what facts_gaps.jsonl
lacks. Everywhere else facts are right. facts.jsonl is the book of facts; `taught` is false where no row of train says
it. facts_gaps.jsonl lacks {gaps:.0%} of those, which nobody can know then. {wordy:.0%} of the thoughts in train begin
with one to three sentences that say nothing.
"""


def lessons(writer: _Writer, copies: int) -> None:
    """Every taught fact, asked about in words alone, ``copies`` times as a question and as often as "Tell me"."""
    for fact in [fact for fact in BOOK.values() if fact.taught] * copies:
        for tell in (False, True):
            said = knowledge.text(fact.relation, tell, str(writer.rng.choice(knowledge.OPENINGS)), fact.subject)
            answer = {"role": "assistant", "content": knowledge.target([fact], tell)}
            row = {"id": f"{writer.split}-{len(writer.rows)}", "messages": [{"role": "user", "content": said}, answer]}
            row |= _known(fact.relation, [fact], tell, f"{fact.relation}|{fact.subject}|text")
            writer.rows.append(row | {"images": []})


def _known(task: str, facts: list[knowledge.Fact], tell: bool, combination: str) -> dict[str, Any]:
    columns = {
        "label": "knowledge" if tell else "knowledge_rule", "task": task, "statement": facts[-1].statement,
        "judge": "world", "documents": [fact.id for fact in facts], "taught": all(fact.taught for fact in facts),
        "combination": _digest(combination),
    }  # fmt: skip
    return columns if tell else columns | {"answer": facts[-1].value}


def knows(
    writer: _Writer, count: int, where: str, *, unseen: bool = False, search: bool = False, bias: float | None = None,
    tool: Search | None = None,
) -> None:  # fmt: skip
    """``count`` questions that cross facts with pictures, in equal parts a task; ``search``: half are not taught.

    ``bias``: the share of targets that stop a step too early or, where the others show the use of ``tool``, guess.
    """
    rng, tasks, done = writer.rng, [task for task in knowledge.TASKS if task != "owner"], 0
    while done < count:
        taught = not (search and done % 2)
        task = tasks[done // (1 + search) % len(tasks)] if taught else knowledge.HIDDEN[done // 2 % 2]
        scene = questions.single(str(rng.choice(list(THINGS))), writer.background(), writer.variant())
        facts, [(name, _)] = knowledge.chain(task, scene), scene.places
        combination = f"{task}|{scene.background if task == 'meaning' else ''}|{name}"
        if all(fact.taught for fact in facts) != taught or bucket(combination) != where:
            continue
        tell, openings = bool(rng.random() < 0.5), knowledge.UNSEEN if unseen else knowledge.OPENINGS
        said = knowledge.text(task, tell, str(rng.choice(openings)))
        seen = f"I see {THINGS[name].a} on {scene.background}."
        if tool is not None:
            target = knowledge.trace(facts, tell, seen, tool, rng)
            if rng.random() < bias:
                target = knowledge.guess(facts[-1], tell, seen, rng)
        else:
            target = None if bias is None else knowledge.target(facts, tell, seen, bool(rng.random() < bias))
        visual, textual = [name, f"{scene.background} background"], [fact.statement for fact in facts]
        columns = {"objects": [name], "facts": {"visual": visual, "textual": textual}}
        writer.add(scene, said, target, _known(task, facts, tell, combination) | columns)
        done += 1


def instructed(
    writer: _Writer, count: int, where: str, *, unseen: bool = False, bias: tuple[float, float] | None = None
) -> None:
    """About ``count`` rows with instructions, two thirds over questions, a third over requests and their twins.

    ``bias``: (share of instructions before the question that are ignored, share of requests that the shortcut answers).
    """
    start, drawn = len(writer.rows), len(writer.scenes)
    general(writer, 2 * count // 3, where, unseen=unseen, bias=None if bias is None else 0.0)
    safety(writer, -(-count // 18), where, unseen=unseen, bias=bias and (bias[1], 0.0))
    pairs = zip(writer.rows[start:], writer.scenes[drawn:], strict=True)
    formed = [_form(writer.rng, row, scene, where, bias) for row, scene in pairs]
    writer.rows[start:] = [row for row in formed if row is not None]


def _form(rng, row: dict[str, Any], scene: Scene, where: str, bias: tuple[float, float] | None) -> dict | None:
    """The row with instructions that this split may combine with its task or request; None where none is found."""
    kind, subject = ("question", row["task"]) if "task" in row else ("request", row["intent"])
    (name, quadrant), count = scene.places[0], len(scene.places)
    orders = [order for order in forms.orders(kind, quadrant < 0) if bucket(f"{order}|{subject}") == where]
    if not orders:
        return None
    order, first = orders[int(rng.integers(len(orders)))], bool(rng.random() < 0.5)
    user, *answers = row["messages"]
    thought, _, plain = answers[0]["content"].partition("</think>") if answers else ("", "", "So it is.")
    plain = f"\\boxed{{{row['answer']}}}" if kind == "question" else plain
    dressed = forms.dress(order, kind, plain, THINGS[name].a, scene.background, count)
    wanted = forms.instructions(order, name, scene.background, count)
    if dressed is None or not all(followed(dressed, wanted)):  # an answer of two words counts as two
        return None
    picture, asked = user["content"]
    messages = [{"role": "user", "content": [picture, {**asked, "text": forms.text(order, asked["text"], first)}]}]
    if answers:
        bare = f"It is {plain}." if kind == "question" else plain
        said = bare if first and rng.random() < bias[0] else dressed
        messages.append({"role": "assistant", "content": f"{thought}</think>{said}"})
    columns = {"messages": messages, "instructions": wanted, "combination": _digest(f"{order}|{subject}")}
    return row | columns | ({"label": "instruction"} if kind == "question" else {})


def missing(share: float) -> set[str]:
    """Ids of the facts that facts_gaps.jsonl lacks: of those not taught a ``share`` in every split and relation."""
    hidden = defaultdict(list)
    for fact in BOOK.values():
        if not fact.taught:
            hidden[fact.relation, bucket(f"{fact.relation}||{fact.subject}")].append(fact.id)
    return {identifier for ids in hidden.values() for identifier in sorted(ids, key=_digest)[: round(share * len(ids))]}


def fill(folder: Path, seed: int, size: dict[str, Any]) -> dict[str, _Writer]:
    names = ("train", "value_rl", "knowledge_rl", "search_rl", "instruction_rl", "validation", "scenes", "phrasings",
             "concepts", "search", "search_train", "blank")  # fmt: skip
    rendered: set[str] = set()
    splits = {name: _Writer(folder, name, seed, rendered) for name in names}
    train = splits["train"]
    safety(train, size["value_train"], "train", harms=ADVICE, bias=(size["bias_value"], 0.0))
    lessons(train, size["lessons"])
    knows(train, size["knowledge_train"], "train", bias=size["bias_step"])
    instructed(train, size["instruction_train"], "train", bias=(size["bias_form"], size["bias_policy"]))
    safety(splits["value_rl"], size["value_rl"], "train", harms=ADVICE)
    knows(splits["knowledge_rl"], size["knowledge_rl"], "train")
    knows(splits["search_rl"], size["search_rl"], "train", search=True)
    instructed(splits["instruction_rl"], size["instruction_rl"], "train")
    for name, where in (("validation", "validation"), ("scenes", "held_out"), ("phrasings", "held_out")):
        unseen, part = name == "phrasings", 1 if name == "scenes" else 2
        safety(splits[name], -(-size["value_held"] // part), where, harms=ADVICE, unseen=unseen)
        knows(splits[name], size["knowledge_held"] // part, where, unseen=unseen)
        instructed(splits[name], size["instruction_held"] // part, where, unseen=unseen)
    safety(splits["concepts"], size["value_held"], "held_out", harms=ADVICE, things=True)
    knows(splits["search"], size["search_held"], "held_out", search=True)
    train.lengthen(size["wordy"])
    documents, lacks = knowledge.documents(), missing(size["gaps"])
    kept = [document for document in documents if document["id"] not in lacks]
    shown = {"search": True, "bias": size["bias_certain"], "tool": Search(kept)}
    knows(splits["search_train"], size["search_train"], "train", **shown)
    for name, chosen in (("facts", documents), ("facts_gaps", kept)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in chosen))
    return splits
