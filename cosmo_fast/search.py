"""Search over a local corpus: what the `<search>` and `<read>` calls of a response are answered with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from cosmo_fast.data.rows import DataError, parse_line

CALLS = ("search", "read")
_CALL = re.compile(f"<({'|'.join(CALLS)})>([^<]*)</\\1>")
# What a call is answered with, right behind it: in a target it is not learnt, as it is nothing that a policy writes.
RESULT = re.compile("(?:(?<=</search>)|(?<=</read>))<result>[^<]*</result>")


class Search:
    """BM25 (the package bm25s) over documents; equal scores rank in the order of the corpus.

    Args:
        documents: each with an `id` and a `text`, and a `title` if it has one; other keys are not read.
        top_k: documents that a search shows. max_calls: calls of a response that are answered.
        max_result_length: tokens of a result, its tags not counted. name: of the corpus, in messages.

    Raises:
        DataError: no documents, one without a text or an id of its own, or none with a word.
    """

    def __init__(
        self,
        documents: Sequence[Mapping[str, Any]],
        *,
        top_k: int = 3,
        max_calls: int = 4,
        max_result_length: int = 64,
        name: str = "corpus",
    ):
        self.top_k, self.max_calls, self.max_result_length = top_k, max_calls, max_result_length
        self.documents: dict[str, Mapping[str, Any]] = {}
        for number, document in enumerate(documents, 1):
            where, key = f"{name}, document {number}", document.get("id")
            if not isinstance(key, str) or key != key.strip() or not key or "<" in key or key in self.documents:
                raise DataError(f"{where}: 'id' must be a text of its own, without '<' or spaces around, not {key!r}")
            if not isinstance(document.get("text"), str) or not document["text"].strip():
                raise DataError(f"{where}: 'text' must be a text that is not blank, not {document.get('text')!r}")
            if not isinstance(document.get("title", ""), str):
                raise DataError(f"{where}: 'title' must be a text, not {document['title']!r}")
            self.documents[key] = document
        words = _words([f"{d.get('title', '')} {d['text']}" for d in self.documents.values()])
        if not any(words):
            raise DataError(f"{name}: no document has a word to search for")
        self._ids, self._index = list(self.documents), bm25s.BM25()
        self._index.index(words, show_progress=False)

    @classmethod
    def load(cls, path: str | Path, **settings: int) -> Search:
        """Over a JSONL file, a document a line. DataError as above, and where there is no such file."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; tools.search.corpus is a JSONL file of documents: id, title, text")
        with path.open("rb") as file:
            return cls([parse_line(line) for line in file if line.strip()], name=path.name, **settings)

    def find(self, query: str) -> list[str]:
        """The ids of the ``top_k`` best documents that share a word with ``query``, the best first."""
        [words] = _words([query])
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        best = np.argsort(-scores, kind="stable")[: self.top_k]
        return [self._ids[i] for i in best if scores[i] > 0]

    def answer(self, kind: str, said: str) -> tuple[str, bool]:
        """What a call is answered with, and whether it failed: nothing was found, or there is no such document.

        A search shows ids and titles, a read the text. `<` is written `&lt;`, so that no document holds a tag.
        """
        if kind == "read":
            document = self.documents.get(said.strip())
            text = "no such document" if document is None else document["text"]
            return text.replace("<", "&lt;"), document is None
        found = [f"{key}: {self.documents[key].get('title', '')}".removesuffix(": ") for key in self.find(said)]
        return ("; ".join(found) or "nothing found").replace("<", "&lt;"), not found

    def result(self, kind: str, said: str, tokenizer) -> tuple[str, bool]:
        """``answer`` as it stands in a response: in its tags, and at most ``max_result_length`` tokens long."""
        text, failed = self.answer(kind, said)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > self.max_result_length:
            text = tokenizer.decode(ids[: self.max_result_length])
        return f"<result>{text}</result>", failed


def last_call(text: str) -> tuple[str, str] | None:
    """(kind, what it asks) of the last call in ``text``; None where there is none."""
    calls = _CALL.findall(text)
    return calls[-1] if calls else None


def _words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, return_ids=False, show_progress=False)
