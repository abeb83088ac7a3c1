"""Runs, evaluation and generation with pruned vision tokens, and settings that cannot be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from short_run import SHORT, chance, whole_and_resumed

from cosmo_fast import cli, report
from cosmo_fast.config import ConfigError, load_config
from cosmo_fast.stages.rl import RLStage
from cosmo_fast.trainer import Trainer

FLAGS = ["--vision_prune.selector=max_min", "--vision_prune.keep=0.5"]


def test_a_run_with_pruning_is_the_same_bit_for_bit_after_a_stop(recipe, tmp_path, monkeypatch):
    whole, again, rows = whole_and_resumed(recipe, FLAGS, tmp_path, monkeypatch)
    for a, b in zip(whole.policy.model.parameters(), again.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    written = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {row["perf/vision_tokens_kept"] for row in written} == {0.5}
    assert all(abs(row["rollout/kl"]) < 1e-4 for row in written if row["stage"] == "rl")
    shown = [json.loads(x) for x in next((tmp_path / "whole" / "samples").glob("*.jsonl")).read_text().splitlines()]
    assert {len(s["vision_prune"]["rows"]) for s in shown} == {2} and all(s["vision_prune"]["hash"] for s in shown)
    [resolved] = [line for line in (tmp_path / "whole" / "config.yaml").read_text().splitlines() if "max_min" in line]
    assert "selector" in resolved


def test_passes_over_one_rollout_reuse_its_rows_and_refuse_others(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda folder: None)
    step, seen = RLStage.step, []

    def tampers(self, number):
        metrics = step(self, number)
        seen.append([g.prompt.kept.hash for g in self.groups])
        if number == 1:
            prompt = self.groups[0].prompt
            wrong = np.setdiff1d(np.arange(prompt.vision_rows), prompt.kept.rows)
            self.groups[0].prompt = replace(prompt, kept=replace(prompt.kept, rows=wrong))
        return metrics

    monkeypatch.setattr(RLStage, "step", tampers)
    flags = [*SHORT, *FLAGS, "--stages.rl.num_iterations=3", "--save_steps=null", "--stages.rl.beta=0.1"]
    flags += ["--stages.rl.reward_recipe={'*': {chance: 1, visual_focus_drop: 0.1}}"]  # a blank pass, too
    with pytest.raises(ValueError, match="it would be trained on other rows than it was sampled with"):
        Trainer(load_config(str(recipe), flags), reward_funcs={"chance": chance}).train()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_generate_and_evaluate_prune(small_world, capsys):
    model, seen = str(small_world / "model"), []
    picture = str(sorted((small_world / "images").glob("*.png"))[0])
    ask = ["generate", model, "--image", picture, "--prompt", "How many?", "--max-completion-length", "6"]
    judge = ["evaluate", model, str(small_world / "scenes.jsonl"), "--limit", "4", "--max-completion-length", "6"]
    for command in (ask, judge):
        for flag in (
            ["--vision-prune", "selector=max_min,keep=3"],
            ["--vision-prune", "selector=uniform,keep=1.0"],
            [],
        ):
            assert cli.main([*command, *flag]) == 0
            seen.append(capsys.readouterr().out)
    assert seen[1] == seen[2] != seen[0] and json.loads(seen[4]) == json.loads(seen[5])
    assert cli.main([*ask, "--vision-prune", "selector=key_norm,keep=0.5,layer=40"]) == 2
    assert "vision_prune.layer=40: the language model has the layers 0 to" in capsys.readouterr().err
    assert cli.main([*ask, "--vision-prune", "selector=best,keep=0.5"]) == 2
    assert "selector Input should be 'uniform', 'random', 'max_min'" in capsys.readouterr().err
    assert cli.main([*ask, "--vision-prune", "selector=uniform,keep=[1"]) == 2
    assert "--vision-prune 'selector=uniform,keep=[1': a value cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["selector=bst", "keep=0.5"], r"vision_prune\.selector: Input should be .*'max_min'.*got 'bst'"),
        (["selector=max_min", "keep=1.5"], r"vision_prune: keep=1\.5 must be a share in \(0, 1\] or a whole number"),
        (["selector=max_min", "keep=0"], r"vision_prune: keep=0 must be"),
        (["selector=max_min", "keep=0.5", "layer=1"], r"layer=1 with selector='max_min': only attention and key_norm"),
        (
            ["selector=uniform", "keep=0.5", "per_prompt=true"],
            r"per_prompt=true .* a prompt's budget is a whole number",
        ),
        (["selector=uniform", "keep=0.5", "ratio=1"], r"unknown setting 'vision_prune\.ratio'; known: keep, layer"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_name(recipe, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config(str(recipe), [f"--vision_prune.{flag}" for flag in flags])
