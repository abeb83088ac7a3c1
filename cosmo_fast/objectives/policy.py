"""Policy losses on token vectors, minimised. Each is checked against its formula once, in tests/test_objectives.py."""

import math

import torch
from torch import Tensor

from cosmo_fast.objectives.base import Objective, TokenBatch, sequence_mean

# Above e^20 a ratio carries no information, and e^89 overflows fp32, whose 0 * inf would be NaN in the gradient.
_MAX_LOG_RATIO = 20.0
KL_KINDS = ("k1", "k2", "k3")


def sft() -> Objective:
    """Negative log-likelihood."""

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        return -logp, {"entropy": entropy.detach(), "probability": logp.detach().exp()}

    return Objective("sft", loss)


def kl_estimate(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) (N,): k1 = ln π/ρ, k2 = k1²/2, k3 = ρ/π − 1 + k1 (Schulman 2020)."""
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(min=-_MAX_LOG_RATIO)  # both terms, or the gradient would change its sign there
    return torch.expm1(-difference) + difference


def grpo(
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    importance_sampling_level: str = "token",
) -> Objective:
    """−min(r·A, clip(r, 1−ε, 1+ε_high)·A) + β·KL − entropy_coef·H, with r = π/π_old (arXiv 2402.03300).

    epsilon_high None: as epsilon. delta: upper bound of the unclipped ratio, which bounds the loss where A < 0
    (two-sided clip, arXiv 2505.07291). importance_sampling_level "sequence": r is the exponential of the sequence's
    mean log-ratio (GSPO, arXiv 2507.18071). Dr. GRPO, DAPO and BNPO differ in advantage and aggregation only.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check_clip(epsilon, high)
    _check_regularisers(beta, kl)
    if delta is not None and not delta > 1 + high:
        raise ValueError(f"delta must exceed 1 + epsilon_high = {1 + high}, got {delta}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}")
    by_sequence = importance_sampling_level == "sequence"

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        ratio = (sequence_mean(log_ratio, batch.sequence) if by_sequence else log_ratio).clamp(max=_MAX_LOG_RATIO).exp()
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        token_loss = -torch.min(bounded * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)
        r = ratio.detach()
        metrics = _clip_metrics(
            (r < 1 - epsilon) & (advantage < 0), (r > 1 + high) & (advantage > 0), log_ratio, entropy
        )
        return _regularised(token_loss, metrics, logp, entropy, batch, beta, kl, entropy_coef)

    return Objective("gspo" if by_sequence else "grpo", loss, sequence_level=by_sequence)


def cpgd(
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    alpha: float = 0.01,
    drift_cap: float = 2.0,
    beta: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> Objective:
    """CPGD (arXiv 2505.12504): −[Φ − α·E] + β·KL − entropy_coef·H, with r = π/π_old.

    Φ = min(ln r·A, clip(ln r, ln(1−ε), ln(1+ε_high))·A): its gradient is A·∇ln π unless clipped, without a ratio in it.
    E = min(sg(r) − 1, drift_cap)·ln π: the drift from the old policy, with a cap on its gradient.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check_clip(epsilon, high)
    _check_regularisers(beta, kl)
    if alpha < 0 or drift_cap < 0:
        raise ValueError(f"alpha and drift_cap must not be negative, got {alpha} and {drift_cap}")
    lowest, highest = math.log1p(-epsilon), math.log1p(high)

    def loss(logp: Tensor, entropy: Tensor, batch: TokenBatch):
        advantage, old_logp = batch.need("advantage", "old_logp")
        log_ratio = logp - old_logp
        gain = torch.min(log_ratio * advantage, log_ratio.clamp(lowest, highest) * advantage)
        drift = torch.expm1(log_ratio.detach().clamp(max=_MAX_LOG_RATIO)).clamp(max=drift_cap)
        low, top = (log_ratio.detach() < lowest) & (advantage < 0), (log_ratio.detach() > highest) & (advantage > 0)
        metrics = _clip_metrics(low, top, log_ratio, entropy)
        return _regularised(alpha * drift * logp - gain, metrics, logp, entropy, batch, beta, kl, entropy_coef)

    return Objective("cpgd", loss)


def _check_clip(epsilon: float, high: float) -> None:
    if not 0 <= epsilon < 1 or high < 0:
        raise ValueError(f"epsilon must lie in [0, 1) and epsilon_high not below 0, got {epsilon} and {high}")


def _check_regularisers(beta: float, kl: str) -> None:
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if kl not in KL_KINDS:
        raise ValueError(f"kl must be one of {', '.join(KL_KINDS)}, got {kl!r}")


def _clip_metrics(low: Tensor, high: Tensor, log_ratio: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    log_ratio = log_ratio.detach()
    return {
        "entropy": entropy.detach(),
        "ratio": log_ratio.clamp(max=_MAX_LOG_RATIO).exp(),
        "policy_kl": kl_estimate("k3", log_ratio, torch.zeros_like(log_ratio)),
        "clip_ratio/low": low.to(log_ratio.dtype),
        "clip_ratio/high": high.to(log_ratio.dtype),
    }


def _regularised(token_loss, metrics, logp, entropy, batch, beta, kl, entropy_coef):
    if beta > 0:
        (ref_logp,) = batch.need("ref_logp")
        divergence = kl_estimate(kl, logp, ref_logp)
        metrics["kl"] = divergence.detach()
        token_loss = token_loss + beta * divergence
    if entropy_coef != 0:
        token_loss = token_loss - entropy_coef * entropy
    return token_loss, metrics
