"""The response's shape: the tags that a recipe asks for, and what a reader sees of the answer."""

import re
from collections.abc import Sequence

_ACTION = r"(?:<think>[^<]*</think>\s*|<(search|read)>[^<]*</\1>\s*(?:<result>[^<]*</result>\s*)?)"
_END = r"<confidence>\s*(?:10|\d)\s*</confidence>\s*<answer>([^<]*[^<\s][^<]*)</answer>\s*"
_DELIBERATIVE = re.compile(rf"\s*{_ACTION}+{_END}")
_AFTER_THOUGHT = re.compile(rf"\s*{_ACTION}*{_END}")


def format_reward(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    """1 where the completion is one `<think>…</think>` followed by text that is not blank, else 0.

    Each tag exactly once; the thought itself may be empty. Source: the group's public M3-RL code (R_format).
    """
    return [float(_well_formed(text)) for text in completions]


def format_answer(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    """1 for `<think>…</think><answer>…</answer>` and nothing else, each tag once; the thought may be empty."""
    return [float(_tagged(text, "think", "answer")) for text in completions]


def format_perception(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    """1 for `<description>…</description><think>…</think><answer>…</answer>`, each tag once and only the thought blank.

    R_fmt of VTPerception-R1 (arXiv 2509.24776): tags in order, none missing or repeated. Ours: nothing between them.
    """
    return [float(_tagged(text, "description", "think", "answer")) for text in completions]


def format_deliberative(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
    """1 for `<think>`, `<search>` and `<read>` parts, then `<confidence>` 0–10 and `<answer>` at the end, else 0.

    A `<result>` may stand behind a search or read, and nowhere else.
    The actions of Deliberative Searcher (arXiv 2507.16727); their order and spelling are ours.
    """
    return [float(bool(_DELIBERATIVE.fullmatch(text))) for text in completions]


def _tagged(text: str, *names: str) -> bool:
    shape = r"\s*".join(["", *(f"<{name}>.*</{name}>" for name in names), ""])
    once = all(text.count(tag) == 1 for name in names for tag in (f"<{name}>", f"</{name}>"))
    filled = all(section(text, name) for name in names if name != "think")
    return once and filled and bool(re.fullmatch(shape, text, re.DOTALL))


def section(text: str, name: str) -> str:
    """The content of the only `<name>…</name>` in text; "" without one, with several, or when it is not closed."""
    inner, closed, _ = text.partition(f"<{name}>")[2].partition(f"</{name}>")
    return inner.strip() if closed and text.count(f"<{name}>") == 1 else ""


def _well_formed(text: str) -> bool:
    once = text.count("<think>") == 1 and text.count("</think>") == 1
    return once and text.lstrip().startswith("<think>") and bool(answer_text(text))


def shown(completion: str) -> str:
    """The completion as rates judge it: one without any think tag is all answer."""
    return completion if "<think>" in completion or "</think>" in completion else f"</think>{completion}"


def answer_text(completion: str) -> str:
    """The text after the first `</think>`: all that a reader sees, so all that is judged; "" when nothing closes it.

    Where that is one `<answer>…</answer>`, or ends in one as `format_deliberative` asks, what it holds.
    """
    text = completion.partition("</think>")[2].strip()
    if found := _AFTER_THOUGHT.fullmatch(text):
        return found[2].strip()
    whole = text.startswith("<answer>") and text.endswith("</answer>")
    return section(text, "answer") if whole else text
