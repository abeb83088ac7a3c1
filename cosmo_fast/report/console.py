"""Live progress of a run on stdout, and the table before and after each stage.

A terminal gets a live bar and values; anything else (a file, a pipe, CI) one plain line every few steps.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What a progress line shows: key of the metrics row, its name, its format. Rates stand in the pair.
SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("safety/safe_rate", "safe", "{:.3f}"),
    ("safety/over_refusal_rate", "over-refusal", "{:.3f}"),
    ("frac_reward_zero_std", "tied", "{:.2f}"),  # groups that teach nothing
    ("perf/tokens_per_s", "tokens/s", "{:,.0f}"),
)
RATES = (
    ("accuracy", "accuracy"),
    ("safe_rate", "safe"),
    ("over_refusal_rate", "over-refusal"),
    ("helpful_rate", "helpful"),
    ("warn_rate", "warned help"),
    ("value_rate", "good advice"),
    ("knowledge_rate", "known"),
    ("instruction_rate", "instructions"),
    ("verdict_accuracy", "right verdicts"),
    ("format_rate", "format"),
)


class Progress:
    """Progress of one run, a context manager. stages: (name, optimiser steps) of each; `update` after every step.

    every: a plain stream gets a line every so many steps. Shown values are means over the steps since the last line (at
    most `every`; rewards of one step are noisy); a value that no step had is left out. Time left is that of the stage.
    """

    def __init__(self, stages: Sequence[tuple[str, int]], *, every: int = 10, stream: TextIO | None = None):
        if every < 1:
            raise ValueError(f"progress every {every} steps: want at least 1")
        self.stages, self.every = list(stages), every
        self.console = plain_console(stream)
        self._live: Live | None = None
        self._index: int | None = None
        self._done = 0
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=every)
        self._times: deque[float] = deque(maxlen=51)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def note(self, text: str) -> None:
        """One line of its own, above the live ones."""
        self.console.print(Text(text), soft_wrap=True)

    def update(self, row: Mapping[str, Any]) -> None:
        """One optimiser step is done; row is its metrics row, with `stage_index` and `step` (from 1, in the stage)."""
        if row["stage_index"] != self._index:
            self._stop()
            self._index = row["stage_index"]
            self._recent.clear()
            self._times.clear()
        self._done = row["step"]
        self._recent.append(row)
        self._times.append(time.monotonic())
        total = self.stages[self._index][1]
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, refresh_per_second=4)
                self._live.start()
            self._live.update(self._picture())
            if self._done == total:
                self._stop()
        elif self._done % self.every == 0 or self._done == total:
            self.note(f"{self._head()}  {self._values()}")
            self._recent.clear()

    def table(self, summary: Mapping[str, Any]) -> None:
        """Prints `stage_table(summary)`, if it has rows; without the intervals where the terminal is too narrow."""
        self._stop()
        table = stage_table(summary)
        if not table.row_count:
            return
        wanted = Measurement.get(self.console, self.console.options.update(max_width=10_000), table).maximum
        self.console.print(table if wanted <= self.console.width else stage_table(summary, intervals=False))

    def seconds_left(self) -> float | None:
        """Time left in the stage, from the mean of its last 50 steps; None before the second."""
        if len(self._times) < 2:
            return None
        each = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return each * (self.stages[self._index][1] - self._done)

    def _head(self) -> str:
        name, total = self.stages[self._index]
        return f"[{self._index + 1}/{len(self.stages)}] {name}  {self._done}/{total}"

    def _picture(self) -> Group:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.stages[self._index][1], completed=self._done, width=30)
        head.add_row(Text(self._head()), bar)
        return Group(head, Text(self._values()))

    def _values(self) -> str:
        parts = []
        for key, name, form in SHOWN:
            rows = [row for row in self._recent if row.get(key) is not None and math.isfinite(row[key])]
            # Tokens a second of several steps is all their tokens by all their seconds.
            weights = [row.get("step_time", 1.0) if key == "perf/tokens_per_s" else 1.0 for row in rows]
            if sum(weights):
                value = sum(row[key] * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
                parts.append(f"{name} {form.format(value)}")
        left = self.seconds_left()
        return "  ".join(parts + ([f"stage left {clock(left)}"] if left is not None else []))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()  # leaves the last state on the screen
            self._live = None


def plain_console(stream: TextIO | None = None) -> Console:
    """A console that never cuts a line at 80 columns because its stream is no terminal."""
    console = Console(file=stream or sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=stream or sys.stdout, highlight=False, width=200)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def stage_table(summary: Mapping[str, Any], *, intervals: bool = True) -> Table:
    """The summary (see `report.write_summary`) as a table: one row a split and rate, one column a stage.

    A cell is the rate and its 95 % Wilson interval, "-" where nothing was measured. The last column is the change from
    the first stage to the last. Safe rate and over-refusal rate stand one under the other.
    """
    stages = summary["stages"]
    table = Table(title=f"After each stage: rate{' [95 % interval]' if intervals else ''}", title_justify="left")
    for heading in ("split", "rate", "n"):
        table.add_column(heading, justify="right" if heading == "n" else "left", no_wrap=True)
    for stage in stages:
        seconds = f"\n{clock(stage['seconds'])}" if stage.get("seconds") is not None else ""
        table.add_column(Text(f"{stage['name']}{seconds}"), justify="right")
    if len(stages) > 1:
        table.add_column("change", justify="right")
    for split in dict.fromkeys(name for stage in stages for name in stage["splits"]):
        results = [stage["splits"].get(split, {}) for stage in stages]
        first = True
        for key, name in RATES:
            if all(result.get(key) is None for result in results):
                continue
            count = next((result[f"{key}_n"] for result in results if result.get(f"{key}_n")), "")
            cells = [_cell(result, key, intervals) for result in results]
            ends = results[0].get(key), results[-1].get(key)
            change = [f"{ends[1] - ends[0]:+.3f}" if None not in ends else "-"] if len(stages) > 1 else []
            table.add_row(Text(split if first else ""), name, str(count), *cells, *change)
            first = False
        table.add_section()
    return table


def _cell(result: Mapping[str, Any], key: str, intervals: bool) -> Text:
    if result.get(key) is None:
        return Text("-")
    interval = result.get(f"{key}_interval") if intervals else None
    return Text(f"{result[key]:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
