"""The relations of a run's rewards, summed up stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmo_fast.report import read_metrics


def reward_summary(run_folder: Path) -> list[dict[str, Any]]:
    """:func:`cosmo_fast.rewards.relations.relations` of a run's rollouts by stage.

    share: means over the rollouts whose rewards differ within groups. correlations: {"A,B": pearson, spearman, n}, the
    means of the rollouts' own weighted by their samples, and all samples: what comes from training, which moves all
    rewards at once, is not in it. ValueError for a folder whose metrics.jsonl has none of this.
    """
    stages: dict[tuple, list[dict]] = {}
    for row in read_metrics(Path(run_folder) / "metrics.jsonl"):
        if any(key.startswith("rewards/") and (key.endswith("/share") or "/corr/" in key) for key in row):
            stages.setdefault((row["stage_index"], row["stage"]), []).append(row)
    if not stages:
        raise ValueError(f"{run_folder}: metrics.jsonl has no rollout with rewards/NAME/share; is this a run with rl?")
    return [{"stage": name, "rollouts": len(rows)} | _summary(rows) for (_, name), rows in sorted(stages.items())]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str, weight: str | None = None) -> float:
        found = [(row[key], row[weight] if weight else 1) for row in rows if row.get(key) is not None]
        return sum(value * w for value, w in found) / sum(w for _, w in found)

    keys = sorted({key for row in rows for key in row if row[key] is not None})
    shares = {key.split("/")[1]: mean(key) for key in keys if key.startswith("rewards/") and key.endswith("/share")}
    pairs = {}
    for pair in [key.removeprefix("rewards/corr/") for key in keys if key.startswith("rewards/corr/")]:
        count = f"rewards/corr_n/{pair}"
        pairs[pair] = {
            "pearson": mean(f"rewards/corr/{pair}", count),
            "spearman": mean(f"rewards/rank_corr/{pair}", count),
        }
        pairs[pair]["n"] = int(sum(row.get(count) or 0 for row in rows))
    return {"share": shares, "correlations": pairs}
