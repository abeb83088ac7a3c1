"""The runner of the reproduction tables, on a stand-in for training."""

import csv
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "reproduce")]

import runner  # noqa: E402
import summary  # noqa: E402
from runner import Arm, Job  # noqa: E402

# Trains nothing: [START] FOLDER --seed N. Notes when it ran; an arm named "bad" fails; a start must be there.
STAND_IN = """
import json, pathlib, sys, time
*start, folder, _, seed = sys.argv[1:]
folder, began = pathlib.Path(folder), time.time()
assert all((pathlib.Path(s) / "summary.json").is_file() for s in start)
print("a line of the log")
if folder.name.startswith("bad"):
    sys.exit("out of cheese")
time.sleep(0.3)
split = {"n": 5, "accuracy": 0.5 + int(seed) / 10, "safe_rate": None, "accuracy_interval": [0, 1], "tasks": {}}
folder.mkdir(parents=True)
about = {"device": "none", "threads": "1", "versions": "torch 2, more"}
stage = {"name": "only", "seconds": 1.23, "splits": {"scenes": split, "clips": split}}
(folder / "summary.json").write_text(json.dumps({"seed": int(seed), "stages": [stage], "environment": about}))
with open(folder.parent / "times", "a") as file:
    file.write(f"{folder.name} {began} {time.time()}\\n")
"""


@pytest.fixture
def bench(tmp_path):
    """``run(*flags, arms=...)`` -> status; its folder is ``run.folder``, the rows ``run.rows()``, who ran ``ran()``."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    names = {"cold": None, "a": "cold", "b": "cold"}

    def run(*flags, starts=names, seeds=(0, 1), **more):
        arms = [Arm(name, program=str(script), start=start) for name, start in starts.items()]
        table = SimpleNamespace(ARMS=arms, SEEDS=seeds, __doc__="# Title\n\nIt is so.", **more)
        return runner.main(["t", "--runs", str(tmp_path / "runs"), *flags], table, tmp_path / "results")

    times = tmp_path / "runs" / "t" / "times"
    run.folder, run.rows = tmp_path, lambda: runner.read(tmp_path / "results" / "t.csv")
    run.times = lambda: [line.split() for line in times.read_text().splitlines()] if times.is_file() else []
    return run


def test_every_arm_runs_once_after_its_start_two_side_by_side_and_leaves_a_row_a_split(bench):
    assert bench() == 0
    times = {name: (float(began), float(ended)) for name, began, ended in bench.times()}
    assert len(bench.times()) == len(times) == 6
    for name, (began, _) in times.items():
        assert name.startswith("cold") or times[f"cold-{name[-1]}"][1] <= began
        assert sum(b <= began < e for b, e in times.values()) <= 2
    assert times["cold-1"][0] < times["cold-0"][1]
    text = (bench.folder / "results" / "t.csv").read_text()
    assert text.startswith("arm,seed,stage,split,accuracy,") and "#" not in text
    keys = [(row["arm"], row["seed"], row["stage"], row["split"]) for row in csv.DictReader(text.splitlines())]
    assert sorted(keys) == sorted(
        (a, s, "only", p) for a in ("cold", "a", "b") for s in "01" for p in ("scenes", "clips")
    )
    assert {(row["accuracy"], row["safe_rate"], row["n"]) for row in bench.rows()} == {
        ("0.5", "", "5"),
        ("0.6", "", "5"),
    }
    assert (bench.folder / "results" / "t.md").read_text().startswith("# Title\n\nIt is so.\n\n<!-- reproduce-t -->")


def test_what_is_filed_is_not_run_again_and_a_start_without_its_model_is(bench):
    assert bench("--arm", "a", "--seed", "1") == 0
    assert [name for name, *_ in bench.times()] == ["cold-1", "a-1"]
    assert bench("--seed", "1") == 0
    assert [name for name, *_ in bench.times()][2:] == ["b-1"]
    for name in ("cold-1", "b-1"):  # a fresh clone has rows and no runs
        (bench.folder / "runs" / "t" / name / "summary.json").unlink()
        (bench.folder / "runs" / "t" / name).rmdir()
    runner.append(bench.folder / "results" / "t.csv", [])
    kept = [row for row in bench.rows() if row["arm"] != "b"]
    (bench.folder / "results" / "t.csv").unlink()
    runner.append(bench.folder / "results" / "t.csv", kept)
    assert bench("--seed", "1") == 0
    assert [name for name, *_ in bench.times()][3:] == ["cold-1", "b-1"]
    assert len(bench.rows()) == 6


def test_a_run_that_ended_unfiled_is_filed_without_running(bench):
    assert bench("--arm", "cold", "--seed", "0") == 0
    (bench.folder / "results" / "t.csv").unlink()
    assert bench("--arm", "cold", "--seed", "0") == 0
    assert len(bench.times()) == 1 and len(bench.rows()) == 2


def test_an_arm_waits_for_all_that_it_needs_and_is_told_their_folders(bench):
    arms = [Arm("late", needs=("one", "two"), start="zero"), Arm("zero"), Arm("one", start="zero"), Arm("two")]
    jobs = runner.wanted(arms, {3: {"late"}}, set(), Path("/r"))
    assert [job.name for job in jobs] == ["zero-3", "one-3", "two-3", "late-3"]
    judged = Arm("judged", "prune.yaml", ("rl",), {"verifiers": {"safety": {"model": "{one}"}}}, needs=("one",))
    command = Job(judged, 3, Path("/r")).command()
    assert json.loads(command[command.index("--verifiers") + 1]) == {"safety": {"model": "/r/one-3"}}


def test_a_seed_is_finished_in_the_order_of_the_table_before_the_next_begins(tmp_path):
    arms = [Arm("cold"), Arm("a", start="cold"), Arm("other"), Arm("b", start="cold")]
    every = {"cold", "a", "other", "b"}
    jobs = runner.wanted(arms, {0: every, 1: every}, {("a", "1")}, tmp_path)
    assert [job.name for job in jobs] == ["cold-0", "a-0", "other-0", "b-0", "cold-1", "other-1", "b-1"]


def test_some_arms_run_with_further_seeds_and_with_those_alone_that_are_named(bench, capsys):
    assert bench("--list", MORE={5: ("cold", "a")}) == 0
    assert [line.rsplit(" ", 1)[0] for line in capsys.readouterr().out.splitlines()] == [
        "cold 0", "a 0", "b 0", "cold 1", "a 1", "b 1", "cold 5", "a 5",
    ]  # fmt: skip
    assert bench("--arm", "a", seeds=(0,), MORE={5: ("cold", "a")}) == 0
    assert sorted(name for name, *_ in bench.times()) == ["a-0", "a-5", "cold-0", "cold-5"]
    assert bench("--arm", "b", "--seed", "0", MORE={5: ("cold", "a")}) == 0
    assert [name for name, *_ in bench.times()][4:] == ["b-0"]
    capsys.readouterr()
    assert bench("--list", "--seed", "5", "--seed", "7", MORE={5: ("cold", "a")}) == 0
    assert [line.rsplit(" ", 1)[0] for line in capsys.readouterr().out.splitlines()] == [
        "cold 5", "a 5", "cold 7", "a 7", "b 7",
    ]  # fmt: skip


def test_what_other_settings_made_is_neither_gone_on_with_nor_filed(bench, capfd):
    assert bench("--arm", "a", "--seed", "0") == 0
    about = bench.folder / "runs" / "t" / "cold-0.settings"
    about.write_text(about.read_text() + "a line of the recipe")
    assert bench("--arm", "b", "--seed", "0") == 1
    printed = capfd.readouterr().out
    assert "cold-0: FAILED, its settings are not those it began with: remove" in printed and "b-0: not run" in printed
    about.unlink()
    assert bench("--arm", "b", "--seed", "0") == 1
    (bench.folder / "runs" / "t" / "cold-0" / "summary.json").unlink()
    (bench.folder / "runs" / "t" / "cold-0").rmdir()
    assert bench("--arm", "b", "--seed", "0") == 0


def test_an_arm_that_cannot_be_measured_fails_and_the_others_go_on(bench, capfd, monkeypatch):
    read_of = runner.rows_of
    monkeypatch.setattr(
        runner, "rows_of", lambda job, commit: {}["gone"] if job.name == "a-0" else read_of(job, commit)
    )
    assert bench(seeds=(0,)) == 1
    printed = capfd.readouterr().out
    assert "a-0: FAILED, it ended but was not measured" in printed and "KeyError: 'gone'" in printed
    assert {row["arm"] for row in bench.rows()} == {"cold", "b"}


def test_a_failing_arm_shows_its_log_stops_what_starts_from_it_and_nothing_else(bench, capfd):
    assert bench(starts={"bad": None, "after": "bad", "good": None}, seeds=(0,)) == 1
    printed = capfd.readouterr().out
    assert "bad-0: FAILED (1)" in printed and "a line of the log" in printed and "out of cheese" in printed
    assert "after-0: not run, bad-0 failed" in printed and "failed: bad-0, after-0" in printed
    assert [row["arm"] for row in bench.rows()] == ["good", "good"]


def test_a_stopped_training_goes_on_from_its_checkpoint(tmp_path):
    job = Job(Arm("x", "prune.yaml", ("rl",), {"vision_prune": {"keep": 0.5}}, "cold"), 3, tmp_path)
    fresh = job.command()
    assert fresh[fresh.index("--overwrite_output_dir") + 1] == "true" and "--resume_from_checkpoint" not in fresh
    (job.folder / "checkpoint-10").mkdir(parents=True)
    again = job.command()
    assert again[again.index("--resume_from_checkpoint") + 1] == "true" and "--overwrite_output_dir" not in again
    for command in (fresh, again):
        assert command[command.index("--model_name_or_path") + 1] == str(tmp_path / "cold-3")
        assert json.loads(command[command.index("--vision_prune") + 1]) == {"keep": 0.5}
        assert command[command.index("--seed") + 1] == "3"
        assert [stage["name"] for stage in json.loads(command[command.index("--stages") + 1])] == ["rl"]


def test_list_and_dry_run_start_nothing(bench, capsys):
    assert bench("--list") == bench("--dry-run", "--arm", "b", "--seed", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["cold 0 open", "a 0 open"] and [line.split()[-1] for line in lines[-2:]] == ["1", "1"]
    assert "cold-1" in lines[-2] and "b-1" in lines[-1] and not (bench.folder / "results").exists()
    with pytest.raises(ValueError, match="--arm 'c' is none of cold, a, b"):
        bench("--arm", "c")


def _file(path, seed):
    for arm in range(10):
        runner.append(path, [{"arm": f"arm{arm}", "seed": seed, "stage": "s", "split": "x", "n": 1, f"m{seed}": arm}])


def test_rows_filed_by_several_runners_at_once_are_all_there_in_a_file_that_is_whole_at_any_time(tmp_path):
    path = tmp_path / "t.csv"
    with ProcessPoolExecutor(3) as pool:
        writers = [pool.submit(_file, path, seed) for seed in range(3)]
        while not all(writer.done() for writer in writers):
            assert all(row["n"] == "1" for row in runner.read(path))
        for writer in writers:
            writer.result()
    rows = runner.read(path)
    assert {(row["arm"], row["seed"], row[f"m{row['seed']}"]) for row in rows} == {
        (f"arm{arm}", str(seed), str(arm)) for arm in range(10) for seed in range(3)
    } and len(rows) == 30


def test_differences_to_the_baseline_are_paired_by_seed():
    values = {("base", "rl"): {0: 0.5, 1: 0.9}, ("x", "rl"): {0: 0.6, 1: 1.0, 2: 0.0}}
    rows = [
        {"arm": arm, "stage": stage, "seed": str(seed), "split": "s", "accuracy": str(value)}
        for (arm, stage), found in values.items()
        for seed, value in found.items()
    ]
    cells = summary.cells(rows, "s", ["accuracy", "nothing"], ("base", "rl"))
    assert cells["base", "rl"] == ["0.70 ± 0.28", "+0.00 ± 0.00", "–", "–"]
    assert cells["x", "rl"] == ["0.53 ± 0.50", "+0.10 ± 0.00", "–", "–"]


def test_the_page_of_a_table_follows_its_module_and_keeps_what_is_shown(bench):
    page = bench.folder / "results" / "t.md"
    page.parent.mkdir()
    page.write_text("# Old\n\n<!-- reproduce-t -->\n\n| a |\n\n<!-- /reproduce-t -->\n")
    assert bench("--arm", "cold", "--seed", "0") == bench("--arm", "cold", "--seed", "0") == 0
    assert page.read_text() == "# Title\n\nIt is so.\n\n<!-- reproduce-t -->\n\n| a |\n\n<!-- /reproduce-t -->\n"


def test_the_command_prints_what_it_would_run():
    script = ROOT / "benchmarks" / "reproduce" / "runner.py"
    command = [sys.executable, script, "prune", "--dry-run", "--arm", "sweep", "--seed", "9", "--runs", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "prune_sweep.py" in done.stdout.splitlines()[-1] and len(done.stdout.splitlines()) == 4
