"""What a run leaves to look at: live progress, metrics.jsonl, summary.json, curves, samples with their pictures."""

from cosmo_fast.report.console import Progress, stage_table
from cosmo_fast.report.metrics import MetricsWriter, read_metrics, write_summary
from cosmo_fast.report.plots import plot_run, write_plots
from cosmo_fast.report.samples import write_samples

__all__ = [
    "MetricsWriter",
    "Progress",
    "plot_run",
    "read_metrics",
    "stage_table",
    "write_plots",
    "write_samples",
    "write_summary",
]
