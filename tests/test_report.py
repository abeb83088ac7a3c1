"""What a run leaves behind: finite JSON lines, progress that reads the same anywhere, legible curves and sheets."""

import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from rich.console import Console

from cosmo_fast.evaluate import score
from cosmo_fast.report import (
    MetricsWriter,
    Progress,
    plot_run,
    read_metrics,
    stage_table,
    write_plots,
    write_samples,
    write_summary,
)
from cosmo_fast.report.console import clock, plain_console
from cosmo_fast.report.plots import trailing_mean
from cosmo_fast.report.samples import sheet, wrap


def metrics(stages=(("sft", 6), ("rl-mixed", 8))) -> list[dict]:
    rows = []
    for index, (stage, steps) in enumerate(stages):
        for step in range(1, steps + 1):
            row = {"stage": stage, "stage_index": index, "step": step, "global_step": len(rows) + 1, "loss": 1 / step}
            if stage != "sft":
                row |= {"reward": 1.5, "rewards/accuracy/mean": 0.5, "rewards/safety/mean": None, "accuracy": step / 10}
                row |= {"safety/safe_rate": 0.9, "safety/over_refusal_rate": 0.1, "perf/tokens_per_s": 9000.0}
            rows.append(row)
    return rows


def summary() -> dict:
    stages = []
    for name, answers in (("sft", "1112"), ("rl", "1111")):
        rows = [{"answer": "1", "task": "count"}] * 4
        result = score(rows, [f"<think>x</think>\\boxed{{{answer}}}" for answer in answers])
        stages.append({"name": name, "seconds": 3700.0, "splits": {"scenes": result}})
    return {"seed": 0, "stages": stages}


def test_metrics_are_finite_or_null_and_on_disk_after_every_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            {"global_step": 1, "nan": math.nan, "inf": -math.inf, "t": torch.tensor(2.0), "n": np.float32("nan")}
        )
        line = path.read_text()
        writer.write({"global_step": 2, "nested": {"a": [np.int64(3), math.inf]}, "stage": "größer"})
    assert json.loads(line) == {"global_step": 1, "nan": None, "inf": None, "t": 2.0, "n": None}
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert read_metrics(path)[1] == {"global_step": 2, "nested": {"a": [3, None]}, "stage": "größer"}


@pytest.mark.parametrize("step", [None, 1.0, "1", True])
def test_a_row_without_an_integer_step_is_refused(tmp_path, step):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="global_step"):
        writer.write({"global_step": step})


def test_a_value_that_is_no_json_is_refused_and_writes_nothing(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(TypeError, match="set"):
        writer.write({"global_step": 1, "x": {1}})
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_resume_drops_the_later_rows_and_a_line_cut_by_a_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.write({"global_step": step, "run": 1})
    with path.open("ab") as file:
        file.write('{"global_step": 6, "stage": "grö'.encode()[:-1])
    with MetricsWriter(path, resume_step=3) as writer:
        writer.write({"global_step": 4, "run": 2})
    assert [(row["global_step"], row["run"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_does_not_append_to_an_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"global_step": 1})
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        MetricsWriter(path)
    assert len(read_metrics(path)) == 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"global_step": 1}\n{"glo\n{"global_step": 3}\n')
    with pytest.raises(ValueError, match="m.jsonl:2"):
        read_metrics(tmp_path / "m.jsonl")


def test_the_summary_is_strict_json(tmp_path):
    write_summary(tmp_path / "summary.json", summary() | {"x": math.nan})
    text = (tmp_path / "summary.json").read_text()
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert loaded["x"] is None and loaded["stages"][1]["splits"]["scenes"]["accuracy"] == 1.0


def run_progress(stream, rows=None, every=4) -> None:
    with Progress([("sft", 6), ("rl [bold]", 8)], every=every, stream=stream) as report:
        for row in rows or metrics()[6:]:
            report.update(row)
        report.note("done [/x] in /runs/demo")
        report.table(summary())


def test_a_plain_stream_gets_one_line_every_few_steps_and_no_control_codes():
    stream = io.StringIO()
    run_progress(stream)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines[:2]] == [["[2/2] rl [bold]", "4/8"], ["[2/2] rl [bold]", "8/8"]]
    # accuracy of the steps 5 to 8 is .5 to .8
    for value in ("reward 1.500", "accuracy 0.650", "safe 0.900", "over-refusal 0.100", "tokens/s 9,000", "left 0:00"):
        assert value in lines[1]
    assert lines[2] == "done [/x] in /runs/demo"
    assert "\x1b" not in stream.getvalue()


def test_a_progress_line_leaves_out_what_no_step_measured():
    stream = io.StringIO()
    row = {"stage_index": 0, "step": 4, "loss": 1.0, "reward": None, "accuracy": math.nan}
    run_progress(stream, [row])
    first = stream.getvalue().splitlines()[0]
    assert "loss 1.000" in first and "reward" not in first and "nan" not in first


def test_the_values_of_one_stage_do_not_leak_into_the_next():
    stream = io.StringIO()
    run_progress(stream, [{"stage_index": 0, "step": 5, "loss": 9.0}, {"stage_index": 1, "step": 4, "loss": 1.0}])
    assert stream.getvalue().startswith("[2/2] rl [bold]  4/8  loss 1.000")


def test_tokens_a_second_of_several_steps_weigh_each_step_by_its_time():
    stream = io.StringIO()
    row = {"stage_index": 0, "perf/tokens_per_s": 100.0, "step_time": 3.0}
    run_progress(stream, [row | {"step": 3}, row | {"step": 4, "perf/tokens_per_s": 0.0, "step_time": 1.0}])
    assert "tokens/s 75" in stream.getvalue()


def test_a_terminal_gets_a_live_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    run_progress(stream, metrics())
    for text in ("\x1b", "6/6", "8/8", "accuracy 0.650"):
        assert text in stream.getvalue()


def test_the_time_left_is_that_of_the_remaining_steps(monkeypatch):
    now = iter(range(100, 1000, 2))
    monkeypatch.setattr("cosmo_fast.report.console.time.monotonic", lambda: next(now))
    report = Progress([("sft", 10)], stream=io.StringIO())
    report.update({"stage_index": 0, "step": 5})  # resumed
    assert report.seconds_left() is None
    report.update({"stage_index": 0, "step": 6})
    assert report.seconds_left() == 8.0
    assert (clock(59.6), clock(3599), clock(3725)) == ("1:00", "59:59", "1:02:05")


def test_progress_every_zero_steps_is_refused():
    with pytest.raises(ValueError, match="every 0"):
        Progress([], every=0)


def test_the_table_shows_each_stage_its_interval_and_the_change():
    stream = io.StringIO()
    plain_console(stream).print(stage_table(summary()))
    text = stream.getvalue()
    assert "0.750 [0.30, 0.95]" in text and "1.000 [0.51, 1.00]" in text and "+0.250" in text and "1:01:40" in text
    assert "warned help" not in text  # measured nowhere


def test_a_narrow_terminal_gets_the_table_without_intervals():
    report = Progress([], stream=io.StringIO())
    report.console = Console(file=io.StringIO(), width=60)
    report.table(summary())
    lines = report.console.file.getvalue().splitlines()
    assert any("0.750" in line for line in lines) and not any("[0.30" in line for line in lines)


def test_a_table_of_one_stage_or_of_other_splits_later_is_drawn():
    one = summary()["stages"][:1]
    late = [one[0], {"name": "rl", "splits": {"style": one[0]["splits"]["scenes"]}}]
    for stages in (one, late):
        stream = io.StringIO()
        plain_console(stream).print(stage_table({"stages": stages}))
        assert "0.750" in stream.getvalue()


def test_stages_without_an_evaluation_get_no_table():
    report = Progress([], stream=io.StringIO())
    report.console = Console(file=io.StringIO(), width=60)
    report.table({"stages": [{"name": "rl", "splits": {}}]})
    assert not report.console.file.getvalue()


def test_trailing_mean_is_the_mean_of_the_last_values():
    values = np.array([1.0, 2.0, 3.0, 10.0])
    assert trailing_mean(values, 2).tolist() == [1.0, 1.5, 2.5, 6.5]
    assert trailing_mean(values, 1).tolist() == values.tolist()
    assert trailing_mean(values, 99).tolist() == [1.0, 1.5, 2.0, 4.0]


def test_every_curve_that_has_values_is_drawn_from_the_file(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for row in metrics():
            writer.write(row)
    paths = write_plots(tmp_path)
    assert [path.stem for path in paths] == ["reward", "rewards", "safety", "accuracy", "loss", "overview"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width >= 900
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_one_step_is_enough_for_a_plot(tmp_path):
    assert plot_run(metrics()[-1:], tmp_path, smoothing=1)


def test_a_curve_that_begins_after_its_stage_has_room_for_the_stage_s_name(tmp_path):
    rows = [{"global_step": 1, "stage": "rl", "loss": 1.0}, {"global_step": 99, "stage": "rl", "rollout/kl": 0.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, where what lies outside leaves the axes no room
        assert {path.stem for path in plot_run(rows, tmp_path, smoothing=1)} == {"kl", "loss", "overview"}


def test_nothing_to_plot_and_no_smoothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="2 metrics rows"):
        plot_run([{"global_step": 1, "loss": None}, {"global_step": 2}], tmp_path)
    with pytest.raises(ValueError, match="smoothing = 0"):
        plot_run(metrics(), tmp_path, smoothing=0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def samples(tmp_path) -> list[dict]:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    Image.new("RGB", (500, 100), "blue").save(tmp_path / "b.png")
    first = {"id": "s1", "label": "safety", "prompt": "What is this?", "response": "<think>x</think>a red square"}
    first |= {
        "images": [tmp_path / "a.png"],
        "reward": torch.tensor(1.5),
        "rewards": {"format": 1.0, "safety": None, "helpful": math.nan},
    }
    second = {"prompt": "Grüße\n" * 40, "response": "x" * 5000, "images": [tmp_path / "b.png"] * 5, "reward": 0.0}
    return [first, second, {"prompt": "no picture", "response": "", "reward": None}]


def test_samples_are_written_in_full_with_their_pictures_and_rewards(tmp_path, samples):
    lines, picture = write_samples(tmp_path / "samples", 123, samples)
    assert (lines.name, picture.name) == ("step-000123.jsonl", "step-000123.png")
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["rewards"] == {"format": 1.0, "safety": None, "helpful": None}
    assert rows[0]["reward"] == 1.5 and rows[0]["images"] == [str(tmp_path / "a.png")] and rows[0]["step"] == 123
    assert rows[1]["response"] == "x" * 5000 and rows[2]["images"] == []
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours


def test_the_sheet_shows_so_many_samples_and_each_adds_a_block(samples):
    heights = [sheet(samples[:count], title="t").height for count in (1, 2, 3)]
    assert heights == sorted(heights) and len(set(heights)) == 3


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="step 7: no samples"):
        write_samples(tmp_path, 7, [])


@pytest.mark.parametrize(
    "text", ["a few short words " * 30, "x" * 700, "one\n\ntwo\nthree", "", " " * 500, "tab\there\x00"]
)
def test_wrapped_lines_fit_and_lose_nothing_but_spaces(text):
    font = ImageFont.load_default(16)
    lines = wrap(text, font, 300, 100)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.replace("\x00", " ").split())


def test_a_cut_text_says_how_much_is_missing_and_still_fits():
    font = ImageFont.load_default(16)
    text = "word " * 400
    lines = wrap(text, font, 300, 3)
    assert len(lines) == 3 and all(font.getlength(line) <= 300 for line in lines)
    shown, note = "".join(lines[:2]), lines[2]
    left = int(note.split("(")[1].split(" ")[0].replace(",", ""))
    kept = len(shown) + len(note.split(" … ")[0])
    assert abs(kept + left - len(text)) <= 3  # the spaces at the ends of the lines
