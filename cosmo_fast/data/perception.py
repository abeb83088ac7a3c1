"""VTPerception-R1's supervised rows from a user's captions, detections and texts in the picture, without any model.

A line of captions.jsonl: ``image`` (or ``images``), ``caption``, ``question``, ``answer``; optional ``detections``
(names, or objects with ``label`` and perhaps ``attribute``; boxes are not read), ``ocr`` (texts in the picture) and
``reasoning``. Other columns are kept. Out: `<description>…</description><think>…</think><answer>…</answer>` behind the
question, ``facts``: ``visual`` V (what is in the picture) and ``textual`` Z (names and quantities of the question), the
key items of R_vkey and R_tkey, and ``steps`` (fact -> sentence of the reasoning that uses it).

The paper (arXiv 2509.24776) writes the description and re-derives the reasoning with large models; here the description
is the three sources one after the other, and a missing reasoning is the sentences of the description that bear on the
question. Its score 0.30 f + 0.35 c + 0.30 a + 0.05 m >= threshold is the paper's; what the letters stand for was not
published, and these are ours, each in [0, 1]:

- f, format: description, reasoning and answer are there and hold no tags.
- c, consistency: share of the key items of reasoning and answer that the description or the question has (R_cons).
- a, answer: share of the answer's key items that stand in the reasoning (before its "So the answer is").
- m, agreement: share of detections and texts that the caption mentions too; 1 where there are none.

Key items are numbers and words without articles and the like, plurals folded: a synonym counts as missing, and a
sentence that is wrong in the right words passes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cosmo_fast.data.rows import DataError, check_row, parse_line
from cosmo_fast.rewards.facts import clauses

WEIGHTS = {"format": 0.30, "consistency": 0.35, "answer": 0.30, "agreement": 0.05}
_TAG = re.compile(r"</?(?:description|think|answer)>")
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_PLAIN = frozenset(
    "a an the of in on at to and or is are was were be there this that these those it its with for from by as has have "
    "do does did how many much what which who where when why so answer not no picture image".split()
)
_OWN = frozenset({"image", "images", "caption", "question", "answer", "detections", "ocr", "reasoning"})


def key_items(text: str) -> list[str]:
    """Numbers (three -> 3) and words that carry content, lower case, plurals folded, in order, each once."""
    found = []
    for word in re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text.casefold()):
        word = str(_NUMBERS.index(word)) if word in _NUMBERS else word
        if word not in _PLAIN:
            found.append(word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word)
    return list(dict.fromkeys(found))


def build_row(item: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The supervised row of one line and its four scores.

    Raises:
        DataError: what keeps the line from becoming a row.
    """
    for column in ("caption", "question", "answer"):
        if not isinstance(item.get(column), (str, int, float)) or not str(item[column]).strip():
            raise DataError(f"no {column}")
    caption, question, answer = (str(item[column]).strip() for column in ("caption", "question", "answer"))
    images = item["images"] if "images" in item else [item[key] for key in ("image",) if item.get(key)]
    if not images:
        raise DataError("no image")
    seen = [_label(thing) for thing in _list(item, "detections")]
    written = [str(text).strip() for text in _list(item, "ocr") if str(text).strip()]
    counted = [f"{count} {name}" if count > 1 else name for name, count in Counter(seen).items()]
    parts = [caption if caption.endswith((".", "!", "?")) else f"{caption}."]
    parts += [f"Objects: {', '.join(counted)}."] if counted else []
    parts += ["Text in the picture: " + ", ".join(f'"{text}"' for text in written) + "."] if written else []
    description = " ".join(parts)
    reasoning = str(item.get("reasoning") or "").strip() or _extract(description, question, answer)
    thought = f"{reasoning} So the answer is {answer}."
    target = f"<description>{description}</description><think>{thought}</think><answer>{answer}</answer>"
    sources = [*seen, *written]
    mentioned = set(key_items(caption))
    scores = {
        "format": float(not any(_TAG.search(text) for text in (description, reasoning, answer))),
        "consistency": _share(key_items(f"{reasoning} {answer}"), key_items(f"{description} {question}")),
        "answer": _share(key_items(answer), key_items(reasoning)),
        "agreement": sum(set(key_items(s)) <= mentioned for s in sources) / len(sources) if sources else 1.0,
    }
    visual = [*counted, *written] or [
        part.strip() for part in re.split(r"[.,;]\s|\band\b", caption) if part.strip(" .")
    ]
    facts = {"visual": visual, "textual": key_items(question)}
    facts = {kind: [fact for fact in found if clauses(fact)] for kind, found in facts.items()}  # "you" says nothing
    steps = {
        fact: used[0]
        for fact in facts["visual"] + facts["textual"]
        if (used := [s for s in _sentences(thought) if key_items(fact) and set(key_items(fact)) <= set(key_items(s))])
    }
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": target}]
    kept = {name: value for name, value in item.items() if name not in _OWN}
    return {"messages": messages, "images": images, **kept, "answer": answer, "facts": facts, "steps": steps}, scores


def build_perception(source: Path, target: Path, *, threshold: float = 0.6) -> dict[str, Any]:
    """Writes the rows of ``source`` whose quality reaches ``threshold``; returns what was kept, and dropped for what.

    Names of pictures stay as they are, under the folder of ``source``: where ``target`` lies elsewhere, train with
    ``image_root``. Every kept row has passed the checks of :func:`cosmo_fast.data.load_rows`.

    Raises:
        ValueError: a threshold outside [0, 1], ``target`` is there, or no row is left. OSError: no such file.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be in [0, 1]")
    if target.exists():
        raise ValueError(f"{target} exists; name another file")
    dropped: Counter[str] = Counter()
    kept = []
    for line in filter(bytes.strip, source.read_bytes().splitlines()):
        try:
            row, scores = build_row(parse_line(line))
            quality = sum(WEIGHTS[name] * value for name, value in scores.items())
            if quality < threshold - 1e-9:
                worst = max(WEIGHTS, key=lambda name: WEIGHTS[name] * (1 - scores[name]))
                raise DataError(f"quality below {threshold}, most for {worst}")
            check_row(row, source.parent, needs_answer=True)
            kept.append(json.dumps(row | {"quality": round(quality, 4)}, ensure_ascii=False) + "\n")
        except DataError as error:
            dropped[str(error)] += 1
    if not kept:
        raise ValueError(f"{source}: no row is left; dropped: {dict(dropped.most_common())}")
    target.write_text("".join(kept), encoding="utf-8")
    return {"rows": len(kept) + dropped.total(), "kept": len(kept), "dropped": dict(dropped.most_common())}


def _list(item: dict[str, Any], column: str) -> list:
    value = item.get(column) or []
    if not isinstance(value, (list, str)):
        raise DataError(f"{column} is not a list")
    return [value] if isinstance(value, str) else value


def _label(thing: Any) -> str:
    if isinstance(thing, dict) and isinstance(thing.get("label"), str):
        return " ".join(str(thing[key]).strip() for key in ("attribute", "label") if thing.get(key))
    if not isinstance(thing, str) or not thing.strip():
        raise DataError("a detection without a label")
    return thing.strip()


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]


def _extract(description: str, question: str, answer: str) -> str:
    wanted = set(key_items(f"{question} {answer}"))
    if not (found := [s for s in _sentences(description) if wanted & set(key_items(s))]):
        raise DataError("no reasoning, and no sentence of the description bears on the question")
    return " ".join(found)


def _share(wanted: list[str], there: list[str]) -> float:
    return len(set(wanted) & set(there)) / len(wanted) if wanted else 1.0
