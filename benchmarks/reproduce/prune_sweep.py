"""Evaluates one policy under every selector and keep of the table, its pictures encoded once.

    python benchmarks/reproduce/prune_sweep.py RUN_FOLDER OUTPUT_DIR --seed N

The rows are those that the run was evaluated on. Leaves a summary.json as training does, one stage a setting.
"""

import argparse
import json
import time
from pathlib import Path

from prune import KEEPS, SWEPT, name, vision_kv

from cosmo_fast.checkpoint import replace_text
from cosmo_fast.config import load_config
from cosmo_fast.data.sources import read, world_resolver
from cosmo_fast.distributed import Ranks
from cosmo_fast.doctor import environment
from cosmo_fast.evaluate.run import evaluate
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.pruning import VisionPrune


def main() -> None:
    """A sweep takes minutes: one that was stopped begins anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    config = load_config(str(options.run / "config.yaml"))
    resolve = world_resolver(config, Ranks(None))
    splits = {split: read(config, resolve(path)) for split, path in config.eval.datasets.items()}
    policy = load_policy(options.run.absolute(), device=config.device)
    policy.freeze_vision_tower(True)  # features are kept from one setting to the next
    shared = {"max_completion_length": config.max_completion_length, "vision": Vision(policy)}
    swept = [(selector, keep, layer) for keep in KEEPS for selector, layer in (*SWEPT, ("frame_difference", 0))]
    stages = []
    for selector, keep, layer in [("all", 1.0, 0), *swept]:
        began = time.perf_counter()
        setting = None if selector == "all" else VisionPrune(selector=selector, keep=keep, layer=layer)
        over = ["clips"] if selector == "frame_difference" else list(splits)
        found = {split: evaluate(policy, splits[split], vision_prune=setting, **shared) for split in over}
        cost = {"vision_kept": keep, "vision_kv_kib": vision_kv(keep, layer)}
        seconds = time.perf_counter() - began
        stages.append({"name": name(selector, keep, layer), "seconds": seconds, "splits": found, "measured": cost})
        print(name(selector, keep, layer), {split: scores["accuracy"] for split, scores in found.items()}, flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    summary = {"seed": options.seed, "stages": stages, "environment": environment()}
    replace_text(options.output_dir / "summary.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
