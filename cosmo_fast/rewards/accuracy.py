"""Answers graded by rule: exact, mathematics, multiple choice, within a tolerance."""

import re
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from cosmo_fast.rewards.columns import RewardError, row_name, rows_of

RULE_LABELS = ("general_rule", "knowledge_rule")
# Bounded digits: a policy that writes 1e999999999 must not cost a gigabyte of integer.
_NUMBER = re.compile(r"([+-]?)(\d{0,30}(?:\.\d{1,30})?)(?:/(\d{1,30}))?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_FORMULA = re.compile(r"[\\^=*/+()%!√π]|\d-|-[a-z\d]")  # what sends a pair of answers to math-verify
_WORD = re.compile(r"[^\W\d_]{3}")  # as mathematics "(listen)" is "silent": the same letters multiplied
_COMMAND = re.compile(r"\\(?:text|mathrm)\{[^{}]*\}|\\[A-Za-z]+")
_COSTLY = re.compile(r"\^\{?\s*\d{3}|\^\{[^{}]*\^|\d{3}!|[^\d]!|.{200}", re.DOTALL)  # minutes, gigabytes


def accuracy(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """1 where the stated answer is the column `answer`, 0 where not (R_acc; the "rule" of the public M3-RL code).

    What is stated: after `</think>` the last `<answer>…</answer>`, or the last `\\boxed{}` in it; without such a tag
    the last `\\boxed{}`. How it is compared: `correct`. None on rows without an `answer`; a row labelled general_rule
    or knowledge_rule must have one (RewardError).
    """
    rows = rows_of(columns, len(completions))
    for row in rows:
        if row.get("answer") is None and row.get("label") in RULE_LABELS:
            raise RewardError(f"{row_name(row)} has no column 'answer'")
        if row.get("answer") is not None and not str(row["answer"]).strip():
            raise RewardError(f"{row_name(row)} has a blank 'answer': every empty box would be right")
    return [
        None if row.get("answer") is None else float(correct(stated(text), row))
        for row, text in zip(rows, completions, strict=True)
    ]


def stated(completion: str) -> str | None:
    """The answer that a completion states after its thought, as `accuracy` says; None where it states none."""
    text = completion.partition("</think>")[2]
    if found := re.findall(r"<answer>((?:(?!<answer>).)*)</answer>", text, re.DOTALL):
        inner = boxed(found[-1])
        return found[-1].strip() if inner is None else inner
    return boxed(text)


def correct(given: str | None, row: Mapping[str, Any]) -> bool:
    """Whether an answer (None: none was stated) is the row's column `answer`.

    With `choices` (a list of texts) both may be a letter or an option's text: "B", "(B)", "B. red", "red". With
    `tolerance`, a number is right within it (0.5), or within that share of the answer ("5%"). Else `same_answer`.
    Raises RewardError for columns that do not fit together.
    """
    expected = str(row["answer"])
    if row.get("choices") is not None:
        choices = [str(choice) for choice in row["choices"]]
        wanted = _option(expected, choices)
        if wanted is None:
            raise RewardError(f"{row_name(row)}: answer {expected!r} is no letter or text of choices {choices}")
        return given is not None and _option(given, choices) == wanted
    if row.get("tolerance") is not None:
        return _within(given, expected, row)
    return same_answer(given, expected)


def _option(answer: str, choices: Sequence[str]) -> int | None:
    """The place of the option that an answer names, by its text before its letter."""
    texts = [normalise(choice) for choice in choices]
    if normalise(answer) in texts:
        return texts.index(normalise(answer))
    found = re.fullmatch(r"\(?([A-Za-z])[).:]*(?:\s+(.*))?", answer.strip(), re.DOTALL)
    index = ord(found[1].upper()) - ord("A") if found else len(choices)
    if index >= len(choices) or (found[2] and normalise(found[2]) != texts[index]):
        return None
    return index


def _within(given: str | None, expected: str, row: Mapping[str, Any]) -> bool:
    text, target, number = str(row["tolerance"]), normalise(expected), normalise(given or "")
    try:
        bound = Fraction(text.removesuffix("%"))  # exact: 2.1 lies within 0.1 of 2
    except ValueError:
        bound = Fraction(-1)
    if bound < 0 or not isinstance(target, Fraction):
        what = f"tolerance {text!r} and answer {expected!r}"
        raise RewardError(f"{row_name(row)}: {what} must be a number (or share, '5%') of at least 0 and a number")
    bound *= abs(target) / 100 if text.endswith("%") else 1
    return isinstance(number, Fraction) and abs(number - target) <= bound


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
    """Whether an answer (None: there was none) equals the expected one after `normalise`, or as math-verify sees it."""
    if given is None:
        return False
    a, b = normalise(given), normalise(expected)
    if a == b or (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return a == b
    sides = (given, expected)
    formula = any(map(_FORMULA.search, sides)) and not any(_WORD.search(_COMMAND.sub(" ", side)) for side in sides)
    return formula and not _COSTLY.search(given) and _equivalent(given, expected)


@lru_cache(maxsize=4096)
def _equivalent(given: str, expected: str) -> bool:
    """Equal as mathematics, by math-verify on LaTeX. Its time limits are signals, which only the main thread has."""
    from math_verify import LatexExtractionConfig, parse, verify  # sympy: for whom a formula is graded

    limit = 2 if threading.current_thread() is threading.main_thread() else None
    options = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": limit}
    sides = [parse(f"${text.strip().strip('$')}$", **options) for text in (expected, given)]
    return bool(all(sides) and verify(*sides, timeout_seconds=limit))
