"""Runs of the recipe in conftest.py cut down to five steps: one that goes through, one that is stopped and resumed."""

import json
import zlib

import pytest

from cosmo_fast import report
from cosmo_fast.config import load_config
from cosmo_fast.trainer import Trainer

SHORT = ["--stages.cold.max_steps=2", "--stages.rl.max_steps=3", "--eval={}", "--max_completion_length=36"]
SHORT += ["--save_steps=1"]
RANDOM = "--stages.rl.reward_recipe={'*': {chance: 1}}"  # what a fresh model says earns nothing elsewhere
AT = 4  # global steps before the stop, in the second stage
TIMED = ("timing", "perf", "step_time")


def chance(prompts, completions, **columns):
    return [zlib.crc32(text.encode()) % 7 for text in completions]


def trainer(recipe, flags):
    return Trainer(load_config(str(recipe), [*SHORT, RANDOM, *flags]), reward_funcs={"chance": chance})


def whole_and_resumed(recipe, flags, folder, monkeypatch):
    """Both trainers and the rows of metrics, which are the same in both but for times."""
    monkeypatch.setattr(report, "write_plots", lambda folder: None)
    whole = trainer(recipe, [*flags, f"--output_dir={folder}/whole"])
    whole.train()
    flags = [*flags, f"--output_dir={folder}/cut"]
    step = Trainer._step

    def stops(self, *arguments):
        if self.global_step == AT:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            trainer(recipe, flags).train()
    again = trainer(recipe, [*flags, "--resume_from_checkpoint=true"])
    again.train()
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)}
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]
    for a, b in zip(*rows, strict=True):
        assert a == b
    assert len(rows[0]) == 5
    assert [row for row in rows[0] if not row["grad_norm"] > 0] == []
    return whole, again, rows[0]
