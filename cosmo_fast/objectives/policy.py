"""Policy losses on token vectors, minimised. r = π/π_old, A = advantage; every one ends in `Terms`.

Each is checked against its formula once, in tests/test_policy_objectives.py. Losses that differ only in advantage and
aggregation are one function under several names; `DEFAULTS` says which advantage and aggregation each name stands for.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosmo_fast.objectives.base import Objective, TokenBatch, sequence_mean, sequence_sum
from cosmo_fast.objectives.terms import MAX_LOG_RATIO, Terms, clip_metrics, policy_metrics, ratio_of

_SMALLEST_WEIGHT = 1e-8  # of VESPO's sequence weight, as in TRL; the largest is e^20

# Aggregation and advantage of each loss as its paper (or, where it has none, its authors' code) has them; a recipe may
# choose others.
DEFAULTS = {
    "reinforce": ("seq-mean-token-sum-norm", "reinforce"),
    "rloo": ("seq-mean-token-sum-norm", "rloo"),
    "reinforce_pp": ("token-mean", "reinforce_pp"),
    "grpo": ("seq-mean-token-mean", "group"),
    "dr_grpo": ("seq-mean-token-sum-norm", "dr_grpo"),
    "bnpo": ("token-mean", "group"),
    "dapo": ("token-mean", "group"),
    "gspo": ("seq-mean-token-mean", "group"),
    "gmpo": ("seq-mean-token-mean", "group"),
    "cispo": ("token-mean", "group"),
    "sapo": ("seq-mean-token-mean", "group"),
    "luspo": ("seq-mean-token-sum", "group"),
    "vespo": ("token-mean", "group"),
    "cpgd": ("prompt-mean-token-mean", "cpgd"),
}


def objective(loss_type: str, **options: Any) -> Objective:
    """The loss of that name. ValueError for an unknown name, and for an option that this loss does not read."""
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {loss_type!r}")
    read = inspect.signature(LOSSES[loss_type]).parameters
    unread = [name for name in options if name not in read]
    if unread:
        raise ValueError(f"loss_type {loss_type!r} does not read {', '.join(unread)}; it reads {', '.join(read)}")
    return LOSSES[loss_type](**options)


def _reads(base: Callable) -> Callable[[Callable], Callable]:
    """A decorator: `**options` are those of `base`, and the signature says so (to `help` and to `objective`)."""

    def show(function: Callable) -> Callable:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in inspect.signature(base).parameters.values() if p.name not in {q.name for q in own}]
        named = [p.replace(kind=p.KEYWORD_ONLY) for p in rest]
        function.__signature__ = inspect.Signature(own + named, return_annotation=Objective)
        return function

    return show


@_reads(Terms)
def sft(**terms) -> Objective:
    """Negative log-likelihood."""
    tail = Terms(**terms)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        metrics = {"entropy": entropy.detach(), "probability": logp.detach().exp()}
        return tail.add(-logp, metrics, logp, entropy, batch)

    return Objective("sft", loss)


@_reads(Terms)
def reinforce(**terms) -> Objective:
    """−A·ln π (Williams 1992): no ratio and no clip, so the data must come from the policy at hand."""
    tail = Terms(**terms)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        (advantage,) = batch.need("advantage")
        metrics = {"entropy": entropy.detach()}
        if batch.old_logp is not None:
            metrics = policy_metrics(logp - batch.old_logp, entropy)
        return tail.add(-advantage * logp, metrics, logp, entropy, batch)

    return Objective("reinforce", loss)


@_reads(reinforce)
def rloo(**options) -> Objective:
    """`reinforce`, A = R − mean of the group's others (arXiv 2402.14740)."""
    return replace(reinforce(**options), name="rloo")


@_reads(Terms)
def grpo(
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    importance_sampling_level: str = "token",
    **terms,
) -> Objective:
    """−min(r·A, clip(r, 1−ε, 1+ε_high)·A) (arXiv 2402.03300).

    epsilon_high None: as epsilon. delta: upper bound of the unclipped ratio, which bounds the loss where A < 0
    (two-sided clip, arXiv 2505.07291). dual_clip: the loss where A < 0 is at most −dual_clip·A (dual-clip PPO, arXiv
    1912.09729; usually 3); above 1 + ε_high both are one function, so only one may be given.
    importance_sampling_level "sequence": r is the exponential of the sequence's mean log-ratio (GSPO).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check_clip(epsilon, high)
    if delta is not None and dual_clip is not None:
        raise ValueError(f"delta={delta} and dual_clip={dual_clip} bound the same ratio: give one")
    bound = dual_clip if delta is None else delta
    if bound is not None and not bound > 1 + high:
        name = "dual_clip" if delta is None else "delta"
        raise ValueError(f"{name} must exceed 1 + epsilon_high = {1 + high}, got {bound}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}")
    by_sequence, tail = importance_sampling_level == "sequence", Terms(**terms)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        ratio = ratio_of(sequence_mean(log_ratio, batch.sequence) if by_sequence else log_ratio)
        bounded = ratio if bound is None else ratio.clamp(max=bound)
        policy = -torch.min(bounded * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)
        r = ratio.detach()
        low, top = (r < 1 - epsilon) & (advantage < 0), (r > 1 + high) & (advantage > 0)
        return tail.add(policy, clip_metrics(low, top, log_ratio, entropy), logp, entropy, batch, ratio)

    return Objective("grpo", loss, sequence_level=by_sequence)


@_reads(grpo)
def reinforce_pp(**options) -> Objective:
    """REINFORCE++ (arXiv 2501.03262): `grpo`'s clipped ratio, A normalised over the whole batch, not the group."""
    return replace(grpo(**options), name="reinforce_pp")


@_reads(grpo)
def dr_grpo(**options) -> Objective:
    """Dr. GRPO (arXiv 2503.20783): `grpo`, A = R − mean, and a constant as the denominator."""
    return replace(grpo(**options), name="dr_grpo")


@_reads(grpo)
def bnpo(**options) -> Objective:
    """BNPO as TRL has it: `grpo` with the mean over the batch's tokens."""
    return replace(grpo(**options), name="bnpo")


@_reads(grpo)
def dapo(epsilon: float = 0.2, epsilon_high: float | None = 0.28, **options) -> Objective:
    """DAPO (arXiv 2503.14476): `grpo` with the mean over the batch's tokens and a clip that is wider above."""
    return replace(grpo(epsilon, epsilon_high, **options), name="dapo")


@_reads(grpo)
def gspo(
    epsilon: float = 3e-4, epsilon_high: float | None = 4e-4, importance_sampling_level: str = "sequence", **options
) -> Objective:
    """GSPO (arXiv 2507.18071): `grpo` with the sequence's ratio and the paper's bounds."""
    options |= {"importance_sampling_level": importance_sampling_level}
    return replace(grpo(epsilon, epsilon_high, **options), name="gspo")


@_reads(grpo)
def luspo(
    epsilon: float = 2e-3, epsilon_high: float | None = 2.5e-3, importance_sampling_level: str = "sequence", **options
) -> Objective:
    """LUSPO (arXiv 2602.05261): GSPO times the sequence's length, which is the *sum* over its tokens.

    The length comes from the aggregation, seq-mean-token-sum.
    """
    options |= {"importance_sampling_level": importance_sampling_level}
    return replace(grpo(epsilon, epsilon_high, **options), name="luspo")


@_reads(Terms)
def gmpo(epsilon: float = 0.4, epsilon_high: float | None = None, **terms) -> Objective:
    """GMPO (arXiv 2507.20673): −A·(Π over the sequence of r clipped by token)^(1/n), the geometric mean of the ratios.

    epsilon, epsilon_high bound *log*-ratios, as in the paper: r in (e^−ε, e^ε_high), on the side that A pushes to.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if epsilon < 0 or high < 0:
        raise ValueError(f"gmpo's epsilon and epsilon_high must not be negative, got {epsilon} and {high}")
    tail = Terms(**terms)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        clipped = torch.where(advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))
        ratio = ratio_of(sequence_mean(clipped, batch.sequence))
        x = log_ratio.detach()
        low, top = (x < -epsilon) & (advantage < 0), (x > high) & (advantage > 0)
        return tail.add(-ratio * advantage, clip_metrics(low, top, log_ratio, entropy), logp, entropy, batch)

    return Objective("gmpo", loss, sequence_level=True)


@_reads(Terms)
def cispo(epsilon_high: float = 5.0, **terms) -> Objective:
    """CISPO (arXiv 2506.13585): −sg(min(r, epsilon_high))·A·ln π, so that a clipped token keeps a gradient.

    epsilon_high is the bound itself, not its distance from 1, as in TRL; 5 is ScaleRL's (arXiv 2510.13786).
    """
    if not epsilon_high > 0:
        raise ValueError(f"cispo's epsilon_high is the largest ratio and must be positive, got {epsilon_high}")
    tail = Terms(**terms)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        ratio = ratio_of(log_ratio.detach())
        clipped = (ratio > epsilon_high) & (advantage > 0)
        metrics = policy_metrics(log_ratio, entropy, cispo_clip_ratio=clipped)
        return tail.add(-ratio.clamp(max=epsilon_high) * advantage * logp, metrics, logp, entropy, batch)

    return Objective("cispo", loss)


@_reads(Terms)
def sapo(sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, **terms) -> Objective:
    """SAPO (arXiv 2511.20347): −4/τ·sigmoid(τ·(r − 1))·A, τ by the sign of A: a soft gate in the place of the clip."""
    if not (sapo_temperature_pos > 0 and sapo_temperature_neg > 0):
        given = f"{sapo_temperature_pos} and {sapo_temperature_neg}"
        raise ValueError(f"sapo_temperature_pos and sapo_temperature_neg must be positive, got {given}")
    tail = Terms(**terms)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        heat = _choose(advantage > 0, sapo_temperature_pos, sapo_temperature_neg, log_ratio)
        gate = 4 / heat * torch.sigmoid(heat * (ratio_of(log_ratio) - 1))
        return tail.add(-gate * advantage, policy_metrics(log_ratio, entropy), logp, entropy, batch)

    return Objective("sapo", loss)


@_reads(Terms)
def vespo(
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    **terms,
) -> Objective:
    """VESPO (arXiv 2602.10693): −sg(φ(w))·A·ln π; φ = w^k·e^(λ − λw), w = Π r over the sequence, k and λ by A's sign.

    `TokenBatch.correction` is a factor of w, not of the loss, as in TRL: by token only, since w takes the product.
    """
    if min(vespo_k_pos, vespo_k_neg) < 0 or not min(vespo_lambda_pos, vespo_lambda_neg) > 0:
        given = f"{vespo_k_pos}, {vespo_k_neg} and {vespo_lambda_pos}, {vespo_lambda_neg}"
        raise ValueError(f"vespo_k_* must not be negative and vespo_lambda_* must be positive, got {given}")
    tail, lowest = Terms(**terms), math.log(_SMALLEST_WEIGHT)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        factors = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if batch.correction is not None:
            factors = factors + batch.correction.log().clamp(lowest, MAX_LOG_RATIO)
        log_w = sequence_sum(factors, batch.sequence).clamp(lowest, MAX_LOG_RATIO)
        k = _choose(advantage >= 0, vespo_k_pos, vespo_k_neg, log_w)
        rate = _choose(advantage >= 0, vespo_lambda_pos, vespo_lambda_neg, log_w)
        phi = torch.exp(rate + k * log_w - rate * log_w.exp())
        policy = -phi * advantage * logp
        if batch.correction is not None:  # what `Terms` would do, less the factor that w has already
            policy = torch.where(batch.correction == 0, 0.0, policy)
            batch = replace(batch, correction=None)
        metrics = policy_metrics(log_ratio, entropy, **{"vespo/phi_seq_mean": phi})
        return tail.add(policy, metrics, logp, entropy, batch)

    return Objective("vespo", loss, sequence_level=True)


@_reads(Terms)
def cpgd(
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    epsilon_start: float | None = None,
    alpha: float = 0.01,
    drift_cap: float = 2.0,
    reweight: bool = False,
    **terms,
) -> Objective:
    """CPGD (arXiv 2505.12504): −[Φ − α·E].

    Φ = min(ln r·A, clip(ln r, ln(1−ε), ln(1+ε_high))·A): its gradient is A·∇ln π unless clipped, without a ratio in it.
    E = min(sg(r) − 1, drift_cap)·ln π: the drift from the old policy, with a cap on its gradient.
    epsilon_start: tight-to-loose clip, both bounds grow along the sequence to epsilon and epsilon_high. That they do is
    the paper's; that they grow linearly from epsilon_start with `TokenBatch.position` is ours.
    reweight, for passes after the first: A ← clip(sg(π_now)/π_old, 1−ε, 1+ε_high)·A. In the paper π_now is the policy
    at the end of the previous pass; ours is the policy at this update, the same where a pass is one update.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check_clip(epsilon, high)
    if epsilon_start is not None and not 0 <= epsilon_start <= min(epsilon, high):
        raise ValueError(f"epsilon_start must lie in [0, {min(epsilon, high)}], the tighter bound, got {epsilon_start}")
    if alpha < 0 or drift_cap < 0:
        raise ValueError(f"alpha and drift_cap must not be negative, got {alpha} and {drift_cap}")
    tail, log1p = Terms(**terms), math.log1p if epsilon_start is None else torch.log1p

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        below, above = epsilon, high
        if epsilon_start is not None:
            (position,) = batch.need("position")
            below, above = (epsilon_start + (end - epsilon_start) * position for end in (epsilon, high))
        log_ratio, lowest, highest = logp - old_logp, log1p(-below), log1p(above)
        x = log_ratio.detach()
        if reweight:
            advantage = advantage * ratio_of(x).clamp(1 - below, 1 + above)
        gain = torch.min(log_ratio * advantage, log_ratio.clamp(lowest, highest) * advantage)
        drift = torch.expm1(x.clamp(max=MAX_LOG_RATIO)).clamp(max=drift_cap)
        low, top = (x < lowest) & (advantage < 0), (x > highest) & (advantage > 0)
        metrics = clip_metrics(low, top, log_ratio, entropy)
        return tail.add(alpha * drift * logp - gain, metrics, logp, entropy, batch)

    return Objective("cpgd", loss)


def _choose(mask: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    return torch.full_like(like, no).masked_fill(mask, yes)  # torch.where of two numbers would be fp32


def _check_clip(epsilon: float, high: float) -> None:
    if not 0 <= epsilon < 1 or not high >= 0:
        raise ValueError(f"epsilon must lie in [0, 1) and epsilon_high not below 0, got {epsilon} and {high}")


_ALL = (sft, reinforce, rloo, reinforce_pp, grpo, dr_grpo, bnpo, dapo, gspo, gmpo, cispo, sapo, luspo, vespo, cpgd)
LOSSES = {function.__name__: function for function in _ALL}
