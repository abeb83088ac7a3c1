"""`cosmo-fast data`: every problem with its line before training, and rows from captions with the reasons for drops."""

import json
import shutil

import pytest
from PIL import Image

from cosmo_fast.cli import main
from cosmo_fast.config import load_config
from cosmo_fast.data import load_rows
from cosmo_fast.data.perception import build_row, key_items
from cosmo_fast.rewards import RewardMix
from cosmo_fast.trainer import Trainer


def lines_of(folder, *rows, name="rows.jsonl"):
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def row(text="How many?", **columns):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "images": ["a.png"]} | columns


GOOD = row(label="general_rule", answer="3", task="count")
BAD = {
    "no label": row(),
    "a label without a recipe": row(label="generl"),
    "no column 'answer'": row(label="general_rule"),
    "unknown judge 'me'": row(label="safety", policy="refuse", judge="me"),
    "unknown policy 'deny'": GOOD | {"policy": "deny"},
    "does not exist": GOOD | {"images": ["b.png"]},
    "neither 'messages' nor 'prompt'": {"label": "safety"},
}


def test_every_problem_is_told_with_its_line_and_the_status_is_one(tmp_path, capsys):
    path = lines_of(tmp_path, GOOD, *BAD.values(), GOOD)
    assert main(["data", "check", path]) == 1
    *problems, counts = capsys.readouterr().out.splitlines()
    for number, (what, problem) in enumerate(zip(BAD, problems, strict=True), 2):
        assert problem.startswith(f"rows.jsonl:{number}: ") and what in problem
    assert json.loads(counts)["problems"] == 7 and json.loads(counts)["task"] == {"count": 3}
    assert main(["data", "check", path, "--max-problems", "2"]) == 1
    assert capsys.readouterr().out.splitlines()[2] == "... and 5 more"


def test_a_good_file_passes_and_a_supervised_one_needs_no_label(tmp_path, capsys):
    told = row()
    told["messages"].append({"role": "assistant", "content": "<think>t</think>3"})
    assert main(["data", "check", lines_of(tmp_path, GOOD, told)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "rows": 2, "label": {"general_rule": 1}, "task": {"count": 1}, "problems": 0
    }  # fmt: skip
    assert main(["data", "check", str(tmp_path / "none.jsonl")]) == 2
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--stage", "rl"]) == 2
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--seed", "1"]) == 2


def test_a_recipe_brings_lengths_answers_and_its_own_labels_without_loading_weights(
    recipe, small_world, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(small_world / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    path = lines_of(tmp_path, GOOD, row("many " * 60, label="general_rule", answer="3"), row(label="safety"))
    given = ["data", "check", path, "--recipe", str(recipe), "--model_name_or_path", str(model)]
    given += ["--max_prompt_length", "50"]
    assert main([*given, "--stage", "rl"]) == 1
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("rows.jsonl:2: the prompt has") and "max_prompt_length=50" in first
    assert second.startswith("rows.jsonl:3: ") and "no column 'judge'" in second
    assert main([*given, "--stage", "cold"]) == 1
    assert capsys.readouterr().out.count("supervised row ends with an assistant message") == 2
    assert main([*given, "--stage", "rl", "--max_tokens_per_batch", "60"]) == 1
    assert "rows.jsonl:1: " in capsys.readouterr().out
    assert main([*given, "--stage", "rl", "--stages.rl.reward_recipe", "{safety: {accuracy: 1}}"]) == 1
    assert "rows.jsonl:1: row (label 'general_rule') has a label without a recipe" in capsys.readouterr().out
    pruned = ["--vision_prune.selector=frame_difference", "--vision_prune.keep=0.5"]
    assert main([*given, "--stage", "rl", *pruned]) == 1
    assert "rows.jsonl:1: vision_prune.selector=frame_difference takes" in capsys.readouterr().out
    assert main(given) == 2 and "--stage" in capsys.readouterr().err
    assert main([*given[:3], "--recipe", str(recipe), "--stage", "none"]) == 2


def test_a_file_that_stages_name_is_checked_for_all_of_them(recipe, small_world, capsys, monkeypatch):
    for name in ("train", "rl_safety", "rl", "scenes"):  # SFT, RL twice, evaluation
        assert main(["data", "check", str(small_world / f"{name}.jsonl"), "--recipe", str(recipe)]) == 0
    assert main(["data", "check", str(small_world / "reading.jsonl"), "--recipe", str(recipe)]) == 2
    monkeypatch.setattr("cosmo_fast.world.ensure_world", lambda **_: small_world)
    capsys.readouterr()
    flags = ["--stages.rl.train_dataset", "world:rl.jsonl"]
    assert main(["data", "check", "world:rl.jsonl", "--recipe", str(recipe), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len((small_world / "rl.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "setting, what",
    [("label_weights={safety: 1, normal: 1}", "has no weight for the label 'general_rule'"),
     ("curriculum={column: hardness, from: 0.5}", "curriculum.column='hardness' must be a number")],
)  # fmt: skip
def test_check_tells_what_the_stages_rules_cannot_draw(setting, what, recipe, tmp_path, capsys):
    path = lines_of(tmp_path, GOOD)
    flags = ["--stages.rl.train_dataset", path, f"--stages.rl.{setting}"]
    with pytest.raises(ValueError, match=what):
        Trainer(load_config(str(recipe), flags))
    assert main(["data", "check", path, "--recipe", str(recipe), *flags]) == 1
    assert what in capsys.readouterr().out


def test_check_takes_rows_that_fit_pruned_as_the_trainer_does(recipe, tmp_path):
    """448 pixels are 64 vision tokens, of which one stays."""
    Image.new("RGB", (448, 448)).save(tmp_path / "large.png")
    path = lines_of(tmp_path, row(label="general_rule", answer="3", images=["large.png"]))
    flags = [f"--stages.rl.train_dataset={path}", "--max_completion_length=56", "--max_tokens_per_batch=110"]
    assert main(["data", "check", path, "--recipe", str(recipe), *flags]) == 1
    flags += ["--vision_prune={selector: uniform, keep: 1}"]
    Trainer(load_config(str(recipe), flags))
    assert main(["data", "check", path, "--recipe", str(recipe), *flags]) == 0


@pytest.mark.parametrize("what", [w for w in BAD if "policy" not in w])
def test_the_trainer_refuses_what_check_tells_in_the_same_words(what, recipe, tmp_path, capsys):
    path = lines_of(tmp_path, GOOD, BAD[what])
    flags = ["--stages.rl.train_dataset", path]
    with pytest.raises(ValueError) as refused:
        Trainer(load_config(str(recipe), flags))
    assert main(["data", "check", path, "--recipe", str(recipe), *flags]) == 1
    told = capsys.readouterr().out.splitlines()[0]
    assert what in told and what in str(refused.value)


CAPTION = {
    "image": "a.png", "caption": "Three red apples lie on a table", "question": "How many apples are there?",
    "answer": "3", "detections": ["apple", "apple", {"label": "apple", "attribute": "red"}, "knife"], "ocr": ["SALE"],
    "source": "mine",
}  # fmt: skip


def test_a_caption_becomes_a_row_whose_quality_is_the_papers_sum():
    made, scores = build_row(CAPTION)
    # By hand: of the four detections and one text the caption mentions apple, apple and red apple.
    assert scores == {"format": 1, "consistency": 1, "answer": 1, "agreement": 3 / 5}
    [asked, told] = made["messages"]
    assert asked["content"] == [{"type": "image"}, {"type": "text", "text": "How many apples are there?"}]
    description = 'Three red apples lie on a table. Objects: 2 apple, red apple, knife. Text in the picture: "SALE".'
    assert told["content"] == (
        f"<description>{description}</description><think>Three red apples lie on a table. Objects: 2 apple, red apple, "
        "knife. So the answer is 3.</think><answer>3</answer>"
    )
    assert made["facts"]["visual"] == ["2 apple", "red apple", "knife", "SALE"]
    assert made["facts"]["textual"] == ["apple"]
    assert made["steps"]["knife"] == "Objects: 2 apple, red apple, knife."
    assert made["source"] == "mine" and made["answer"] == "3" and "caption" not in made
    wrong, scores = build_row(CAPTION | {"answer": "7", "reasoning": "I count seven green pears there."})
    # Of 7, count, green, pear nothing stands in the description or the question.
    assert (scores["consistency"], scores["answer"]) == (0, 1)


def test_the_facts_of_a_caption_are_those_that_rewards_take():
    made, _ = build_row(CAPTION | {"question": "How many apples do you and I see without help?", "ocr": ["!", "SALE"]})
    recipe = {"*": dict.fromkeys(("visual_key", "textual_key", "consistency"), 1)}
    told = made["messages"][-1]["content"]
    mixed = RewardMix(recipe, format_weight=0)([made["messages"][0]["content"][1]["text"]], [told], [made])
    assert mixed.matrix[0].tolist() == [1, 0, 1]
    assert made["facts"]["textual"] == ["apple", "see", "help"] and "SALE" in made["facts"]["visual"]


def test_key_items_fold_plurals_and_numbers():
    assert key_items("The two glasses, 2 Boxes and a bus: 3.5 kg") == ["2", "glasse", "boxe", "bus", "3.5", "kg"]


def test_what_is_dropped_is_counted_by_its_reason(tmp_path, capsys):
    bad = [
        {"answer": ""}, {"image": None}, {"image": "b.png"}, {"answer": "<think>3"}, {"detections": 3},
        {"answer": "7", "reasoning": "Seven green pears hang there."}, {"question": "Why?", "answer": "love"},
    ]  # fmt: skip
    path = lines_of(tmp_path, CAPTION, *(CAPTION | change for change in bad), name="captions.jsonl")
    out = tmp_path / "out.jsonl"
    assert main(["data", "build-perception", path, str(out), "--threshold", "0.7"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["kept"]) == (8, 1)
    reasons = list(result["dropped"])
    for what in (
        "no answer", "no image", "'b.png' does not exist", "for format", "detections is not a list",
        "quality below 0.7, most for consistency", "no sentence of the description bears on the question",
    ):  # fmt: skip
        assert sum(what in reason for reason in reasons) == 1, (what, reasons)
    [kept] = load_rows(out, needs_answer=True)
    assert kept.columns["quality"] == pytest.approx(0.95 + 0.05 * 3 / 5)
    assert main(["data", "build-perception", path, str(out)]) == 2  # out is there
    assert main(["data", "build-perception", path, str(tmp_path / "x"), "--threshold", "1"]) == 2  # nothing is left
    assert main(["data", "build-perception", path, str(tmp_path / "x"), "--threshold", "7"]) == 2
