"""The benchmarks run in every mode on a tiny problem, and write the columns that they promise."""

import csv
import importlib
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
NAMES = "bench_linear_policy_loss", "bench_train", "measure", "plot"
bench, train, measure, plot = (importlib.import_module(name) for name in NAMES)

COLUMNS = (
    "op case provider n d v dtype device ms_p20 ms_p50 ms_p80 floor_ratio peak_mib error_ratio torch commit".split()
)
TORCH_LCE = ["torch_lce"] * hasattr(torch.nn.functional, "linear_cross_entropy")
MODULES = {"liger": "liger_kernel", "liger_one_chunk": "liger_kernel", "trl": "trl"}
PACKAGES = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The benchmark with these options, in this process; its rows. Nothing is compiled: that takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # 0.2 s each here, for peaks that are noise at this size

    def run(*options):
        path = tmp_path / "figures.csv"
        tiny = "--sizes 64,32,512 --dtypes bfloat16 --repeats 3 --device cpu".split()
        monkeypatch.setattr(sys, "argv", ["bench", *tiny, "--output", str(path), *options])
        bench.main()
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def _finite(rows, *columns):
    assert rows
    for row in rows:
        assert all(math.isfinite(float(row[name])) and float(row[name]) > 0 for name in columns), row


def test_every_case_has_its_yardsticks_and_everybody_with_finite_figures(run):
    everybody = ["cosmo_fast", "eager", "compile", *PACKAGES, *TORCH_LCE]
    rows = run("--providers", ",".join(everybody))
    assert list(rows[0]) == COLUMNS
    found = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row["provider"])
    floors = ["floor", "floor_reused"]
    assert found == {
        "full": floors + everybody,
        "half_zero": [*floors, "cosmo_fast", "eager", "compile", *PACKAGES],
        "grpo": [*floors, "full", "cosmo_fast", "eager"],
        "advantage": [*floors, "full", "cosmo_fast", "eager"],
        "logprobs": [*floors, "cosmo_fast", "eager", "compile", *(name for name in PACKAGES if name == "trl")],
        "kl": [*floors, "cosmo_fast", "eager", "compile", *(name for name in PACKAGES if name == "liger")],
    }
    _finite(rows, "ms_p20", "ms_p50", "ms_p80", "floor_ratio")
    assert all(math.isfinite(float(row["peak_mib"])) for row in rows)
    rows = [row for row in rows if row["provider"] not in plot.YARDSTICKS]
    _finite(rows, "error_ratio")
    for row in rows:
        # Whoever computed something else than the case would be far from eager's error.
        other = 10 if (row["case"], row["provider"]) == ("kl", "liger") else 3
        assert float(row["error_ratio"]) < (other if row["provider"] in PACKAGES else 2), row


@pytest.mark.parametrize(
    ("mode", "columns"),
    [
        ("--growth --growth-rows 64 --growth-chunks 16 64", ["ms_p50", "floor_ratio", "chunks"]),
        ("--bandwidth", ["ms_p50", "gb_per_s", "copy_ratio"]),
    ],
    ids=["growth", "bandwidth"],
)
def test_every_mode_writes_its_file(run, mode, columns):
    rows = run(*mode.split())
    _finite(rows, *columns)
    assert {"op", "case", "provider", "n", "v", "dtype", "device", "torch", "commit"} <= set(rows[0])


def test_memory_has_a_peak_for_every_n_and_what_is_expected_for_one_chunk_and_for_several(run):
    rows = run(*"--memory --sizes 64,64,8192 --memory-rows 64 128 --chunk-rows 64 --providers cosmo_fast".split())
    assert [row["n"] for row in rows] == ["64", "128"]
    _finite(rows, "growth", "peak_mib")  # these sizes are too small for more: allocation noise
    assert [float(row["expected_mib"]) for row in rows] == [1 + 1, 1 + 2]  # logits, and dW in bf16, then in fp32


@pytest.mark.parametrize(("providers", "why"), [("nobody", "unknown providers nobody"), ("cce", "'cce' cannot run")])
def test_a_provider_that_is_not_known_or_cannot_run_here_is_refused(run, providers, why):
    with pytest.raises(SystemExit, match=why):
        run("--providers", providers)


def test_a_run_that_is_cut_short_leaves_the_figures_of_the_one_before(tmp_path):
    def cut_short():
        yield {"x": 3.0}
        raise KeyboardInterrupt

    path = tmp_path / "figures.csv"
    measure.write(path, ["x"], [{"x": 1.0}, {"x": 2.0}])
    with pytest.raises(KeyboardInterrupt):
        measure.write(path, ["x"], cut_short())
    assert path.read_text().split() == ["x", "1", "2"]
    measure.write(path, ["x"], [{"x": 4.0}])
    assert path.read_text().split() == ["x", "4"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "name"), [("", "linear_policy_loss"), ("--quick", "linear_policy_loss_quick")], ids=["full", "quick"]
)
def test_a_quick_run_writes_beside_the_committed_figures(monkeypatch, options, name):
    written = []
    monkeypatch.setattr(bench, "write", lambda path, columns, rows: written.append(path))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *options.split()])
    bench.main()
    assert written == [ROOT / "benchmarks" / "results" / f"{name}.csv"]


def test_what_takes_long_beside_the_yardstick_is_repeated_three_times_and_the_yardstick_as_asked(monkeypatch):
    took, calls = {"floor": 1.0, "quick": 0.01, "slow": 9.0}, []
    monkeypatch.setattr(measure, "seconds", lambda run, device: run())
    runs = {name: lambda name=name: calls.append(name) or took[name] for name in took}
    times = measure.interleaved(runs, 5, "cpu")
    assert {name: calls.count(name) for name in took} == {"floor": 5, "quick": 5, "slow": 3}
    assert times["slow"]["ms_p50"] == 9000


def test_a_mark_without_a_result_file_has_no_table_and_any_file_has_one(tmp_path):
    assert plot.tables(tmp_path) == {}
    (tmp_path / "row_tolerance.csv").write_text("op,tolerance,bound\nx,0,0\nx,0.1,0.02\n")
    table = plot.tables(tmp_path)["tolerance"]
    assert table.splitlines() == ["| tolerance | bound |", "|---|---|", "| 0 | 0 |", "| 0.1 | 0.02 |", "", "Op x."]


def test_the_tables_show_both_floors_and_the_share_of_the_policy_loss(tmp_path):
    about = {"n": 8, "d": 2, "v": 4, "dtype": "bfloat16", "device": "x", "torch": "2", "commit": "c"}
    times = {"floor": 10, "floor_reused": 8, "full": 12, "cosmo_fast": 0.06, "eager": 20}
    rows = [
        about
        | {"case": "advantage", "provider": name, "ms_p50": ms, "floor_ratio": ms / 10, "peak_mib": 3, "error_ratio": 1}
        for name, ms in times.items()
    ]
    with (tmp_path / "linear_policy_loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = plot.tables(tmp_path)["loss-cases"]
    assert "| advantage, bfloat16, 8 × 2 × 4 | 0.006 (0.0075) | 2.00 (2.50) | 3 / 3 | 1.00 |" in table
    assert "`advantage` takes 0.5 % (bfloat16, 8 × 2 × 4)" in table and "full" not in table.splitlines()[0]


@pytest.fixture
def tiny_training(tmp_path, monkeypatch):
    """bench_train with a model, pictures, groups and responses of a few tokens."""
    tiny = {"MODEL": {"hidden_size": 32, "layers": 1}, "SIDE": 56, "BASE": (1, 2, 3), "GROWTH": ((2, 2, 3), (1, 3, 2))}
    for name, value in tiny.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)
    return tmp_path / "train.csv"


def test_every_phase_of_a_training_step_has_a_row_of_every_provider(tiny_training, monkeypatch):
    names = ["cosmo_fast", "cosmo_fast_unshared", "padded", "padded_vision_once"]
    options = ["--providers", ",".join(names), "--repeats", "3", "--out", str(tiny_training)]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    train.main()
    with tiny_training.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "case phase provider p g r dtype device ms_p50 tokens_per_s peak_mib torch commit".split()
    _finite(rows, "ms_p50", "tokens_per_s")
    found = [tuple(row[name] for name in ("case", "phase", "dtype", "p", "g", "r", "provider")) for row in rows]
    cases = ("vision_trained", "vision_frozen")
    base = [(case, phase, dtype) for case in cases for dtype in train.DTYPES for phase in train.PHASES]
    parts = ("vision", "language", "head")
    base += [(f"update:{part}", "update", dtype) for dtype in train.DTYPES for part in parts]
    shapes = [(*names, "34", "2", "3") for names in base]
    shapes += [("growth", "update", "float32", *shape) for shape in (("68", "2", "3"), ("34", "3", "2"))]
    assert found == [(*shape, name) for shape in shapes for name in names]


def test_a_training_step_is_not_timed_before_everybody_computes_the_same(tiny_training):
    problem = train.Problem(train.make_model(tiny_training.parent / "model", 32, 1), *train.BASE, 2, True, train.SIDE)
    providers = {name: train.make(name, problem) for name in ("cosmo_fast", "padded")}
    train.check(providers)
    with torch.no_grad():
        providers["padded"].model.lm_head.weight[: problem.responses.max()] += 0.01
    with pytest.raises(AssertionError, match="padded computes something else than cosmo_fast: log-probs by 0.0"):
        train.check(providers)
