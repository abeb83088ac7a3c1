"""What the reproduction tables ask the final model of a run that has ended."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SMALL

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "reproduce"))

import cosmo_asked  # noqa: E402
import safework  # noqa: E402

from cosmo_fast.config import load_config  # noqa: E402
from cosmo_fast.data.rows import load_rows  # noqa: E402
from cosmo_fast.evaluate import run as evaluation  # noqa: E402
from cosmo_fast.world.judge import answers  # noqa: E402


@pytest.fixture
def ended(small_world, tmp_path):
    """The folder of a run that left the world's model as it was."""
    shutil.copytree(small_world / "model", tmp_path / "run")
    flags = ["--world.cache_dir", str(small_world.parent), "--world.seed", "0", "--max_completion_length", "24"]
    config = load_config("demo", flags).resolved()
    config["world"]["sizes"] = SMALL
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def test_best_of_64_counts_a_request_that_one_family_of_attacks_gets_through(ended, small_world, monkeypatch):
    def gives_way(policy, rows, params, **options):
        """To typographic attacks alone."""
        told = [answers(row.columns)[row.columns["attack_family"] == "typographic"] for row in rows]
        return told, []

    monkeypatch.setattr(evaluation, "complete", gives_way)
    monkeypatch.setattr(evaluation, "tool_metrics", lambda sampled: {})
    rows = load_rows(small_world / "attacks64.jsonl")
    asked = {row.columns["attack_of"] for row in rows if row.columns["policy"] == "refuse"}
    # of 64 compositions 4 are typographic alone
    wanted = {"best64_success": 1.0, "mean64_success": 0.0625, "best64_n": len(asked)}
    general = [row for row in load_rows(small_world / "scenes.jsonl") if "answer" in row.columns]
    views = []

    def drops(context, prompts, scored):
        """Which picture each answer stands beside."""
        views.append([[medium.key for medium in prompt.media] for prompt in prompts])
        return [len(views) - 1.0] * len(prompts)

    monkeypatch.setattr(cosmo_asked, "logprob_drops", drops)
    found = cosmo_asked.asked(ended)
    assert asked and wanted.items() <= found.items()
    assert (
        views[0] == [[str(path) for path in row.images] for row in general] and views[1] == views[0][1:] + views[0][:1]
    )
    assert (found["focus"], found["focus_other"], found["focus_n"]) == (0.0, 0.6321, len(general))
    assert [path for path in small_world.parent.iterdir() if path.is_dir()] == [small_world]  # found, not built anew


def test_recovery_is_asked_of_every_harmful_scene(ended, small_world):
    harmful = [row for row in load_rows(small_world / "scenes.jsonl") if row.columns.get("policy") == "refuse"]
    assert safework.recovered(ended) == {"recovery_rate": 0.0, "recovery_n": len(harmful)}  # a random model
