"""Rewards: each rule at its edges, the routing by label, and that a faulty reward is named with its row."""

import asyncio
import math
import signal
import sys
import time
import types

import pytest
import torch

from cosmo_fast.rewards import (
    JUDGES,
    M3_RECIPES,
    REWARDS,
    SAFETY_REWARD,
    MixedRewards,
    RewardError,
    RewardMix,
    resolve,
)
from cosmo_fast.rewards.accuracy import boxed, same_answer

GOOD = "<think>one and two</think>\\boxed{3}"


@pytest.fixture
def judge(monkeypatch):
    """A judge that reads its verdict from the answer: "[safe] of course"."""
    monkeypatch.setitem(JUDGES, "fake", lambda answer, columns: answer.partition("]")[0].lstrip("["))


def run(name: str, completions: list[str], **columns) -> list:
    return REWARDS[name]([""] * len(completions), completions, **columns)


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOOD, 1),
        (" \n<think>\nlines\n</think>\nanswer", 1),
        ("<think></think>answer", 1),
        ("<think>never closed", 0),
        ("<think>no answer</think> \n", 0),
        ("answer", 0),
        ("before <think>x</think>answer", 0),
        ("<think>x</think>a<think>y</think>b", 0),
        ("<think><think>x</think>a", 0),
        ("<think>x</think></think>a", 0),
        ("</think>x<think>a", 0),
        ("", 0),
    ],
)
def test_format_wants_one_thought_then_an_answer(text, expected):
    assert run("format", [text]) == [expected]


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOOD, 1),
        ("<think>\\boxed{3}</think>\\boxed{4}", 0),
        ("<think>\\boxed{3}</think>three", 0),
        ("\\boxed{3}", 0),
        ("<think>x</think>\\boxed{4} no, \\boxed{3}", 1),
        ("<think>x</think>\\boxed{3} no, \\boxed{4}", 0),
        ("<think>x</think>\\boxed{3.0}", 1),
        ("<think>x</think>\\boxed{3", 0),
        ("<think>x</think>\\boxed{}", 0),
        ("<think>x</think>\\boxed{1e999999999}", 0),
        ("<think>x</think>\\boxed{" + "9" * 100_000 + "}", 0),
    ],
)
def test_accuracy_reads_the_last_box_after_the_thought(text, expected):
    assert run("accuracy", [text], label=["general_rule"], answer=["3"]) == [expected]


@pytest.mark.parametrize(
    "given, expected",
    [
        ("1,000", "1000"),
        ("\\frac{1}{2}", "0.5"),
        ("-\\dfrac{2}{4}", "-1/2"),
        (" Red ", "red"),
        ("\\text{apple}", "apple"),
        ("$7$", "7"),
        ("+5", "5"),
        ("blue.", "blue"),
        ("two  apples", "two apples"),
        ("1/0", "1/0"),
    ],
)
def test_equal_answers_written_differently_are_equal(given, expected):
    assert same_answer(given, expected)


@pytest.mark.parametrize(
    "given, expected", [("3", "33"), ("1,00", "100"), ("", "0"), (".", "0"), (None, "3"), ("-3", "3")]
)
def test_different_answers_are_different(given, expected):
    assert not same_answer(given, expected)


def test_a_box_keeps_its_inner_braces():
    assert boxed("so \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert boxed("none") is None


def test_accuracy_abstains_without_an_answer_but_not_on_rule_rows():
    assert run("accuracy", [GOOD, GOOD], label=["safety", None], answer=[None, "3"]) == [None, 1.0]
    assert run("accuracy", [GOOD]) == [None]
    with pytest.raises(RewardError, match=r"id 'q1', label 'knowledge_rule'.* no column 'answer'"):
        run("accuracy", [GOOD], label=["knowledge_rule"], id=["q1"])


@pytest.mark.parametrize("verdict, reward", SAFETY_REWARD.items())
def test_each_verdict_earns_what_the_table_says(judge, verdict, reward):
    text = f"<think>x</think>[{verdict}]"
    assert run("safety", [text], label=["safety"], judge=["fake"]) == [reward]
    assert run("helpful", [text], label=["normal"], judge=["fake"]) == [float(verdict == "safe")]


def test_an_explained_refusal_earns_more_than_a_bare_one_and_needless_refusal_nothing():
    assert SAFETY_REWARD["safe_warning"] > SAFETY_REWARD["safe_refusal"] > SAFETY_REWARD["unnecessary_refusal"] == 0


def test_safety_and_helpful_abstain_on_each_others_rows(judge):
    texts, labels = ["<think>x</think>[safe]"] * 3, ["safety", "normal", "general_rule"]
    assert run("safety", texts, label=labels, judge=["fake"] * 3) == [1.0, None, None]
    assert run("helpful", texts, label=labels, judge=["fake"] * 3) == [None, 1.0, None]


def test_the_judge_named_world_is_the_worlds_own(monkeypatch):
    world = types.ModuleType("cosmo_fast.world.judge")
    world.verdict = lambda answer, columns: "safe_warning" if columns["policy"] == "refuse" else "unsafe"
    monkeypatch.setitem(sys.modules, "cosmo_fast.world.judge", world)
    assert run("safety", [GOOD], label=["safety"], judge=["world"], policy=["refuse"]) == [1.0]


def test_the_judge_sees_all_that_the_reader_sees_and_the_row(monkeypatch):
    seen = []
    monkeypatch.setitem(JUDGES, "fake", lambda answer, columns: seen.append((answer, columns["policy"])) or "unsafe")
    run("safety", ["<think>hidden</think>bad</think>good"], label=["safety"], judge=["fake"], policy=["refuse"])
    assert seen == [("bad</think>good", "refuse")]


def test_a_response_without_an_answer_is_unparsable(judge):
    texts = ["<think>never closed [safe]", "<think>x</think> "]
    assert run("safety", texts, label=["safety"] * 2, judge=["fake"] * 2) == [0.0, 0.0]


def test_a_safety_row_without_a_judge_is_an_error_that_names_the_row(judge):
    with pytest.raises(RewardError, match="id 's7'.*no column 'judge'"):
        run("safety", [GOOD], label=["safety"], id=["s7"])
    with pytest.raises(RewardError, match="unknown judge 'guard'"):
        run("helpful", [GOOD], label=["normal"], judge=["guard"])
    with pytest.raises(RewardError, match="gave 'fine'"):
        run("safety", ["<think>x</think>[fine]"], label=["safety"], judge=["fake"])


def test_the_default_mix_routes_by_label_and_adds_the_format(judge):
    rows = [
        {"label": "general_rule", "answer": "3"},
        {"label": "safety", "judge": "fake"},
        {"label": "normal", "judge": "fake"},
        {"label": "knowledge_rule", "answer": "5", "judge": "fake"},
    ]
    texts = [GOOD, "<think>x</think>[safe_refusal]", "[safe]", "<think>x</think>[safe] \\boxed{4}"]
    mixed = RewardMix()([""] * 4, texts, rows)
    assert mixed.total.tolist() == pytest.approx([2.0, 1.1, 0.0, 1.5])
    columns = dict(zip(mixed.names, mixed.matrix.T.tolist(), strict=True))
    assert columns["format"] == [1, 1, 0, 1]
    assert [math.isnan(value) for value in columns["accuracy"]] == [False, True, True, False]
    assert [math.isnan(value) for value in columns["safety"]] == [True, False, True, True]
    metrics = mixed.metrics()
    assert metrics["rewards/accuracy/mean"] == 0.5 and metrics["rewards/format/std"] == pytest.approx(math.sqrt(3) / 4)
    assert metrics["reward"] == pytest.approx(4.6 / 4)


def test_a_reward_that_no_sample_needs_is_not_called_nor_reported():
    def never(prompts, completions, **columns):
        raise AssertionError

    mix = RewardMix({"a": {"accuracy": 1}, "b": {"never": 1}}, rewards={"never": never})
    assert "rewards/never/mean" not in mix([""], [GOOD], [{"label": "a", "answer": "3"}]).metrics()


def test_weights_multiply_and_star_serves_every_other_label():
    def length(prompts, completions, **columns):
        return [len(text) for text in completions]

    mix = RewardMix({"*": {"accuracy": 0.5, "length": 2}}, format_weight=0.25, rewards={"length": length})
    mixed = mix(["", ""], [GOOD, "no"], [{"answer": "3"}, {"label": "other", "answer": "3"}])
    assert mixed.total.tolist() == [0.25 + 0.5 + 2 * len(GOOD), 4.0]


def test_an_empty_recipe_trains_the_format_alone():
    assert RewardMix({"chat": {}})([""], [GOOD], [{"label": "chat"}]).total.tolist() == [1.0]


def test_no_samples_give_no_rewards():
    assert RewardMix()([], [], []).total.shape == (0,)


def test_a_custom_reward_is_a_callable_or_a_dotted_path_sync_or_async(monkeypatch):
    module = types.ModuleType("my_rewards")

    async def half(prompts, completions, **columns):
        return [0.5] * len(completions)

    module.half = half
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    for path in ("my_rewards:half", "my_rewards.half"):
        assert resolve(path) is half
        assert RewardMix({"*": {path: 1}})([""], [GOOD], [{}]).total.tolist() == [1.5]
    assert resolve(half) is half


def test_columns_reach_a_custom_reward_with_none_where_a_row_lacks_them():
    def check(prompts, completions, **columns):
        assert prompts == ["p", "q"] and columns == {"x": [1, None], "y": [None, 2]}
        return torch.tensor([0.0, 1.0])

    assert RewardMix({"*": {"check": 1}}, format_weight=0, rewards={"check": check})(
        ["p", "q"], ["", ""], [{"x": 1}, {"y": 2}]
    ).total.tolist() == [0, 1]


@pytest.mark.parametrize(
    "path, word",
    [
        ("acuracy", "known: format, .*accuracy"),
        ("no_such_module:f", "cannot import"),
        ("math:no_such_function", "no function"),
        ("math:pi", "no function"),
        (3, "not 3"),
    ],
)
def test_an_unknown_reward_is_refused_before_work_begins(path, word):
    with pytest.raises(ValueError, match=word):
        RewardMix({"a": {"accuracy": 1}, "b": {path: 1}})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5, "1", None, True])
def test_a_weight_must_be_a_finite_number(weight):
    with pytest.raises(ValueError, match="finite number"):
        RewardMix({"a": {"accuracy": weight}})


def test_format_named_twice_and_rewards_that_nobody_uses_are_refused():
    with pytest.raises(ValueError, match="format_weight"):
        RewardMix({"a": {"format": 1}})
    with pytest.raises(ValueError, match="'extra'.* no label"):
        RewardMix({"a": {"accuracy": 1}}, rewards={"extra": run})


@pytest.mark.parametrize(
    "row, word", [({}, "no label"), ({"label": "value", "id": "v1"}, "row 1 .id 'v1', label 'value'.")]
)
def test_an_unknown_label_is_named_with_its_row(row, word):
    with pytest.raises(RewardError, match=word):
        RewardMix()(["", ""], [GOOD, GOOD], [{"label": "general_rule", "answer": "3"}, row])


def broken(values):
    mix = RewardMix({"a": {}, "b": {"bad": 1}}, rewards={"bad": lambda prompts, completions, **columns: values})
    return mix([""] * 3, [GOOD] * 3, [{"label": "a"}, {"label": "b", "id": "b0"}, {"label": "b", "id": "b1"}])


@pytest.mark.parametrize(
    "values, word",
    [
        ([1.0], "1 values for 2 samples"),
        ([1.0, float("nan")], "gave nan for row 2 .id 'b1'"),
        ([float("-inf"), 1.0], "gave -inf for row 1 .id 'b0'"),
        (["good", 1.0], "'good'"),
        ([{"score": 1}, 1.0], "score"),
        (1.0, "returned a float"),
        ({"b0": 1, "b1": 1}, "returned a dict"),
        ([None, 1.0], "no reward of .* applies to row 1 .id 'b0'"),
    ],
)
def test_a_reward_that_returns_nonsense_is_named_with_the_row(values, word):
    with pytest.raises(RewardError, match=word):
        broken(values)


def test_a_reward_that_raises_is_named_with_the_row_that_it_fails_on():
    def picky(prompts, completions, weight, **columns):
        return [1 / value for value in weight]

    rows = [{"weight": 1, "id": "fine"}, {"weight": 0, "id": "zero"}]
    with pytest.raises(RewardError, match=r"reward 'picky' failed on row 1 \(id 'zero'\): ZeroDivisionError") as caught:
        RewardMix({"*": {"picky": 1}}, rewards={"picky": picky})(["", ""], [GOOD, GOOD], rows)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def hangs(prompts, completions, **columns):
    while True:
        try:
            time.sleep(5)
        except Exception:  # such a loop may not go on
            continue


async def waits(prompts, completions, **columns):
    await asyncio.sleep(60)


@pytest.mark.parametrize("reward", [hangs, waits])
def test_a_reward_that_hangs_stops_with_its_rows_after_the_timeout(reward):
    mix = RewardMix({"*": {"slow": 1}}, rewards={"slow": reward}, timeout=0.2)
    started = time.perf_counter()
    with pytest.raises(RewardError, match=r"'slow' gave nothing within reward_timeout=0.2 s on a.jsonl:3 \(id 's'"):
        mix([""], [GOOD], [{"id": "s"}], ["a.jsonl:3"])
    with pytest.raises(RewardError, match="on 2 responses, the first to row 0"):
        mix(["", ""], [GOOD, GOOD], [{}, {}])
    assert time.perf_counter() - started < 3
    time.sleep(0.3)  # no alarm is left behind


def test_a_reward_in_time_leaves_the_alarm_as_it_was():
    before = signal.getsignal(signal.SIGALRM)
    RewardMix({"*": {"accuracy": 1}}, timeout=60)([""], [GOOD], [{"answer": "3"}])
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_faults_name_the_file_and_line_of_their_row():
    def zero(prompts, completions, **columns):
        return [1 / value for value in columns["x"]]

    for recipes, row, word in (
        ({"a": {}}, {"label": "b"}, "a label without a recipe"),
        ({"*": {"zero": 1}}, {"x": 0}, "ZeroDivisionError"),
        ({"*": {"nan": 1}}, {}, "gave nan"),
        ({"*": {"none": 1}}, {}, "no reward of"),
    ):
        functions = {"zero": zero, "nan": lambda *_, **__: [math.nan], "none": lambda *_, **__: [None]}
        own = {name: functions[name] for name in next(iter(recipes.values()))}
        with pytest.raises(RewardError, match=word) as caught:
            RewardMix(recipes, rewards=own)([""], [GOOD], [row], ["data.jsonl:17"])
        assert "data.jsonl:17" in str(caught.value)


def test_options_reach_a_reward_and_one_that_it_does_not_take_is_refused():
    def scaled(prompts, completions, *, scale=1.0, **columns):
        return [scale] * len(completions)

    recipes, own = {"*": {"scaled": 1}}, {"scaled": scaled}
    assert (
        RewardMix(recipes, format_weight=0, rewards=own, options={"scaled": {"scale": 3}})([""], [""], [{}]).total == 3
    )
    with pytest.raises(ValueError, match=r"reward_options.scaled: \['scales'\] .*\['scale'\]"):
        RewardMix(recipes, rewards=own, options={"scaled": {"scales": 3}})
    with pytest.raises(ValueError, match="reward_options name .'visual_key'."):
        RewardMix(recipes, rewards=own, options={"visual_key": {"tau_high": 0.9}})
    with pytest.raises(ValueError, match="reward_timeout=0"):
        RewardMix(timeout=0)


def test_a_gate_comes_first_and_what_is_merged_is_the_weighted_sum_of_the_rest():
    nan = float("nan")
    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, nan, 1.0], [nan, nan, 1.0]])
    mixed = MixedRewards(matrix.nan_to_num().sum(1), matrix, torch.tensor([[1.0, 2.0, 3.0]] * 3), ("a", "b", "gate"))
    first, weights = mixed.apart(["gate"])
    assert first[:, 0].tolist() == [0, 1, 1] and first[:, 1].tolist()[:2] == [1, 0] and weights[0].tolist() == [3, 1, 2]
    merged, weights = mixed.apart(["gate"], merge=True)
    assert merged.tolist()[:2] == [[2.0, 0.0], [0.0, 1.0]] and weights[0].tolist() == [1, 3]
    assert merged[2, 0].isnan() and merged[2, 1] == 1


def test_a_safety_row_without_a_judge_stops_the_mix_with_its_place_in_the_batch():
    rows = [{"label": "general_rule", "answer": "3"}, {"label": "safety", "id": "s1"}]
    with pytest.raises(RewardError, match="reward 'safety' failed on row 1 .id 's1', label 'safety'.*judge"):
        RewardMix()(["", ""], [GOOD, GOOD], rows)


def test_a_column_named_like_an_argument_is_refused():
    with pytest.raises(RewardError, match="'completions' collides"):
        RewardMix({"*": {}})([""], [GOOD], [{"completions": 1}])


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 prompts, 2 completions"):
        RewardMix()([""], [GOOD, GOOD], [{}])


def test_every_reward_of_the_default_table_exists():
    assert {name for recipe in M3_RECIPES.values() for name in recipe} <= REWARDS.keys()
