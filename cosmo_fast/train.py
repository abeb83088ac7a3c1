"""``python -m cosmo_fast.train --config RECIPE [--key.sub value ...] [--dry-run]``"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

import yaml

ABOUT = """Train a recipe. Any setting of it can be given as a flag, --key.sub value, and wins over the file; a stage
goes by its name: --seed 1 --eval.limit 200 --stages.rl.max_steps 100. --dry-run checks the recipe, the model and all
rows and prints the settings, the batch arithmetic, the predicted peak of memory and the first prompt; it writes no run
folder."""


def quiet() -> None:
    """No progress bars of transformers among our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    """Trains a recipe; returns the exit status. What a user can mend is printed as one message, without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m cosmo_fast.train",
        usage="%(prog)s --config RECIPE [--dry-run] [--key.sub value ...]",
        description=ABOUT,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="recipe file, or a shipped recipe such as demo")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print what would run; no run folder is written"
    )
    known, overrides = parser.parse_known_args(arguments)
    from cosmo_fast.config import load_config
    from cosmo_fast.trainer import Trainer

    quiet()
    try:
        trainer = Trainer(load_config(known.config, overrides))
        if known.dry_run:
            if trainer.ranks.first:
                describe(trainer)
            return 0
        trainer.train()
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        if os.environ.get("COSMO_FAST_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _without_none(value):
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def peak_bytes(trainer, stage) -> int:
    """Peak memory of the stage's largest micro-batch: the longest prompts, every response as long as it may be.

    Weights, optimizer (whole: ZeRO's share is smaller) and the reference of a ``beta`` are included; the sampler's keys
    and values (``kv_cache_mib``) are not, and are gone by then.
    """
    from cosmo_fast.plan import GroupSize, calibrate, micro_batches

    rows = [row for items, _ in trainer.data[stage.name].values() for row in items]
    count = stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    if stage.kind == "sft":
        prompts, sizes = [p for p, *_ in rows], [GroupSize.of(p, [answer]) for p, answer, _ in rows]
    else:
        longest = [[0] * trainer.config.max_completion_length] * stage.num_generations
        prompts, sizes, count = rows, [GroupSize.of(p, longest) for p in rows], count // stage.num_generations
    trainer.policy.freeze(stage.frozen)
    cost = calibrate(trainer.policy, trainer.vision, prompts)
    largest = sorted(sizes, key=lambda size: (size.tokens, size.vision), reverse=True)
    largest = (largest * -(-count // len(largest)))[:count]
    batches = micro_batches(largest, trainer.config.max_tokens_per_batch)
    peak = max(cost.peak_bytes([largest[i] for i in batch], batch.parts) for batch in batches)
    if (
        stage.kind == "rl" and stage.beta and trainer.policy.adapter is None
    ):  # a second model, its tower shared if frozen
        tower = {id(p) for p in trainer.policy.vision_parameters} if trainer.policy.vision_frozen else set()
        peak += sum(p.nbytes for p in trainer.policy.model.parameters() if id(p) not in tower)
    return peak


def _rewards(trainer, stage) -> Counter:
    """How many rows of an rl stage earn what, as text."""
    from cosmo_fast.config.rules import Schedule

    mix, given, found = trainer.reward_mixes[stage.name], stage.reward_recipe or {}, Counter()
    for prompt in (prompt for items, _ in trainer.data[stage.name].values() for prompt in items):
        label = prompt.columns.get("label")
        recipe = mix.recipe(prompt.columns, weights=given)
        recipe |= {"format": stage.format_weight} if mix.format_weight else {}
        weights = {n: f"{w.start:g} to {w.to:g}" if isinstance(w, Schedule) else f"{w:g}" for n, w in recipe.items()}
        earned = ", ".join(f"{name} {weight}" for name, weight in weights.items() if weight != "0")
        found[f"{'without a label' if label is None else f'labelled {label}'}: {earned}"] += 1
    return found


def describe(trainer) -> None:
    """Prints the resolved config, every stage's batch arithmetic and peak memory, and the first rendered prompt."""
    config = trainer.config
    print("# resolved config")
    print(yaml.safe_dump(_without_none(config.resolved()), sort_keys=False).rstrip())
    for stage in config.stages:
        rows = {name: len(items) for name, (items, _) in trainer.data[stage.name].items()}
        world = trainer.ranks.world
        updates = stage.per_device_train_batch_size * stage.gradient_accumulation_steps * world
        print(f"\n# stage {stage.name} ({stage.kind}): {stage.max_steps} optimiser steps")
        for name, count in rows.items():
            print(f"  rows                        {count} in {name}")
        print(f"  predicted peak memory       {peak_bytes(trainer, stage) / 2**20:,.0f} MiB in training")
        if stage.kind == "sft":
            print(f"  rows an optimiser step      {updates}")
            print(f"  epochs                      {stage.max_steps * updates / sum(rows.values()):.2f}")
            continue
        for told, count in _rewards(trainer, stage).items():
            print(f"  rewards                     {count} rows {told}")
        print(f"  completions a rollout       {stage.completions_per_rollout * world}")
        print(f"  prompts a rollout           {stage.completions_per_rollout * world // stage.num_generations}")
        print(f"  generations a prompt        {stage.num_generations}")
        print(f"  optimiser steps a rollout   {stage.updates_per_rollout}")
        print(f"  completions a step          {updates}")
        print(f"  rollouts                    {stage.max_steps // stage.updates_per_rollout}")
    parameters = sum(p.numel() for p in trainer.policy.model.parameters())
    adapter = sum(p.numel() for p in trainer.policy.adapter.parameters.values()) if config.lora_r else 0
    first = next(iter(trainer.data[config.stages[0].name].values()))[0][0]
    prompt = first[0] if config.stages[0].kind == "sft" else first
    added = f", {adapter:,} of them in the adapter" if adapter else ""
    print(f"\n# model: {parameters:,} parameters{added}, {config.dtype}")
    print(f"  tokens a micro-batch        at most {config.max_tokens_per_batch}")
    vision = f"{prompt.vision_rows} of them vision" + (f", {prompt.kept.count} of these kept" if prompt.kept else "")
    print(f"\n# first prompt ({len(prompt.ids)} tokens, {vision}; {prompt.source})")
    print(prompt.text)


if __name__ == "__main__":
    sys.exit(main())
