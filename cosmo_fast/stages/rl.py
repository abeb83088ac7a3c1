"""Reinforcement learning: sample groups, reward, advantage, update."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosmo_fast.config import Config, StageConfig
from cosmo_fast.data.mixture import Mixture
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import DEFAULTS, advantages, objective, token_weights
from cosmo_fast.plan import Prompt
from cosmo_fast.rewards import MixedRewards, RewardMix
from cosmo_fast.rollout import Completion, Sampler, SamplingParams
from cosmo_fast.search import Search
from cosmo_fast.stages.alive import logprob_drops
from cosmo_fast.stages.base import Context, accumulate, kept_share, logprobs, own_share, step_seed
from cosmo_fast.stages.packed import Group
from cosmo_fast.stages.rl_metrics import mismatch, rollout_metrics
from cosmo_fast.stages.rollout import Rollout
from cosmo_fast.stages.state import TIED

if TYPE_CHECKING:  # it imports this package
    from cosmo_fast.verifiers.engine import Verifiers


class RLStage:
    """A rollout of ``completions_per_rollout`` responses, then ``num_iterations`` passes of updates over them.

    There is no pass for the old log-probs: sampler and trainer share weights and forward, so that the sampler's are
    the old ones, the first ratio is known to be 1, and ``rollout/kl`` shows that it is.

    reference: the policy at the start of the stage, for a stage that is resumed; by default the policy as it is now
        (with an adapter, the same model).
    search: answers the calls in responses.
    """

    def __init__(
        self,
        context: Context,
        mixture: Mixture[Prompt],
        reward_mix: RewardMix,
        reference: Policy | None = None,
        sampler: Sampler | None = None,
        search: Search | None = None,
        verifiers: Verifiers | None = None,
    ):
        self.context, self.mixture, self.reward_mix = context, mixture, reward_mix
        stage = context.stage
        config = context.config
        self.sampler = sampler or own_sampler(config, context.policy, context.vision)
        self.params = sampling_params(config, stage, search)
        self.reference, self.verifiers = reference, verifiers
        if stage.beta and reference is None:
            self.reference = context.policy if context.policy.adapter is not None else _frozen_copy(context.policy)
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
                metrics |= mismatch(self.context, used, logps)
        metrics["timing_s/update"] = time.perf_counter() - started
        metrics["tokens"] = sum(g.tokens for g in (self.groups if place == 0 else groups))
        return {**(self.rollout_metrics if place == 0 else {}), **metrics}

    def samples(self) -> list[dict[str, Any]]:
        """Some samples of the last rollout, as :func:`cosmo_fast.report.write_samples` takes them."""
        return self.shown

    def refresh_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        adapter = self.context.policy.adapter
        if adapter is None:
            self.reference = _frozen_copy(self.context.policy)
        else:
            adapter.keep_reference(adapter.state())

    def _rollout(self, step: int) -> None:
        context, stage, state = self.context, self.context.stage, self.context.state
        each = stage.num_generations
        context.vision.forget()
        wanted = stage.completions_per_rollout * context.ranks.world // each
        weights = state.weights(stage, step, self.reward_mix.recipes)
        rollout = self._sampled(wanted, step, step_seed(context.seed, step), weights)
        used, extra = list(range(wanted)), {}
        if stage.dynamic_sample:
            rollout, used, extra = self._refilled(rollout, wanted, step, weights)
        logged = rollout_metrics(rollout, each) | extra
        logged |= {f"reward_weights/{label}/{n}": w for label, by_name in weights.items() for n, w in by_name.items()}
        logged |= {f"constraints/{name}/lambda": value for name, value in state.multipliers.items()}
        chosen = rollout.only(used, each)
        started = time.perf_counter()
        group_index = torch.arange(wanted).repeat_interleave(each)
        gains = self._advantages(chosen.mixed, group_index, chosen.completions).tolist()
        learns = any(gains) or bool(stage.beta or stage.entropy_coef)
        if state.count_tied(learns) and context.ranks.first:
            context.note(f"{stage.name}, step {step}: {TIED}")
        state.adapt(stage, logged)
        self.groups = [
            Group(
                prompt.reuse(chosen.completions[i].kept),
                [c.ids for c in chosen.completions[i : i + each]],
                weights=[],
                advantages=gains[i : i + each],
                old_logps=[c.logps for c in chosen.completions[i : i + each]],
                ended=[c.ended for c in chosen.completions[i : i + each]],
                tool_masks=[c.own for c in chosen.completions[i : i + each]],
            )
            for i, prompt in zip(range(0, len(chosen.completions), each), chosen.owner[::each], strict=True)
        ]
        if self.reference is not None:
            self._score_reference()
        self.rollout_metrics = logged | {
            **kept_share(rollout.owner[::each]),
            "perf/kv_mib": getattr(self.sampler, "kv_bytes", 0) / 2**20,  # another engine need not know
            "timing_s/sample": rollout.sample_s,
            "timing_s/reward": rollout.reward_s,
            "timing_s/reference": time.perf_counter() - started,
        }
        self.shown = chosen.shown(gains, context.config.log_completions)

    def _sampled(self, count: int, step: int, seed: int, weights: dict[str, dict[str, float]]) -> Rollout:
        """Responses to the next ``count`` prompts and their rewards, of all ranks."""
        context, ranks = self.context, self.context.ranks
        each = context.stage.num_generations
        started = time.perf_counter()
        prompts = context.draw(self.mixture, count, step)
        options = {"num_generations": each, "seed": seed, "first": ranks.start(len(prompts))}
        generated = self.sampler.generate(ranks.share(prompts), self.params, **options)
        completions = [c for g in generated for c in g]
        sampled = time.perf_counter()
        texts = context.policy.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        chosen = [p.reuse(g[0].kept) for p, g in zip(ranks.share(prompts), generated, strict=True)]
        owner = [p for p in chosen for _ in range(each)]
        verdicts, mixed = self._rewarded(owner, completions, texts, weights, step_seed(seed, 3, ranks.rank))
        shares = ranks.gather((completions, texts, verdicts, mixed))
        completions, texts, verdicts = ([x for share in shares for x in share[i]] for i in range(3))
        mixed, owner = MixedRewards.joined([m for *_, m in shares]), [p for p in prompts for _ in range(each)]
        for said in mixed.notes if ranks.first else ():
            context.note(f"{context.stage.name}, step {step}: {said}")
        return Rollout(owner, completions, texts, verdicts, mixed, sampled - started, time.perf_counter() - sampled)

    def _refilled(
        self, rollout: Rollout, wanted: int, step: int, weights
    ) -> tuple[Rollout, list[int], dict[str, float]]:
        """DAPO's dynamic sampling (arXiv 2503.14476): further prompts until ``wanted`` groups have rewards that differ.

        Every time as many as the share of such groups so far asks for, ``wanted`` at most (ours; DAPO draws a whole
        batch each time), ``max_resample_times`` times at most.

        Returns:
            all that was sampled, the indices of the groups to train on, and what is logged.
        """
        stage, each, times = self.context.stage, self.context.stage.num_generations, 0
        while True:
            varied, groups = rollout.varied(each, stage.dynamic_sample_reward), len(rollout.owner) // each
            missing = wanted - len(varied)
            if missing <= 0 or times == stage.max_resample_times:
                break
            times += 1
            count = min(wanted, -(-missing * groups // max(1, len(varied))))
            seed = step_seed(self.context.seed, step, 2, times)
            rollout = rollout.joined(self._sampled(max(count, self.context.ranks.world), step, seed, weights))
        if missing > 0:
            message = (
                f"dynamic_sample: after {times} resamplings {len(varied)} of the {wanted} groups wanted have rewards "
                f"that differ, of {groups} sampled; are the rows too easy or too hard? Raise num_generations or "
                "max_resample_times, or draw other rows (curriculum, train_dataset)"
            )
            if stage.resample_exhausted == "error":
                raise ValueError(f"stage {stage.name!r}, step {step}: {message}; or set resample_exhausted: fill")
            if self.context.ranks.first:
                self.context.note(message)
        equal = sorted(set(range(groups)) - set(varied))
        logged = {"dynamic_sample/resamplings": times, "dynamic_sample/kept": len(varied) / groups}
        return rollout, (varied + equal)[:wanted], logged | {"dynamic_sample/missing": max(0, missing)}

    def _rewarded(
        self, owner: list[Prompt], completions: list[Completion], texts: list[str], weights: dict, seed: int
    ) -> tuple[list[dict[str, str]], MixedRewards]:
        """The verifiers' verdicts on this rank's responses, {kind: verdict} each, and the rewards.

        Those see STAGE_COLUMNS, too, and the λ that `deliberative` reads.
        """
        stage, state = self.context.stage, self.context.state
        added: list[dict[str, Any]] = [{"completion_ids": c.ids.tolist()} for c in completions]
        if "visual_focus_drop" in self.reward_mix.functions:
            for row, drop in zip(added, logprob_drops(self.context, owner, completions), strict=True):
                row["blank_logprob_drop"] = drop
        if stage.multi_objective_aggregation != "lagrangian" and "reliability" in state.multipliers:
            added = [row | {"reliability_multiplier": state.multipliers["reliability"]} for row in added]
        if self.verifiers:
            recipes = [self.reward_mix.recipe(p.columns, p.source) for p in owner]
            for row, given in zip(added, self.verifiers(owner, texts, recipes, seed), strict=True):
                row |= given
        shown = [{"question": p.question, **p.columns, "images": [m.key for m in p.media]} for p in owner]
        rows = [columns | row for columns, row in zip(shown, added, strict=True)]
        bounds = stage.max_reward_failures, stage.num_generations
        mixed = self.reward_mix([p.text for p in owner], texts, rows, [p.source for p in owner], weights, *bounds)
        return [row.get("verifier_verdicts", {}) for row in added], mixed

    def _advantages(self, mixed: MixedRewards, groups: torch.Tensor, completions: list[Completion]) -> torch.Tensor:
        stage = self.context.stage
        lengths = torch.tensor([int(c.own.sum()) for c in completions])
        options = {"weighting": stage.cpgd_weighting, "lengths": lengths, "mu": stage.cale_mu, "a": stage.cale_a}
        if stage.multi_objective_aggregation == "sum_then_normalize":
            return advantages(mixed.total, groups, self.advantage, **options)
        options["multi_objective_aggregation"] = stage.multi_objective_aggregation
        matrix, weights = mixed.matrix, mixed.weights
        if stage.multi_objective_aggregation == "gated":
            matrix, weights = mixed.apart([stage.gate_reward])
            options["gate_threshold"] = stage.gate_threshold
        if stage.multi_objective_aggregation == "lagrangian":
            matrix, weights = mixed.apart([*stage.constraints], merge=True)
            options["multipliers"] = [*self.context.state.multipliers.values()]
        return advantages(matrix, groups, self.advantage, reward_weights=weights, **options)

    @torch.no_grad()
    def _score_reference(self) -> None:
        """Log-probs under the policy at the start of the stage; a frozen tower's features are the rollout's own."""
        context, vision, adapter = self.context, self.context.vision, self.context.policy.adapter
        if not context.policy.vision_frozen:
            vision = Vision(self.reference, max_image_pixels=context.config.max_image_pixels)
        with nullcontext() if adapter is None else adapter.reference():
            self._score_groups(vision)

    def _score_groups(self, vision: Vision) -> None:
        context, reference = self.context, self.reference
        mine = own_share(context, self.groups)
        scored = logprobs(context, reference, vision, [self.groups[i] for i in mine])
        for share in context.ranks.gather(list(zip(mine, scored, strict=True))):
            for i, arrays in share:
                self.groups[i].ref_logps = arrays


def own_sampler(config: Config, policy: Policy, vision: Vision) -> Sampler:
    """The sampler on the policy's own weights, within the recipe's bounds."""
    return Sampler(policy, vision, config.sampling_batch_size, config.max_tokens_per_batch, config.kv_cache_mib)


def sampling_params(config: Config, stage: StageConfig, search: Search | None = None) -> SamplingParams:
    """How the stage draws."""
    drawn = (stage.temperature, stage.top_k, stage.top_p, stage.min_p, stage.stop_strings)
    return SamplingParams(config.max_completion_length, *drawn, search)


def _share(groups: list[Group], parts: int, part: int) -> list[Group]:
    size = len(groups) // parts
    return groups[part * size : (part + 1) * size]


def _set_weights(groups: list[Group], aggregation: str, context: Context) -> None:
    """Token weights of one optimiser step; truncated responses count nowhere when they are masked, nor do results."""
    masks = [mask for g in groups for mask in g.tool_masks]
    lengths = [int(mask.sum()) for mask in masks]
    if context.stage.mask_truncated_completions:
        ended = [e for g in groups for e in g.ended]
        lengths = [n if e else 0 for n, e in zip(lengths, ended, strict=True)]
    owner = [i for i, g in enumerate(groups) for _ in g.responses]
    flat = token_weights(
        aggregation, torch.tensor(lengths), groups=torch.tensor(owner), max_length=context.config.max_completion_length
    )
    weights = [np.zeros(len(mask), dtype=np.float32) for mask in masks]
    for piece, mask, own in zip(flat.split(lengths), masks, weights, strict=True):
        if len(piece):
            own[mask] = piece.numpy()
    filled = iter(weights)
    for group in groups:
        group.weights = [next(filled) for _ in group.responses]


def _frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now; a tower that does not learn is shared."""
    kept = {id(p): p for p in policy.vision_parameters} if policy.vision_frozen else {}
    model = copy.deepcopy(policy.model, kept).requires_grad_(False)
    return Policy(model, policy.tokenizer, policy.image_processor, policy.family)
