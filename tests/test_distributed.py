"""Two processes under DeepSpeed's ZeRO on the CPU make the gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosmo_fast.config import ConfigError
from cosmo_fast.distributed import Ranks

TESTS = Path(__file__).parent
RECIPE = """
output_dir: {out}
model_name_or_path: {world}/model
image_root: {world}
max_completion_length: 48
max_tokens_per_batch: 200
stages:
  - {{name: sft, kind: sft, train_dataset: {rows}, max_steps: 1, per_device_train_batch_size: 8, max_grad_norm: 1.0e6}}
  - {{name: rl, kind: rl, train_dataset: {rows}, max_steps: 2, per_device_train_batch_size: 16, num_generations: 4,
     loss_type: grpo, beta: 0.1, format_weight: 0, reward_recipe: {{"*": {{"ranks_worker:spread": 1}}}},
     advantage: batch, steps_per_generation: 1, num_iterations: 2, max_grad_norm: 1.0e6}}
"""


@pytest.fixture(scope="module")
def recipe(small_world, tmp_path_factory):
    """Rows with and without pictures, so that one rank may have none."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = [json.loads(line) for line in (small_world / "train.jsonl").read_text().splitlines()[:24]]
    for row in rows[::2]:
        row["images"] = []
        for message in row["messages"]:
            if isinstance(message["content"], list):
                message["content"] = [part for part in message["content"] if part["type"] != "image"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}))
    (folder / "recipe.yaml").write_text(
        RECIPE.format(out=folder / "run", world=small_world, rows=folder / "rows.jsonl")
    )
    return folder / "recipe.yaml"


def gradients(recipe, name, processes, *flags):
    """{step/parameter: gradient} of a run on so many processes."""
    folder, command = recipe.parent, [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        flags = (*flags, "--deepspeed", str(folder / "zero2.json"))
    out = folder / f"{name}.safetensors"
    command += [str(TESTS / "ranks_worker.py"), str(recipe), str(out), "--output_dir", str(folder / name), *flags]
    paths = [str(TESTS), str(TESTS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return load_file(out)


def test_two_ranks_under_zero_2_make_the_gradients_of_one_process(recipe):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    one = gradients(recipe, "one", 1)
    half = [f"--stages.{stage}.per_device_train_batch_size={n}" for stage, n in (("sft", 4), ("rl", 8))]
    two = gradients(recipe, "two", 2, *half)
    assert one.keys() == two.keys() and len({key.split("/")[0] for key in one}) == 3
    for key, grad in one.items():
        error = (two[key] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 1e-5, f"{key}: relative error {error}"
    logs = [(recipe.parent / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 3, "only the first rank writes"
    for row, other in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        noise = ("stage", "timing", "perf", "step_time", "rollout/")
        same = [k for k in row if row[k] is not None and not k.startswith(noise)]
        assert [other[k] for k in same] == pytest.approx([row[k] for k in same], rel=2e-5, abs=1e-6), row["step"]


def test_processes_without_deepspeed_and_settings_that_are_the_recipes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "zero.json"
    for settings, message in (
        ({"zero_optimization": {"stage": 3}}, "stage=3 is not supported"),
        ({"bf16": {"enabled": True}}, "bf16 is set by the recipe"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set by the recipe"),
    ):
        path.write_text(json.dumps(settings))
        with pytest.raises(ConfigError, match=message):
            Ranks(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no DeepSpeed JSON file"):
        Ranks(str(path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        Ranks()


def test_shares_cover_everything_once_and_differ_by_one_at_most():
    ranks = Ranks()
    for world in (1, 2, 3, 5):
        shares = []
        for rank in range(world):
            ranks.world, ranks.rank = world, rank
            shares.append(ranks.share(list(range(13))))
        assert sum(shares, []) == list(range(13)) and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert torch.distributed.is_initialized() is False
