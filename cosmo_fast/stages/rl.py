"""Reinforcement learning: sample groups, reward, advantage, update."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch

from cosmo_fast.data.mixture import Mixture
from cosmo_fast.evaluate import score
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import DEFAULTS, advantages, objective, token_weights
from cosmo_fast.plan import Prompt, micro_batches
from cosmo_fast.report.metrics import finite
from cosmo_fast.rewards import MixedRewards, RewardMix
from cosmo_fast.rollout import Completion, Sampler, SamplingParams
from cosmo_fast.stages.base import Context, Group, accumulate, by_response, plan_of, step_seed


class RLStage:
    """A rollout of ``completions_per_rollout`` responses, then ``num_iterations`` passes of updates over them."""

    def __init__(
        self, context: Context, mixture: Mixture[Prompt], reward_mix: RewardMix, reference: Policy | None = None
    ):
        self.context, self.mixture, self.reward_mix = context, mixture, reward_mix
        stage = context.stage
        config = context.config
        self.sampler = Sampler(context.policy, context.vision, config.sampling_batch_size, config.max_tokens_per_batch)
        self.params = SamplingParams(
            context.config.max_completion_length, stage.temperature, stage.top_k, stage.top_p, stage.min_p
        )
        self.reference = reference
        if stage.beta and reference is None:
            self.reference = Policy(
                copy.deepcopy(context.policy.model).requires_grad_(False),
                context.policy.tokenizer,
                context.policy.image_processor,
                context.policy.family,
            )
        aggregation, advantage = DEFAULTS[stage.loss_type]
        self.aggregation, self.advantage = stage.aggregation or aggregation, stage.advantage or advantage
        self.objective = self.later_objective = objective(stage.loss_type, **stage.loss_options)
        if stage.loss_type == "cpgd":
            self.later_objective = objective(stage.loss_type, **stage.loss_options, reweight=True)
        self.groups: list[Group] = []
        self.rollout_metrics: dict[str, float] = {}
        self.shown: list[dict[str, Any]] = []

    def step(self, step: int) -> dict[str, float]:
        """Accumulates the gradient of step ``step``, sampling a new rollout when the last one is used up."""
        stage = self.context.stage
        place = step % stage.updates_per_rollout
        if place == 0:
            self._rollout(step)
        started = time.perf_counter()
        updates = stage.updates_per_rollout // stage.num_iterations
        groups = _share(self.groups, updates, place % updates)
        _set_weights(groups, self.aggregation, self.context)
        # With ratio 1, no KL and no entropy bonus a group without advantage has no gradient: it costs no forward.
        idle = place == 0 and not stage.beta and not stage.entropy_coef
        used = [g for g in groups if not idle or any(g.advantages)]
        metrics = {"loss": 0.0}
        if used:
            loss_function = self.objective if place < updates else self.later_objective
            loss, own, logps = accumulate(
                self.context, used, loss_function, stage.temperature, step_seed(self.context.seed, step, 1)
            )
            own.pop("entropy", None)  # of the groups in this update only; the rollout's is logged
            metrics = {"loss": loss, **own}
            if place == 0:
                metrics |= _mismatch(used, logps)
        metrics["timing_s/update"] = time.perf_counter() - started
        metrics["tokens"] = sum(g.tokens for g in (self.groups if place == 0 else groups))
        return {**(self.rollout_metrics if place == 0 else {}), **metrics}

    def samples(self) -> list[dict[str, Any]]:
        """Some samples of the last rollout, as :func:`cosmo_fast.report.write_samples` takes them."""
        return self.shown

    def _rollout(self, step: int) -> None:
        context, stage = self.context, self.context.stage
        each = stage.num_generations
        started = time.perf_counter()
        context.vision.forget()
        prompts = self.mixture.draw(stage.completions_per_rollout // each)
        seed = step_seed(context.seed, step)
        completions = [
            c for group in self.sampler.generate(prompts, self.params, num_generations=each, seed=seed) for c in group
        ]
        sampled = time.perf_counter()
        texts = context.policy.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        owner = [p for p in prompts for _ in range(each)]
        mixed = self.reward_mix([p.text for p in owner], texts, [p.columns for p in owner])
        rewarded = time.perf_counter()
        group_index = torch.arange(len(prompts)).repeat_interleave(each)
        gains = self._advantages(mixed, group_index, completions).tolist()
        self.groups = [
            Group(
                prompt,
                [c.ids for c in completions[i : i + each]],
                weights=[],
                advantages=gains[i : i + each],
                old_logps=[c.logps for c in completions[i : i + each]],
                ended=[c.ended for c in completions[i : i + each]],
            )
            for i, prompt in zip(range(0, len(completions), each), prompts, strict=True)
        ]
        if self.reference is not None:
            self._score_reference()
        self.rollout_metrics = _rollout_metrics(mixed, completions, texts, owner, each) | {
            "timing_s/sample": sampled - started,
            "timing_s/reward": rewarded - sampled,
            "timing_s/reference": time.perf_counter() - rewarded,
        }
        spread = np.linspace(0, len(texts) - 1, min(len(texts), context.config.log_completions)).astype(int)
        self.shown = [
            {
                "id": owner[i].columns.get("id"),
                "label": owner[i].columns.get("label"),
                "prompt": owner[i].text,
                "images": [m.key for m in owner[i].media],
                "response": texts[i],
                "reward": float(mixed.total[i]),
                "rewards": dict(zip(mixed.names, finite(mixed.matrix[i].tolist()), strict=True)),
                "advantage": gains[i],
            }
            for i in spread
        ]

    def _advantages(self, mixed: MixedRewards, groups: torch.Tensor, completions: list[Completion]) -> torch.Tensor:
        stage = self.context.stage
        lengths = torch.tensor([len(c.ids) for c in completions])
        options = {"weighting": stage.cpgd_weighting, "lengths": lengths, "mu": stage.cale_mu, "a": stage.cale_a}
        if stage.multi_objective_aggregation == "sum_then_normalize":
            return advantages(mixed.total, groups, self.advantage, **options)
        options["multi_objective_aggregation"] = stage.multi_objective_aggregation
        return advantages(mixed.matrix, groups, self.advantage, reward_weights=mixed.weights, **options)

    @torch.no_grad()
    def _score_reference(self) -> None:
        context, vision = self.context, Vision(self.reference, max_image_pixels=self.context.config.max_image_pixels)
        for indices in micro_batches([g.tokens for g in self.groups], context.config.max_tokens_per_batch):
            chosen = [self.groups[i] for i in indices]
            plan = plan_of(chosen)
            logps, _ = self.reference.logprobs(plan, vision.features(plan.media), context.stage.temperature)
            for group, arrays in zip(chosen, by_response(logps, chosen), strict=True):
                group.ref_logps = arrays


def _share(groups: list[Group], parts: int, part: int) -> list[Group]:
    size = len(groups) // parts
    return groups[part * size : (part + 1) * size]


def _set_weights(groups: list[Group], aggregation: str, context: Context) -> None:
    """Token weights of one optimiser step; truncated responses count nowhere when they are masked."""
    lengths = [len(r) for g in groups for r in g.responses]
    if context.stage.mask_truncated_completions:
        ended = [e for g in groups for e in g.ended]
        lengths = [n if e else 0 for n, e in zip(lengths, ended, strict=True)]
    owner = [i for i, g in enumerate(groups) for _ in g.responses]
    flat = token_weights(
        aggregation, torch.tensor(lengths), groups=torch.tensor(owner), max_length=context.config.max_completion_length
    )
    pieces = iter(flat.split(lengths))
    for group in groups:
        group.weights = []
        for response in group.responses:
            piece = next(pieces).numpy()
            group.weights.append(piece if len(piece) == len(response) else np.zeros(len(response), dtype=np.float32))


def _mismatch(groups: list[Group], logps: list) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's on the same weights: 0 up to rounding."""
    counted = np.concatenate([a for g in groups for a in g.weights]) > 0
    old = np.concatenate([a for g in groups for a in g.old_logps])[counted]
    new = np.concatenate([a for group in logps for a in group])[counted]
    if not counted.any():
        return {}
    return {
        "rollout/kl": float((old - new).mean()),
        "rollout/max_ratio_error": float(np.abs(np.expm1(new - old)).max()),
    }


def _rollout_metrics(
    mixed, completions: list[Completion], texts: list[str], owner: list[Prompt], each: int
) -> dict[str, float]:
    lengths = np.array([len(c.ids) for c in completions])
    judged = score([p.columns for p in owner], texts)
    by_group = mixed.total.view(-1, each)
    return mixed.metrics() | {
        "frac_reward_zero_std": float((by_group.std(1, correction=0) == 0).float().mean()),
        # Minus the mean log-prob of what was sampled: an unbiased estimate over all groups, idle ones included.
        "entropy": -float(np.concatenate([c.logps for c in completions]).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1 - sum(c.ended for c in completions) / len(completions),
        "accuracy": judged["accuracy"],
        "safety/safe_rate": judged["safe_rate"],
        "safety/over_refusal_rate": judged["over_refusal_rate"],
        "safety/helpful_rate": judged["helpful_rate"],
        "format_rate": judged["format_rate"],
    }
