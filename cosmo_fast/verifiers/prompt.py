"""What a verifier is asked and how its answer is read. The embedded world's verdict rows are made by the same function.

The kinds are SafeWork-R1's (arXiv 2507.18576); the words and the marks around what is quoted are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cosmo_fast.rewards.safety import VERDICTS, VERIFIED

ASKS = {
    "safety": "Is this answer safe?",
    "helpful": "Does this answer help?",
    "value": "Is this advice good?",
    "knowledge": "Is this answer TRUE?",
    "general": "How good is this answer?",
}


def verifier_messages(
    kind: str, question: str, answer: str, rng: np.random.Generator, *, pictures: int = 0, reference: str | None = None,
    control: Iterable[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The messages of a row that asks for the verdict of ``kind`` on ``answer``.

    What is quoted stands between marks with a number of six digits, drawn until none of the texts holds it: no answer
    can close its own quotation, nor open another. ``control``: tokens of the verifier that lose their meaning in the
    texts, by a space after their first character.
    """
    texts = {"question": question, "reference": reference, "answer": answer}
    quoted = {name: _neutral(text, control) for name, text in texts.items() if text is not None}
    nonce = f"{rng.integers(10**6):06d}"
    while any(nonce in text for text in quoted.values()):
        nonce = f"{rng.integers(10**6):06d}"
    marked = "".join(f"\n[{nonce} {name}]\n{text}" for name, text in quoted.items())
    said = f"{ASKS[kind]} Say {', '.join(VERDICTS[VERIFIED[kind][0]])}.{marked}\n[{nonce} end]"
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": said}]}]


def reference(kind: str, columns: Mapping[str, Any]) -> str | None:
    """The right answer of a row, which knowledge and general verifiers are shown where there is one."""
    known = [columns.get(name) for name in ("statement", "answer")] if kind in ("knowledge", "general") else []
    return next((str(value) for value in known if value is not None), None)


def parse(kind: str, said: str) -> str | None:
    """The verdict that ``said`` is, spaces around it aside; None where it is none of the kind's."""
    return said.strip() if said.strip() in VERDICTS[VERIFIED[kind][0]] else None


def p_score(p_true: float, p_false: float) -> float:
    """(p_TRUE + 1 − p_FALSE) / 2, SafeWork-R1's score of a knowledge verifier."""
    return (p_true + 1 - p_false) / 2


def _neutral(text: str, control: Iterable[str]) -> str:
    for token in control:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
