"""The folder of a run: whether a run may go there, and what of an earlier one it may remove."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from cosmo_fast import checkpoint as ckpt
from cosmo_fast.config import Config, ConfigError, WorldConfig, resolved_stage
from cosmo_fast.distributed import Ranks

# Lists the files of ours at the root of the folder: only they, and the folders below, are ever removed.
MARKER = ".cosmo_fast_run.json"
_FILES = ("config.yaml", "metrics.jsonl", "summary.json", MARKER)
_FOLDERS = ("checkpoint-*", ".checkpoint-*", ".model.partial", "samples", "plots")
# Settings that a resumed run may change: they decide where, how often and how it is shown, not what is computed; the
# sampler's two bounds change last bits only.
_FREE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "model_name_or_path", "logging_steps",
    "log_completions", "save_steps", "save_total_limit", "eval", "device", "sampling_batch_size",
    "kv_cache_mib",
}  # fmt: skip
_FREE_OF_STAGE = ("max_tied_rollouts",)


def check(folder: Path, config: Config, resume: Path | None, inputs: list[str]) -> None:
    """Refuses a folder that cannot be written, or that holds what is not ours to remove; nothing is touched.

    Args:
        folder: the run's. config: the recipe. resume: the checkpoint to go on from. inputs: models and data that the
            run reads.

    Raises:
        ConfigError: with the setting to change.
    """
    parent = folder.absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir={str(folder)!r} cannot be written: {parent} is no folder with write access; choose another"
        )
    held = set(os.listdir(folder)) if folder.is_dir() else set()
    if not held:
        return
    if MARKER not in held:
        raise ConfigError(
            f"output_dir={str(folder)!r} is not empty and holds no run of cosmo_fast; choose another output_dir"
        )
    if resume is None:
        # A run that stopped before its first step has nothing to lose.
        log = folder / "metrics.jsonl"
        begun = any(folder.glob("checkpoint-*")) or (log.is_file() and log.stat().st_size > 0)
        if begun and not config.overwrite_output_dir:
            raise ConfigError(
                f"output_dir={str(folder)!r} holds an earlier run; set overwrite_output_dir or resume_from_checkpoint "
                "true, or choose another output_dir"
            )
        for name in inputs:
            if Path(name).resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"{name!r} lies in output_dir={str(folder)!r}, which overwrite_output_dir would clear"
                )
        return
    step = ckpt.load_state(resume)["global_step"]
    later = [p.name for p in ckpt.checkpoints(folder) if ckpt.load_state(p)["global_step"] > step]
    if later:
        raise ConfigError(
            f"resume_from_checkpoint={str(resume)!r}: {folder} holds later checkpoints ({', '.join(later)}); resume "
            "from the last one, move them away, or choose another output_dir"
        )


def check_same(saved: dict[str, Any], config: Config) -> None:
    """Refuses to resume with settings that would make another run of it.

    Raises:
        ConfigError: naming the first setting that differs, its value then and now.
    """
    now, saved = config.resolved(), saved | {"world": WorldConfig().model_dump() | saved.get("world", {})}
    free = _FREE - {"model_name_or_path"} if config.lora_r else _FREE  # an adapter is of no use without its base
    for key in sorted(now.keys() - free):
        # What an earlier version did not have is at its default.
        if saved.get(key, Config.model_fields[key].default) == now[key]:
            continue
        if key != "stages" or len(saved[key]) != len(now[key]):
            raise ConfigError(
                f"resume_from_checkpoint: {key} was {saved.get(key)!r}, now {now[key]!r}; a resume cannot change it"
            )
        for before, after in zip(map(resolved_stage, saved[key]), now[key], strict=True):
            for name in (name for name in after if name not in _FREE_OF_STAGE):
                if before.get(name) != after[name]:
                    raise ConfigError(
                        f"resume_from_checkpoint: stages.{after['name']}.{name} was {before.get(name)!r}, now "
                        f"{after[name]!r}; a resume cannot change it"
                    )


def prepare(folder: Path, config: Config, resume_step: int | None) -> None:
    """Makes the folder; an earlier run in it goes, of a resumed one only samples after ``resume_step``."""
    folder.mkdir(parents=True, exist_ok=True)
    if resume_step is None:
        marker = folder / MARKER
        root = json.loads(marker.read_text()) if marker.is_file() else []
        for pattern in _FOLDERS:
            for path in folder.glob(pattern):
                shutil.rmtree(path)
        for name in (*root, *_FILES):
            (folder / name).unlink(missing_ok=True)
    else:
        for path in (folder / "samples").glob("step-*"):
            if int(path.stem.removeprefix("step-")) > resume_step:
                path.unlink()
    record(folder, [])
    ckpt.replace_text(folder / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False))


def record(folder: Path, names: list[str]) -> None:
    """Notes the files of the final model, so that a later run may replace them."""
    ckpt.replace_text(folder / MARKER, json.dumps(names) + "\n")


def check_save_steps(config: Config, ranks: Ranks) -> None:
    """Refuses checkpoints in places where the state cannot be saved.

    Raises:
        ConfigError: naming ``save_steps``.
    """
    if config.save_steps and ranks.deepspeed is not None:
        raise ConfigError(
            f"save_steps={config.save_steps} with deepspeed: the optimizer's shards are not saved inside a stage yet; "
            "leave save_steps out, the end of every stage is saved"
        )
    for stage in config.stages:
        inside = stage.metric_for_best_model or stage.reference_refresh_steps
        if inside and ranks.deepspeed is not None:
            raise ConfigError(
                f"stage {stage.name!r}: metric_for_best_model and reference_refresh_steps keep checkpoints "
                "inside a stage, which deepspeed does not support yet; leave them out"
            )
        if config.save_steps and stage.kind == "rl" and config.save_steps % stage.updates_per_rollout:
            raise ConfigError(
                f"save_steps={config.save_steps} is not a multiple of the {stage.updates_per_rollout} optimiser "
                f"steps of a rollout in stage {stage.name!r}; a checkpoint cannot lie inside a rollout"
            )
