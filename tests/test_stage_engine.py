"""The stage engine: schedules, λ, curricula, dynamic sampling, stop rules, freezing, references, and their resume."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from short_run import chance, whole_and_resumed
from tiny import tiny_policy

from cosmo_fast.checkpoint import checkpoints
from cosmo_fast.config import RECIPES, ConfigError, StageConfig, load_config
from cosmo_fast.config.rules import Constraint, Schedule, StopRule
from cosmo_fast.stages.state import StageState
from cosmo_fast.trainer import Trainer

RL = {"name": "rl", "kind": "rl", "train_dataset": "a.jsonl", "max_steps": 10, "per_device_train_batch_size": 8}
QUICK = ["--stages.cold.max_steps=1", "--max_completion_length=36", "--eval.limit=6"]


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr("cosmo_fast.report.write_plots", lambda folder: None)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(recipe, *flags, rewards=None):
    trainer = Trainer(load_config(str(recipe), [*QUICK, *flags]), reward_funcs=rewards)
    return trainer, trainer.train()


@pytest.mark.parametrize(
    "shape, values",
    [("linear", [1, 0.75, 0.5, 0.25, 0, 0]), ("step", [1, 1, 1, 1, 0, 0]),
     ("cosine", [1, 1 - (1 - math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0])],
)  # fmt: skip
def test_a_schedule_goes_over_steps_or_a_share_of_the_stage_and_stays(shape, values):
    for over, max_steps in ((4, 10), (0.5, 8)):
        schedule = Schedule(**{"from": 1, "to": 0, "over": over, "shape": shape})
        assert [schedule.at(step, max_steps) for step in range(6)] == pytest.approx(values)


def test_multiplicative_weights_push_a_reward_to_its_target_and_stay_within_bounds():
    constraint, value = Constraint(target=0.8, eta=0.5, max=3), 1.0
    for mean in (0.2, 0.5, 1.0):
        value = constraint.adapted(value, mean)
    assert value == pytest.approx(math.exp(0.5 * (0.6 + 0.3 - 0.2)))
    assert constraint.adapted(2.9, 0.0) == 3 and Constraint(target=0, min=0.9).adapted(1.0, 5) == 0.9
    assert Constraint(target=1e9, max=7).adapted(1.0, 0) == 7, "no overflow"


def test_the_weights_of_a_step_are_the_schedules_and_multipliers_and_nothing_else():
    recipe = {"safety": {"safety": {"from": 0, "to": 2}, "helpful": 0.5}, "normal": {"helpful": 1}}
    stage = StageConfig(**RL, reward_recipe=recipe, constraints={"helpful": {"target": 1, "start": 3}})
    state = StageState.of(stage)
    table = {"safety": {"safety": 0.0, "helpful": 0.5}, "normal": {"helpful": 1.0}, "plain": {"accuracy": 1.0}}
    assert state.weights(stage, 5, table) == {"safety": {"safety": 1.0, "helpful": 1.5}, "normal": {"helpful": 3.0}}
    state.adapt(stage, {"rewards/safety/mean": 0.0})
    assert state.multipliers == {"helpful": 3}, "a reward that applied to no sample leaves its multiplier alone"


def test_a_rule_holds_on_the_mean_of_a_full_window():
    rule = StopRule(metric="reward", above=0.5, window=3)
    assert [rule.holds(v) for v in ([1, 1], [0.9, 0.2, 0.3], [0, 0.9, 0.4, 0.3], [0.5] * 3)] == [
        False,
        False,
        True,
        False,
    ]
    assert StopRule(metric="x", below=0.1).holds([5, 0])
    stage = StageConfig(**RL, stop={"metric": "rewrad", "above": 1})
    with pytest.raises(ValueError, match="no metric is named 'rewrad'; there are reward, rollout/kl"):
        StageState.of(stage).note(stage, {"reward": 1.0, "rollout/kl": 0.0}, 1)
    with pytest.raises(ValueError, match="no metric is named 'stage'"):
        stage = StageConfig(**RL, stop={"metric": "stage", "above": 1})
        StageState.of(stage).note(stage, {"stage": "rl", "rollout/kl": 0.0}, 1)


def test_a_rate_over_no_row_of_a_rollout_is_no_value_of_its_metric():
    stage = StageConfig(**RL, stop={"metric": "accuracy", "above": 0.5, "window": 2})
    state = StageState.of(stage)
    for value, ends in ((0.9, False), (None, False), (0.7, True)):
        state.note(stage, {"accuracy": value, "rollout/kl": 0.0}, 1)
        state.verdict(stage)
        assert (state.ended is not None) == ends


def test_rules_and_best_values_follow_their_metric():
    stage = StageConfig(
        **RL, eval_steps=1, metric_for_best_model="eval/a/over_refusal_rate", greater_is_better=False,
        stop={"metric": "eval/a/accuracy", "above": 0.9}, stop_loss={
            "metric": "eval/a/over_refusal_rate", "above": 0.3, "window": 2, "action": "restore"},
    )  # fmt: skip
    state, seen = StageState.of(stage), []
    for step, rate in enumerate([0.2, 0.1, 0.1, 0.25], 1):
        seen.append(state.note(stage, {"eval/a/over_refusal_rate": rate, "eval/a/accuracy": 0.5}, step))
        assert not state.verdict(stage) and state.ended is None
    assert seen == [True, True, False, False] and state.best == [0.1, 2]
    state.note(stage, {"eval/a/over_refusal_rate": 0.5, "eval/a/accuracy": 1.0}, 5)
    assert state.verdict(stage) and state.ended == "stop_loss: eval/a/over_refusal_rate above 0.3 over 2"
    again = StageState(**json.loads(json.dumps(state.__dict__)))
    assert again == state


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llama"])
def test_what_is_frozen_is_what_was_named(family):
    policy, _ = tiny_policy(family=family)
    names = [name for name, _ in policy.model.named_parameters()]

    def frozen(*parts):
        policy.freeze(parts)
        return {name for name, p in policy.model.named_parameters() if not p.requires_grad}

    vision = {n for n in names if "visual." in n or "vision_tower." in n or "projector" in n}
    merger = {n for n in names if "merger" in n or "projector" in n}
    assert frozen("vision_tower") == vision - merger and frozen("merger") == merger
    assert policy.vision_frozen == (family == "llama"), "the merger alone still leaves the tower to learn"
    assert frozen("vision_tower", "merger") == vision and policy.vision_frozen
    assert frozen("embeddings") == {n for n in names if "embed_tokens" in n} and frozen("head") == {"lm_head.weight"}
    assert frozen("language_model") == set(names) - vision - {"lm_head.weight"} - {n for n in names if "embed_tok" in n}
    assert frozen(r"layers\.0\.", "head") == {n for n in names if "layers.0." in n} | {"lm_head.weight"}
    assert frozen() == set()
    with pytest.raises(ValueError, match="'layer_99', but no weight"):
        policy.freeze(["layer_99"])
    with pytest.raises(ValueError, match="leaves nothing that learns"):
        policy.freeze(["language_model", "head", "embeddings", "vision_tower", "merger"])
    policy.model.lm_head.weight = policy.model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="one weight in this model"):
        policy.freeze(["head"])


def with_difficulty(small_world, folder, name="rl"):
    """The world's rows with a number each, more difficult the later."""
    rows = [json.loads(line) for line in (small_world / f"{name}.jsonl").read_text().splitlines()]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row | {"difficulty": i}) for i, row in enumerate(rows)))
    return path


def test_a_run_with_every_rule_resumes_bitwise(recipe, small_world, tmp_path, monkeypatch):
    rl = [
        "beta=0.01", "reference=stage:cold", "reference_refresh_steps=2", "format_weight={from: 1, to: 0.2, over: 2}",
        "constraints={chance: {target: 4, eta: 0.2}}", "curriculum={column: difficulty, from: 0.2, over: 3}",
        f"train_dataset={with_difficulty(small_world, tmp_path)}", "label_weights={general_rule: 1}", "eval_steps=1",
        "metric_for_best_model=eval/scenes/format_rate", "load_best_model_at_end=true", "dynamic_sample=true",
        "stop={metric: reward, above: 1000, window: 2}", "freeze=[merger, vision_tower, embeddings]",
        "stop_loss={metric: rollout/kl, above: 1, window: 2, action: restore}",
    ]  # fmt: skip
    flags = [f"--stages.rl.{setting}" for setting in rl] + [f"--image_root={small_world}", "--eval.limit=4"]
    flags += [f"--eval.datasets={{scenes: {small_world}/scenes.jsonl}}", "--stages.cold.freeze=[head]"]
    flags += [f"--stages.cold.train_dataset={with_difficulty(small_world, tmp_path, 'train')}"]
    flags += ["--stages.cold.curriculum={column: difficulty, from: 0.1}"]
    whole, again, rows = whole_and_resumed(recipe, flags, tmp_path, monkeypatch)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [json.loads((tmp_path / n / "checkpoint-5" / "trainer_state.json").read_text()) for n in ("whole", "cut")]
    assert states[0]["ends"] == states[1]["ends"] == [2, 5]
    multipliers = [row["constraints/chance/lambda"] for row in rows[2:]]
    means = [row["rewards/chance/mean"] for row in rows[2:4]]
    assert multipliers[0] == 1 and multipliers[2] == pytest.approx(math.exp(0.2 * (8 - sum(means))))
    assert [row["reward_weights/*/format"] for row in rows[2:]] == pytest.approx([1, 0.6, 0.2])
    best = json.loads((tmp_path / "whole" / "summary.json").read_text())["stages"][1]["best"]
    assert best == [max(row["eval/scenes/format_rate"] for row in rows[2:]), 3]
    kept = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(ours[name], kept[name]) for name in ours), "the first of equal values is the best"


def test_a_stop_rule_ends_a_stage_early_and_the_next_one_begins_there(recipe, tmp_path):
    cold = ["max_steps=5", "stop={metric: loss, below: 100, window: 3}"]
    flags = [f"--stages.cold.{setting}" for setting in cold] + ["--stages.rl.max_steps=1", "--stages.rl.beta=0.01"]
    _, summary = run(recipe, *flags)
    assert summary["stages"][0]["ended"] == "stop: loss below 100.0 over 3"
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]
    assert [(row["stage"], row["step"]) for row in metrics(tmp_path / "run")] == [("cold", i) for i in (1, 2, 3)] + [
        ("rl", 1)
    ]


def test_a_lagrangian_is_adapted_and_the_best_may_be_the_last(recipe, small_world, tmp_path, monkeypatch):
    values = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(Trainer, "_evaluate", lambda self, stage: {"scenes": {"accuracy": next(values)}})
    rl = ["max_steps=2", "multi_objective_aggregation=lagrangian", "constraints={chance: {target: 4}}", "eval_steps=1"]
    rl += ["reward_recipe={'*': {chance: 1}}", "metric_for_best_model=eval/scenes/accuracy", "load_best_model_at_end=1"]
    _, summary = run(recipe, *(f"--stages.rl.{setting}" for setting in rl), rewards={"chance": chance})
    first, second = metrics(tmp_path / "run")[1:]
    expected = math.exp(0.1 * (4 - first["rewards/chance/mean"]))
    assert (first["constraints/chance/lambda"], second["constraints/chance/lambda"]) == pytest.approx((1, expected))
    assert not [key for key in second if key.startswith("reward_weights")], "λ is in the advantages, not in the weights"
    assert summary["stages"][1]["best"] == [0.3, 3] and first["grad_norm"] > 0


def test_a_stop_loss_brings_the_best_weights_back(recipe, small_world, tmp_path, monkeypatch):
    rates = iter([0.5, 0.9, 0.1, 0.7])
    monkeypatch.setattr(Trainer, "_evaluate", lambda self, stage: {"scenes": {"accuracy": next(rates)}})
    rules = ["max_steps=6", "eval_steps=1", "metric_for_best_model=eval/scenes/accuracy"]
    rules.append("stop_loss=[{metric: eval/scenes/accuracy, below: 0.2, action: restore}]")
    flags = [f"--stages.cold.{rule}" for rule in rules] + ["--save_total_limit=1", "--stages.rl.max_steps=1"]
    trainer = Trainer(load_config(str(recipe), [*QUICK, *flags]))
    trainer.config.stages.pop()  # the cold start alone
    summary = trainer.train()
    assert summary["stages"][0]["best"] == [0.9, 2] and summary["stages"][0]["splits"]["scenes"]["accuracy"] == 0.7
    final, best = (load_file(tmp_path / "run" / name / "model.safetensors") for name in (".", "checkpoint-2"))
    assert all(torch.equal(final[name], best[name]) for name in final)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_stage_that_learns_nothing_says_so_once_and_ends(recipe, small_world, tmp_path, capsys):
    calls = []

    def mostly_equal(prompts, completions, **columns):
        """The second of the rollouts alone has groups whose rewards differ."""
        calls.append(len(calls))
        return chance(prompts, completions) if len(calls) == 2 else [0.1] * len(completions)

    flags = ["--stages.rl.max_steps=9", "--stages.rl.format_weight=0", "--stages.rl.reward_recipe={'*': {own: 1}}"]
    _, summary = run(recipe, *flags, "--stages.rl.max_tied_rollouts=3", rewards={"own": mostly_equal})
    shares = [row["frac_reward_zero_std"] for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert len(shares) == 5 and shares[1] < 1 == min(shares[0], *shares[2:])
    assert summary["stages"][-1]["ended"].startswith("max_tied_rollouts=3: every advantage of the rollout is 0")
    said = capsys.readouterr().out
    assert said.count("rl, step") == 2 and "rl ended by max_tied_rollouts=3" in said and "tied 1.00" in said
    pulled = ["--stages.rl.beta=0.1", "--stages.rl.max_steps=5", f"--output_dir={tmp_path}/pulled"]
    _, summary = run(recipe, *flags, *pulled, "--stages.rl.max_tied_rollouts=3", rewards={"own": mostly_equal})
    assert "ended" not in summary["stages"][-1], "the KL is learned from"


def test_groups_of_equal_rewards_are_replaced_until_the_bound(recipe, small_world, tmp_path, capsys):
    def by_row(prompts, completions, **columns):
        """Only every third row's responses differ in reward."""
        odd = [int(name.split("-")[1]) % 3 == 0 for name in columns["id"]]
        return [hash_of(text) if varied else 1.0 for text, varied in zip(completions, odd, strict=True)]

    def hash_of(text):
        return chance([], [text])[0]

    base = [
        "--stages.rl.max_steps=1",
        "--stages.rl.reward_recipe={'*': {own: 1}}",
        f"--stages.rl.train_dataset={small_world}/rl.jsonl",
    ]
    base += ["--stages.rl.dynamic_sample=true", "--stages.rl.format_weight=0"]
    trainer, _ = run(recipe, *base, "--stages.rl.max_resample_times=9", rewards={"own": by_row})
    row = metrics(tmp_path / "run")[-1]
    assert row["dynamic_sample/missing"] == 0 and row["dynamic_sample/resamplings"] >= 1
    assert row["frac_reward_zero_std"] == pytest.approx(1 - row["dynamic_sample/kept"]), "of all that was sampled"

    named = [*base, "--stages.rl.reward_recipe={'*': {own: 1, other: 1}}", "--stages.rl.dynamic_sample_reward=own"]
    rewards = {"own": lambda p, c, **k: [1.0] * len(c), "other": lambda p, c, **k: [hash_of(text) for text in c]}
    run(recipe, *named, f"--output_dir={tmp_path}/named", rewards=rewards)
    assert metrics(tmp_path / "named")[-1]["dynamic_sample/missing"] == 6, "only the named reward has to differ"
    with pytest.raises(ConfigError, match="dynamic_sample_reward='owm' is no reward of stage 'rl'"):
        named.append(f"--output_dir={tmp_path}/misspelt")
        run(recipe, *named, "--stages.rl.dynamic_sample_reward=owm", rewards=rewards)

    never = [*base, f"--output_dir={tmp_path}/never", "--stages.rl.max_resample_times=2"]
    with pytest.raises(ValueError, match="after 2 resamplings 0 of the 6 groups .*set resample_exhausted: fill"):
        run(recipe, *never, "--stages.rl.resample_exhausted=error", rewards={"own": lambda p, c, **k: [1.0] * len(c)})
    run(recipe, *never, "--overwrite_output_dir=true", rewards={"own": lambda p, c, **k: [1.0] * len(c)})
    assert metrics(tmp_path / "never")[-1]["dynamic_sample/missing"] == 6
    assert "0 of the 6 groups wanted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["rl.label_weights={safety: 1, normal: 1, general_rule: 1, value: 2}"], r"has the label\(s\) \['value'\]"),
        (["rl.label_weights={safety: 1}"], "no weight for the label 'normal'"),
        (["rl.label_weights={safety: 0}"], "leave nothing to draw"),
        (["rl.curriculum={column: hardness, from: 0.5}"], r"jsonl:1: curriculum.column='hardness' must be a number"),
        (["rl.curriculum={column: x, from: 0}"], "greater than 0"),
        (["rl.format_weight={from: 1, to: 1}"], "changes nothing: write the number"),
        (["rl.constraints={nosuch: {target: 1}}"], "'rewards/nosuch/mean' is not measured; there are rewards/accuracy"),
        (["rl.constraints={safety: {target: 1, start: 20}}"], "start=20.0 must lie between"),
        (["cold.freeze=[nosuch]"], "stage 'cold': freeze names 'nosuch'"),
        (
            ["rl.eval_steps=1", "rl.metric_for_best_model=eval/scenes/accurate"],
            "'eval/scenes/accurate' is not measured",
        ),
        (["rl.metric_for_best_model=eval/scenes/accuracy"], "only with eval_steps"),
        (["rl.load_best_model_at_end=true"], "no effect without metric_for_best_model"),
        (["rl.stop={metric: reward}"], "needs one of above and below"),
        (["rl.stop_loss={metric: reward, below: 0, action: restore}"], "restore needs a metric_for_best_model"),
        (["rl.reference=stage:cold"], "reference='stage:cold' has no effect without a beta above 0"),
        (["rl.reference=none", "rl.beta=0.1"], "the KL needs a reference"),
        (["rl.reference=stage:rl", "rl.beta=0.1"], "reference='stage:rl' is none of start, none, stage:cold"),
        (["rl.max_resample_times=2"], "no effect without dynamic_sample"),
        (["rl.steps_per_generation=2", "rl.reference_refresh_steps=3", "rl.beta=1"], "not a multiple of the 2"),
        (["cold.constraints={a: {target: 1}}"], "constraints: a setting of rl stages"),
    ],
)
def test_rules_that_cannot_work_are_refused_before_work_begins(recipe, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(load_config(str(recipe), [f"--stages.{flag}" for flag in flags]))
    assert not (tmp_path / "run").exists()


def test_the_second_stage_may_refer_to_the_end_of_the_first(recipe, tmp_path):
    """With a learning rate of nothing the policy stays the reference."""
    still = ["--stages.rl.max_steps=2", "--stages.rl.beta=1", "--stages.rl.reference=stage:cold"]
    still += ["--stages.rl.learning_rate=1e-30", "--stages.rl.reward_recipe={'*': {chance: 1}}"]
    run(recipe, *still, rewards={"chance": chance})
    assert all(row["kl"] == pytest.approx(0, abs=1e-6) for row in metrics(tmp_path / "run")[1:])


def test_data_dir_is_where_relative_files_lie(small_world, recipe, tmp_path):
    relative = ["--stages.cold.train_dataset=train.jsonl", f"--stages.rl.train_dataset={small_world}/rl.jsonl"]
    relative += ["--eval.datasets={scenes: scenes.jsonl}", f"--data_dir={small_world}"]
    trainer = Trainer(load_config(str(recipe), relative))
    assert len(trainer.eval_rows["scenes"]) == 24 and len(trainer.data["cold"]["train.jsonl"][0]) > 100
    assert load_config("demo", ["--data_dir=world:"]).data_path("rl.jsonl") == "world:rl.jsonl"


@pytest.mark.parametrize("name, least", [("cosmo_rl", 60), ("grpo", 20), ("vtperception_r1", 40), ("safework_r1", 60)])
def test_every_value_of_a_recipe_for_real_models_says_whose_it_is(name, least):
    lines = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if not line.startswith("#")]
    valued = [line for line in lines if re.match(r"\s*(- )?\S+:\s+[^#\s]", line)]
    assert len(valued) > least and [line for line in valued if not re.search(r"# (paper|ours)\b", line)] == []
    assert [line for line in lines if "{" in line or "[" in line] == [], "one value a line"


@pytest.mark.parametrize("name", ["cosmo_rl", "grpo", "safework_r1", "vtperception_r1"])
def test_two_flags_point_a_shipped_recipe_at_a_model_and_a_data_folder(name, small_world, tmp_path):
    flags = [f"--model_name_or_path={small_world}/model", f"--data_dir={small_world}", f"--output_dir={tmp_path}/run"]
    if name == "safework_r1":  # the small world has no corpus
        (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "some words"}\n')
        flags.append(f"--stages.deliberative.tools.search.corpus={tmp_path}/corpus.jsonl")
    trainer = Trainer(load_config(name, flags))
    assert all(rows for sources in trainer.data.values() for rows, _ in sources.values())
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_past_a_reward_that_fails_now_and_then(recipe, tmp_path, capsys):
    def flaky(prompts, completions, **columns):
        values = chance(prompts, completions)
        if 0 in values:
            raise OSError("no answer")
        return [math.nan if value == 1 else value for value in values]

    flags = ["--stages.rl.max_steps=2", "--stages.rl.reward_recipe={'*': {own: 1}}", "--log_completions=48"]
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        mixed = f"--stages.rl.multi_objective_aggregation={aggregation}"
        rare = [mixed, "--stages.rl.max_reward_failures=0.5", f"--output_dir={tmp_path}/{aggregation}"]
        run(recipe, *flags, *rare, rewards={"own": flaky})
        rows = [row for row in metrics(tmp_path / aggregation) if row["stage"] == "rl"]
        assert len(rows) == 2 and all(math.isfinite(row["reward"]) for row in rows)
        (last,) = (tmp_path / aggregation / "samples").glob("*.jsonl")
        samples = [json.loads(line) for line in last.read_text().splitlines()]
        left_out = [sample for sample in samples if sample["reward"] is None]
        assert len(left_out) == rows[-1]["rewards/own/failed"] > 0 and all(
            sample["advantage"] == 0 for sample in left_out
        )
        assert any(sample["advantage"] for sample in samples)
    assert "reward 'own' failed on" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"reward 'own' failed on .*jsonl:\d+ .* OSError: no answer"):
        run(recipe, *flags, "--stages.rl.max_reward_failures=0", rewards={"own": flaky})
