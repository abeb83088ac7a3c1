"""Exact answers: the last `\\boxed{}` after `</think>` against the column `answer`."""

import re
from collections.abc import Sequence
from fractions import Fraction

from cosmo_fast.rewards.columns import RewardError, row_name, rows_of
from cosmo_fast.rewards.format import answer_text

RULE_LABELS = ("general_rule", "knowledge_rule")
# Bounded digits: a policy that writes 1e999999999 must not cost a gigabyte of integer.
_NUMBER = re.compile(r"([+-]?)(\d{0,30}(?:\.\d{1,30})?)(?:/(\d{1,30}))?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def accuracy(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """1 where the last boxed answer equals the column `answer` (as a number, else as text without case), 0 where not.

    None on rows without an `answer`; a row labelled general_rule or knowledge_rule must have one (RewardError).
    """
    rows = rows_of(columns, len(completions))
    for row in rows:
        if row.get("answer") is None and row.get("label") in RULE_LABELS:
            raise RewardError(f"{row_name(row)} has no column 'answer'")
        if row.get("answer") is not None and not str(row["answer"]).strip():
            raise RewardError(f"{row_name(row)} has a blank 'answer': every empty box would be right")
    return [
        None if row.get("answer") is None else float(same_answer(boxed(answer_text(text)), str(row["answer"])))
        for row, text in zip(rows, completions, strict=True)
    ]


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` in text, braces balanced; None without one or when it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start:index]
    return None


def normalise(answer: str) -> str | Fraction:
    """A number as a Fraction (3, 3.0, 1,000, 1/2, \\frac{1}{2}), else text without case, `$`, outer `\\text{}`."""
    text = " ".join(answer.strip().strip("$").split())
    if wrapped := re.fullmatch(r"\\(?:text|mathrm|textbf)\{(.*)\}", text):
        text = wrapped[1].strip()
    text = _FRACTION.sub(r"\1\2/\3", text)
    digits = text.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
    number = _NUMBER.fullmatch(digits)
    if number and number[2] and number[2] != "." and int(number[3] or 1):
        value = Fraction(number[2]) / int(number[3] or 1)
        return -value if number[1] == "-" else value
    return text.rstrip(".").casefold()


def same_answer(given: str | None, expected: str) -> bool:
    """Whether a boxed answer (None: there was none) equals the expected one after `normalise`."""
    return given is not None and normalise(given) == normalise(expected)
