"""A table's rows over its seeds: mean ± standard deviation, and the paired difference to the baseline arm; Markdown."""

from __future__ import annotations

from statistics import mean, stdev

Pairs = dict[int, tuple[tuple[tuple[str, str], tuple[tuple[str, str], ...]], ...]]


def over_seeds(rows: list[dict[str, str]], split: str, metric: str) -> dict[tuple[str, str], dict[str, float]]:
    """{(arm, stage): {seed: value}} of a split, in the order of the file; empty cells are left out."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["split"] == split and row.get(metric, "") != "":
            found.setdefault((row["arm"], row["stage"]), {})[row["seed"]] = float(row[metric])
    return found


def by_arm(rows: list[dict[str, str]], split: str, metric: str) -> dict[str, dict[str, float]]:
    """{arm: {seed: value}} at each arm's last stage."""
    return {arm: by_seed for (arm, _), by_seed in over_seeds(rows, split, metric).items()}


def spread(values: list[float], sign: str = "", digits: int | None = None) -> str:
    """``0.83 ± 0.02``, without the spread for one seed, a dash for none; by default no decimals from 10 on."""
    if not values:
        return "–"
    digits = digits or (2 if max(map(abs, values)) < 10 else 0)
    shown = f"{mean(values):{sign}.{digits}f}"
    return shown + (f" ± {deviation(values):.{digits}f}" if len(values) > 1 else "")


def deviation(values: list[float]) -> float:
    """The standard deviation, 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def differences(rows: list[dict[str, str]], pairs: Pairs) -> str:
    """What becomes of the arms that hypotheses compare, a line each hypothesis, of the seeds that both have.

    pairs: {hypothesis: ((arm, minus arm), ((split, metric), ...)), ...}, at the arms' last stages.
    """
    lines = []
    for number, several in pairs.items():
        told = []
        for (arm, other), metrics in several:
            shown = []
            for split, metric in metrics:
                found = by_arm(rows, split, metric)
                mine, theirs = found.get(arm, {}), found.get(other, {})
                if gaps := [value - theirs[seed] for seed, value in mine.items() if seed in theirs]:
                    where = "" if split == "scenes" else f" ({split})"
                    shown.append(f"{metric.replace('_', ' ')}{where} {spread(gaps, '+', 3)} [{len(gaps)}]")
            told += [f"`{arm}` − `{other}`: {', '.join(shown)}"] * bool(shown)
        lines += [f"- {number}. {'; '.join(told)}."] * bool(told)
    head = "Paired differences of arms that hypotheses compare, mean ± deviation over the seeds of both [seeds]:"
    return "\n".join([head, "", *lines]) if lines else ""


def seeds(rows: list[dict[str, str]]) -> str:
    """``3 seeds``, or ``3 to 5 seeds`` where some arms have more than others."""
    by_arm: dict[str, set[str]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], set()).add(row["seed"])
    counts = [len(found) for found in by_arm.values()] or [0]
    return " to ".join(map(str, dict.fromkeys((min(counts), max(counts))))) + " seeds"


def cells(
    rows: list[dict[str, str]], split: str, metrics: list[str], baseline: tuple[str, str]
) -> dict[tuple[str, str], list[str]]:
    """{(arm, stage): two cells a metric: its spread, and that of the differences to the baseline's same seeds}."""
    table: dict[tuple[str, str], list[str]] = {}
    for metric in metrics:
        found = over_seeds(rows, split, metric)
        base = found.get(baseline, {})
        for key in dict.fromkeys((row["arm"], row["stage"]) for row in rows if row["split"] == split):
            values = found.get(key, {})
            paired = [value - base[seed] for seed, value in values.items() if seed in base]
            table.setdefault(key, []).extend([spread(list(values.values())), spread(paired, "+")])
    return table


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table of cells."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def source(*rows: dict) -> str:
    """Where rows were measured: as the first was, and every commit."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {commits}"
