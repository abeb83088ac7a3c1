"""Evaluates one policy under every selector and keep of the table, its pictures encoded once.

    python benchmarks/reproduce/prune_sweep.py RUN_FOLDER OUTPUT_DIR --seed N

The rows are those that the run was evaluated on. Leaves a summary.json as training does, one stage a setting. Of clips
it also says which share of the tokens that differ from the frame before is kept, whatever the policy makes of them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from opened import opened
from PIL import Image
from prune import KEEPS, SWEPT, name, vision_kv

from cosmo_fast.checkpoint import replace_text
from cosmo_fast.data.rows import Row
from cosmo_fast.data.sources import read
from cosmo_fast.doctor import environment
from cosmo_fast.evaluate.run import complete, evaluate
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import SamplingParams

CELL = 28  # pixels of a vision token's side


def changed(row: Row) -> np.ndarray:
    """Of a clip's vision tokens, frame by frame: whether their pixels are others than in the frame before (bool)."""
    frames = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in row.images])
    moved = np.zeros(frames.shape[:3], dtype=bool)
    moved[1:] = (frames[1:] != frames[:-1]).any(-1)
    side = frames.shape[1] // CELL
    return moved.reshape(len(frames), side, CELL, side, CELL).any((2, 4)).reshape(-1)


def changed_kept(policy: Policy, rows: list[Row], setting: VisionPrune | None, vision: Vision) -> float:
    """Mean over the clips of the share of changed tokens that the setting keeps."""
    once = SamplingParams(1, temperature=0)
    _, sampled = complete(policy, rows, once, vision_prune=setting, vision=vision)
    pairs = [(changed(row), c.kept) for row, c in zip(rows, sampled, strict=True)]
    return float(np.mean([1.0 if kept is None else moved[kept.rows].sum() / moved.sum() for moved, kept in pairs]))


def main() -> None:
    """A sweep takes minutes: one that was stopped begins anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    config, policy, find = opened(options.run)
    splits = {split: read(config, find(path)) for split, path in config.eval.datasets.items()}
    shared = {"max_completion_length": config.max_completion_length, "vision": Vision(policy)}  # features are kept
    swept = [(selector, keep, layer) for keep in KEEPS for selector, layer in (*SWEPT, ("frame_difference", 0))]
    stages = []
    for selector, keep, layer in [("all", 1.0, 0), *swept]:
        began = time.perf_counter()
        setting = None if selector == "all" else VisionPrune(selector=selector, keep=keep, layer=layer)
        over = ["clips"] if selector == "frame_difference" else list(splits)
        found = {split: evaluate(policy, splits[split], vision_prune=setting, **shared) for split in over}
        cost = {"vision_kept": keep, "vision_kv_kib": vision_kv(keep, layer)}
        cost["changed_kept"] = round(changed_kept(policy, splits["clips"], setting, shared["vision"]), 4)
        seconds = time.perf_counter() - began
        stages.append({"name": name(selector, keep, layer), "seconds": seconds, "splits": found, "measured": cost})
        print(name(selector, keep, layer), {split: scores["accuracy"] for split, scores in found.items()}, flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    summary = {"seed": options.seed, "stages": stages, "environment": environment()}
    replace_text(options.output_dir / "summary.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
