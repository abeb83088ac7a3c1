"""The relations of a run's rewards, summed up stage by stage."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from cosmo_fast.report import read_metrics
from cosmo_fast.rewards.relations import PAIRS


def reward_summary(run_folder: Path) -> list[dict[str, Any]]:
    """:func:`cosmo_fast.rewards.relations.relations` of a run's rollouts, of each stage that has any.

    share: means over the rollouts. corr and rank_corr of "A,B": means of the rollouts' own, weighted by their samples,
    so that training, which moves all rewards at once, does not correlate them; corr_n: all samples.
    ValueError for a folder whose metrics.jsonl has none of this.
    """
    stages: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for row in read_metrics(run_folder / "metrics.jsonl"):
        for key, value in row.items():
            family, kind, name = [*key.split("/", 2), "", ""][:3]
            if family == "rewards" and name == "share":
                stages[row["stage"]]["share", kind].append((value, 1))
            elif family == "rewards" and kind in PAIRS and "," in name:
                stages[row["stage"]][kind, name].append((value, row[f"rewards/corr_n/{name}"]))
    if not stages:
        raise ValueError(f"{run_folder}: metrics.jsonl has no rollout with rewards/NAME/share; is it a run with rl?")
    result = []
    for stage, found in stages.items():
        kinds: dict[str, dict] = {kind: {} for kind in ("share", *PAIRS)}
        for (kind, name), pairs in found.items():
            total = sum(weight for _, weight in pairs)
            kinds[kind][name] = total if kind == "corr_n" else sum(v * w for v, w in pairs) / total
        result.append({"stage": stage, **kinds})
    return result
