"""Perception rewards against the published formulas and against scenes of the world; visual focus measures focus."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from short_run import SHORT

from cosmo_fast import report
from cosmo_fast.config import load_config
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import load_rows
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.rewards import REWARDS, RewardError
from cosmo_fast.rewards.facts import claims, stated_facts
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.alive import logprob_drops
from cosmo_fast.trainer import Trainer

FACTS = {"visual": ["apple top left", "3 red frogs"], "textual": ["apple", "sum of 12"]}


def run(name, texts, prompt="", **columns):
    return REWARDS[name]([prompt] * len(texts), texts, **{k: [v] * len(texts) for k, v in columns.items()})


def response(description="", think="", answer="x"):
    return f"<description>{description}</description><think>{think}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "text, fact, stated",
    [
        ("There is an Apple at the top left.", "apple top left", True),
        ("Top left: an apple.", "apple top left", True),
        ("top left apple, top right frog", "apple top right", False),
        ("a frog and an apple", "frog", True),
        ("three frogs", "3 frog", True),
        ("3.5 frogs", "3 frogs", False),
        ("pineapple", "apple", False),
        ("no apple at the top left", "apple top left", False),
        ("not red, an apple", "apple", True),
        ("salt, then pepper", "salt and pepper", True),
        ("", "apple", False),
    ],
)
def test_a_fact_is_stated_by_its_whole_words_in_one_clause(text, fact, stated):
    assert stated_facts(text, [fact]) == [stated]


def test_claims_are_made_of_one_thing_a_clause():
    said = claims("The apple is at the top left. Two red frogs. A frog beside 4 apples.", {"apple", "frog"})
    assert said == {
        ("apple", "place"): {frozenset({"top", "left"})},
        ("frog", "number"): {frozenset({"2"})},
        ("frog", "colour"): {frozenset({"red"})},
    }


@pytest.mark.parametrize("stated", range(6))
def test_coverage_earns_1_a_half_or_0_at_its_thresholds(stated):
    facts = {"visual": [f"word{chr(97 + i)}" for i in range(5)], "textual": [f"term{chr(97 + i)}" for i in range(5)]}
    expected = 1.0 if stated / 5 >= 0.6 else 0.5 if stated / 5 >= 0.2 else 0.0
    text = response(". ".join(facts["visual"][:stated]), ". ".join(facts["textual"][:stated]))
    columns = {"facts": [facts]}
    for name in ("visual_key", "textual_key"):
        assert REWARDS[name]([""], [text], tau_high=0.6, tau_low=0.2, **columns) == [expected]
    swapped = response(". ".join(facts["textual"]), ". ".join(facts["visual"]))
    assert run("visual_key", [swapped], facts=facts) == run("textual_key", [swapped], facts=facts) == [0.0]


def test_rows_without_facts_have_no_perception_reward_and_bad_facts_are_named():
    for name in ("visual_key", "textual_key", "consistency", "visual_focus"):
        assert run(name, ["x"]) == run(name, ["x"], facts={}) == [None]
    for facts in ("apple", {"vision": ["apple"]}, {"visual": "apple"}, {"visual": ["the"]}, {"textual": [3]}):
        with pytest.raises(RewardError, match="id 'r1'.*column 'facts' must be"):
            run("visual_key", ["x"], facts=facts, id="r1")


@pytest.mark.parametrize(
    "description, think, answer, expected",
    [
        ("An apple at the top left. 3 red frogs.", "3 frogs", "apple", 1.0),
        ("An apple at the top left. 3 red frogs.", "4 frogs", "apple", 0.0),
        ("An apple at the top left. 3 red frogs.", "3 blue frogs", "apple", 0.0),
        ("An apple at the top left.", "the apple at the left", "x", 1.0),
        ("An apple at the top left.", "the apple at the bottom left", "x", 0.0),
        ("3 red frogs", "apple", "frogs", 0.5),
        ("3 red frogs", "2 apples", "frogs", 1 / 3),
        ("3 red frogs", "", "x", 0.0),
    ],
)
def test_consistency_is_the_share_of_what_is_used_that_was_given_and_0_on_a_conflict(
    description, think, answer, expected
):
    assert run("consistency", [response(description, think, answer)], facts=FACTS) == [pytest.approx(expected)]


def test_the_worlds_own_reasoning_is_consistent_with_its_picture_and_not_with_another(small_world):
    rows = [json.loads(line) for line in (small_world / "train.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["label"] == "general_rule" and row["task"] not in ("presence", "sum")]
    thoughts = [row["messages"][-1]["content"].partition("</think>")[0].removeprefix("<think>") for row in rows]
    facts = [row["facts"] for row in rows]
    for shift, low, high in ((0, 0.9, 1.0), (1, 0.0, 0.6)):
        seen = facts[shift:] + facts[:shift]
        texts = [response(". ".join(f["visual"]), t, "") for f, t in zip(seen, thoughts, strict=True)]
        mean = np.mean(REWARDS["consistency"]([""] * len(rows), texts, facts=facts))
        assert low <= mean <= high, (shift, mean)


def test_what_the_question_gives_may_be_used():
    text = response("3 red frogs", "2 apples", "frogs")
    assert run("consistency", [text], prompt="There are 2 apples.", facts=FACTS) == [1.0]


def test_visual_focus_is_what_is_stated_less_what_is_contradicted():
    texts = ["apple top left. 3 red frogs", "apple top left", "apple top left. 2 red frogs", "something", ""]
    assert run("visual_focus", texts, facts=FACTS) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_a_response_that_ignores_its_picture_has_less_visual_focus_whatever_it_says(small_world):
    rows = [json.loads(line) for line in (small_world / "rl.jsonl").read_text().splitlines()]
    facts = [row["facts"] for row in rows if row["task"] in ("count", "sum", "total", "presence")]
    seen = [response(". ".join(f["visual"])) for f in facts]
    columns = {"facts": facts}
    read = np.mean(REWARDS["visual_focus"]([""] * len(facts), seen, **columns))
    guessed = np.mean(REWARDS["visual_focus"]([""] * len(facts), seen[1:] + seen[:1], **columns))
    constant = max(np.mean(REWARDS["visual_focus"]([""] * len(facts), [text] * len(facts), **columns)) for text in seen)
    all_places = ", ".join(f"{thing} {place}" for thing in ("apple", "frog", "cat", "key", "hat", "bell")
                           for place in ("top left", "top right", "bottom left", "bottom right"))  # fmt: skip
    listed = np.mean(REWARDS["visual_focus"]([""] * len(facts), [all_places] * len(facts), **columns))
    assert read == 1.0 and max(guessed, constant, listed) < 0.4


def test_the_drop_is_positive_for_responses_to_the_picture_and_negative_for_those_to_a_blank_one(small_world):
    policy = load_policy(small_world / "model")
    for name, parameter in policy.model.named_parameters():
        if "lm_head" in name or "embed_tokens" in name:
            parameter.data *= 3  # a random model is nearly uniform: sharper, so that a few samples tell
    vision = Vision(policy)
    config = SimpleNamespace(max_tokens_per_batch=16384)
    context = SimpleNamespace(policy=policy, vision=vision, config=config, stage=SimpleNamespace(temperature=1.0))
    prompts = [Encoder(policy).prompt(row) for row in load_rows(small_world / "rl.jsonl", limit=16)]
    owner = [p for p in prompts for _ in range(4)]
    drops = {}
    dark = SimpleNamespace(features=lambda media, alone: vision.blank(media))
    for kind, shown in (("seeing", vision), ("blind", dark)):
        groups = Sampler(policy, shown).generate(prompts, SamplingParams(12), num_generations=4, seed=1)
        completions = [c for group in groups for c in group]
        if kind == "blind":  # a response that ignores the picture, scored with it
            again = SimpleNamespace(**vars(context) | {"vision": SimpleNamespace(features=None, blank=vision.features)})
            minus = logprob_drops(again, owner, completions)  # log p(blank) − log p(seen)
            drops[kind] = [-value for value in minus]
        else:
            drops[kind] = logprob_drops(context, owner, completions)
    rewards = {kind: run_drop(values) for kind, values in drops.items()}
    assert np.mean(drops["seeing"]) > 0 > np.mean(drops["blind"])
    assert np.mean(rewards["seeing"]) > np.mean(rewards["blind"])


def run_drop(values):
    return REWARDS["visual_focus_drop"]([""] * len(values), [""] * len(values), blank_logprob_drop=values)


def test_visual_focus_by_the_drop_is_the_share_of_probability_that_the_picture_gives():
    assert run_drop([0.0, math.log(4), -1.0, None]) == [0.0, pytest.approx(0.75), 0.0, None]
    with pytest.raises(RewardError, match="an rl stage adds"):
        run("visual_focus_drop", ["x"])


def test_a_stage_rewards_focus_by_the_drop_and_the_tokens_of_its_responses(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda folder: None)
    rewards = "{'*': {visual_focus_drop: 1, repetition: 0.5, soft_overlong: 1}}"
    flags = [
        *SHORT,
        f"--stages.rl.reward_recipe={rewards}",
        "--stages.rl.reward_options.soft_overlong.soft_punish_cache=8",
    ]
    Trainer(load_config(str(recipe), flags)).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == "rl"][-1]
    assert 0 < last["rewards/visual_focus_drop/mean"] < 1 and last["grad_norm"] > 0
    assert -1 <= last["rewards/soft_overlong/mean"] <= 0 and -1 <= last["rewards/repetition/mean"] <= 0
