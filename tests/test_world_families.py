"""The embedded world with a model of another family: the same rows, pictures and prompts, and it trains."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import RECIPE, SMALL
from short_run import whole_and_resumed

from cosmo_fast import cli
from cosmo_fast.config import ConfigError, load_config
from cosmo_fast.data import load_rows
from cosmo_fast.data.encode import Encoder
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan
from cosmo_fast.run_folder import check_same
from cosmo_fast.world import ensure_world
from cosmo_fast.world.model import FAMILIES, build_model
from cosmo_fast.world.parts import ensure_part

OTHERS = FAMILIES[1:]


@pytest.fixture(scope="module", params=OTHERS)
def world(request, tmp_path_factory):
    """The folder of the small world with a model of the family; its parent is the cache."""
    sizes = {name: float(count) for name, count in SMALL.items()}  # as a recipe gives them
    return ensure_world(seed=0, cache_dir=tmp_path_factory.mktemp("cache"), family=request.param, **sizes)


def test_the_family_changes_the_model_alone_and_the_name_of_the_folder(world, small_world):
    def contents(folder):  # parts are written where they are asked for
        files = [p for p in (*folder.iterdir(), *(folder / "images").iterdir()) if p.is_file()]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

    assert contents(world) == contents(small_world) and len(contents(world)) > 100
    assert world.name != small_world.name
    read = [json.loads((folder / "model" / "config.json").read_text()) for folder in (world, small_world)]
    assert read[0]["model_type"] in OTHERS and read[1]["model_type"] == "qwen2_5_vl"


def test_prompts_have_the_ids_that_they_have_for_the_default_family(world, small_world):
    policies = [load_policy(folder / "model") for folder in (world, small_world)]
    for split in ("train", "scenes"):
        rows = [load_rows(folder / f"{split}.jsonl") for folder in (world, small_world)]
        encoders = [Encoder(policy, max_prompt_length=64) for policy in policies]
        for ours, theirs in zip(*rows, strict=True):
            a, b = encoders[0].prompt(ours), encoders[1].prompt(theirs)
            assert np.array_equal(a.ids, b.ids) and [m.rows for m in a.media] == [4]
            if split == "train":
                assert np.array_equal(encoders[0].target(ours), encoders[1].target(theirs))
    processors = [policy.image_processor for policy in policies]
    assert processors[0].image_mean == processors[1].image_mean and processors[0].image_std == processors[1].image_std
    sizes = [sum(p.numel() for p in policy.model.parameters()) for policy in policies]
    assert 0.75 < sizes[0] / sizes[1] < 1.25


def test_matrices_start_with_the_given_deviation_and_a_picture_changes_the_log_probs(world):
    policy = load_policy(world / "model")
    for name, p in policy.model.named_parameters():
        assert p.dim() < 2 or p.numel() < 500 or abs(p.std().item() - 0.05) < 0.005, name
    rows = [row for row in load_rows(world / "scenes.jsonl") if row.columns.get("task") == "name"]
    other = next(row for row in rows if row.images != rows[0].images)
    prompts = [Encoder(policy).prompt(row) for row in (rows[0], dataclasses.replace(rows[0], images=other.images))]
    found = []
    for prompt in prompts:
        plan = Plan([prompt], [[np.arange(20, 30)]])
        found.append(policy.logprobs(plan, Vision(policy).features(plan.media))[0])
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_recipe_trains_it_goes_on_from_a_checkpoint_and_evaluates_what_it_trained(
    world, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{world}/", "world:").format(out=tmp_path / "run"))
    family = json.loads((world / "model" / "config.json").read_text())["model_type"]
    flags = [f"--world.family={family}", f"--world.cache_dir={world.parent}", f"--world.sizes={json.dumps(SMALL)}"]
    whole, again, rows = whole_and_resumed(path, flags, tmp_path, monkeypatch)
    states = (whole.policy.model.state_dict(), again.policy.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert {row["stage"] for row in rows} == {"cold", "rl"} and len(list(world.parent.glob("world-*"))) == 1
    capsys.readouterr()
    cli.main(["evaluate", str(tmp_path / "whole"), str(world / "scenes.jsonl"), "--limit", "9"])
    assert json.loads(capsys.readouterr().out)["n"] == 9


def test_the_model_of_a_part_is_of_the_worlds_family(world):
    part = ensure_part(world, "verdicts")
    assert load_policy(part / "model").family is load_policy(world / "model").family


@pytest.mark.parametrize(("family", "rows"), [("qwen2_5_vl", 196), ("qwen3_vl", 196), ("internvl", 200)])
def test_a_large_picture_has_four_tokens_for_every_window_of_56_pixels(family, rows, tmp_path):
    build_model(tmp_path, ["a b"], image_mean=[0.5] * 3, image_std=[0.2] * 3, picture=392, family=family)
    policy = load_policy(tmp_path)
    grid = policy.family.grid_after_merge(policy.model.config, policy.image_processor, 392, 392)
    assert np.prod(grid) == rows  # InternVL's thumbnail of the whole among them


def test_a_checkpoint_from_before_the_setting_goes_on_with_the_default_family_and_no_other(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path, world="w"))
    saved = load_config(str(path)).resolved()
    del saved["world"]["family"]
    check_same(saved, load_config(str(path)))
    with pytest.raises(ConfigError, match="resume_from_checkpoint: world was .*'qwen2_5_vl'.* now .*'internvl'"):
        check_same(saved, load_config(str(path), ["--world.family=internvl"]))


def test_an_unknown_family_is_one_error_that_names_the_setting(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path, world="w"))
    with pytest.raises(ConfigError, match=r"^world\.family: .*'qwen3_vl' or 'internvl' \(got 'llava'\)$"):
        load_config(str(path), ["--world.family", "llava"])
    with pytest.raises(ValueError, match="world.family='llava' is none of qwen2_5_vl, qwen3_vl, internvl"):
        ensure_world(cache_dir=tmp_path, family="llava", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
