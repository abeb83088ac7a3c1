"""A policy that does not see its pictures, and a sampler that is another policy than the trainer, stop the run."""

import json

import pytest
import torch
from short_run import SHORT

from cosmo_fast import report, train
from cosmo_fast.config import load_config
from cosmo_fast.models import load_policy
from cosmo_fast.stages.rl import RLStage
from cosmo_fast.trainer import Trainer


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda folder: None)
    return [*SHORT, "--stages.cold.max_steps=1", "--stages.rl.max_steps=1"]


def notes(config, monkeypatch):
    """What a run notes on the console."""
    said = []
    monkeypatch.setattr(report.Progress, "note", lambda self, text: said.append(text))
    Trainer(config).train()
    return said


def test_blank_pictures_change_the_logprobs_of_the_demo_model_and_the_run_says_by_how_much(recipe, flags, monkeypatch):
    [said] = [text for text in notes(load_config(str(recipe), flags), monkeypatch) if "vision/alive" in text]
    assert float(said.split()[1].rstrip(":")) > 1e-3


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_a_tower_that_says_nothing_stops_the_run_before_its_first_update(
    recipe, flags, small_world, tmp_path, capsys, kind
):
    policy = load_policy(small_world / "model")
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".visual.merger." in name:
                parameter.zero_()
    policy.save(tmp_path / "blind")
    if kind == "rl":
        text = recipe.read_text()
        recipe.write_text(text[: text.index("  - {name: cold")] + text[text.index("  - {name: rl") :])
        flags = [flag for flag in flags if "cold" not in flag]
    assert train.main(["--config", str(recipe), *flags, f"--model_name_or_path={tmp_path}/blind"]) == 2
    error = capsys.readouterr().err
    assert "blind' does not see its pictures" in error and "jsonl:" in error and "change by 0 nats" in error
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_without_pictures_is_not_asked(recipe, flags, small_world, tmp_path, monkeypatch):
    for name in ("train", "rl", "rl_safety"):
        lines = []
        for line in (small_world / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line) | {"images": []}
            for message in row["messages"]:
                if not isinstance(message["content"], str):
                    message["content"] = [part for part in message["content"] if part["type"] == "text"]
            lines.append(json.dumps(row))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe.write_text(recipe.read_text().replace(f"{small_world}/rl", f"{tmp_path}/rl"))
    recipe.write_text(recipe.read_text().replace(f"{small_world}/train", f"{tmp_path}/train"))
    assert not [text for text in notes(load_config(str(recipe), flags), monkeypatch) if "vision/alive" in text]


def test_a_sampler_that_is_another_policy_stops_the_run_before_the_update(recipe, flags, tmp_path, monkeypatch):
    rollout = RLStage._rollout

    def stale(self, step):
        rollout(self, step)
        for group in self.groups:
            group.old_logps = [logps + 0.1 for logps in group.old_logps]
            group.advantages = [1.0, -1.0, 1.0, -1.0]

    monkeypatch.setattr(RLStage, "_rollout", stale)
    with pytest.raises(FloatingPointError, match=r"rollout/kl 0\.1 is over max_rollout_kl=0\.05.*No update was made"):
        Trainer(load_config(str(recipe), flags)).train()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["cold"]
    off = [*flags, "--stages.rl.max_rollout_kl=null", f"--output_dir={tmp_path}/off"]
    Trainer(load_config(str(recipe), off)).train()
