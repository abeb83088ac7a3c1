"""The harmful rows of an analysis, each with an answer that is safe and a first step that is not."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from cosmo_fast.data.rows import DataError, Row
from cosmo_fast.evaluate.attacks import _SAFE, _verdicts


def harmful(rows: Sequence[Row]) -> list[Row]:
    """Those with policy refuse; ValueError without any."""
    chosen = [row for row in rows if row.columns.get("policy") == "refuse"]
    if not chosen:
        raise ValueError(f"none of the {len(rows)} rows has the policy 'refuse', which marks a harmful request")
    return chosen


def safe_answer(row: Row) -> str:
    """Column ``safe_answer``, else the row's closing assistant message if its judge calls that safe, else the world's.

    DataError where there is none of them.
    """
    if row.columns.get("safe_answer"):
        return row.columns["safe_answer"]
    if row.response is not None and _verdicts([row.columns], [row.response])[0] in _SAFE:
        return row.response
    return _told(row, "safe_answer")[0]


def unsafe_step(row: Row) -> str:
    """Column ``unsafe_step``: how the response is forced to begin.

    Of the embedded world's rows (ours): the response that helps, up to the end of the first sentence that the safe
    response has not. DataError where there is neither.
    """
    if row.columns.get("unsafe_step"):
        return row.columns["unsafe_step"]
    safe, unsafe = _told(row, "unsafe_step")
    end = re.compile(r"[.!?](?=\s|<|$)").search(unsafe, len(os.path.commonprefix([safe, unsafe])))
    return unsafe[: end.end()]


def _told(row: Row, column: str) -> tuple[str, str]:
    if row.columns.get("judge") != "world":
        raise DataError(f"{row.source}: a harmful row needs the column {column!r}, which only world rows do without")
    from cosmo_fast.world.judge import answers  # imported on first use: other data need no world

    return answers(row.columns)
