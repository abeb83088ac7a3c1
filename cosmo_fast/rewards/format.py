"""The response's shape: one `<think>…</think>`, then the answer."""

from collections.abc import Sequence


def format_reward(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    """1 where the completion is one `<think>…</think>` followed by text that is not blank, else 0.

    Each tag exactly once; the thought itself may be empty. Source: the group's public M3-RL code (R_format).
    """
    return [float(_well_formed(text)) for text in completions]


def _well_formed(text: str) -> bool:
    once = text.count("<think>") == 1 and text.count("</think>") == 1
    return once and text.lstrip().startswith("<think>") and bool(answer_text(text))


def answer_text(completion: str) -> str:
    """The text after the first `</think>`: all that a reader sees, so all that is judged; "" when nothing closes it."""
    return completion.partition("</think>")[2].strip()
