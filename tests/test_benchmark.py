"""The benchmark of the loss engine runs in every mode on a tiny problem, and writes the columns that it promises."""

import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks" / "bench_linear_policy_loss.py"
COLUMNS = (
    "op case provider n d v dtype device ms_p20 ms_p50 ms_p80 floor_ratio peak_mib error_ratio torch commit".split()
)
TORCH_LCE = ["torch_lce"] * hasattr(torch.nn.functional, "linear_cross_entropy")


def _run(path, *options):
    command = [sys.executable, BENCH, "--sizes", "64,32,512", "--dtypes", "bfloat16", "--repeats", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "--device", "cpu", "--output", path, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _finite(rows, *columns):
    assert rows
    for row in rows:
        assert all(math.isfinite(float(row[name])) and float(row[name]) > 0 for name in columns), row


def test_every_case_has_its_floors_ours_and_eager_with_finite_figures(tmp_path):
    rows = _run(tmp_path / "cases.csv", "--providers", ",".join(["cosmo_fast", "eager", *TORCH_LCE]))
    assert list(rows[0]) == COLUMNS
    found = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row["provider"])
    expected = ["floor", "floor_reused", "cosmo_fast", "eager"]
    rest = ("half_zero", "grpo", "advantage", "logprobs", "kl")
    assert found == {"full": expected + TORCH_LCE} | {case: expected for case in rest}
    _finite(rows, "ms_p20", "ms_p50", "ms_p80", "floor_ratio")
    _finite([row for row in rows if not row["provider"].startswith("floor")], "error_ratio")
    for row in rows:
        # Whoever computed something else than the case would be far from eager's error.
        assert row["provider"].startswith("floor") or float(row["error_ratio"]) < 2, row
        assert all(math.isfinite(float(row["peak_mib"])) for row in rows)


@pytest.mark.parametrize(
    ("mode", "columns"),
    [
        (["--memory", "--memory-rows", "64", "--chunk-rows", "32", "--providers", "cosmo_fast"], ["growth"]),
        (["--growth", "--growth-rows", "64", "--growth-chunks", "16", "64"], ["ms_p50", "floor_ratio", "chunks"]),
        (["--bandwidth"], ["ms_p50", "gb_per_s", "copy_ratio"]),
    ],
    ids=["memory", "growth", "bandwidth"],
)
def test_every_mode_writes_its_file(tmp_path, mode, columns):
    rows = _run(tmp_path / "mode.csv", *mode)
    _finite(rows, *columns)
    assert {"op", "case", "provider", "n", "v", "dtype", "device", "torch", "commit"} <= set(rows[0])


def test_a_provider_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="unknown providers nobody"):
        _run(tmp_path / "none.csv", "--providers", "nobody")


def test_a_mark_without_a_result_file_has_no_table_and_any_file_has_one(tmp_path):
    spec = importlib.util.spec_from_file_location("plot", ROOT / "benchmarks" / "plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    assert plot.tables(tmp_path) == {}
    (tmp_path / "row_tolerance.csv").write_text("op,tolerance,bound\nx,0,0\nx,0.1,0.02\n")
    table = plot.tables(tmp_path)["tolerance"]
    assert table.splitlines() == ["| tolerance | bound |", "|---|---|", "| 0 | 0 |", "| 0.1 | 0.02 |", "", "Op x."]
