"""The trainer: checks everything, then runs a recipe's stages, with metrics, checkpoints, evaluation and resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from cosmo_fast import checkpoint as ckpt
from cosmo_fast import report, run_folder
from cosmo_fast.config import Config, ConfigError, StageConfig
from cosmo_fast.data import Row
from cosmo_fast.data.check import at as _at
from cosmo_fast.data.check import check_rewards, reward_mix
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.mixture import Mixture
from cosmo_fast.data.sources import load_stages, read, world_resolver
from cosmo_fast.distributed import Ranks, Update
from cosmo_fast.doctor import environment
from cosmo_fast.evaluate import rates, score
from cosmo_fast.evaluate.run import evaluate
from cosmo_fast.kept_weights import KeptWeights
from cosmo_fast.models import Policy, load_policy
from cosmo_fast.models.adapter import add_adapter
from cosmo_fast.models.vision import Vision
from cosmo_fast.optimizer import AdamW
from cosmo_fast.plan import GroupSize, micro_batches
from cosmo_fast.rewards.worker import Worker
from cosmo_fast.rollout import SamplingParams
from cosmo_fast.search import Search
from cosmo_fast.stages import STAGES
from cosmo_fast.stages.alive import vision_alive
from cosmo_fast.stages.base import Context, step_seed
from cosmo_fast.stages.rl import own_sampler, sampling_params
from cosmo_fast.stages.schedule import learning_rate
from cosmo_fast.stages.state import StageState, check_metrics, rules
from cosmo_fast.verifiers.engine import Verifiers, counted, unjudged


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
        self.config, self.ranks = config, Ranks(config.deepspeed)
        self.output_dir = Path(config.output_dir)
        self.resume = None
        if config.resume_from_checkpoint:
            self.resume = ckpt.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
            if model is not None:
                raise ConfigError("resume_from_checkpoint brings its own weights: give no model, or do not resume")
            saved = ckpt.load_state(self.resume)
            run_folder.check_same(saved["config"], config)
            if saved.get("ranks", 1) != self.ranks.world:
                raise ConfigError(
                    f"resume_from_checkpoint: the run had {saved.get('ranks', 1)} process(es), now {self.ranks.world}; "
                    "batch sizes are per device, so this would be another run"
                )
        run_folder.check_save_steps(config, self.ranks)
        files = [*(p for s in config.stages for p in s.datasets), *config.eval.datasets.values()]
        given = {s.name: s.tools for s in config.stages} | {"": config.eval.tools}  # no stage is without a name
        tools = {name: t.search.model_dump() for name, t in given.items() if t}
        files += [search["corpus"] for search in tools.values()]
        inputs = [*map(config.data_path, files), config.model_name_or_path]
        inputs += [verifier.model for verifier in config.verifiers.values()]
        run_folder.check(self.output_dir, config, self.resume, [] if self.resume else inputs)
        self.reward_funcs = reward_funcs or {}
        self.reward_worker, learned = Worker(), [stage for stage in config.stages if stage.kind == "rl"]
        self.reward_mixes = {s.name: reward_mix(config, s, self.reward_funcs, self.reward_worker) for s in learned}
        self._check_rewards_used()
        if any(stage.reward_worker for stage in learned):
            self.reward_worker.start()  # while this process is small
        resolve = world_resolver(config, self.ranks)
        self.rows = load_stages(config, train_dataset or {}, resolve)
        self.search = {n: Search.load(resolve(config.data_path(t.pop("corpus"))), **t) for n, t in tools.items()}
        self.eval_rows = {
            name: read(config, resolve(config.data_path(path)), limit=config.eval.limit)
            for name, path in config.eval.datasets.items()
        }
        options = {"device": config.device, "trust_remote_code": config.trust_remote_code, "dtype": config.dtype}
        self.load = partial(load_policy, **options)
        self.start = resolve(config.model_name_or_path)
        self.policy = model or self.load(self.start if config.lora_r else self.resume or self.start)
        _prepare(self.policy, config)
        if config.lora_r and self.resume:
            self.policy.adapter.load(self.resume)
        self.kept = KeptWeights(self.policy, self.load, self.start, self.output_dir, self.resume)
        self.vision = Vision(self.policy, max_image_pixels=config.max_image_pixels)
        self.encoder = Encoder.within(self.policy, config)
        self.verifiers = self._verifiers(resolve) if config.verifiers else None
        self.data = {stage.name: self._encode(stage) for stage in config.stages}
        measured: dict[str, float] = {}
        for name, rows in self.eval_rows.items():
            prompts = [self.encoder.prompt(row) for row in rows]
            params = SamplingParams(config.max_completion_length, temperature=0)
            own_sampler(config, self.policy, self.vision).store_rows(prompts, params, 1)
            if self.verifiers:
                self.verifiers.check(prompts)
            columns = [unjudged(config.verifiers, row.columns) for row in rows]
            measured |= rates(name, score(columns, [""] * len(rows)))  # or a row cannot be judged
            measured[f"eval/{name}/mean_length"] = 0.0
        for stage in config.stages:
            _at(f"stage {stage.name!r}", self.policy.freeze, stage.frozen)
            check_metrics(stage, measured, getattr(self.reward_mixes.get(stage.name), "functions", ()))

    def _verifiers(self, resolve) -> Verifiers:
        files = [rows for stage in self.reward_mixes for rows, _ in self.rows[stage].values()]
        judged = (row for rows in (*files, *self.eval_rows.values()) for row in rows)
        rated = {counted(self.config.verifiers, row.columns) for row in judged}
        return Verifiers(self.config, resolve, self.policy.device, rated | self._rewards())

    def _rewards(self) -> set[str]:
        """Names of all stages' rewards."""
        return {name for mix in self.reward_mixes.values() for name in mix.functions}

    def _check_rewards_used(self) -> None:
        if unused := sorted(self.reward_funcs.keys() - self._rewards()):
            raise ConfigError(f"reward_funcs {unused} are named by no stage's reward_recipe")

    def _encode(self, stage: StageConfig) -> dict[str, tuple[list, float]]:
        """The stage's rows as ids; whatever would fail in the middle of the stage fails here."""
        sources = {}
        for name, (rows, weight) in self.rows[stage.name].items():
            prompts = [self.encoder.prompt(row) for row in rows]
            if stage.kind == "sft":
                targets = [self.encoder.target(row) for row in rows]
                sizes = [GroupSize.of(p, [t]) for p, t in zip(prompts, targets, strict=True)]
                sources[name] = (list(zip(prompts, targets, map(self.encoder.learnt, rows), strict=True)), weight)
            else:
                longest = [[0] * self.config.max_completion_length] * stage.num_generations
                sizes = [GroupSize.of(p, longest) for p in prompts]
                check_rewards(f"stage {stage.name!r}", self.reward_mixes[stage.name], prompts, self.config.verifiers)
                if self.verifiers:
                    self.verifiers.check(prompts, self.reward_mixes[stage.name])
                params = sampling_params(self.config, stage)
                own_sampler(self.config, self.policy, self.vision).store_rows(prompts, params, stage.num_generations)
                sources[name] = (prompts, weight)
            worst = max(range(len(sizes)), key=lambda i: sizes[i].prompt + max(sizes[i].responses))
            _at(prompts[worst].source, micro_batches, [sizes[worst]], self.config.max_tokens_per_batch)
        return sources

    def train(self) -> dict[str, Any]:
        """Runs all stages from the start or from the checkpoint; returns the summary that ``summary.json`` holds."""
        config = self.config
        state = {"stage_index": 0, "step": 0, "global_step": 0, "summary": []}
        if self.resume:
            state = ckpt.load_state(self.resume)
        self.ranks.wait()  # every rank has looked at the run folder as it was
        if self.ranks.first:
            run_folder.prepare(self.output_dir, config, state["global_step"] if self.resume else None)
        self.summary = {"seed": config.seed, "stages": state["summary"], "environment": environment()}
        self.global_step = state["global_step"]
        ended = list(accumulate(stage.max_steps for stage in config.stages[: state["stage_index"]]))
        self.ends = state.get("ends", ended)  # global steps at which stages ended; an earlier version knew no others
        self.evaluated: tuple[int, dict[str, Any]] = (-1, {})
        self.sees: float | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self.reward_worker.close)
            stream, metrics, resume_step = None, self.output_dir / "metrics.jsonl", None
            if not self.ranks.first:
                stream, metrics = stack.enter_context(open(os.devnull, "w")), Path(os.devnull)
            elif self.resume:
                resume_step = self.global_step
            self.log = stack.enter_context(report.MetricsWriter(metrics, resume_step=resume_step))
            names = [(s.name, s.max_steps) for s in config.stages]
            self.console = stack.enter_context(report.Progress(names, every=config.logging_steps, stream=stream))
            for index in range(state["stage_index"], len(config.stages)):
                self._run_stage(index, state if index == state["stage_index"] else {"step": 0})
        if self.ranks.first:
            self._finish()
        return self.summary

    def _finish(self) -> None:
        """Final model, summary and plots."""
        run_folder.record(self.output_dir, ckpt.save_model(self.output_dir, self.policy))
        report.write_summary(self.output_dir / "summary.json", self.summary)
        report.write_plots(self.output_dir)
        self.console.table(self.summary)
        self.console.note(f"run folder: {self.output_dir}")

    def _run_stage(self, index: int, saved: dict[str, Any]) -> None:
        config, stage, begin = self.config, self.config.stages[index], saved["step"]
        seed = step_seed(config.seed, index)
        self.policy.freeze(stage.frozen)
        self.vision.forget()
        state = StageState(**saved["stage"]) if begin and "stage" in saved else self._fresh(index, saved)
        context = Context(
            config, stage, self.policy, self.vision, seed, self.ranks, state=state, note=self.console.note
        )
        column = stage.curriculum and stage.curriculum.column
        mixture = Mixture(self.data[stage.name], seed, column and (lambda row: _columns(row)[column]))
        extra: dict[str, Any] = {}
        if stage.kind == "rl":
            extra |= {"reward_mix": self.reward_mixes[stage.name], "search": self.search.get(stage.name)}
            extra["verifiers"] = self.verifiers
            if stage.beta:
                extra["reference"] = self.kept.reference(stage, begin, state)
        runner = STAGES[stage.kind](context, mixture, **extra)
        optimizer = _optimizer(self.policy, stage, keep_masters=self.ranks.deepspeed is None)
        if begin:
            mixture.taken.update(state.taken)
            mixture.skipped.update(state.skipped)
            if begin < stage.max_steps:
                ckpt.load_optimizer(self.resume, optimizer)
        if self.sees is None and (alive := vision_alive(context, runner, self.data[stage.name])) is not None:
            self.sees = alive
            self.console.note(f"vision/alive {alive:.3g}: nats a token by which blank pictures change the log-probs")
        update = self.ranks.update(self.policy, optimizer, stage.max_grad_norm)
        context.backward = update.backward
        started, folder = time.perf_counter() - saved.get("seconds", 0.0), self.resume
        for step in range(begin, stage.max_steps):
            save = self._step(index, step, runner, update, state)
            done, every = step + 1, stage.reference_refresh_steps
            restore = done % stage.updates_per_rollout == 0 and state.verdict(stage)
            if rules(stage):  # ranks may time the same step differently
                restore, state.ended = self.ranks.gather((restore, state.ended))[0]
            ended = done == stage.max_steps or state.ended is not None
            if every and done % every == 0 and not ended:
                runner.refresh_reference()
                state.reference, save = self.global_step, True
            if ended:
                self.ends = [*self.ends[:index], self.global_step]
                back = state.best and state.best[1] != self.global_step
                if back and (restore or stage.load_best_model_at_end):
                    self.console.note(self.kept.restore(*state.best))
                    self.evaluated = (-1, {})
            if (save or ended or (config.save_steps and done % config.save_steps == 0)) and self.ranks.first:
                position = {"stage_index": index, "step": stage.max_steps if ended else done, "stage": asdict(state)}
                moments = optimizer if self.ranks.deepspeed is None else None
                folder = self._save(moments, position | {"seconds": time.perf_counter() - started}, state)
            if ended:
                break
        update.close()
        if self.ranks.first:
            self._close(index, state, folder)
        self.ranks.wait()

    def _close(self, index: int, state: StageState, folder: Path) -> None:
        """The stage is on disk before it is evaluated: a fault in the evaluation costs the evaluation."""
        stage, (step, splits) = self.config.stages[index], self.evaluated
        splits = splits if step == self.global_step else self._evaluate(stage)
        about = {"name": stage.name, "seconds": ckpt.load_state(folder)["seconds"], "splits": splits}
        about |= {name: value for name in ("ended", "best") if (value := getattr(state, name)) is not None}
        self.summary["stages"].append(about)
        if state.ended:
            self.console.note(f"{stage.name} ended by {state.ended}")
        ckpt.replace_text(folder / ckpt.STATE, json.dumps(self._state({"stage_index": index + 1, "step": 0}), indent=1))

    def _fresh(self, index: int, saved: dict[str, Any]) -> StageState:
        """The state of a stage's first step, or of a checkpoint of an earlier version."""
        stage, names = self.config.stages[index], [stage.name for stage in self.config.stages]
        state = StageState.of(stage)
        state.taken = saved.get("taken", {})
        before = names.index(stage.reference[6:]) if stage.reference.startswith("stage:") else index - 1
        state.reference = self.ends[before] if before >= 0 else 0
        return state

    def _step(self, index: int, step: int, runner, update: Update, state: StageState) -> bool:
        """One optimiser step; whether an evaluation after it is the best so far."""
        stage = self.config.stages[index]
        started = time.perf_counter()
        rate = learning_rate(stage, step)
        for group in update.optimizer.param_groups:
            group["lr"] = rate
        with update.accumulating():
            metrics = runner.step(step)
        norm = update.norm()
        if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
            saved = ckpt.checkpoints(self.output_dir)
            where = f"resume from {saved[-1]}" if saved else "there is no checkpoint yet"
            raise FloatingPointError(
                f"stage {stage.name!r}, step {step}: loss {metrics['loss']}, gradient norm {norm}; no update was made. "
                f"Lower learning_rate or max_grad_norm; {where}."
            )
        update.step()
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
        if stage.eval_steps and (step + 1) % stage.eval_steps == 0:
            splits = self._evaluate(stage) if self.ranks.first else {}
            self.evaluated = (self.global_step, self.ranks.gather(splits)[0])
            for name, result in self.evaluated[1].items():
                row |= rates(name, result)
        self.log.write(row)
        self.console.update(row)
        shown = runner.samples() if self.ranks.first and (step + 1) % self.config.logging_steps == 0 else []
        if shown:
            report.write_samples(self.output_dir / "samples", self.global_step, shown)
        return state.note(stage, row, self.global_step)

    def _evaluate(self, stage: StageConfig) -> dict[str, Any]:
        splits = {}
        for name, rows in self.eval_rows.items():
            self.console.note(f"evaluating {name} ({len(rows)} rows) after {stage.name}")
            splits[name] = evaluate(
                self.policy,
                rows,
                max_completion_length=self.config.max_completion_length,
                stop_strings=stage.stop_strings,
                search=self.search.get(stage.name, self.search.get("")),
                batch_size=self.config.eval.batch_size,
                max_tokens=self.config.max_tokens_per_batch,
                kv_cache_mib=self.config.kv_cache_mib,
                vision_prune=self.config.vision_prune,
                verifiers=self.verifiers,
            )
        return splits

    def _state(self, position: dict[str, Any]) -> dict[str, Any]:
        done = {"global_step": self.global_step, "summary": self.summary["stages"], "config": self.config.resolved()}
        done |= {"ranks": self.ranks.world, "ends": self.ends}
        return position | done

    def _save(self, optimizer: AdamW | None, position: dict[str, Any], state: StageState) -> Path:
        folder = self.output_dir / f"checkpoint-{self.global_step}"
        ckpt.save_checkpoint(folder, self.policy, optimizer, self._state(position))
        needed = {*self.ends, state.reference, *([state.best[1]] if state.best else [])}
        kept = {self.output_dir / f"checkpoint-{step}" for step in needed}
        ckpt.prune(self.output_dir, self.config.save_total_limit, kept)
        return folder


def _columns(row) -> dict[str, Any]:
    """Of an encoded row: a prompt, or a prompt and its answer."""
    return (row[0] if isinstance(row, tuple) else row).columns


def _optimizer(policy: Policy, stage: StageConfig, keep_masters: bool) -> AdamW:
    betas = (stage.adam_beta1, stage.adam_beta2)
    settings = {"lr": stage.learning_rate, "betas": betas, "weight_decay": stage.weight_decay}
    settings["keep_masters"] = keep_masters
    return AdamW(policy.model.named_parameters(), **settings)


def _prepare(policy: Policy, config: Config) -> None:
    """The dtype, adapter and checkpointing that the recipe asks for."""
    for parameter in policy.model.parameters():  # not the buffers: rotary frequencies stay fp32, as they are loaded
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    if config.lora_r and config.deepspeed and config.dtype != "float32":
        raise ConfigError(
            f"lora_r={config.lora_r} with dtype={config.dtype} and deepspeed: DeepSpeed would round the "
            "adapter to bf16; use dtype: float32, or one process"
        )
    if config.lora_r:
        add_adapter(
            policy,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
            seed=config.seed,
        )
    elif policy.adapter is not None:
        raise ConfigError(
            f"model_name_or_path={config.model_name_or_path!r} is an adapter: train the merged model (the root of its "
            "run folder) instead"
        )
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
