"""The harmful rows of an analysis, each with an answer that is safe and a first step that is not."""

import os
import re
from collections.abc import Sequence

from cosmo_fast.data.rows import DataError, Row


def harmful(rows: Sequence[Row]) -> list[Row]:
    """Those with policy refuse; ValueError without any."""
    chosen = [row for row in rows if row.columns.get("policy") == "refuse"]
    if not chosen:
        raise ValueError(f"none of the {len(rows)} rows has the policy 'refuse', which marks a harmful request")
    return chosen


def safe_answer(row: Row) -> str:
    """Column ``safe_answer``, or the response that the embedded world asks for; DataError with neither."""
    return row.columns.get("safe_answer") or _told(row, "safe_answer")[0]


def unsafe_step(row: Row) -> str:
    """Column ``unsafe_step``, how the response is forced to begin; DataError with neither it nor a world row.

    Of the world (ours): the response that helps, to the end of the first sentence that the safe response has not.
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
