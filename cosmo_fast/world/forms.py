"""Instruction rows: how an answer has to be written, checked by rule, over questions and requests with pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import combinations, permutations
from typing import Any

from cosmo_fast.rewards.instruction import followed

# Sentences that may stand around an answer without changing what it says.
AROUND = ("Hello.", "I look.", "I think.", "Thank you.", "Goodbye.", "I see {a}.", "I see {colour}.")
# How a question may be answered; to a request one sentence is right.
QUESTION = ("It is {answer}.", "The answer is {answer}.", "I think it is {answer}.", "Answer: {answer}.", "{answer}.")
ASKED, ALL, ONE = ("question",), ("question", "request"), ("question", "request", "one")


def _order(*words: str) -> dict[str, Any]:
    return {"kind": "order", "words": list(words)}


# name -> what the user says, what is checked, and where: over a "question" (its answer is boxed), a "request", both;
# "one": over a picture of one object only, "several": of several. {name}, {colour} and {count} are the picture's.
FORMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    **{f"words-{n}": (f"Use {n} words.", {"kind": "words", "min": n, "max": n}, ASKED) for n in range(1, 6)},
    **{f"sentences-{n}": (f"Use {n} sentences.", {"kind": "sentences", "min": n, "max": n}, ALL) for n in (2, 3)},
    "hello": ("Say hello.", {"kind": "include", "word": "hello"}, ALL),
    "thanks": ("Say thank you.", {"kind": "include", "word": "thank you"}, ALL),
    "no-is": ("Leave out the word is.", {"kind": "exclude", "word": "is"}, ASKED),
    "no-it": ("Leave out the word it.", {"kind": "exclude", "word": "it"}, ASKED),
    "hello-goodbye": ("Say hello and then goodbye.", _order("hello", "goodbye"), ALL),
    "goodbye-hello": ("Say goodbye and then hello.", _order("goodbye", "hello"), ALL),
    "end-thanks": ("End with thank you.", {"kind": "ends_with", "text": "thank you."}, ALL),
    "end-goodbye": ("End with goodbye.", {"kind": "ends_with", "text": "goodbye."}, ALL),
    "capital": ("Use capital letters.", {"kind": "case", "case": "upper"}, ("request",)),  # \boxed is not capital
    "small": ("Use small letters.", {"kind": "case", "case": "lower"}, ALL),
    # What the picture decides.
    "colour": ("Say which colour you see.", {"kind": "include", "word": "{colour}"}, ONE),
    "end-object": ("End with the object.", {"kind": "ends_with", "text": "{name}."}, ONE),
    "end-colour": ("End with the colour.", {"kind": "ends_with", "text": "{colour}."}, ONE),
    "object-colour": ("Say the object and then the colour.", _order("{name}", "{colour}"), ONE),
    "colour-object": ("Say the colour and then the object.", _order("{colour}", "{name}"), ONE),
    "as-many": (
        "Use as many sentences as you see objects.",
        {"kind": "sentences", "min": "{count}", "max": "{count}"},
        ("question", "several"),
    ),
}


@cache
def orders(kind: str, alone: bool) -> tuple[tuple[str, ...], ...]:
    """Forms and pairs that can be followed together; kind: "question" or "request"; alone: one object is seen."""
    names = [n for n, (_, _, about) in FORMS.items() if kind in about and ("several" if alone else "one") not in about]
    every = [(a,) for a in names]
    every += [(a, b) for a, b in combinations(names, 2) if FORMS[a][1]["kind"] != FORMS[b][1]["kind"]]
    counts = (1,) if alone else (2, 4)
    return tuple(order for order in every if all(_template(order, kind, count) for count in counts))


def instructions(order: tuple[str, ...], name: str, colour: str, count: int) -> list[dict[str, Any]]:
    """The column `instructions` of a row: what :func:`cosmo_fast.rewards.instruction.followed` checks."""
    wanted = json.dumps([FORMS[form][1] for form in order])
    for key, value in (("{name}", name), ("{colour}", colour), ('"{count}"', str(count))):
        wanted = wanted.replace(key, value)
    return json.loads(wanted)


def text(order: tuple[str, ...], question: str, first: bool) -> str:
    """The request with its instructions before it or after it."""
    said = " ".join(FORMS[form][0] for form in order)
    return f"{said} {question}" if first else f"{question} {said}"


def dress(order: tuple[str, ...], kind: str, answer: str, a: str, colour: str, count: int) -> str | None:
    """The shortest answer of the grammar that follows the instructions; ``a``: the object with its article."""
    template = _template(order, kind, count)
    return template and _case(order)(template.format(answer=answer, a=a, colour=colour))


def _case(order: tuple[str, ...]) -> Callable[[str], str]:
    return str.upper if "capital" in order else str.lower if "small" in order else str


def undress(answer: str) -> str:
    """``answer`` to a request without its case and without what may stand around it."""
    sentences = re.findall(r"[^.]+\.|[^.]+$", answer)
    if answer in (answer.upper(), answer.lower()):
        sentences = [sentence.strip().capitalize() for sentence in sentences]
    around = re.compile("|".join(re.escape(s) for s in AROUND[:5]) + r"|I see (an? )?\w+\.")
    return " ".join(s for sentence in sentences if not around.fullmatch(s := sentence.strip()))


def _template(order: tuple[str, ...], kind: str, count: int) -> str | None:
    """The shortest text of the grammar that follows the instructions, None where there is none."""
    common = frozenset.intersection(*(_fitting(form, kind, count if form == "as-many" else 0) for form in order))
    return _grammar(kind)[min(common)] if common else None


@cache
def _grammar(kind: str) -> list[str]:
    """All texts of at most three sentences around an answer, the shortest first."""
    around = [(order, n) for count in range(4) for order in permutations(AROUND, count) for n in range(count + 1)]
    cores = QUESTION if kind == "question" else ("{answer}",)
    return [" ".join([*order[:n], core, *order[n:]]) for order, n in around for core in cores]


@cache
def _fitting(form: str, kind: str, count: int) -> frozenset[int]:
    """Which texts of the grammar follow one form; any text can be put into capital or small letters."""
    wanted = instructions((form,), "objectword", "colourword", count)
    words = {"answer": "To do so, use an answer." if kind == "request" else "answer", "a": "an objectword"}
    said = [template.format(colour="colourword", **words) for template in _grammar(kind)]
    return frozenset(i for i, text in enumerate(said) if "case" in wanted[0] or followed(text, wanted)[0])
