"""What the stages share: their context, and the packed forward and backward of one optimiser step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from cosmo_fast import ops
from cosmo_fast.config import Config, StageConfig
from cosmo_fast.data.mixture import Mixture
from cosmo_fast.distributed import Ranks
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import TokenBatch, sequence_position
from cosmo_fast.plan import Plan, Prompt, balance, flops
from cosmo_fast.stages.packed import Group, passes
from cosmo_fast.stages.state import StageState


@dataclass
class Context:
    """What a stage works with. ``seed`` is the stage's own; ``backward`` adds a loss's gradient to the parameters'.

    ``state``: by default that of the first step. ``note`` says a line to the user.
    """

    config: Config
    stage: StageConfig
    policy: Policy
    vision: Vision
    seed: int
    ranks: Ranks = field(default_factory=Ranks)
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    state: StageState | None = None
    note: Callable[[str], None] = print

    def __post_init__(self):
        self.state = self.state or StageState.of(self.stage)

    def draw(self, mixture: Mixture, count: int, step: int) -> list:
        """The next ``count`` rows, out of those that the curriculum has open at ``step``."""
        curriculum = self.stage.curriculum
        rows = mixture.draw(count, curriculum.at(step, self.stage.max_steps) if curriculum else 1.0)
        self.state.taken, self.state.skipped = mixture.taken, mixture.skipped
        return rows


def own_share(context: Context, groups: list[Group]) -> list[int]:
    """Indices of the groups that this rank takes."""
    if context.ranks.world == 1:
        return list(range(len(groups)))
    return balance(flops(context.policy).of([g.size for g in groups]), context.ranks.world)[context.ranks.rank]


def by_response(values: torch.Tensor, groups: list[Group]) -> list[list[np.ndarray]]:
    """A vector in the order of ``plan.targets`` (N,) as fp32 arrays, one a response, in a list for each group."""
    lengths = [len(r) for g in groups for r in g.responses]
    pieces = iter(np.split(values.detach().float().cpu().numpy(), np.cumsum(lengths)[:-1]))
    return [[next(pieces) for _ in g.responses] for g in groups]


@torch.no_grad()
def logprobs(context: Context, policy: Policy, vision: Vision, groups: list[Group]) -> list[list[np.ndarray]]:
    """Log-probs of the responses' tokens under ``policy``, fp32 arrays in a list for each group; no gradient."""
    scored: list[list[np.ndarray]] = [[] for _ in groups]
    for work in passes(policy, vision, groups, context.config.max_tokens_per_batch):
        targets = work.plan.tensor("targets", policy.device)
        temperature = context.stage.temperature
        logps, _ = ops.linear_logprobs(work.hidden, policy.head_weight, targets, temperature=temperature)
        for i, arrays in zip(work.indices, by_response(logps, work.groups), strict=True):
            scored[i] += arrays
    return scored


def kept_share(prompts: list[Prompt]) -> dict[str, float]:
    """The metric ``perf/vision_tokens_kept``: the mean share, over prompts with pictures; nothing without pruning."""
    shares = [p.kept.count / p.vision_rows for p in prompts if p.kept]
    return {"perf/vision_tokens_kept": sum(shares) / len(shares)} if shares else {}


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

    Every rank is given all groups and takes those that :func:`cosmo_fast.plan.balance` gives it.

    seed: of the rows that an unbiased ``row_tolerance`` keeps.

    Returns:
        over all ranks the loss Σ weight · ℓ and the objective's metrics (means weighted as the tokens are), and for
        every group of this rank the log-probs of its responses (list of arrays), None for the others.
    """
    policy, stage, loss, counted = context.policy, context.stage, 0.0, 0.0
    totals, dropped = defaultdict(float), defaultdict(float)
    logps: list = [None] * len(groups)
    mine = own_share(context, groups)
    options: dict = {"temperature": temperature}
    forwards = passes(
        policy, context.vision, [groups[i] for i in mine], context.config.max_tokens_per_batch, context.backward
    )
    for number, work in enumerate(forwards):
        batch = token_batch(work.groups, work.plan, policy.device)
        if stage.epsilon_start is not None:
            learnt = batch.weight != 0
            batch.position = torch.zeros_like(batch.weight)
            batch.position[learnt] = sequence_position(batch.sequence[learnt])
        if stage.row_tolerance:
            seed_here = step_seed(seed, context.ranks.rank, number)
            options["row_tolerance"] = ops.RowTolerance(stage.row_tolerance, stage.row_tolerance_unbiased, seed_here)
        out = ops.linear_policy_loss(work.hidden, policy.head_weight, batch, objective, **options)
        # DeepSpeed takes the mean over the ranks; the loss is a sum over all groups.
        context.backward(out.loss if context.ranks.world == 1 else out.loss * context.ranks.world)
        mass = float(batch.weight.sum())
        loss += float(out.loss.detach())
        counted += mass
        for name, value in out.metrics.items():
            totals[name] += float(value) * mass
        for name, value in (out.dropped or {}).items():
            key = f"row_tolerance/{name}"
            dropped[key] = options["row_tolerance"].add(name, dropped[key], float(value))
        for i, arrays in zip(work.indices, by_response(out.logp, work.groups), strict=True):
            logps[mine[i]] = (logps[mine[i]] or []) + arrays
    everyone = context.ranks.gather((loss, counted, totals, dropped))
    counted = sum(mass for _, mass, _, _ in everyone)
    metrics: dict[str, float] = {}
    for _, _, sums, costs in everyone:
        for name, value in sums.items() if counted else ():
            metrics[name] = metrics.get(name, 0.0) + value / counted
        for key, value in costs.items():
            metrics[key] = options["row_tolerance"].add(key.split("/")[1], metrics.get(key, 0.0), value)
    return sum(loss for loss, *_ in everyone), metrics, logps
