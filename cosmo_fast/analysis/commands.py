"""``cosmo-fast analyse peaks | recovery | rewards``"""

import argparse
import json
from pathlib import Path


def add(commands, positive) -> list[argparse.ArgumentParser]:
    """The sub-commands' arguments (positive: type of counts); returns those that sample and take evaluate's bounds."""
    about = commands.add_parser("analyse", help="what a trained policy does inside")
    actions = about.add_subparsers(dest="action", required=True)
    peaks = actions.add_parser("peaks", help="where responses to harmful rows tell most about a safe answer")
    back = actions.add_parser("recovery", help="safe answers to harmful rows after a forced unsafe first step")
    for sub, what in ((peaks, "a model folder"), (back, "a model folder, or a run folder for the end of each stage")):
        sub.add_argument("checkpoint", help=what)
        sub.add_argument("data", help="a JSONL file of rows; those with policy refuse are harmful")
        sub.add_argument("--image-root", help="folder of the pictures; default: the folder of DATA")
        sub.add_argument("--limit", type=positive, help="first rows only")
        sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
        sub.add_argument("--seed", type=int, default=0)
    peaks.add_argument("out_dir", help="folder for peaks.json and peaks.png")
    rewards = actions.add_parser("rewards", help="how the rewards of a run correlate, and their share of the advantage")
    rewards.add_argument("run_folder", help="of a run with an rl stage")
    return [peaks, back]


def run(options: argparse.Namespace) -> None:
    """Runs one and prints JSON; what peaks finds in each response goes to ``out_dir`` alone."""
    from cosmo_fast.analysis.information import peaks, plot_peaks
    from cosmo_fast.analysis.recovery import recovery, stage_ends
    from cosmo_fast.analysis.rewards import reward_summary
    from cosmo_fast.data import load_rows
    from cosmo_fast.models import load_policy
    from cosmo_fast.models.vision import Vision
    from cosmo_fast.pruning import VisionPrune
    from cosmo_fast.report import write_summary
    from cosmo_fast.rollout import Sampler, SamplingParams
    from cosmo_fast.verifiers.engine import Verifiers, flagged

    if options.action == "rewards":
        print(json.dumps(reward_summary(Path(options.run_folder)), indent=1))
        return
    rows = load_rows(options.data, image_root=options.image_root, limit=options.limit)
    params = SamplingParams(options.max_completion_length, options.temperature)
    asked = {"seed": options.seed, "vision_prune": VisionPrune.parse(options.vision_prune)}
    folder, own = Path(options.checkpoint).absolute(), flagged(options, rows)
    for stage, path in stage_ends(folder) if options.action == "recovery" else [(folder.name, folder)]:
        policy = load_policy(path, device=options.device)
        asked["verifiers"] = Verifiers(own, device=policy.device) if own.verifiers else None
        bounds = {"batch_size": options.batch_size, "kv_cache_mib": options.kv_cache_mib}
        action = recovery if options.action == "recovery" else peaks
        found = action(policy, Sampler(policy, Vision(policy), **bounds), rows, params, **asked)
        if options.action == "peaks":
            out = Path(options.out_dir)
            out.mkdir(parents=True, exist_ok=True)
            write_summary(out / "peaks.json", found)
            plot_peaks(found, out / "peaks.png")
            found = {**json.loads((out / "peaks.json").read_text()), "responses": str(out / "peaks.json")}
        print(json.dumps({"stage": stage, **found}, indent=1), flush=True)
