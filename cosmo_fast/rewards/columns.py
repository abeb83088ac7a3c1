"""What every reward needs: columns as rows, and a row's name for messages."""

from collections.abc import Mapping, Sequence
from typing import Any


class RewardError(ValueError):
    """A reward that cannot be computed; the message names the reward and the row."""


def rows_of(columns: Mapping[str, Sequence], count: int) -> list[dict[str, Any]]:
    """Columns of length `count` (TRL's keyword arguments) as one dictionary a row."""
    return [{name: values[index] for name, values in columns.items()} for index in range(count)]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """One dictionary a row as columns; None where a row lacks a column that another has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def row_name(row: Mapping[str, Any], index: int | None = None, source: str | None = None) -> str:
    """What a message calls a row: "data.jsonl:17 (id 'scene-17', label 'safety')", or "row 3 (...)" of a batch."""
    known = ", ".join(f"{key} {row[key]!r}" for key in ("id", "label") if row.get(key) is not None)
    place = source or ("row" if index is None else f"row {index}")
    return place + (f" ({known})" if known else "")
