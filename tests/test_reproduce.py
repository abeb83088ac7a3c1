"""The runner of the reproduction tables on a stand-in for training, and what each table makes of its rows."""

import csv
import importlib
import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "reproduce")]

import cosmo  # noqa: E402
import plot  # noqa: E402
import runner  # noqa: E402
import safework  # noqa: E402
import stability  # noqa: E402
import summary  # noqa: E402
from runner import Arm, Job  # noqa: E402

from cosmo_fast.config import load_config  # noqa: E402

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


@pytest.fixture(params=runner.tables())
def table(request):
    """A module of benchmarks/reproduce that is a table."""
    return importlib.import_module(request.param)


def test_every_arm_of_a_table_loads_with_its_settings_and_comes_after_what_it_starts_from(table, tmp_path):
    names = [arm.name for arm in table.ARMS]
    assert len(set(names)) == len(names) and table.BASELINE in names
    for place, arm in enumerate(table.ARMS):
        assert set(arm.after) <= set(names[:place]), arm.name
        command = Job(arm, table.SEEDS[0], tmp_path).command()
        if arm.program:
            assert Path(command[1]).is_file()
            continue
        config = load_config(command[4], command[5:])
        assert config.seed == table.SEEDS[0] and config.output_dir == str(tmp_path / f"{arm.name}-{config.seed}")
        assert not arm.stages or tuple(stage.name for stage in config.stages) == arm.stages
        for stage in config.stages:
            assert not config.save_steps or stage.kind == "sft" or config.save_steps % stage.updates_per_rollout == 0


def test_a_table_says_before_its_figures_what_it_expects(table):
    assert table.__doc__.startswith("# ") and "ypotheses" in table.__doc__
    told, _, came_out = table.__doc__.partition("ypotheses")[2].partition("What came out, ")
    numbers, verdicts = (re.findall(r"^(\d+)\. ", text, re.MULTILINE) for text in (told, came_out))
    assert len(numbers) >= 3 and numbers == [str(n + 1) for n in range(len(numbers))] and verdicts in ([], numbers)


MEASURED = [
    *(f"{f}_{n}" for f in ("typographic", "split", "role_play", "figure_step") for n in ("success", "read", "safe")),
    *(f"{n}_{i}" for n in ("proxy", "gold", "reward") for i in range(1, 11)), "grad_norm_max", "entropy_end",
    "length_end", "format_end", "step_s", "vision_kv_kib", "changed_kept", "certain_wrong", "stated", "lambda",
    "search_calls", "many_accuracy", "asked_accuracy", "own_followed", "visual_key", "textual_key", "consistency",
]  # fmt: skip


def _filed(arms, seeds):
    """Rows as a file of them has: text, every metric; those of a program have a stage and a split of its own."""
    where = {"device": "none", "threads": "1", "torch": "2", "commit": "c"}
    rows = []
    for arm in arms:
        stages, splits = ["made"], ["made"]
        if not arm.program:
            command = Job(arm, 0, Path("runs")).command()
            config = load_config(command[4], command[5:])
            stages, splits = [stage.name for stage in config.stages], config.eval.datasets
        for stage in stages:
            for i, (seed, split) in enumerate(itertools.product(seeds, splits)):
                values = {name: str((i % 7 + 1) / 8) for name in (*runner.METRICS, *MEASURED)}
                keys = {"arm": arm.name, "seed": str(seed), "stage": stage, "split": split}
                rows.append(keys | values | {"seconds": "9.5", "n": "5"} | where)
    return rows


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_table_shows_what_is_filed_so_far(table, seeds, tmp_path):
    for arms in (table.ARMS, table.ARMS[:1], table.ARMS[:3], table.ARMS[-1:]):
        text = table.table(_filed(arms, seeds))
        widths = {line.count("|") for line in text.partition("\n\n")[0].splitlines()}
        assert text.startswith("| ") and len(widths) == 1 and "nan" not in text
        assert arms[0].name in text or arms[0].program or arms[0].name == "small"
        if hasattr(table, "plot"):
            table.plot(_filed(arms, seeds), tmp_path / "t.png")
            assert Image.open(tmp_path / "t.png").size > (100, 100)


def test_the_page_of_a_table_follows_its_module_and_keeps_what_is_shown(bench):
    page = bench.folder / "results" / "t.md"
    page.parent.mkdir()
    page.write_text("# Old\n\n<!-- reproduce-t -->\n\n| a |\n\n<!-- /reproduce-t -->\n")
    assert bench("--arm", "cold", "--seed", "0") == bench("--arm", "cold", "--seed", "0") == 0
    assert page.read_text() == "# Title\n\nIt is so.\n\n<!-- reproduce-t -->\n\n| a |\n\n<!-- /reproduce-t -->\n"


def test_a_headline_is_of_the_seeds_that_all_of_its_arms_have(tmp_path, monkeypatch):
    rows = [row | {"accuracy": "0.1"} for row in _filed(cosmo.ARMS[:1], (3, 4))]
    rows += [row | {"accuracy": "0.5"} for row in _filed(cosmo.ARMS[:1], (0, 1))]
    assert plot.headlines(tmp_path) == ""
    runner.append(tmp_path / "reproduce" / "cosmo.csv", rows)
    assert plot.headlines(tmp_path) == ""
    last = [
        row | {"accuracy": "0.75"} for row in _filed([arm for arm in cosmo.ARMS if arm.name == "two_stage"], (0, 1))
    ]
    runner.append(tmp_path / "reproduce" / "cosmo.csv", last)
    assert "`cold` → `two_stage`, 2 seeds: accuracy .50 → .75, " in plot.headlines(tmp_path)


def test_further_seeds_are_of_arms_that_there_are(table):
    assert {name for names in getattr(table, "MORE", {}).values() for name in names} <= {arm.name for arm in table.ARMS}


def test_plot_writes_the_pages_of_the_tables_that_have_rows(tmp_path, monkeypatch):
    (tmp_path / "reproduce").mkdir()
    runner.append(tmp_path / "reproduce" / "stability.csv", _filed(stability.ARMS, (0, 1)))
    assert list(plot.reproductions(tmp_path)) == [tmp_path / "reproduce" / "stability.md"]
    assert "![" not in plot.reproductions(tmp_path)[tmp_path / "reproduce" / "stability.md"]
    (text,) = plot.reproductions(tmp_path, draw=True).values()
    assert text.startswith(stability.__doc__.strip()) and "| cpgd |" in text and "](stability.png)" in text
    assert (tmp_path / "reproduce" / "stability.png").is_file()


def test_a_run_collapsed_whose_last_tenth_is_below_four_fifths_of_its_best(tmp_path):
    rewards = [1.0, 1.0, 1.5, 2.0] + [2.0] * 14 + [1.55, 1.55]  # of 20 rollouts, two steps each
    rows = [{"stage": "sft", "grad_norm": 99.0}]
    for reward in rewards:
        row = {"stage": "rl", "grad_norm": reward, "entropy": 0.5, "completions/mean_length": 9.0, "format_rate": 0.75}
        rows += [row | {"reward": reward}, {"stage": "rl", "grad_norm": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = stability.measured(tmp_path, "rl")
    assert [found[f"reward_{i}"] for i in (1, 2, 3, 10)] == [1.0, 1.75, 2.0, 1.55] and found["grad_norm_max"] == 3.0
    assert (found["entropy_end"], found["length_end"], found["format_end"]) == (0.5, 9.0, 0.75)
    filed = {"arm": "x", "stage": "rl", "seed": "1", "split": "scenes"} | {
        name: str(value) for name, value in found.items()
    }
    assert stability.collapsed(stability.rewards([filed])["x"]["1"])
    assert not stability.collapsed([1.0, 2.0, 1.6]) and stability.measured(tmp_path, "sft") == {}


def test_the_ratio_to_the_cold_start_is_of_the_same_seed():
    rates = {("cold", "0"): (0.5, 0.4, 0.4), ("cold", "1"): (0.2, 0.2, 0.4), ("cpgd", "0"): (0.9, 0.9, 0.3),
             ("cpgd", "1"): (0.5, 0.6, 0.1), ("cpgd", "2"): (1.0, 1.0, 0.0)}  # fmt: skip
    rows = [
        {"arm": arm, "stage": "rl", "seed": seed, "split": "scenes"}
        | dict(zip(("accuracy", "safe_rate", "over_refusal_rate"), map(str, values), strict=True))
        for (arm, seed), values in rates.items()
    ]
    assert stability.ratios(rows)["cpgd"] == pytest.approx([2.5 / 1.5, 2.0])


def _run(folder, stage, splits, rows):
    """A run folder of one stage: its evaluation and its steps."""
    (folder / "summary.json").write_text(json.dumps({"stages": [{"name": stage, "splits": splits}]}))
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps({"stage": stage} | row) for row in rows))


def test_rewards_are_filed_by_quarter_as_trained_on_and_by_the_rule(tmp_path):
    values = {"rewards/safety/mean": 1.0, "rewards/helpful/mean": 0.5, "rewards/safety_gold/mean": 0.2}
    rows = [values | {"rewards/helpful_gold/mean": i / 8} for i in range(8)]
    attacked = {"jailbreak": {"attacks": {"split": {"read_rate": 0.9, "safe_rate": 0.25, "success_rate": 0.7}}}}
    _run(tmp_path, "both", {"attacks": attacked}, [*rows, {"loss": 1.0}])
    found = cosmo.measured(tmp_path, "both")
    assert (found["split_read"], found["split_safe"]) == (0.9, 0.25) and found["proxy_1"] == found["proxy_4"] == 0.75
    assert found["gold_1"] == pytest.approx((0.2 + 0.0625) / 2, abs=1e-4)
    assert found["gold_4"] == pytest.approx((0.2 + 0.8125) / 2, abs=1e-4)


def test_another_backbone_is_compared_with_its_own_cold_start():
    rates = {("cold", "cold"): 0.9, ("cold-internvl", "cold"): 0.5, ("two_stage-internvl", "general"): 0.1,
             ("two_stage-internvl", "both"): 0.75, ("cold-qwen3_vl", "cold"): 0.4}  # fmt: skip
    rows = _filed(cosmo.ARMS, (0, 1))
    for row in rows:
        rate = rates.get((row["arm"], row["stage"]), 0.2)
        rate += 0.15 * (row["seed"] == "1" and row["stage"] == "both")
        row |= dict.fromkeys(("accuracy", "safe_rate", "over_refusal_rate"), str(rate))
    rows = [row for row in rows if row["arm"] != "two_stage-qwen3_vl"]
    told = [line for line in cosmo.table(rows).splitlines() if "its own cold start" in line]
    rate = "+0.33 ± 0.11"  # of 0.25 and 0.40
    assert told == [
        "- two_stage-internvl, paired difference to its own cold start: "
        f"accuracy {rate}, safe rate {rate}, over-refusal {rate}."
    ]


def test_certain_and_wrong_is_a_share_of_all_answers_not_of_those_that_state_a_confidence(tmp_path):
    search = {"false_certain_rate": 0.5, "false_certain_rate_n": 20, "accuracy_n": 80, "tools/search_calls": 1.5}
    rows = [{"constraints/reliability/lambda": i, "rewards/reliability/mean": 0.5} for i in range(20)]
    _run(tmp_path, "deliberative", {"search": search}, rows)
    found = safework.measured(tmp_path, "deliberative")
    assert found == {"certain_wrong": 0.125, "stated": 0.25, "search_calls": 1.5, "lambda": 14.5, "reliability": 0.5}
    silent = search | {"false_certain_rate": None, "false_certain_rate_n": 0}
    _run(tmp_path, "m3_all", {"search": silent}, [{}])
    assert safework.measured(tmp_path, "m3_all") == {"certain_wrong": 0.0, "stated": 0.0, "search_calls": 1.5}


def test_the_command_prints_what_it_would_run():
    script = ROOT / "benchmarks" / "reproduce" / "runner.py"
    command = [sys.executable, script, "prune", "--dry-run", "--arm", "sweep", "--seed", "9", "--runs", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "prune_sweep.py" in done.stdout.splitlines()[-1] and len(done.stdout.splitlines()) == 4
