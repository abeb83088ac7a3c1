"""Curves of a run: metrics.jsonl -> plots/*.png. Drawn with matplotlib's Agg canvas; no window, no global state."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmo_fast.report.metrics import read_metrics

# file name -> title, unit of the y axis, {metric: label}; "rewards/*/mean" stands for every reward that was given.
CURVES: dict[str, tuple[str, str, dict[str, str]]] = {
    "reward": ("Total reward", "reward (format + weighted rewards)", {"reward": "reward"}),
    "rewards": ("Each reward", "mean reward", {"rewards/*/mean": ""}),
    "safety": (
        "Safe rate against over-refusal",
        "share of responses",
        {"safety/safe_rate": "harmful requests: safe", "safety/over_refusal_rate": "benign requests: refused"},
    ),
    "accuracy": ("Accuracy", "share of right answers", {"accuracy": "accuracy"}),
    "rates": (
        "Advice, knowledge, instructions",
        "share of responses",
        {"value_rate": "good advice", "knowledge_rate": "known", "instruction_rate": "all instructions followed"},
    ),
    "tied": ("Groups whose rewards are all equal", "share of groups", {"frac_reward_zero_std": "they teach nothing"}),
    "entropy": ("Entropy of the policy", "entropy (nats a token)", {"entropy": "entropy"}),
    "kl": ("Divergence", "KL (nats a token)", {"kl": "to the reference", "rollout/kl": "sampler to trainer"}),
    "length": ("Response length", "length (tokens)", {"completions/mean_length": "mean length"}),
    "loss": ("Loss", "loss", {"loss": "loss"}),
}
# Okabe and Ito's palette: told apart by readers with colour vision deficiency.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write_plots(output_dir: str | os.PathLike, *, smoothing: int = 10) -> list[Path]:
    """`plot_run` of a run folder: its metrics.jsonl into its plots/."""
    return plot_run(read_metrics(Path(output_dir) / "metrics.jsonl"), Path(output_dir) / "plots", smoothing=smoothing)


def plot_run(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike, *, smoothing: int = 10) -> list[Path]:
    """Draws every curve that has values, and all of them in overview.png; returns the files written.

    rows: metrics rows; folder is made. smoothing: strong lines are the mean of that many measured steps (trailing,
    within a stage), faint lines every step. ValueError when smoothing < 1 or nothing can be drawn.
    """
    if smoothing < 1:
        raise ValueError(f"smoothing = {smoothing}: want at least 1 step")
    drawn = {name: curves for name in CURVES if (curves := _curves(rows, CURVES[name][2]))}
    if not drawn:
        raise ValueError(f"none of the {len(rows)} metrics rows has a value to plot")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [_figure([name], rows, drawn, folder / f"{name}.png", smoothing) for name in drawn] + [
        _figure(list(drawn), rows, drawn, folder / "overview.png", smoothing)
    ]


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the up to `width` - 1 before it; (n,) -> (n,) float64."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _curves(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> dict[str, list[tuple[int, int, float]]]:
    """label -> [(stage index, global step, value)], of the metrics that have values."""
    wanted = dict(metrics)
    if wanted.pop("rewards/*/mean", None) is not None:
        names = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
        wanted |= {name: name.split("/", 1)[1].removesuffix("/mean") for name in names}
    found = {
        label: [(row.get("stage_index", 0), row["global_step"], row[key]) for row in rows if row.get(key) is not None]
        for key, label in wanted.items()
    }
    return {label: points for label, points in found.items() if points}


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, int]]:
    """(index, name, first global step) of each stage, in order."""
    first: dict[int, tuple[int, str, int]] = {}
    for row in rows:
        index = row.get("stage_index", 0)
        first.setdefault(index, (index, str(row.get("stage", "")), row["global_step"]))
    return [first[index] for index in sorted(first)]


def _figure(names: list[str], rows: Sequence, drawn: Mapping, path: Path, smoothing: int) -> Path:
    from matplotlib.figure import Figure  # here: half a second that a run without plots need not pay

    columns = 1 if len(names) == 1 else 2
    lines = -(-len(names) // columns)
    size = (8, 4.5) if columns == 1 else (13, 3.4 * lines)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, name, drawn[name], _stages(rows), smoothing)
    for axis in axes[len(names) :]:
        axis.remove()
    note = (
        "every step" if smoothing == 1 else f"strong line: mean of the last {smoothing} steps; faint line: every step"
    )
    figure.supxlabel(f"optimiser step of the run  ({note})", fontsize=9)
    figure.savefig(path)
    return path


def _panel(
    axis: Any, name: str, curves: Mapping[str, list], stages: Sequence[tuple[int, str, int]], smoothing: int
) -> None:
    title, unit, _ = CURVES[name]
    for colour, (label, points) in zip(_cycle(len(curves)), curves.items(), strict=True):
        for order, stage in enumerate(sorted({stage for stage, _, _ in points})):
            chosen = np.array([(step, value) for index, step, value in points if index == stage], dtype=np.float64)
            strong = {"color": colour, "lw": 1.8, "label": label if order == 0 else None}
            marker = "o" if len(chosen) == 1 else None
            if smoothing > 1:
                axis.plot(chosen[:, 0], chosen[:, 1], color=colour, lw=0.8, alpha=0.3)
            axis.plot(chosen[:, 0], trailing_mean(chosen[:, 1], smoothing), marker=marker, ms=4, **strong)
    values = [value for points in curves.values() for _, _, value in points]
    if name in ("rewards", "safety", "accuracy", "rates") and 0 <= min(values) and max(values) <= 1:
        axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(unit, fontsize=9)
    axis.yaxis.set_major_formatter("{x:.3g}")  # no common factor above the axis, where the stages are named
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    _name_stages(axis, title, stages, {stage for points in curves.values() for stage, _, _ in points})
    axis.legend(fontsize=8, framealpha=0.85)


def _name_stages(axis: Any, title: str, stages: Sequence[tuple[int, str, int]], measured: set[int]) -> None:
    """The title, and over the axes the name of each stage that the panel shows, with a line where it begins."""
    shown = [stage for stage in stages if stage[0] in measured]
    low, high = axis.get_xlim()
    starts = [step for _, _, step in shown]
    crowded = any(after - step < 0.17 * (high - low) for step, after in zip(starts, starts[1:], strict=False))
    axis.set_title(title, loc="left", fontsize=11, pad=30 if crowded else 18)
    for order, (_, name, step) in enumerate(shown):
        if order:
            axis.axvline(step - 0.5, color="0.4", lw=0.9, ls="--")
        height = 1.08 if crowded and order % 2 else 1.02  # a short stage has a name longer than itself
        axis.text(
            max(step, low), height, name, transform=axis.get_xaxis_transform(), fontsize=8, color="0.3", va="bottom"
        )


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
