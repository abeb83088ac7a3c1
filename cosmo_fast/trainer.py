"""The trainer: checks everything, then runs a recipe's stages, with metrics, checkpoints, evaluation and resume."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from cosmo_fast import checkpoint as ckpt
from cosmo_fast import report, run_folder
from cosmo_fast.config import Config, ConfigError, StageConfig
from cosmo_fast.data import Row, load_rows
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.mixture import Mixture
from cosmo_fast.evaluate import score
from cosmo_fast.evaluate.run import evaluate
from cosmo_fast.models import Policy, load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import micro_batches
from cosmo_fast.rewards import REWARDS, RewardMix
from cosmo_fast.rollout import SamplingParams
from cosmo_fast.stages import STAGES
from cosmo_fast.stages.base import Context, step_seed


class Trainer:
    """Runs the stages of a recipe.

    Args:
        config: the recipe, as :func:`cosmo_fast.config.load_config` gives it.
        model: a loaded :class:`Policy` instead of ``model_name_or_path``.
        reward_funcs: further rewards, ``{name: f(prompts, completions, **columns)}``, for recipes that name them.
        train_dataset: ``{stage name: rows}`` instead of the stages' files.

    Raises:
        ValueError: anything a user can mend, before the run folder is touched.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: Policy | None = None,
        reward_funcs: dict[str, Any] | None = None,
        train_dataset: dict[str, list[Row]] | None = None,
    ):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.resume = None
        if config.resume_from_checkpoint:
            self.resume = ckpt.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
            if model is not None:
                raise ConfigError("resume_from_checkpoint brings its own weights: give no model, or do not resume")
            run_folder.check_same(ckpt.load_state(self.resume)["config"], config)
        _check_save_steps(config)
        inputs = [p for s in config.stages for p in s.datasets] + [
            *config.eval.datasets.values(),
            config.model_name_or_path,
        ]
        run_folder.check(self.output_dir, config, self.resume, [] if self.resume else inputs)
        self.reward_funcs = reward_funcs or {}
        self.reward_mixes = {s.name: self._reward_mix(s) for s in config.stages if s.kind == "rl"}
        self._check_rewards_used()
        resolve = _world_resolver(config)
        self.rows = _load_stages(config, train_dataset or {}, resolve)
        self.eval_rows = {
            name: _read(config, resolve(path), limit=config.eval.limit) for name, path in config.eval.datasets.items()
        }
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        self.load = partial(load_policy, device=device, trust_remote_code=config.trust_remote_code)
        self.start = resolve(config.model_name_or_path)
        self.policy = model or self.load(self.resume or self.start)
        self.vision = Vision(self.policy, max_image_pixels=config.max_image_pixels)
        self.encoder = Encoder(
            self.policy, max_prompt_length=config.max_prompt_length, max_completion_length=config.max_completion_length
        )
        self.data = {stage.name: self._encode(stage) for stage in config.stages}
        for rows in self.eval_rows.values():
            for row in rows:
                self.encoder.prompt(row)
            score([row.columns for row in rows], [""] * len(rows))  # raises where a row cannot be judged

    def _reward_mix(self, stage: StageConfig) -> RewardMix:
        used = {name for recipe in (stage.reward_recipe or {}).values() for name in recipe}
        own = {name: f for name, f in self.reward_funcs.items() if name in used}
        return RewardMix(stage.reward_recipe, format_weight=stage.format_weight, rewards=own)

    def _check_rewards_used(self) -> None:
        used = {name for mix in self.reward_mixes.values() for name in mix.functions}
        if unused := sorted(self.reward_funcs.keys() - used):
            raise ConfigError(f"reward_funcs {unused} are named by no stage's reward_recipe")

    def _encode(self, stage: StageConfig) -> dict[str, tuple[list, float]]:
        """The stage's rows as ids; whatever would fail in the middle of the stage fails here."""
        sources = {}
        for name, (rows, weight) in self.rows[stage.name].items():
            prompts = [self.encoder.prompt(row) for row in rows]
            if stage.kind == "sft":
                targets = [self.encoder.target(row) for row in rows]
                longest = max(len(p.ids) + len(t) for p, t in zip(prompts, targets, strict=True))
                sources[name] = (list(zip(prompts, targets, strict=True)), weight)
            else:
                longest = max(len(p.ids) for p in prompts) + stage.num_generations * self.config.max_completion_length
                columns = [p.columns for p in prompts]
                mix = self.reward_mixes[stage.name]
                for column in columns:
                    mix.recipe(column)
                if mix.functions.keys() <= REWARDS.keys():  # a user's own may be slow, or count its calls
                    mix([p.text for p in prompts], [""] * len(prompts), columns)
                score(columns, [""] * len(prompts))
                SamplingParams(
                    self.config.max_completion_length, stage.temperature, stage.top_k, stage.top_p, stage.min_p
                )
                sources[name] = (prompts, weight)
            micro_batches([longest], self.config.max_tokens_per_batch)
        return sources

    def train(self) -> dict[str, Any]:
        """Runs all stages from the start or from the checkpoint; returns the summary that ``summary.json`` holds."""
        config = self.config
        state = {"stage_index": 0, "step": 0, "global_step": 0, "summary": []}
        if self.resume:
            state = ckpt.load_state(self.resume)
        run_folder.prepare(self.output_dir, config, state["global_step"] if self.resume else None)
        self.summary = {"seed": config.seed, "stages": state["summary"], "environment": environment()}
        self.global_step = state["global_step"]
        metrics = self.output_dir / "metrics.jsonl"
        self.log = report.MetricsWriter(metrics, resume_step=self.global_step if self.resume else None)
        self.console = report.Progress([(s.name, s.max_steps) for s in config.stages], every=config.logging_steps)
        with self.log, self.console:
            for index in range(state["stage_index"], len(config.stages)):
                self._run_stage(index, state if index == state["stage_index"] else {"step": 0})
        run_folder.record(self.output_dir, ckpt.save_model(self.output_dir, self.policy))
        report.write_summary(self.output_dir / "summary.json", self.summary)
        report.write_plots(self.output_dir)
        self.console.table(self.summary)
        self.console.note(f"run folder: {self.output_dir}")
        return self.summary

    def _run_stage(self, index: int, state: dict[str, Any]) -> None:
        config, stage = self.config, self.config.stages[index]
        seed = step_seed(config.seed, index)
        self.policy.freeze_vision_tower(stage.freeze_vision_tower)
        self.vision.forget()
        context = Context(config, stage, self.policy, self.vision, seed)
        mixture = Mixture(self.data[stage.name], seed)
        extra: dict[str, Any] = {}
        if stage.kind == "rl":
            extra["reward_mix"] = self.reward_mixes[stage.name]
            if stage.beta and state["step"]:
                extra["reference"] = self.load(self._reference(index))
                extra["reference"].model.requires_grad_(False)
        runner = STAGES[stage.kind](context, mixture, **extra)
        optimizer = _optimizer(self.policy, stage)
        if state["step"]:
            mixture.taken.update(state["taken"])
            ckpt.load_optimizer(self.resume, self.policy, optimizer)
        started = time.perf_counter() - state.get("seconds", 0.0)
        for step in range(state["step"], stage.max_steps):
            self._step(index, step, runner, optimizer)
            done = step + 1
            if done == stage.max_steps or (config.save_steps and done % config.save_steps == 0):
                position = {"stage_index": index, "step": done, "taken": mixture.taken}
                folder = self._save(optimizer, position | {"seconds": time.perf_counter() - started})
        # The stage is on disk before it is evaluated: a fault in the evaluation costs the evaluation.
        folder = folder if state["step"] < stage.max_steps else self.resume
        seconds = ckpt.load_state(folder)["seconds"]
        self.summary["stages"].append({"name": stage.name, "seconds": seconds, "splits": self._evaluate(stage)})
        position = {"stage_index": index + 1, "step": 0, "taken": {}}
        ckpt.replace_text(folder / ckpt.STATE, json.dumps(self._state(position), indent=1))

    def _reference(self, index: int) -> Path | str:
        """The weights that stage ``index`` began with: the end of the stage before, beside what is resumed from."""
        before = sum(stage.max_steps for stage in self.config.stages[:index])
        if not before:
            return self.start
        folder = self.resume.parent / f"checkpoint-{before}"
        if not (folder / ckpt.STATE).is_file():
            raise ConfigError(
                f"resume_from_checkpoint={str(self.resume)!r} needs {folder.name} beside it: beta is set, and the "
                "reference is the policy at the start of the stage"
            )
        return folder

    def _step(self, index: int, step: int, runner, optimizer: torch.optim.Optimizer) -> None:
        stage = self.config.stages[index]
        started = time.perf_counter()
        rate = learning_rate(stage, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        metrics = runner.step(step)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
            saved = ckpt.checkpoints(self.output_dir)
            where = f"resume from {saved[-1]}" if saved else "there is no checkpoint yet"
            raise FloatingPointError(
                f"stage {stage.name!r}, step {step}: loss {metrics['loss']}, gradient norm {norm}; no update was made. "
                f"Lower learning_rate or max_grad_norm; {where}."
            )
        optimizer.step()
        self.global_step += 1
        seconds = time.perf_counter() - started
        tokens = metrics.pop("tokens")
        row = {
            "stage": stage.name,
            "stage_index": index,
            "step": step + 1,
            "global_step": self.global_step,
            **metrics,
            "grad_norm": norm,
            "learning_rate": rate,
            "step_time": seconds,
            "perf/tokens_per_s": tokens / seconds,
        }
        self.log.write(row)
        self.console.update(row)
        if (step + 1) % self.config.logging_steps == 0 and (shown := runner.samples()):
            report.write_samples(self.output_dir / "samples", self.global_step, shown)

    def _evaluate(self, stage: StageConfig) -> dict[str, Any]:
        splits = {}
        for name, rows in self.eval_rows.items():
            self.console.note(f"evaluating {name} ({len(rows)} rows) after {stage.name}")
            splits[name] = evaluate(
                self.policy,
                rows,
                max_completion_length=self.config.max_completion_length,
                batch_size=self.config.eval.batch_size,
            )
        return splits

    def _state(self, position: dict[str, Any]) -> dict[str, Any]:
        done = {"global_step": self.global_step, "summary": self.summary["stages"], "config": self.config.resolved()}
        return position | done

    def _save(self, optimizer: torch.optim.Optimizer, position: dict[str, Any]) -> Path:
        folder = self.output_dir / f"checkpoint-{self.global_step}"
        ckpt.save_checkpoint(folder, self.policy, optimizer, self._state(position))
        ends = {self.output_dir / f"checkpoint-{n}" for n in _stage_ends(self.config)}
        ckpt.prune(self.output_dir, self.config.save_total_limit, ends)
        return folder


def environment() -> dict[str, str]:
    """What a run's figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return {"device": device, "threads": str(torch.get_num_threads()), "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def learning_rate(stage: StageConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then constant, linear to 0 or half a cosine to 0."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.max_steps - stage.warmup_steps)
    shapes = {"constant_with_warmup": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return stage.learning_rate * shapes[stage.lr_scheduler_type]


def _optimizer(policy: Policy, stage: StageConfig) -> torch.optim.Optimizer:
    """AdamW over what learns; vectors (norms, biases) are not decayed."""
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(stage.adam_beta1, stage.adam_beta2), fused=True)


def _stage_ends(config: Config) -> list[int]:
    ends, total = [], 0
    for stage in config.stages:
        total += stage.max_steps
        ends.append(total)
    return ends


def _world_resolver(config: Config):
    """``world:NAME`` -> a path inside the embedded world, built on first use; other names stay."""
    root: list[Path] = []

    def resolve(name: str) -> str:
        if not name.startswith("world:"):
            return name
        if not root:
            from cosmo_fast.world import ensure_world

            seed = config.seed if config.world.seed is None else config.world.seed
            root.append(ensure_world(seed=seed, cache_dir=config.world.cache_dir, **config.world.sizes))
        return str(root[0] / name.removeprefix("world:"))

    return resolve


def _load_stages(config: Config, given: dict[str, list[Row]], resolve) -> dict[str, dict[str, tuple[list[Row], float]]]:
    unknown = sorted(given.keys() - {s.name for s in config.stages})
    if unknown:
        raise ConfigError(
            f"train_dataset names the stage(s) {unknown}; the recipe has {[s.name for s in config.stages]}"
        )
    read: dict[tuple[str, bool], list[Row]] = {}
    stages: dict[str, dict[str, tuple[list[Row], float]]] = {}
    for stage in config.stages:
        if stage.name in given:
            stages[stage.name] = {"train_dataset": (given[stage.name], 1.0)}
            continue
        stages[stage.name] = {}
        for path, weight in stage.datasets.items():
            key = (path, stage.kind == "sft")
            if key not in read:
                read[key] = _read(config, resolve(path), needs_answer=stage.kind == "sft")
            stages[stage.name][path] = (read[key], weight)
    return stages


def _read(config: Config, path: str, **options: Any) -> list[Row]:
    return load_rows(path, image_root=config.image_root, max_image_pixels=config.max_image_pixels, **options)


def _check_save_steps(config: Config) -> None:
    for stage in config.stages:
        if config.save_steps and stage.kind == "rl" and config.save_steps % stage.updates_per_rollout:
            raise ConfigError(
                f"save_steps={config.save_steps} is not a multiple of the {stage.updates_per_rollout} optimiser "
                f"steps of a rollout in stage {stage.name!r}; a checkpoint cannot lie inside a rollout"
            )
