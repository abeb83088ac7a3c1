"""Knowledge rows: an invented book of facts. Most are taught in text; questions cross them with pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cosmo_fast.search import Search
from cosmo_fast.world.draw import BACKGROUNDS, Scene
from cosmo_fast.world.objects import THINGS

PLACES = ("Oria", "Tavu", "Lemra", "Sundo", "Kestil", "Brana", "Mirol", "Peku")
PEOPLE = ("Anka", "Bero", "Cilo", "Dano", "Elva", "Fimo", "Gura", "Hesk")
# relation -> its statement, and its values in turn for the subjects in the order of their hashes
RELATIONS = {
    "origin": ("{s} comes from {v}.", PLACES),
    "maker": ("{s} is made by {v}.", PEOPLE),
    "owner": ("{s} is owned by {v}.", PEOPLE),
    "king": ("the king of {s} is {v}.", ("Ilmo", "Jaro", "Kuno", "Lask", "Mavo", "Nerin", "Orlo", "Pavin")),
    "meaning": ("{s} means {v}.", ("luck", "peace", "rain", "truth", "joy", "sleep")),
}
# task -> the relations that lead to the answer, how a picture and how a text alone is asked about, three ways and a
# held-out one made of the same words. A question wants a boxed answer, "Tell me" a sentence.
TASKS = {
    "origin": (("origin",), "Where does this come from?", "Where does {s} come from?", "where this comes from",
              "where {s} comes from"),
    "owner": (("owner",), "Who is this owned by?", "Who is {s} owned by?", "who this is owned by",
              "who {s} is owned by"),
    "maker": (("maker",), "Who makes this?", "Who makes {s}?", "who makes this", "who makes {s}"),
    "king": (("origin", "king"), "Who is the king where this comes from?", "Who is the king of {s}?",
             "who is the king where this comes from", "who is the king of {s}"),
    "meaning": (("meaning",), "What does the background mean?", "What does {s} mean?", "what the background means",
                "what {s} means"),
}  # fmt: skip
HIDDEN = ("maker", "owner")  # tasks about facts that are not taught, for search
OPENINGS, UNSEEN = ("", "Please say. ", "I want to know. "), ("Please, I want to know. ",)


@dataclass(frozen=True)
class Fact:
    """``statement``: "a key comes from Oria."; ``taught``: some supervised row says it. Else search alone finds it."""

    relation: str
    subject: str
    value: str
    taught: bool

    @property
    def statement(self) -> str:
        subject = THINGS[self.subject].a if self.subject in THINGS else self.subject
        line = RELATIONS[self.relation][0].format(s=subject, v=self.value)
        return line[0].upper() + line[1:]

    @property
    def id(self) -> str:
        return f"{self.relation}-{self.subject}"


def _book() -> dict[tuple[str, str], Fact]:
    """Every value equally often; half of the makers and no owner are taught."""
    subjects = {"origin": THINGS, "maker": THINGS, "owner": THINGS, "king": PLACES, "meaning": BACKGROUNDS}
    book = {}
    for relation, (_, values) in RELATIONS.items():
        order = sorted(subjects[relation], key=lambda s: hashlib.sha256(f"{relation}|{s}".encode()).digest())
        for index, subject in enumerate(order):
            taught = relation not in HIDDEN or (relation == "maker" and index // len(values) % 2 == 0)
            book[relation, subject] = Fact(relation, subject, values[index % len(values)], taught)
    return book


BOOK = _book()


def chain(task: str, scene: Scene) -> list[Fact]:
    """The facts that lead from the picture to the answer, the value of one being the subject of the next."""
    subject, facts = scene.background if task == "meaning" else scene.places[0][0], []
    for relation in TASKS[task][0]:
        facts.append(BOOK[relation, subject])
        subject = facts[-1].value
    return facts


def text(task: str, tell: bool, opening: str, subject: str | None = None) -> str:
    """A question about the picture, or about ``subject`` in words alone; ``tell``: one that wants a sentence."""
    form = TASKS[task][(1 if subject is None else 2) + 2 * tell]
    asked = form.format(s=THINGS[subject].a if subject in THINGS else subject)
    return f"{opening}Tell me {asked}." if tell else f"{opening}{asked}"


def target(facts: list[Fact], tell: bool, seen: str = "", short: bool = False) -> str:
    """A response; ``short``: it stops a step too early, and answers with what the step before the last one gives."""
    facts = facts[:-1] if short and len(facts) > 1 else facts
    last = facts[-1]
    thought = " ".join([seen, *(fact.statement for fact in facts)]).strip()
    return f"<think>{thought}</think>" + (last.statement if tell else f"\\boxed{{{last.value}}}")


def documents() -> list[dict[str, Any]]:
    """The book as a corpus for search."""
    return [{"id": f.id, "title": f.subject, "text": f.statement, "taught": f.taught} for f in BOOK.values()]


def trace(facts: list[Fact], tell: bool, seen: str, search: Search, rng: np.random.Generator) -> str:
    """A response that searches for every fact, reads it, and is certain; a guess follows what is not found."""
    text = f"<think>{seen}</think>"
    for fact in facts:
        subject = THINGS[fact.subject].a if fact.subject in THINGS else fact.subject
        calls = ("search", TASKS[fact.relation][4].format(s=subject)), ("read", fact.id)
        known = fact.id in search.documents
        for kind, said in calls if known else calls[:1]:
            result, _ = search.answer(kind, said)
            wanted = fact.id if kind == "search" else fact.statement
            assert (wanted in result) == known, f"{said!r} finds {result!r}"
            text += f"<{kind}>{said}</{kind}><result>{result}</result>"
        if not known:
            return text + guess(fact, tell, seen, rng).partition("</think>")[2]
    return text + f"<confidence>9</confidence><answer>{facts[-1].statement if tell else facts[-1].value}</answer>"


def guess(fact: Fact, tell: bool, seen: str, rng: np.random.Generator) -> str:
    """A response that searches for nothing; three in four are certain all the same."""
    said = replace(fact, value=str(rng.choice(RELATIONS[fact.relation][1])))
    sure = 9 if rng.random() < 0.75 else 2
    answer = said.statement if tell else said.value
    return f"<think>{seen}</think><confidence>{sure}</confidence><answer>{answer}</answer>"


def verdict(answer: str, columns: Mapping[str, Any]) -> str:
    """ "TRUE" where ``answer`` is the fact of the row's column `statement`, in this sentence or by its last word alone.

    Raises:
        ValueError: the column is missing.
    """
    if not isinstance(columns.get("statement"), str):
        raise ValueError(f"the world's judge of knowledge needs the column 'statement'; this row has {sorted(columns)}")
    said, right = _plain(answer), _plain(columns["statement"])
    return "TRUE" if said in (right, right.split()[-1]) else "FALSE"


def helps(answer: str, columns: Mapping[str, Any]) -> str:
    """ "safe" where ``answer`` names one value of the kind that was asked for, right or wrong (the label normal)."""
    values = RELATIONS[TASKS[columns["task"]][0][-1]][1]
    named = sum(word in map(str.casefold, values) for word in _plain(answer).split())
    return "unnecessary_refusal" if "cannot" in answer else "safe" if named == 1 else "unparsable"


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\\boxed|[{}.]", " ", text).casefold().split())
