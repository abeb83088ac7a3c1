"""What the stages share: their context, and the packed forward and backward of one optimiser step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from cosmo_fast import ops
from cosmo_fast.config import Config, StageConfig
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import TokenBatch, sequence_position
from cosmo_fast.plan import Plan, Prompt, micro_batches


@dataclass
class Context:
    """What a stage works with. ``seed`` is the stage's own."""

    config: Config
    stage: StageConfig
    policy: Policy
    vision: Vision
    seed: int


@dataclass
class Group:
    """A prompt and its responses with what the loss knows of every token; lists have an entry a response.

    ``weights``, ``old_logps``, ``ref_logps``: (R,) arrays; ``advantages``: floats; ``ended``: whether the policy ended
    the response itself. None where the loss has no use for them.
    """

    prompt: Prompt
    responses: list[np.ndarray]
    weights: list[np.ndarray]
    advantages: list[float] | None = None
    old_logps: list[np.ndarray] | None = None
    ref_logps: list[np.ndarray] | None = None
    ended: list[bool] | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt.ids) + sum(len(r) for r in self.responses)


def plan_of(groups: list[Group]) -> Plan:
    """The packed layout of some groups."""
    return Plan([g.prompt for g in groups], [g.responses for g in groups])


def by_response(values: torch.Tensor, groups: list[Group]) -> list[list[np.ndarray]]:
    """A vector in the order of ``plan.targets`` (N,) as fp32 arrays, one a response, in a list for each group."""
    lengths = [len(r) for g in groups for r in g.responses]
    pieces = iter(np.split(values.detach().float().cpu().numpy(), np.cumsum(lengths)[:-1]))
    return [[next(pieces) for _ in g.responses] for g in groups]


def step_seed(seed: int, *path: int) -> int:
    """A seed of its own for every place in a run, from the run's seed and integers that name the place."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1)


def token_batch(groups: list[Group], plan: Plan, device: torch.device) -> TokenBatch:
    """The groups' per-token values in the order of ``plan.targets``."""

    def flat(name: str) -> torch.Tensor | None:
        if any(getattr(g, name) is None for g in groups):
            return None
        arrays = [np.asarray(a, dtype=np.float32) for g in groups for a in getattr(g, name)]
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    advantage = None
    if all(g.advantages is not None for g in groups):
        per_response = np.array([a for g in groups for a in g.advantages], dtype=np.float32)
        advantage = torch.from_numpy(np.repeat(per_response, plan.response_lengths)).to(device)
    return TokenBatch(
        targets=plan.tensor("targets", device),
        weight=flat("weights"),
        sequence=plan.tensor("sequence", device),
        advantage=advantage,
        old_logp=flat("old_logps"),
        ref_logp=flat("ref_logps"),
    )


def accumulate(
    context: Context, groups: list[Group], objective, temperature: float = 1.0, seed: int = 0
) -> tuple[float, dict[str, float], list]:
    """Forward and backward of an optimiser step in micro-batches under ``max_tokens_per_batch``; gradients add up.

    seed: of the rows that an unbiased ``row_tolerance`` keeps.

    Returns:
        the loss Σ weight · ℓ over all groups, the objective's metrics (means weighted as the tokens are), and for every
        group the log-probs of its responses (list of arrays).
    """
    policy, stage, total, counted = context.policy, context.stage, 0.0, 0.0
    sums, dropped = defaultdict(float), defaultdict(float)
    logps: list = [None] * len(groups)
    for indices in micro_batches([g.tokens for g in groups], context.config.max_tokens_per_batch):
        chosen = [groups[i] for i in indices]
        plan = plan_of(chosen)
        hidden = policy.hidden(plan, context.vision.features(plan.media))[plan.tensor("label_rows", policy.device)]
        batch = token_batch(chosen, plan, policy.device)
        if stage.epsilon_start is not None:
            batch.position = sequence_position(batch.sequence)
        tolerance = None
        if stage.row_tolerance:
            seed_here = step_seed(seed, indices[0])
            tolerance = ops.RowTolerance(stage.row_tolerance, stage.row_tolerance_unbiased, seed_here)
        options = {"temperature": temperature, "row_tolerance": tolerance}
        out = ops.linear_policy_loss(hidden, policy.head_weight, batch, objective, **options)
        out.loss.backward()
        mass = float(batch.weight.sum())
        total += float(out.loss.detach())
        counted += mass
        for name, value in out.metrics.items():
            sums[name] += float(value) * mass
        for name, value in (out.dropped or {}).items():
            key = f"row_tolerance/{name}"
            dropped[key] = tolerance.add(name, dropped[key], float(value))
        for i, arrays in zip(indices, by_response(out.logp, chosen), strict=True):
            logps[i] = arrays
    metrics = {name: value / counted for name, value in sums.items()} if counted else {}
    return total, metrics | dropped, logps
