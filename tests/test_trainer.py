"""The trainer from end to end on a small world: what a run leaves, resume, and bad input before any work."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cosmo_fast import cli, train
from cosmo_fast.checkpoint import checkpoints
from cosmo_fast.config import load_config
from cosmo_fast.models import load_policy
from cosmo_fast.trainer import Trainer, learning_rate


def run(recipe, *flags):
    return Trainer(load_config(str(recipe), list(flags))).train()


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_leaves_a_model_checkpoints_metrics_samples_plots_and_a_summary(recipe, tmp_path, capsys):
    trainer = Trainer(load_config(str(recipe)))
    summary = trainer.train()
    out = tmp_path / "run"
    assert [s["name"] for s in summary["stages"]] == ["cold", "rl"]
    assert json.loads((out / "summary.json").read_text())["stages"][1]["splits"]["scenes"]["n"] == 24
    assert [p.name for p in checkpoints(out)] == ["checkpoint-6", "checkpoint-12"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["global_step"] for r in rows] == list(range(1, 13))
    assert rows[0]["loss"] > rows[5]["loss"], "six steps of SFT lower the loss"
    rl = rows[6]
    assert {
        "reward",
        "rewards/format/mean",
        "safety/over_refusal_rate",
        "completions/clipped_ratio",
        "entropy",
    } <= rl.keys()
    errors = [row["rollout/max_ratio_error"] for row in rows[6:] if "rollout/max_ratio_error" in row]
    assert errors and max(errors) < 1e-5, "the first policy ratio of a step is 1 (steps without advantage have none)"
    assert list((out / "samples").glob("*.png")) and list((out / "plots").glob("*.png"))
    assert (out / "config.yaml").is_file() and str(out) in capsys.readouterr().out
    loaded = dict(load_policy(out).model.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in trainer.policy.model.named_parameters())
    assert not list(out.rglob("*.pt")) and not list(out.rglob("*.bin")) and not list(out.rglob("*.pkl"))


@pytest.mark.parametrize("stop", [3, 9])
def test_n_steps_equal_k_steps_then_resume_bitwise(recipe, tmp_path, stop, monkeypatch):
    own = ["beta=0.01", "epsilon_start=0.05", "row_tolerance=0.05", "row_tolerance_unbiased=true"]
    own = ["--save_steps=3", *(f"--stages.rl.{setting}" for setting in own)]
    run(recipe, *own, "--output_dir", str(tmp_path / "whole"))
    step = Trainer._step

    def interrupted(self, *args):
        if self.global_step == stop + 1:
            raise KeyboardInterrupt
        step(self, *args)

    flags = [*own, "--output_dir", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, *flags)
    assert checkpoints(tmp_path / "cut")[-1].name == f"checkpoint-{stop}"
    run(recipe, *flags, "--resume_from_checkpoint", "true")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    metrics = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("timing", "perf", "step_time"))}
            for line in lines
        ]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut"))
    ]
    assert metrics[0] == metrics[1]


def test_several_updates_a_rollout_and_several_passes_over_it(recipe, tmp_path, monkeypatch):
    from cosmo_fast.stages import rl

    shares = []
    share = rl._share
    monkeypatch.setattr(rl, "_share", lambda *a: shares.append(share(*a)) or shares[-1])
    flags = ["--stages.rl.steps_per_generation=3", "--stages.rl.num_iterations=2", "--stages.rl.loss_type=grpo"]
    run(recipe, *flags, "--stages.rl.per_device_train_batch_size=8")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][6:]
    assert ["reward" in row for row in rows] == [True] + [False] * 5
    first, second = shares[:3], shares[3:]
    assert len({id(group) for groups in first for group in groups}) == 6, "three updates take the six groups apart"
    assert [[id(g) for g in groups] for groups in first] == [[id(g) for g in groups] for groups in second]


def test_later_passes_of_cpgd_reweight_and_rows_may_be_left_out(recipe, tmp_path, monkeypatch):
    from cosmo_fast.stages import rl

    seen = []
    accumulate = rl.accumulate
    monkeypatch.setattr(rl, "accumulate", lambda c, g, loss, *a: seen.append(loss) or accumulate(c, g, loss, *a))
    flags = ["--stages.rl.num_iterations=2", "--stages.rl.epsilon_start=0.05", "--stages.rl.row_tolerance=0.05"]
    more = ["--stages.rl.row_tolerance_unbiased=true", "--stages.rl.max_steps=4"]
    run(recipe, *flags, *more)
    assert seen[0] is not seen[1], "the second pass of the first rollout"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("row_tolerance/rows", 0) for row in rows) > 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["stages"][1]
    assert (resolved["epsilon"], resolved["alpha"], resolved["aggregation"]) == (0.2, 0.01, "prompt-mean-token-mean")
    assert "delta" not in resolved
    again = load_config(str(tmp_path / "run" / "config.yaml"))
    assert again.resolved() == load_config(str(recipe), [*flags, *more]).resolved(), "a run's config.yaml is a recipe"


def test_an_update_of_truncated_and_masked_responses_alone_goes_by(recipe, tmp_path, monkeypatch):
    from cosmo_fast.stages import rl

    def none_counts(groups, *arguments):
        for group in groups:
            group.weights = [np.zeros(len(response), dtype=np.float32) for response in group.responses]

    monkeypatch.setattr(rl, "_set_weights", none_counts)
    run(recipe, "--stages.rl.mask_truncated_completions=true", "--stages.rl.row_tolerance=0.1")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == 0 and rows[-1]["grad_norm"] == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["loss_type=vespo", "multi_objective_aggregation=normalize_then_sum"],
        ["loss_type=luspo", "advantage=cale", "cale_a=0.9"],
    ],
)
def test_losses_of_whole_sequences_and_advantages_of_several_rewards_or_lengths_train(recipe, tmp_path, flags):
    run(recipe, *(f"--stages.rl.{flag}" for flag in flags), "--stages.rl.max_steps=1")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[-1]["loss"]) and rows[-1]["grad_norm"] > 0


def test_a_resume_with_other_settings_weights_or_an_earlier_checkpoint_is_refused(
    recipe, tmp_path, capsys, small_world
):
    run(recipe)
    capsys.readouterr()
    again = ["--config", str(recipe), "--resume_from_checkpoint"]
    assert train.main([*again, "true", "--stages.rl.learning_rate", "1e-3"]) == 2
    assert_error(capsys, "stages.rl.learning_rate was 0.0001, now 0.001; a resume cannot change it")
    assert train.main([*again, "true", "--seed", "9"]) == 2
    assert_error(capsys, "seed was 0, now 9")
    assert train.main([*again, str(tmp_path / "run" / "checkpoint-6")]) == 2
    assert_error(capsys, "holds later checkpoints .checkpoint-12.")
    with pytest.raises(ValueError, match="brings its own weights"):
        Trainer(load_config(str(recipe), ["--resume_from_checkpoint=true"]), model=load_policy(small_world / "model"))


def test_a_fault_in_the_evaluation_costs_the_evaluation_only(recipe, tmp_path, monkeypatch):
    def fails(self, stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", fails)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    summary = run(recipe, "--resume_from_checkpoint", "true")
    assert [s["name"] for s in summary["stages"]] == ["cold", "rl"] and summary["stages"][0]["splits"]["scenes"][
        "n"
    ] == 24
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 12


def test_truncated_completions_count_neither_in_the_loss_nor_in_the_mismatch(recipe, tmp_path):
    flags = ["--stages.rl.mask_truncated_completions=true", "--max_completion_length=34", "--stages.cold.max_steps=20"]
    run(recipe, *flags, "--stages.rl.temperature=1.5")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][20:]
    assert any(row["completions/clipped_ratio"] > 0 for row in rows)
    assert all(row.get("rollout/max_ratio_error", 0) < 1e-4 for row in rows)


def test_micro_batches_change_nothing_but_rounding(recipe, tmp_path):
    sizes = (16384, 400)
    for size in sizes:
        flags = ["--max_tokens_per_batch", str(size), "--output_dir", str(tmp_path / str(size))]
        run(recipe, *flags, "--stages.cold.max_steps=2", "--stages.rl.max_steps=1")
    rows = [
        [json.loads(line) for line in (tmp_path / str(s) / "metrics.jsonl").read_text().splitlines()] for s in sizes
    ]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-6)


def test_old_checkpoints_go_but_the_ends_of_stages_stay(recipe, tmp_path):
    run(recipe, "--save_steps", "1", "--save_total_limit", "1", "--stages.rl.max_steps", "3")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]


def test_a_half_written_checkpoint_is_skipped(recipe, tmp_path):
    run(recipe)
    (tmp_path / "run" / "checkpoint-99").mkdir()
    (tmp_path / "run" / ".checkpoint-100.partial").mkdir()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-6", "checkpoint-12"]


def test_learning_rates_warm_up_then_follow_their_shape(recipe):
    stage = load_config(str(recipe)).stages[0]
    assert [learning_rate(stage, s) for s in range(4)] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3])
    linear = stage.model_copy(update={"lr_scheduler_type": "linear"})
    assert [learning_rate(linear, s) for s in (2, 4, 5)] == pytest.approx([2e-3, 1e-3, 5e-4])
    cosine = stage.model_copy(update={"lr_scheduler_type": "cosine"})
    assert learning_rate(cosine, 4) == pytest.approx(1e-3)


def test_dry_run_prints_config_arithmetic_memory_and_prompt_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--lora_r=4"]
    assert train.main(["--config", str(recipe), "--seed", "5", "--dry-run", *flags]) == 0
    out = capsys.readouterr().out
    assert "of them in the adapter, float32" in out
    assert (
        all(int(n) > 7 for n in re.findall(r"predicted peak memory +(\d+) MiB", out)) and out.count("peak memory") == 2
    )
    assert re.search(r"rewards  +\d+ rows labelled general_rule: format 1, accuracy 1\n", out)
    assert "seed: 5" in out and "completions a rollout       24" in out and "prompts a rollout           6" in out
    assert "<|vision_start|><|image_pad|><|vision_end|>" in out
    assert not (tmp_path / "run").exists()


def edited(small_world, tmp_path, change):
    """A copy of one training row, changed, in a folder of its own."""
    row = json.loads((small_world / "train.jsonl").read_text().splitlines()[0])
    change(row)
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for name in row["images"]:
        if (small_world / name).is_file():
            (folder / name).write_bytes((small_world / name).read_bytes())
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def missing_image(row):
    row["images"] = ["images/none.png"]


def token_without_image(row):
    row["images"] = []


def empty_answer(row):
    row["messages"][-1]["content"] = ""


@pytest.mark.parametrize(
    "change, message",
    [
        (missing_image, "rows.jsonl:1: .*images/none.png.* does not exist"),
        (token_without_image, "rows.jsonl:1: 1 image parts in the messages but 0 entries in 'images'"),
        (empty_answer, "rows.jsonl:1: zero-length answer"),
    ],
)
def test_a_bad_row_stops_the_run_before_it_begins(recipe, small_world, tmp_path, change, message, capsys):
    path = edited(small_world, tmp_path, change)
    assert train.main(["--config", str(recipe), "--stages.cold.train_dataset", str(path)]) == 2
    assert_error(capsys, message)
    assert not (tmp_path / "run").exists()


def assert_error(capsys, message):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and re.search(message, error), error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sead", "1"], "unknown setting 'sead'"),
        (["--stages.rl.num_generations", "7"], "24 completions a rollout is not a multiple of num_generations=7"),
        (
            ["--model_name_or_path", "/nonexistent/model"],
            "model_name_or_path='/nonexistent/model' is not a model folder",
        ),
        (["--stages.cold.train_dataset", "/nonexistent.jsonl"], "/nonexistent.jsonl"),
        (["--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
        (["--max_prompt_length", "5"], "over max_prompt_length=5"),
        (["--max_completion_length", "3"], "over max_completion_length=3"),
        (["--stages.rl.reward_recipe", "{safety: {nosuch: 1}}"], "unknown reward 'nosuch'"),
        (["--stages.rl.reward_recipe", "{safety: {safety: 1}}"], "has a label without a recipe"),
        (["--save_steps", "4", "--stages.rl.steps_per_generation=3"], "save_steps=4 is not a multiple of the 3"),
        (["--max_tokens_per_batch", "60"], r"\.jsonl:\d+: a prompt of .* is over max_tokens_per_batch=60"),
        (["--sampling_batch_size", "2"], "num_generations=4 is over sampling_batch_size=2"),
        (["--stages.rl.train_dataset", "{}"], "train_dataset names no file"),
        (["--stages.rl.train_dataset", "{a.jsonl: -1}"], "'a.jsonl' has weight -1"),
        (["--stages.rl.loss_type=grpo", "--stages.rl.alpha=0.1"], "loss_type 'grpo' does not read alpha"),
        (["--stages.rl.loss_type=rloo", "--stages.rl.num_iterations=2"], "only the first is on-policy"),
        (["--stages.rl.cale_a=0.9"], "cale_a=0.9 has no effect without advantage: cale"),
        (["--stages.rl.kl=k2"], "kl='k2' has no effect without a beta above 0"),
        (["--stages.rl.row_tolerance_unbiased=true"], "no effect without a row_tolerance"),
        (["--stages.rl.entropy_coef=.nan"], "entropy_coef"),
        (["--stages.rl.loss_type=gspo", "--stages.rl.delta=1.00001"], r"delta must exceed 1 \+ epsilon_high"),
    ],
)
def test_a_bad_setting_stops_the_run_before_it_begins(recipe, tmp_path, flags, message, capsys):
    assert train.main(["--config", str(recipe), *flags]) == 2
    assert_error(capsys, message)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_is_named(recipe, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert train.main(["--config", str(recipe), "--output_dir", str(file / "run")]) == 2
    assert_error(capsys, "output_dir=.*cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a folder without write permission")
def test_a_folder_without_write_permission_is_named(recipe, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert train.main(["--config", str(recipe), "--output_dir", str(tmp_path / "locked" / "run")]) == 2
    assert_error(capsys, "no write access")


def test_an_earlier_run_is_not_overwritten_unasked_and_a_foreign_folder_never(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert train.main(["--config", str(recipe), "--overwrite_output_dir", "true"]) == 2
    assert_error(capsys, "is not empty and holds no run of cosmo_fast")
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    short = ["--stages.cold.max_steps=1", "--stages.rl.max_steps=1"]
    run(recipe, *short)
    capsys.readouterr()
    assert train.main(["--config", str(recipe)]) == 2
    assert_error(capsys, "holds an earlier run; set overwrite_output_dir or resume_from_checkpoint")
    (out / "notes.txt").write_text("mine")
    assert train.main(["--config", str(recipe), "--overwrite_output_dir=true", f"--model_name_or_path={out}"]) == 2
    assert_error(capsys, "lies in output_dir=.*would clear")
    run(recipe, *short, "--overwrite_output_dir", "true", "--seed", "1")
    assert (out / "notes.txt").read_text() == "mine", "what a run did not write is never removed"


def test_evaluate_prints_paired_rates_and_generate_answers(recipe, small_world, tmp_path, capsys):
    run(recipe, "--stages.rl.max_steps", "1")
    capsys.readouterr()
    out = str(tmp_path / "run")
    assert (
        cli.main(["evaluate", out, str(small_world / "scenes.jsonl"), "--limit", "20", "--max-completion-length", "40"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 20 and {"safe_rate", "over_refusal_rate", "safe_rate_interval", "accuracy"} <= result.keys()
    image = next((small_world / "images").glob("*.png"))
    asking = ["generate", out, "--prompt", "What is this?", "--image", str(image), "--max-completion-length", "8"]
    assert cli.main([*asking, "--num-generations", "2", "--temperature", "1"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["generate", out, "--prompt", "x", "--image", str(tmp_path / "none.png")]) == 2
    assert_error(capsys, "none.png")
    assert cli.main(["doctor"]) == 0 and "torch" in capsys.readouterr().out


def test_python_api_takes_rows_rewards_and_a_model(recipe, small_world):
    from cosmo_fast.data import load_rows

    def short(prompts, completions, question, images, completion_ids, **columns):
        if not all(question) or not all(os.path.isfile(image) for paths in images for image in paths) or not images[0]:
            raise ValueError("a reward sees what the model saw")
        return [1.0 / (1 + len(c)) for c in completions]

    flags = ["--stages.rl.reward_recipe", "{'*': {short: 1}}", "--stages.rl.max_steps", "2"]
    config = load_config(str(recipe), [*flags, "--stages.rl.max_reward_failures", "0"])
    rows = load_rows(small_world / "rl.jsonl", limit=8)
    trainer = Trainer(
        config, model=load_policy(small_world / "model"), reward_funcs={"short": short}, train_dataset={"rl": rows}
    )
    assert trainer.train()["stages"][1]["name"] == "rl"
    with pytest.raises(ValueError, match=r"names the stage\(s\) \['x'\]"):
        Trainer(load_config(str(recipe), ["--output_dir", "runs/never"]), train_dataset={"x": rows})
