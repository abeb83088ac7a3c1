"""metrics.jsonl and summary.json: finite numbers or null, never half a line after a resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends rows to a metrics.jsonl, one JSON object a line, each flushed. A row needs an integer `global_step`.

    resume_step: None starts a new file and refuses one that has rows; an integer keeps the rows up to and including
    that step and drops the later ones (and a last line that a crash cut off), so that no step is there twice.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
        self.path = Path(path)
        if resume_step is None:
            if self.path.exists() and self.path.stat().st_size:
                raise ValueError(
                    f"{self.path} has rows of an earlier run: set resume_from_checkpoint, or another output_dir"
                )
        else:
            kept = [row for row in read_metrics(self.path) if row["global_step"] <= resume_step]
            _replace(self.path, "".join(_line(row) for row in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; numbers that are not finite become null. ValueError without an integer `global_step`."""
        step = row.get("global_step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"a metrics row needs an integer 'global_step', not {step!r} (keys: {sorted(row)[:8]})")
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, [] when there is none; a last line without its end is left out, as a crash leaves it."""
    path = Path(path)
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Writes {"seed", "stages": [{"name", "seconds", "splits": {split: evaluate.score(...)}}]} in one piece."""
    _replace(Path(path), json.dumps(finite(summary), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value as plain JSON: tensors and NumPy scalars to numbers, NaN and infinities to None. TypeError for others."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return finite(value.item())
    raise TypeError(f"{type(value).__name__} is no JSON value: {value!r}")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
