"""Exact divergence of two rows of logits over the whole vocabulary, and the gradient that goes back through both.

y = softcap * tanh(z / softcap) / temperature. Work is in fp32 for bf16 and fp32 logits, in fp64 for fp64. A row's sum
has terms that are >= 0 and of second order in the difference of the two rows, so that the small divergences of a policy
near its reference keep their digits, where Σ p (log p - log q) cancels; a peaked row against a flat one, where those
terms would cancel, takes this sum.
"""

import torch
from torch import Tensor

from cosmo_fast.ops.vocab_stats import statistics_dtype  # and the compiled ops with it

KINDS = ("reverse", "forward", "js")


def vocab_kl_(
    logits: Tensor,
    ref_logits: Tensor,
    kind: str,
    coefficient: Tensor | None = None,
    *,
    wanted: tuple[bool, bool] = (False, False),
    temperature: Tensor | None = None,
    softcap: float = 0.0,
    ref_softcap: float = 0.0,
    beta: float = 0.5,
) -> Tensor:
    """KL or Jensen-Shannon (N,) of two matrices of logits (N, V), policy and reference; see `linear_kl` for `kind`.

    wanted: which of the two is overwritten with coefficient (N,) * d kl / d logits. Rows may have any stride, columns
    must be contiguous; vectors are fp32 (fp64 for fp64 logits). One read of both for the sums (`js`: two), one pass for
    the gradient, while the row is still in the cache. CPU: C++; CUDA: Triton.
    """
    flip = kind == "forward"  # KL(reference || policy) is the other's KL, the sides exchanged
    sides = [(logits, softcap, wanted[0]), (ref_logits, ref_softcap, wanted[1])]
    (first, cap, own), (second, other_cap, other) = sides[::-1] if flip else sides
    mixture = beta if kind == "js" else 0.0
    return torch.ops.cosmo_fast.vocab_kl_(first, second, coefficient, temperature, cap, other_cap, mixture, own, other)


def vocab_kl_reference(
    logits: Tensor,
    ref_logits: Tensor,
    kind: str,
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    ref_logit_softcap: float | None = None,
    beta: float = 0.5,
) -> Tensor:
    """The same (N,) in eager PyTorch, differentiable by autograd."""

    def log_probabilities(z, softcap):
        y = z if z.dtype == torch.float64 else z.float()
        y = y if softcap is None else softcap * torch.tanh(y / softcap)
        per_row = isinstance(temperature, Tensor) and temperature.dim()
        return (y / (temperature[:, None] if per_row else temperature)).log_softmax(-1)

    def kl(log_p, log_q):
        return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    p, q = log_probabilities(logits, logit_softcap), log_probabilities(ref_logits, ref_logit_softcap)
    if kind != "js":
        return kl(p, q) if kind == "reverse" else kl(q, p)
    weights = torch.tensor([1 - beta, beta], dtype=p.dtype, device=p.device).log()
    mixture = torch.logaddexp(p + weights[0], q + weights[1])
    return (1 - beta) * kl(p, mixture) + beta * kl(q, mixture)


@torch.library.register_fake("cosmo_fast::vocab_kl_")
def _(logits, other, coefficient, temperature, softcap, other_softcap, beta, wanted, other_wanted):
    return logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits.dtype))


@torch.library.register_kernel("cosmo_fast::vocab_kl_", "cuda")
def _(*arguments):
    from cosmo_fast.kernels.vocab_kl import vocab_kl_ as launch  # Triton is imported at the first call only

    return launch(*arguments)
