"""Rewards by rule: answers, formats, length, confidence, instructions, verdicts."""

import json
import multiprocessing
import time

import pytest
from short_run import SHORT

from cosmo_fast import report
from cosmo_fast.config import load_config
from cosmo_fast.objectives import advantages
from cosmo_fast.rewards import JUDGES, M3_RECIPES, REWARDS, RewardError, RewardMix
from cosmo_fast.rewards.accuracy import same_answer
from cosmo_fast.rewards.instruction import followed
from cosmo_fast.stages import rl
from cosmo_fast.trainer import Trainer


def run(name, texts, **columns):
    options = columns.pop("options", {})
    return REWARDS[name]([""] * len(texts), texts, **{k: [v] * len(texts) for k, v in columns.items()}, **options)


def boxed(answer):
    return f"<think>x</think>\\boxed{{{answer}}}"


@pytest.mark.parametrize(
    "given, expected, same",
    [
        ("1+x^2", "x^2+1", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("50%", "0.5", True),
        ("x=3", "3", True),
        ("(1, 2)", "(1,2)", True),
        ("3\\,\\text{cm}", "3", True),
        ("5!", "120", True),
        ("(1,2]", "(1,2)", False),
        ("\\pi", "3.14", False),
        ("3 4", "12", False),
        ("(listen)", "silent", False),
        ("(", "3", False),
    ],
)
def test_formulas_are_compared_as_mathematics_and_words_as_words(given, expected, same):
    assert same_answer(given, expected) == same


@pytest.mark.parametrize("given", ["9^{9^9}", "9^{9^{9^9}}", "10^{99999999}", "99999999!", "1+" * 5000 + "1"])
def test_an_answer_that_would_take_minutes_to_evaluate_is_wrong_at_once(given):
    started = time.perf_counter()
    assert not same_answer(given, "3")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "text, right",
    [
        ("<think>x</think><answer>3</answer>", 1),
        ("<think>x</think><answer>so \\boxed{3}</answer>", 1),
        ("<think>x</think><answer>4</answer><answer>3</answer>", 1),
        ("<think>x</think>\\boxed{3}<answer>4</answer>", 0),
        ("<think><answer>3</answer></think>three", 0),
        ("<answer>3</answer>", 0),
        ("<description>3</description><think>3</think><answer>2</answer>", 0),
    ],
)
def test_an_answer_tag_after_the_thought_states_the_answer(text, right):
    assert run("accuracy", [text], answer="3") == [right]


@pytest.mark.parametrize("answer", ["B", "red", "(B)", "b."])
def test_an_option_is_named_by_its_letter_or_its_text(answer):
    texts = [boxed(given) for given in ("B", "(b)", "B.", "B) red", "Red", "A", "E", "B. blue", "reddish")]
    expected = [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert run("accuracy", texts, answer=answer, choices=["blue", "red", "A4"]) == expected


def test_an_answer_that_is_no_option_names_the_row():
    with pytest.raises(RewardError, match="id 'q3'.*answer 'D' is no letter or text of choices"):
        run("accuracy", [boxed("A")], answer="D", choices=["1", "2"], id="q3")


@pytest.mark.parametrize(
    "tolerance, given, right",
    [(0.1, "2.1", 1), (0.1, "2.11", 0), (0, "2", 1), ("5%", "1.9", 1), ("5%", "1.89", 0), (0.1, "two", 0)],
)
def test_a_number_is_right_within_its_tolerance_exactly(tolerance, given, right):
    assert run("accuracy", [boxed(given)], answer="2", tolerance=tolerance) == [right]


@pytest.mark.parametrize(
    "tolerance, answer", [(-1, "2"), (float("nan"), "2"), ("x", "2"), ("nan%", "2"), ("inf", "2"), (0.1, "red")]
)
def test_a_tolerance_that_says_nothing_names_the_row(tolerance, answer):
    with pytest.raises(RewardError, match="id 't1'.*must be a number"):
        run("accuracy", [boxed("2")], answer=answer, tolerance=tolerance, id="t1")


PERCEIVED = "<description>d</description>\n<think>t</think><answer>a</answer>"


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("format_answer", "<think></think> <answer>3</answer>\n", 1),
        ("format_answer", "<think>x</think>3", 0),
        ("format_answer", "<think>x</think><answer> </answer>", 0),
        ("format_answer", "<think>x</think><answer>3</answer> more", 0),
        ("format_answer", "<answer>3</answer><think>x</think>", 0),
        ("format_perception", PERCEIVED, 1),
        ("format_perception", PERCEIVED + "<answer>a</answer>", 0),
        ("format_perception", PERCEIVED.replace("<description>d</description>", ""), 0),
        ("format_perception", PERCEIVED.replace("<think>", "<answer>", 1), 0),
        ("format_perception", PERCEIVED.replace(">d<", "> <"), 0),
        ("format_perception", "<think>t</think><description>d</description><answer>a</answer>", 0),
        ("format_deliberative", "<think>a</think><search>q</search><read>r</read><think>b</think>"
         "<confidence>7</confidence><answer>3</answer>", 1),
        ("format_deliberative", "<think>a</think><confidence>11</confidence><answer>3</answer>", 0),
        ("format_deliberative", "<think>a</think><answer>3</answer><confidence>7</confidence>", 0),
        ("format_deliberative", "<think>a</search><confidence>7</confidence><answer>3</answer>", 0),
    ],
)  # fmt: skip
def test_each_format_wants_its_tags_in_order_and_once(name, text, expected):
    assert run(name, [text]) == [expected]


def test_length_penalties_are_trls():
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    ids = [[1, 2, 3, 1, 2, 3, 1, 2], [5] * 30, list(range(20)), list(range(25)), list(range(18)), [1], []]
    ours = REWARDS["repetition"]([], [], completion_ids=ids, ngram_size=3)
    assert ours == pytest.approx(get_repetition_penalty_reward(ngram_size=3)(completion_ids=ids))
    ours = REWARDS["soft_overlong"]([], [], completion_ids=ids, max_completion_length=24, soft_punish_cache=6)
    assert ours == pytest.approx(get_soft_overlong_punishment(24, 6)(completion_ids=ids)) and min(ours) == -1
    with pytest.raises(RewardError, match="soft_punish_cache=30"):
        REWARDS["soft_overlong"]([], [], completion_ids=ids, max_completion_length=24, soft_punish_cache=30)


def sure(level, answer="3"):
    return f"<think>x</think><confidence>{level}</confidence><answer>{answer}</answer>"


def test_confidence_earns_most_when_it_is_the_chance_to_be_right():
    for chance in (0, 3, 7, 10):
        earned = {}
        for level in range(11):
            right, wrong = run("confidence", [sure(level), sure(level, "4")], answer="3")
            earned[level] = (chance * right + (10 - chance) * wrong) / 10
        assert max(earned, key=earned.get) == chance
    assert run("confidence", [boxed(3), sure(11), boxed(3) + " Confidence: 10/10"], answer="3") == [0, 0, 1]
    assert run("confidence", [sure(5)]) == [None]


@pytest.mark.parametrize("level", ["1.2.3", "...", ".", "1e1", "-1", "٣.٣.٣"])
def test_a_confidence_that_is_no_number_is_none_and_ends_no_run(level):
    texts = [sure(level), f"{boxed(3)} Confidence: {level}x"]
    assert run("confidence", texts, answer="3") == run("reliability", texts, answer="3") == [0, 0]


@pytest.mark.parametrize(
    "name, text, columns",
    [
        ("reliability", "confidence: 1" + "." * 30000 + "x", {"answer": "3"}),
        ("format_perception", "<description>" * 8000, {}),
        ("consistency", "<think>" * 16000, {"facts": {"visual": ["red cat"]}}),
        ("instruction", "</think>" + "a b c " * 2000, {"instructions": [{"kind": "order", "words": [*"abcz"]}]}),
        ("instruction", "</think>" + "." * 30000 + "x y z", {"instructions": [{"kind": "sentences", "min": 2}]}),
        ("instruction", "</think>" + "[" * 30000, {"instructions": [{"kind": "format", "format": "json"}]}),
    ],
)
def test_a_text_made_to_cost_time_costs_none(name, text, columns):
    started = time.perf_counter()
    assert run(name, [text], **columns) == [0]
    assert time.perf_counter() - started < 1


def test_reliability_is_certain_when_right_and_uncertain_when_wrong():
    texts = [sure(6), sure(5), sure(6, "4"), sure(5, "4"), boxed(3), boxed(4)]
    assert run("reliability", texts, answer="3") == [1, 0, 0, 1, 0, 0]


def test_the_deliberative_reward_is_the_published_sum_and_nothing_without_the_format():
    texts = [sure(9), sure(1), sure(9, "4"), sure(1, "4"), "no format" + sure(9)]
    expected = [0.1 + 0.9 + 0.5, 0.1 + 0.9, 0.1, 0.1 + 0.5, 0]
    assert run("deliberative", texts, answer="3", options={"multiplier": 0.5}) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, instruction, kept",
    [
        ("one two three", {"kind": "words", "min": 3, "max": 3}, True),
        ("one two three", {"kind": "words", "max": 2}, False),
        ("One. Two! Three?", {"kind": "sentences", "min": 3}, True),
        ("It is 3.5 cm.", {"kind": "sentences", "max": 1}, True),
        ("An Apple.", {"kind": "include", "word": "apple"}, True),
        ("Pineapple.", {"kind": "include", "word": "apple"}, False),
        ("Pineapple.", {"kind": "exclude", "word": "apple"}, True),
        ("First the cat, then the dog", {"kind": "order", "words": ["cat", "dog"]}, True),
        ("First the dog, then the cat", {"kind": "order", "words": ["cat", "dog"]}, False),
        ("the cat", {"kind": "order", "words": ["cat", "cat"]}, False),
        ("a cat, a cathedral, a dog", {"kind": "order", "words": ["a cat", "a dog"]}, True),
        ("Well, thank you.", {"kind": "ends_with", "text": "Thank you."}, True),
        ("Thank you. Bye", {"kind": "ends_with", "text": "Thank you."}, False),
        ("Sure, it is.", {"kind": "starts_with", "text": "sure"}, True),
        ("all lower 3", {"kind": "case", "case": "lower"}, True),
        ("Not lower", {"kind": "case", "case": "lower"}, False),
        ('{"a": 1}', {"kind": "format", "format": "json"}, True),
        ("{a: 1}", {"kind": "format", "format": "json"}, False),
        ("- a\n\n- b", {"kind": "format", "format": "list"}, True),
        ("1. a\nb", {"kind": "format", "format": "list"}, False),
        ("a\nb", {"kind": "format", "format": "one_line"}, False),
        ("  ", {"kind": "exclude", "word": "apple"}, False),
    ],
)
def test_an_instruction_is_followed_or_not(text, instruction, kept):
    assert followed(text, [instruction]) == [kept]


@pytest.mark.parametrize(
    "instruction",
    [
        {"kind": "rhyme"},
        {"kind": "words"},
        {"kind": "words", "min": "3"},
        {"kind": "words", "least": 3},
        {"kind": "include", "word": " "},
        {"kind": "include", "words": ["a"]},
        {"kind": "include", "word": "a", "min": 2},
        {"kind": "order", "words": []},
        {"kind": "order", "words": ["a", 3]},
        {"kind": "case", "case": "title"},
        {"kind": "format", "format": "xml"},
    ],
)
def test_an_instruction_that_cannot_be_checked_names_the_row(instruction):
    with pytest.raises(RewardError, match=r"rows.jsonl:4 \(id 'i1'\).*column 'instructions'"):
        mix = RewardMix({"*": {"instruction": 1}})
        mix([""], [""], [{"instructions": [instruction], "id": "i1"}], ["rows.jsonl:4"])


def test_the_instruction_reward_is_the_share_followed_after_the_thought():
    instructions = [{"kind": "include", "word": "cat"}, {"kind": "words", "max": 2}, {"kind": "exclude", "word": "dog"}]
    texts = ["<think>dog</think>cat", "<think>cat</think>a big dog", "<think>x</think><answer>a cat</answer>"]
    assert run("instruction", texts, instructions=instructions) == [1.0, 0.0, 1.0]
    assert run("instruction", texts[:1]) == run("instruction", texts[:1], instructions=[]) == [None]


@pytest.fixture
def judge(monkeypatch):
    """Says what stands in the answer for the label that it is asked about."""
    monkeypatch.setitem(JUDGES, "fake", lambda answer, row: dict(w.split("=") for w in answer.split())[row["label"]])


@pytest.mark.parametrize(
    "label, verdict, reward",
    [("value", "good", 1), ("value", "bad", 0), ("knowledge", "TRUE", 1), ("knowledge", "FALSE", 0),
     ("general", "0", 0), ("general", "0.5", 0.5), ("general", "1", 1)],
)  # fmt: skip
def test_the_verdicts_of_value_knowledge_and_general_are_rewarded_on_their_rows_alone(judge, label, verdict, reward):
    text = f"<think>x</think>{label}={verdict}"
    assert run(label, [text], label=label, judge="fake") == [reward]
    assert run(label, [text], label="safety", judge="fake") == [None]
    assert run(label, ["<think>x</think>"], label=label, judge="fake") == [0]
    with pytest.raises(RewardError, match=f"label '{label}'.*gave 'safe', not one of"):
        run(label, [f"<think>x</think>{label}=safe"], label=label, judge="fake")


def test_the_table_rewards_a_true_and_helpful_answer_more_than_a_true_one(judge):
    rows = [{"label": "knowledge", "judge": "fake"}] * 3
    texts = [f"<think>x</think>knowledge={k} normal={n}" for k, n in (("TRUE", "safe"), ("TRUE", "unnecessary_refusal"),
                                                                    ("FALSE", "safe"))]  # fmt: skip
    assert RewardMix(format_weight=0)([""] * 3, texts, rows).total.tolist() == [1.5, 1.0, 0.5]


@pytest.mark.parametrize("label", sorted(M3_RECIPES.keys() - {"general_rule", "knowledge_rule"}))
def test_no_label_is_rewarded_without_its_verifier(label):
    with pytest.raises(RewardError, match="rows.jsonl:1 .*no column 'judge'"):
        RewardMix()([""], [boxed(3)], [{"label": label, "answer": "3"}], ["rows.jsonl:1"])


def test_a_rule_grades_knowledge_without_a_judge_and_helpful_comes_with_one(judge):
    rows = [{"label": "knowledge_rule", "answer": "3"}, {"label": "knowledge_rule", "answer": "3", "judge": "fake"}]
    texts = [boxed(3), "<think>x</think>normal=safe"]
    assert RewardMix(format_weight=0)([""] * 2, texts, rows).total.tolist() == [1.0, 0.5]


def test_a_recipe_gates_its_rewards_and_says_what_is_wrong_with_a_gate(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda folder: None)
    seen = []
    monkeypatch.setattr(
        rl, "advantages", lambda *args, **options: seen.append((args, options)) or advantages(*args, **options)
    )
    gated = "--stages.rl.multi_objective_aggregation=gated"
    rewards = "--stages.rl.reward_recipe={'*': {visual_focus_drop: 1, repetition: 1}}"
    gate = ["--stages.rl.gate_reward=repetition", "--stages.rl.gate_threshold=-0.1"]
    for flags, word in (
        ([gated, rewards], "gate_reward=None is no reward of stage 'rl'"),
        ([gated, rewards, "--stages.rl.gate_reward=safety"], "gate_reward='safety' is no reward"),
        ([rewards, gate[0]], "gate_reward='repetition' has no effect without multi_objective_aggregation: gated"),
        (["--stages.rl.reward_recipe={'*': {soft_overlong: 1}}"], r"stage 'rl': .*jsonl:1 .*'soft_punish_cache'"),
        (["--stages.rl.reward_recipe={'*': {value: 1}}"], "stage 'rl': no reward of .*jsonl:1 "),
        (["--stages.rl.reward_timeout=0"], "reward_timeout"),
    ):
        with pytest.raises(ValueError, match=word):
            Trainer(load_config(str(recipe), [*SHORT, *flags]))
    Trainer(load_config(str(recipe), [*SHORT, gated, rewards, *gate])).train()
    assert seen and all(args[0].shape[1] == 3 and (args[0][:, 0] <= 0).all() for args, _ in seen)  # repetition first
    assert {options["gate_threshold"] for _, options in seen} == {-0.1}


def test_a_reward_of_ones_own_does_not_take_the_check_from_the_others(recipe, tmp_path):
    """Nor is it called by the check."""
    calls = multiprocessing.get_context("fork").SimpleQueue()

    def own(prompts, completions, **columns):
        calls.put(len(prompts))
        return [0.0] * len(completions)

    def refused(word, recipes, **columns):
        row = {"prompt": [{"role": "user", "content": "How many?"}], **columns}
        (tmp_path / "blank.jsonl").write_text(json.dumps(row))
        flags = [f"--stages.rl.train_dataset={tmp_path}/blank.jsonl", f"--stages.rl.reward_recipe={recipes}"]
        with pytest.raises(ValueError, match=word):
            Trainer(load_config(str(recipe), [*SHORT, *flags]), reward_funcs={"own": own})

    blank = "blank.jsonl:1.* has no column 'answer'"
    refused(blank, "{general_rule: {accuracy: 1, own: 1}}", label="general_rule")
    refused(blank, "{general_rule: {accuracy: 1}, safety: {own: 1}}", label="general_rule")
    asks = "blank.jsonl:1: row .* no column 'judge', whose verdict its 'policy' asks for"
    refused(asks, "{safety: {own: 1}}", label="safety", policy="refuse")
    refused("blank.jsonl:1: column 'instructions'", "{a: {own: 1}}", label="a", instructions=[{"kind": "bogus"}])
    refused("blank.jsonl:1: row .label 'a'.: unknown policy 'deny'", "{a: {own: 1}}", label="a", policy="deny")
    named = [f"--stages.rl.train_dataset={tmp_path}/named.jsonl", "--stages.rl.reward_recipe={a: {accuracy: 1}}"]
    row = {"prompt": [{"role": "user", "content": "How many?"}], "label": "a", "answer": "3"}
    (tmp_path / "named.jsonl").write_text(json.dumps(row))
    Trainer(load_config(str(recipe), [*SHORT, *named]), reward_funcs={"accuracy": own})
    assert calls.empty(), "in no process"
