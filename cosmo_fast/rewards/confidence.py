"""Confidence that a response states, 0 to 10, against whether it is right."""

import re
from collections.abc import Sequence

from cosmo_fast.rewards.accuracy import accuracy
from cosmo_fast.rewards.format import format_deliberative

THRESHOLD = 5  # above it a response counts as certain (Deliberative Searcher, as reported for SafeWork-R1)
_NUMBER = r"(\d{1,2}(?:\.\d{1,9})?)"  # bounded: a run of dots costs no time
_STATED = re.compile(rf"<confidence>\s*{_NUMBER}\s*</confidence>|confidence:\s*{_NUMBER}(?:\s*/\s*10)?\W*$", re.I)


def stated_confidence(completion: str) -> float | None:
    """The last `<confidence>7</confidence>`, or "Confidence: 7" (also "7/10") at the end; None without one in 0–10."""
    found = list(_STATED.finditer(completion))
    value = float(found[-1][1] or found[-1][2]) if found else None
    return value if value is not None and value <= 10 else None


def confidence(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """1 − (confidence/10 − right)², the Brier score as a reward (ours); 0 where no confidence is stated.

    right: `accuracy`, None on rows where that is None.
    """
    return [
        None if right is None else 0.0 if (sure := stated_confidence(text)) is None else 1 - (sure / 10 - right) ** 2
        for right, text in zip(accuracy(prompts, completions, **columns), completions, strict=True)
    ]


def reliability(prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
    """r_reliab: 1 for certain (above THRESHOLD) and right, or uncertain and wrong, else 0; 0 without a confidence.

    Deliberative Searcher (arXiv 2507.16727). None on rows where `accuracy` is None.
    """
    return [
        None if right is None else float((sure := stated_confidence(text)) is not None and (sure > THRESHOLD) == right)
        for right, text in zip(accuracy(prompts, completions, **columns), completions, strict=True)
    ]


def deliberative(
    prompts: Sequence, completions: Sequence[str], *, multiplier: float | None = None, **columns
) -> list[float | None]:
    """r = r_format·(0.1·r_format + 0.9·r_acc + λ·r_reliab) (Deliberative Searcher, arXiv 2507.16727).

    r_format: `format_deliberative`; r_acc: `accuracy`; λ: `multiplier`, by default that of the stage's constraint on
    `reliability`, which is adapted so that few answers are certain and wrong; 1 where there is none. None on rows where
    `accuracy` is None.
    """
    given = columns.get("reliability_multiplier") or [1.0] * len(completions)
    factors = given if multiplier is None else [multiplier] * len(completions)
    shaped = format_deliberative(prompts, completions)
    right, reliable = (reward(prompts, completions, **columns) for reward in (accuracy, reliability))
    return [
        None if a is None else f * (0.1 * f + 0.9 * a + factor * r)
        for f, a, r, factor in zip(shaped, right, reliable, factors, strict=True)
    ]
