"""The part `verdicts`: questions with answers of every sort and the verdicts that a verifier is to give on them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cosmo_fast.rewards.safety import VERIFIED
from cosmo_fast.verifiers.prompt import reference, verifier_messages
from cosmo_fast.world import advice, judge, knowledge, requests
from cosmo_fast.world.build import ASKED, _Writer, general, safety
from cosmo_fast.world.cosmo import ADVICE, knows
from cosmo_fast.world.objects import THINGS
from cosmo_fast.world.requests import BARE_REFUSAL, INTENTS

ANSWERS = 4  # judged on every row
# Label of a row -> kinds of verifier that are asked about it.
KINDS = {
    "safety": ["safety"], "normal": ["helpful", "safety"], "value": ["value"], "knowledge": ["knowledge", "helpful"],
    "knowledge_rule": ["helpful"], "general_rule": ["general"],
}  # fmt: skip
ABOUT = """Verdict rows: the user message is what a verifier is asked (column `verifier`: its kind), the answer its
verdict (column `verdict`), by the world's judge. Of every row four answers are judged, the verdicts in equal parts
as far as its answers have them. Safety and help: right and wrong, bare and explained refusals, help, warned help, help
with something else, several of these at once, none. Value: good and bad advice. Knowledge: the fact, beside it or not.
General (ours): 1 the boxed answer, 0.5 the answer without its box, 0 another.
"""


def _requested(row: dict[str, Any], rng: np.random.Generator) -> list[str]:
    intent, thing, other = INTENTS[row["intent"]], THINGS[row["objects"][0]], THINGS[str(rng.choice(list(THINGS)))]
    another = INTENTS[str(rng.choice(list(INTENTS)))]
    helped, reasons = requests.helps(intent, thing), requests.reasons(intent, thing) + requests.reasons(another, other)
    risky = [t for t in (thing, other) if t.risk != "safe"]
    wrong = [requests.helps(another, thing), requests.helps(intent, other)]
    refusals = [BARE_REFUSAL, *map(requests.refusal, reasons)]
    warned = [f"{requests.warning(t)} {text}" for t in risky for text in (helped, *wrong)]
    mixed = [f"{BARE_REFUSAL} {helped}", f"{helped} {BARE_REFUSAL}", f"{helped} {wrong[0]}"]
    return [*refusals, helped, *wrong, *warned, *mixed, f"I see {thing.a}, kind {thing.category}.", "This is safe."]


def _advised(row: dict[str, Any], rng: np.random.Generator) -> list[str]:
    situation, thing = ASKED[row["intent"]], THINGS[row["objects"][0]]
    another = list(advice.SITUATIONS.values())[int(rng.integers(len(advice.SITUATIONS)))]
    meant = [(situation, thing), (another, thing), (situation, THINGS[str(rng.choice(list(THINGS)))])]
    return [advice.advice(*pair, policy) for policy in ("comply", "refuse") for pair in meant]


def _known(row: dict[str, Any], rng: np.random.Generator) -> list[str]:
    facts = list(knowledge.BOOK.values())
    relation = knowledge.TASKS[row["task"]][0][-1]
    others = [f for f in facts if f.relation == relation and f.statement != row["statement"]]
    said = [row["statement"], row["statement"].rstrip(".").split()[-1]]
    for fact in (others[int(rng.integers(len(others)))], facts[int(rng.integers(len(facts)))]):
        said += [fact.statement, fact.value]
    return [*said, BARE_REFUSAL, "I see nothing."]


def _pools(row: dict[str, Any], kind: str, rng: np.random.Generator, stated: dict[str, list[str]]) -> dict[str, list]:
    """{verdict: answers to the row that deserve it}."""
    pools: dict[str, list[str]] = defaultdict(list)
    if kind == "general":
        pools |= {"1": [f"\\boxed{{{row['answer']}}}"], "0.5": [f"It is {row['answer']}."]}
        pools |= {"0": [f"\\boxed{{{other}}}" for other in stated[row["task"]] if other != row["answer"]]}
        return {verdict: answers for verdict, answers in pools.items() if answers}
    made = _known if "statement" in row else _advised if kind == "value" else _requested
    for answer in made(row, rng):
        pools[judge.verdict(answer, {**row, "label": VERIFIED[kind][0]})].append(answer)
    return pools


def _judged(writer: _Writer) -> list[dict[str, Any]]:
    """The writer's rows as verdict rows."""
    rng, rows, stated = writer.rng, [], defaultdict(set)
    for row in writer.rows:
        stated[row.get("task")].add(row.get("answer"))
    stated = {task: sorted(map(str, answers)) for task, answers in stated.items()}
    for row in writer.rows:
        for _ in range(ANSWERS):
            kind = str(rng.choice(KINDS[row["label"]]))
            pools = _pools(row, kind, rng, stated)
            verdict = str(rng.choice(sorted(pools)))
            question, answer = row["messages"][0]["content"][-1]["text"], str(rng.choice(pools[verdict]))
            options = {"pictures": len(row["images"]), "reference": reference(kind, row)}
            messages = verifier_messages(kind, question, answer, rng, **options)
            messages.append({"role": "assistant", "content": verdict})
            made = {"id": f"{writer.split}-{len(rows)}", "messages": messages, "images": row["images"]}
            rows.append(made | {"verifier": kind, "verdict": verdict, "combination": row["combination"]})
    return rows


def fill(folder: Path, seed: int, size: dict[str, Any]) -> dict[str, _Writer]:
    rendered: set[str] = set()
    splits = {name: _Writer(folder, name, seed, rendered) for name in ("train", "validation", "scenes", "blank")}
    for name, where in (("train", "train"), ("validation", "validation"), ("scenes", "held_out")):
        writer, each = splits[name], size["verdict_train" if name == "train" else "verdict_held"]
        safety(writer, each, where, warn=size["warn_share"])
        safety(writer, -(-each // 3), where, harms=ADVICE)
        knows(writer, 2 * each, where)
        general(writer, each, where)
        writer.rows = _judged(writer)
    return splits
