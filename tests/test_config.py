"""Recipes: flags win, stages go by name, and every mistake is one message that names the key and the value."""

import inspect
from typing import get_args

import pytest
import yaml

from cosmo_fast.config import LOSS_OPTIONS, RECIPES, AdvantageKind, Aggregation, ConfigError, LossType, load_config
from cosmo_fast.objectives import LOSSES, aggregate
from cosmo_fast.objectives.advantages import KINDS

RECIPE = {
    "output_dir": "runs/x",
    "model_name_or_path": "model",
    "stages": [
        {"name": "cold", "kind": "sft", "train_dataset": "a.jsonl", "max_steps": 5},
        {
            "name": "rl",
            "kind": "rl",
            "train_dataset": {"a.jsonl": 1, "b.jsonl": 2},
            "max_steps": 8,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "num_generations": 8,
            "num_iterations": 2,
            "loss_type": "grpo",
        },
    ],
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def test_flags_win_over_the_file_and_reach_a_stage_by_its_name(recipe):
    config = load_config(recipe, ["--seed", "3", "--stages.rl.learning_rate=1e-4", "--stages.rl.max_steps", "12"])
    assert (config.seed, config.stages[1].learning_rate, config.stages[1].max_steps) == (3, 1e-4, 12)


def test_batch_arithmetic_is_trls(recipe):
    stage = load_config(recipe).stages[1]
    assert stage.completions_per_rollout == 64
    assert stage.updates_per_rollout == 4  # 4 micro-steps / 2 accumulated × 2 iterations


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_is_valid(name):
    load_config(name)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sead", "1"], r"unknown setting 'sead'; did you mean 'seed'\?"),
        (
            ["--stages.rl.clip_ratio_low", "0.1"],
            r"unknown setting 'stages.rl.clip_ratio_low'; did you mean 'epsilon'\?",
        ),
        (["--stages.rl.lr", "0.1"], "did you mean 'learning_rate'"),
        (["--stages.rl.filter_groups", "true"], "did you mean 'dynamic_sample'"),
        (["--per_device_train_batch_size=8"], "belongs to a stage: stages.NAME.per_device_train_batch_size"),
        (["--lr=1"], "unknown setting 'lr'; 'learning_rate' belongs to a stage: stages.NAME.learning_rate"),
        (["--stages.rl.dtype=bfloat16"], "'stages.rl.dtype'; 'dtype' belongs to the top of the recipe"),
        (["--stages.rl.bf16=true"], "write dtype: bfloat16, at the top"),
        (["--stages.rl.reward_funcs=short"], "name rewards in a stage's reward_recipe; functions .* in Python"),
        (["--num_train_epochs=3"], "'num_train_epochs'; a stage's length is max_steps"),
        (["--stages.rl.rollout.n=8"], r"'stages.rl.rollout.n'; did you mean 'num_generations'\?"),
        (["--actor.rollout={top: 1, n: 8}"], "'actor.rollout.n'; 'num_generations' belongs to a stage"),
        (["--data.max_prompt_length=3"], r"'data.max_prompt_length'; did you mean 'max_prompt_length'\?"),
        (["--rollout.temperature=1"], "'rollout.temperature'; 'temperature' belongs to a stage"),
        (["--stages.rl.train_batch_size=8"], "see per_device_train_batch_size and steps_per_generation"),
        (["--max_pixels=5"], "sets the tokens of a picture"),
        (["--eval={datasets: {}, tools: {search: {corpus: x.jsonl}}}"], "tools has no effect without datasets"),
        (["--log_completions=true"], "log_completions: true is no count; .* 0 for none"),
        (
            ["--stages.rl.stop={metrc: reward, above: 1}"],
            r"unknown setting 'stages.rl.stop.metrc'; did you mean 'metric'",
        ),
        (["--stages.rl.format_weight={fromm: 1, to: 0}"], r"'stages.rl.format_weight.fromm'; did you mean 'from'"),
        (["--stages.rl.format_weight=-1"], "format_weight=-1.0 must not be negative"),
        (["--stages.rl.reward_recipe={'*': {accuracy: {from: 1, to: -1}}}"], "accuracy=.* must not be negative"),
        (["--stages.warm.max_steps", "1"], "no stage is named 'warm'; stages: cold, rl"),
        (["--stages.rl", "1"], "name a stage and a setting"),
        (["--output_dir.x", "1"], "'output_dir' is a single value"),
        (["--seed", "many"], "seed: .*got 'many'"),
        (["--seed"], "--seed needs a value"),
        (["seed", "1"], "unexpected argument 'seed'"),
        (["--stages.rl.num_generations", "7"], "64 completions a rollout is not a multiple of num_generations=7"),
        (
            ["--stages.rl.steps_per_generation", "3"],
            "steps_per_generation=3 is not a multiple of gradient_accumulation_steps=2",
        ),
        (["--stages.rl.max_steps", "6"], "max_steps=6 is not a multiple of the 4 optimiser steps of a rollout"),
        (["--stages.rl.loss_type", "ppo"], "stages.rl.loss_type: .*'grpo', .* 'vespo' or 'cpgd'.*got 'ppo'"),
        (["--stages.rl.temperature", "0"], "stages.rl.temperature: .*greater than 0.*got 0"),
        (["--stages.cold.epsilon", "0.1"], "epsilon: a setting of rl stages, but stage 'cold' is kind: sft"),
        (["--stages.cold.name", "rl"], "twice"),
        (["--stages.rl.learning_rate", "-1"], "stages.rl.learning_rate: .*greater than 0"),
    ],
)
def test_a_mistake_is_named(recipe, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, flags)


def test_a_group_may_not_be_cut_by_an_optimiser_step(recipe):
    with pytest.raises(ConfigError, match="4 completions an optimiser step is not a multiple of num_generations=8"):
        load_config(
            recipe,
            [
                "--stages.rl.per_device_train_batch_size=4",
                "--stages.rl.gradient_accumulation_steps=1",
                "--stages.rl.max_steps=8",
            ],
        )


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="'nosuch' is neither a file nor a shipped recipe .*demo"):
        load_config("nosuch")


@pytest.mark.parametrize("text, message", [("a: [", "not valid YAML"), ("- 1", "a recipe is a mapping")])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_every_loss_can_be_named_in_a_recipe_and_every_option_of_one_is_a_setting():
    assert set(get_args(AdvantageKind)) == set(KINDS) and set(get_args(Aggregation)) == set(aggregate.KINDS)
    assert set(get_args(LossType)) == LOSSES.keys() - {"sft"}
    read = {name for loss in LOSSES.values() for name in inspect.signature(loss).parameters}
    assert read == {*LOSS_OPTIONS, "beta", "entropy_coef", "reweight"}
