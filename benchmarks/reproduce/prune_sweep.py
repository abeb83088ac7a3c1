"""Evaluates one policy under every selector and keep of the table, its pictures encoded once.

    python benchmarks/reproduce/prune_sweep.py RUN_FOLDER OUTPUT_DIR --seed N

The rows are those that the run was evaluated on. Leaves a summary.json as training does, one stage a setting.
"""

import argparse
import json
import time
from pathlib import Path

from prune import KEEPS, SWEPT, name

from cosmo_fast.checkpoint import replace_text
from cosmo_fast.config import load_config
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.sources import read, world_resolver
from cosmo_fast.distributed import Ranks
from cosmo_fast.doctor import environment
from cosmo_fast.evaluate import score
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Sampler, SamplingParams


def evaluate(policy, vision, rows, config, setting: VisionPrune | None) -> tuple[dict, dict]:
    """(scores of greedy completions, what a prompt costs: vision rows kept, MiB of keys and values)."""
    encoder = Encoder(policy, vision_prune=setting)
    prompts = [encoder.prompt(row) for row in rows]
    sampler = Sampler(policy, vision, max_tokens=config.max_tokens_per_batch, kv_cache_mib=config.kv_cache_mib)
    groups = sampler.generate(prompts, SamplingParams(config.max_completion_length, temperature=0))
    texts = policy.tokenizer.batch_decode([group[0].ids for group in groups], skip_special_tokens=True)
    kept = sum(p.kept.count if p.kept else p.vision_rows for p in prompts) / sum(p.vision_rows for p in prompts)
    return score([row.columns for row in rows], texts), {"vision_kept": kept, "kv_mib": sampler.kv_bytes / 2**20}


def main() -> None:
    """Skips nothing: a sweep is short, and begins anew where it was stopped."""
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
    vision = Vision(policy)
    settings: list[tuple] = [("all-100", None)]
    for keep in KEEPS:
        for selector, layer in (*SWEPT, ("frame_difference", 0)):
            settings.append((name(selector, keep, layer), VisionPrune(selector=selector, keep=keep, layer=layer)))
    stages = []
    for stage, setting in settings:
        began, found = time.perf_counter(), {}
        for split in ["clips"] if "frame_difference" in stage else splits:
            found[split], cost = evaluate(policy, vision, splits[split], config, setting)
        print(stage, {split: scores["accuracy"] for split, scores in found.items()}, cost, flush=True)
        seconds = time.perf_counter() - began
        stages.append({"name": stage, "seconds": seconds, "splits": found, "measured": cost})
    options.output_dir.mkdir(parents=True, exist_ok=True)
    summary = {"seed": options.seed, "stages": stages, "environment": environment()}
    replace_text(options.output_dir / "summary.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
