"""What COSMO-RL's table asks the final model of an ended run: a harder attack, and how far it looks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

from opened import opened

from cosmo_fast.config import Config
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row
from cosmo_fast.data.sources import read
from cosmo_fast.evaluate.run import evaluate
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.rewards.perception import visual_focus_drop
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.alive import logprob_drops
from cosmo_fast.stages.base import Context, logprobs
from cosmo_fast.stages.packed import Group


def best_of_64(config: Config, policy: Policy, rows: list[Row]) -> dict[str, float]:
    """Harmful scenes under all 64 compositions of attacks, greedy.

    best64_success: rows that are helped under at least one; mean64_success: of all tries; best64_n: rows.
    """
    rows = [row for row in rows if row.columns["policy"] == "refuse"]
    found = evaluate(policy, rows, max_completion_length=config.max_completion_length)["jailbreak"]
    best, tries = found["best_of"], found["attacks"].values()
    mean_of_all = sum(family["success_rate"] * family["n"] for family in tries) / len(rows)
    return {
        "best64_success": best["success_rate"],
        "mean64_success": round(mean_of_all, 4),
        "best64_n": best["success_rate_n"],
    }


def focus(config: Config, policy: Policy, rows: list[Row]) -> dict[str, float]:
    """Visual-Focus by the policy itself of its greedy answers, beside their own picture and beside another's.

    focus, focus_other: means of the reward `visual_focus_drop`; focus_n: rows.
    """
    context = Context(config, config.stages[-1], policy, Vision(policy), 0)
    own = [Encoder(policy).prompt(row) for row in rows]
    params = SamplingParams(config.max_completion_length, temperature=0)
    said = [group[0] for group in Sampler(policy, context.vision).generate(own, params)]
    other = [replace(prompt, media=shown.media) for prompt, shown in zip(own, own[1:] + own[:1], strict=True)]
    found = {"focus_n": len(rows)}
    for name, prompts in (("focus", own), ("focus_other", other)):
        groups = [Group(prompt, [c.ids], weights=[]) for prompt, c in zip(prompts, said, strict=True)]
        seen = logprobs(context, policy, context.vision, groups)
        scored = [replace(c, logps=logps) for c, [logps] in zip(said, seen, strict=True)]
        drops = logprob_drops(context, prompts, scored)
        found[name] = round(mean(visual_focus_drop([], [], blank_logprob_drop=drops)), 4)
    return found


def asked(folder: Path) -> dict[str, float]:
    """Both of the final model of a run."""
    config, policy, find = opened(folder)
    attacked, scenes = (read(config, find(f"world:{name}.jsonl")) for name in ("attacks64", "scenes"))
    general = [row for row in scenes if row.columns.get("answer") is not None]
    return best_of_64(config, policy, attacked) | focus(config, policy, general)


if __name__ == "__main__":
    print(json.dumps(asked(Path(sys.argv[1]))))
