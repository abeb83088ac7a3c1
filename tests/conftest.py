"""A small embedded world, built once for all tests that need one."""

import pytest

SMALL = {
    "train_general": 180, "train_safety": 20, "rl_general": 60, "rl_safety": 12, "validation_general": 18,
    "validation_safety": 4, "scenes_general": 36, "scenes_safety": 6, "held_general": 18, "held_safety": 4,
    "attacks": 20,
    "value_train": 20, "value_rl": 6, "value_held": 12, "lessons": 1, "knowledge_train": 60, "knowledge_rl": 20,
    "knowledge_held": 80, "search_train": 60, "search_rl": 20, "search_held": 20, "instruction_train": 180,
    "instruction_rl": 36, "instruction_held": 72, "perception_train": 90, "perception_rl": 36,
    "perception_validation": 18, "perception_held": 180, "verdict_train": 10, "verdict_held": 6,
}  # fmt: skip

# A recipe of two short stages on it.
RECIPE = """
output_dir: {out}
model_name_or_path: {world}/model
max_completion_length: 40
logging_steps: 2
stages:
  - {{name: cold, kind: sft, train_dataset: {world}/train.jsonl, max_steps: 6, per_device_train_batch_size: 16,
     learning_rate: 2.0e-3, warmup_steps: 2}}
  - {{name: rl, kind: rl, train_dataset: {{{world}/rl_safety.jsonl: 2, {world}/rl.jsonl: 1}}, max_steps: 6,
     per_device_train_batch_size: 24, num_generations: 4, learning_rate: 1.0e-4, loss_type: cpgd,
     freeze_vision_tower: true}}
eval: {{datasets: {{scenes: {world}/scenes.jsonl}}, limit: 24}}
"""


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The folder of a small world with its model."""
    from cosmo_fast.world import ensure_world

    return ensure_world(seed=0, cache_dir=tmp_path_factory.mktemp("cache"), **SMALL)


@pytest.fixture
def recipe(small_world, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "run", world=small_world))
    return path
