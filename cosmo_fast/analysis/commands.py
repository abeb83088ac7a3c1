"""``cosmo-fast analyse peaks | recovery | rewards``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(commands) -> list[argparse.ArgumentParser]:
    """The sub-commands' arguments; returns those that sample, which take evaluate's bounds too."""
    actions = commands.add_parser("analyse", help="what a trained policy does inside").add_subparsers(
        dest="action", required=True
    )
    peaks = actions.add_parser("peaks", help="where responses to harmful rows tell most about a safe answer")
    peaks.add_argument("checkpoint", help="a Hugging Face model folder")
    back = actions.add_parser("recovery", help="safe answers to harmful rows after a forced unsafe first step")
    back.add_argument("checkpoint", help="a model folder, or a run folder: then after each of its stages")
    for sub in (peaks, back):
        sub.add_argument("data", help="a JSONL file of rows; those with policy refuse are harmful")
        sub.add_argument("--image-root", help="folder of the pictures; default: the folder of DATA")
        sub.add_argument("--limit", type=int, help="first rows only")
        sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
        sub.add_argument("--seed", type=int, default=0)
    peaks.add_argument("out_dir", help="folder for peaks.json and peaks.png")
    rewards = actions.add_parser("rewards", help="how the rewards of a run correlate, and their share of the advantage")
    rewards.add_argument("run_folder", help="of a run with an rl stage")
    return [peaks, back]


def run(options: argparse.Namespace) -> None:
    """Runs one and prints JSON; peaks writes its responses into ``out_dir`` only."""
    from cosmo_fast.analysis import peaks, plot_peaks, recovery, reward_summary, stage_ends
    from cosmo_fast.data import load_rows
    from cosmo_fast.models import load_policy
    from cosmo_fast.pruning import VisionPrune
    from cosmo_fast.report.metrics import finite, write_summary
    from cosmo_fast.rollout import SamplingParams

    if options.action == "rewards":
        print(json.dumps(reward_summary(Path(options.run_folder)), indent=1))
        return
    rows = load_rows(options.data, image_root=options.image_root, limit=options.limit)
    params = SamplingParams(options.max_completion_length, options.temperature)
    asked = {name: getattr(options, name) for name in ("seed", "batch_size", "kv_cache_mib")}
    asked["vision_prune"] = VisionPrune.parse(options.vision_prune)
    folder = Path(options.checkpoint).absolute()
    if options.action == "recovery":
        for stage, path in stage_ends(folder):
            found = recovery(load_policy(path, device=options.device), rows, params, **asked)
            print(json.dumps({"stage": stage, "checkpoint": str(path)} | finite(found), indent=1), flush=True)
        return
    found, out = peaks(load_policy(folder, device=options.device), rows, params, **asked), Path(options.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_summary(out / "peaks.json", found)
    plot_peaks(found, out / "peaks.png")
    del found["responses"]
    print(json.dumps(finite(found | {"positions": [p for p in found["positions"] if p["peak"]]}), indent=1))
