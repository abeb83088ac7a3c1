"""Verifiable instructions (after IFEval, arXiv 2311.07911; the kinds are ours), checked by rule."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosmo_fast.rewards.columns import rows_of
from cosmo_fast.rewards.format import answer_text


def instruction(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """The share of the row's column `instructions` that the text after `</think>` follows; None on rows without any."""
    kept = [
        followed(answer_text(text), row.get("instructions") or [])
        for row, text in zip(rows_of(columns, len(completions)), completions, strict=True)
    ]
    return [sum(each) / len(each) if each else None for each in kept]


def followed(text: str, instructions: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether text follows each of the instructions; a blank text follows none.

    - {"kind": "words" | "sentences", "min": 3, "max": 8}: how many there are; either bound may be left out.
    - {"kind": "include" | "exclude", "word": "apple"}: the word or phrase stands there or not, whatever its case.
    - {"kind": "order", "words": ["first", "then"]}: all stand there, in this order.
    - {"kind": "starts_with" | "ends_with", "text": "Thank you."}, whatever the case.
    - {"kind": "case", "case": "lower" | "upper"}. {"kind": "format", "format": "json" | "list" | "one_line"}: a list
      has "- ", "* " or "1. " before every line.

    Raises ValueError for an instruction of another form.
    """
    return [_follows(text.strip(), dict(instruction)) and bool(text.strip()) for instruction in instructions]


def _follows(text: str, instruction: dict[str, Any]) -> bool:
    match instruction:
        case {"kind": "words" | "sentences" as kind, **bounds} if bounds and bounds.keys() <= {"min", "max"}:
            parts = text.split() if kind == "words" else re.split(r"(?<![.!?])[.!?]+(?:\s+|$)", text)
            if all(type(bound) is int and bound >= 0 for bound in bounds.values()):
                return bounds.get("min", 0) <= sum(map(bool, parts)) <= bounds.get("max", math.inf)
        case {"kind": "include" | "exclude" as kind, "word": str(word), **rest} if word.strip() and not rest:
            return _in_order(text, [word]) == (kind == "include")
        case {"kind": "order", "words": [*words], **rest} if words and not rest and _texts(words):
            return _in_order(text, words)
        case {"kind": "starts_with", "text": str(start), **rest} if start.strip() and not rest:
            return text.casefold().startswith(start.strip().casefold())
        case {"kind": "ends_with", "text": str(end), **rest} if end.strip() and not rest:
            return text.casefold().endswith(end.strip().casefold())
        case {"kind": "case", "case": "lower" | "upper" as case, **rest} if not rest:
            return text == getattr(text, case)()
        case {"kind": "format", "format": "json", **rest} if not rest:
            return _is_json(text)
        case {"kind": "format", "format": "list" | "one_line" as form, **rest} if not rest:
            lines = [line for line in text.splitlines() if line.strip()]
            listed = all(re.match(r"\s*(?:[-*]|\d+\.)\s+\S", line) for line in lines)
            return len(lines) == 1 if form == "one_line" else listed
    raise ValueError(f"column 'instructions': {instruction!r} is none that cosmo_fast.rewards.instruction can check")


def _in_order(text: str, words: Sequence[str]) -> bool:
    """Whether the words or phrases stand in text, whole and in this order."""
    place = 0
    for word in words:  # the first place of each is enough, and costs no more than reading the text
        found = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE).search(text, place)
        if found is None:
            return False
        place = found.end()
    return True


def _texts(words: Sequence[Any]) -> bool:
    return all(isinstance(word, str) and word.strip() for word in words)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # nested a thousand deep
        return False
    return True
