"""What each reproduction table says, measures and shows."""

import importlib
import itertools
import json
import re
import sys
from pathlib import Path

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
from runner import Job  # noqa: E402

from cosmo_fast.config import load_config  # noqa: E402


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


def test_differences_are_paired_over_the_seeds_that_both_arms_have_at_their_last_stages():
    def row(arm, stage, seed, value):
        return {"arm": arm, "stage": stage, "split": "scenes", "seed": str(seed), "accuracy": str(value)}

    rows = [row("a", "first", 0, 0.0), row("a", "last", 0, 0.5), row("a", "last", 1, 0.75), row("a", "last", 2, 0.9)]
    rows += [row("b", "only", 1, 0.5), row("b", "only", 0, 0.5), row("b", "only", 3, 0.1)]
    assert summary.by_arm(rows, "scenes", "accuracy")["a"] == {"0": 0.5, "1": 0.75, "2": 0.9}
    pairs = {3: ((("a", "b"), (("scenes", "accuracy"), ("scenes", "absent"))),), 4: ((("a", "c"), ()),)}
    said = summary.differences(rows, pairs).splitlines()
    assert said[2:] == ["- 3. `a` − `b`: accuracy +0.125 ± 0.177 [2]."]
    assert summary.differences(rows, {}) == "" and summary.spread([0.5]) == "0.50" and summary.deviation([2.0]) == 0


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
