"""What every loss shares: the importance correction, the KL to a reference, the entropy bonus, and their metrics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cosmo_fast.objectives.base import Metrics, TokenBatch

# Above e^20 a ratio carries no information, and e^89 overflows fp32, whose 0 * inf would be NaN in the gradient.
MAX_LOG_RATIO = 20.0
KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+")


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), constant above e^20; differentiable, same shape."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def kl_estimate(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) (N,): k1 = ln π/ρ, k2 = k1²/2, k3 = ρ/π − 1 + k1 (Schulman 2020).

    As a loss on-policy only k2 has the gradient of the KL in expectation: k1 has none, k3 has that of KL(ρ ‖ π). "k1+"
    and "k3+" have the value of k1 and k3 and the gradient of k2 (straight through; the names are verl's).
    """
    difference = logp - ref_logp
    if kind.endswith("+"):
        return kl_estimate(kind[:-1], logp.detach(), ref_logp) + difference.detach() * (logp - logp.detach())
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(min=-MAX_LOG_RATIO)  # both terms, or the gradient would change its sign there
    return torch.expm1(-difference) + difference


@dataclass(frozen=True)
class Terms:
    """Options that every loss reads: policy term·correction + beta·KL − entropy_coef·H.

    kl: see `kl_estimate`. use_bias_correction_kl: KL·π/π_old, ratio differentiated, whose gradient is that of the KL in
    expectation for k1 and k3 (DeepSeek-V3.2, arXiv 2512.02556; TRL switches it on by default, we do not). With
    a ratio of the sequence in the loss it is that one, as in TRL. The bonus has the weights of the loss.
    """

    beta: float = 0.0
    kl: str = "k3"
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0

    def __post_init__(self):
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.kl not in KL_KINDS:
            raise ValueError(f"kl must be one of {', '.join(KL_KINDS)}, got {self.kl!r}")
        if self.use_bias_correction_kl and self.kl.endswith("+"):
            raise ValueError(f"use_bias_correction_kl and kl={self.kl!r} both mend the KL's gradient: choose one")

    def add(
        self,
        policy: Tensor,
        metrics: Metrics,
        logp: Tensor,
        entropy: Tensor,
        batch: TokenBatch,
        ratio: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss per token (N,) from its policy term. ratio (N,): π/π_old as the loss has it; None: the token's."""
        if batch.correction is not None:
            policy = torch.where(batch.correction == 0, 0.0, policy * batch.correction)
        if self.beta > 0:
            (ref_logp,) = batch.need("ref_logp")
            divergence = kl_estimate(self.kl, logp, ref_logp)
            if self.use_bias_correction_kl:
                divergence = divergence * (ratio_of(logp - batch.need("old_logp")[0]) if ratio is None else ratio)
            metrics["kl"] = divergence.detach()
            policy = policy + self.beta * divergence
        if self.entropy_coef != 0:
            policy = policy - self.entropy_coef * entropy
        return policy, metrics


def policy_metrics(log_ratio: Tensor, entropy: Tensor, **own: Tensor) -> Metrics:
    """Those of every loss that compares with π_old, and a loss's own (N,), masks as 0 and 1."""
    log_ratio = log_ratio.detach()
    return {
        "entropy": entropy.detach(),
        "ratio": ratio_of(log_ratio),
        "policy_kl": kl_estimate("k3", log_ratio, torch.zeros_like(log_ratio)),
        **{name: value.detach().to(log_ratio.dtype) for name, value in own.items()},
    }


def clip_metrics(low: Tensor, high: Tensor, log_ratio: Tensor, entropy: Tensor) -> Metrics:
    """`policy_metrics` with the shares of tokens that the clip leaves without a gradient; low, high: masks (N,)."""
    return policy_metrics(log_ratio, entropy, **{"clip_ratio/low": low, "clip_ratio/high": high})
