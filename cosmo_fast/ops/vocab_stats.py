"""Statistics of rows of logits, and the gradient that goes back through them.

The scaled logits are y = softcap * tanh(z / softcap) / temperature. Work is in fp32 for bf16 and fp32 logits, in fp64
for fp64. The sums leave the target's column out, so that with d = lse(others) - y_target the log-probability is
-softplus(d) and 1 - p is sigmoid(d): exact for tokens that are nearly certain, where max-and-sum forms return 0.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_built = sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))
if not _built:
    raise ImportError("cosmo_fast._C is not built: run `make install` or `pip install --no-build-isolation -e .`")
torch.ops.load_library(str(_built[0]))

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class VocabStats(NamedTuple):
    """Per row: log-probability of the target, entropy (nats), maximum and sum of e^(y - max) over the other columns.

    All (N,), fp32, or fp64 for fp64 logits. `other_max` is in units of the (capped) logits before the temperature.
    """

    logp: Tensor
    entropy: Tensor
    other_max: Tensor
    other_sum: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics, losses and sums over logits of `dtype` are in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """x with contiguous elements in the last axis, as it is where it has them."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def row_temperature(
    temperature: float | Tensor, logits_dtype: torch.dtype, n: int, device: torch.device
) -> Tensor | None:
    """`temperature` as the kernels take it: None for 1, else a positive (N,) vector in the statistics' dtype."""
    dtype = statistics_dtype(logits_dtype)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        if temperature.shape != (n,):
            raise ValueError(f"temperature must be a number or have shape ({n},), got {tuple(temperature.shape)}")
        return temperature.detach().to(device, dtype).contiguous()
    if not float(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {float(temperature)}")
    return None if temperature == 1 else torch.full((n,), float(temperature), dtype=dtype, device=device)


def check_softcap(softcap: float | None) -> float:
    """The cap as the kernels take it: 0 for none."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap must be positive or None, got {softcap}")
    return float(softcap or 0.0)


def vocab_stats(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, logit_softcap: float | None = None
) -> VocabStats:
    """Log-probability and entropy of each row of `logits` (N, V) at `targets` (N,) int64, in one read.

    logits: fp32, bf16 or fp64; rows may have any stride, columns must be contiguous. temperature: a positive number or
    (N,); it gets no gradient. `logp` and `entropy` are differentiable by the logits. CPU: C++; CUDA: Triton.
    Raises ValueError for a wrong temperature or cap, RuntimeError for wrong shapes, dtypes or (CPU) targets outside V.
    """
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float64, got {logits.dtype}")
    rows = row_temperature(temperature, logits.dtype, logits.shape[0], logits.device)
    softcap = check_softcap(logit_softcap)
    return VocabStats(*torch.ops.cosmo_fast.vocab_stats(logits, targets.contiguous(), rows, softcap))


def vocab_grad_(
    logits: Tensor,
    targets: Tensor,
    stats: VocabStats,
    c_logp: Tensor,
    c_entropy: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Overwrites logits with c_logp * d logp/dz + c_entropy * d entropy/dz, row by row; returns the rows written.

    rows (f,) int64: only these rows count; row rows[i] of the inputs goes to row i of the result, and rows[i] is either
    i or at least f, so that nothing is overwritten before it is read. All vectors are indexed by the input row.
    """
    torch.ops.cosmo_fast.vocab_grad_(logits, rows, targets, *stats, c_logp, c_entropy, temperature, softcap)
    return logits if rows is None else logits[: rows.shape[0]]


def vocab_stats_reference(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, logit_softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) in eager PyTorch: what `vocab_stats` computes, differentiable by autograd."""
    y = logits if logits.dtype == torch.float64 else logits.float()
    if logit_softcap is not None:
        y = logit_softcap * torch.tanh(y / logit_softcap)
    y = y / (temperature[:, None] if isinstance(temperature, Tensor) and temperature.dim() else temperature)
    logp = y.log_softmax(-1)
    probability = logp.exp()
    entropy = -(probability * logp.masked_fill(probability == 0, 0.0)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


@torch.library.register_fake("cosmo_fast::vocab_stats")
def _(logits, targets, temperature, softcap):
    return tuple(logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits.dtype)) for _ in range(4))


@torch.library.register_fake("cosmo_fast::vocab_grad_")
def _(logits, rows, targets, logp, entropy, other_max, other_sum, c_logp, c_entropy, temperature, softcap):
    return None


def _save(ctx, inputs, output):
    logits, targets, temperature, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(logits, targets, temperature, *output)


def _backward(ctx, c_logp, c_entropy, _max, _sum):
    logits, targets, temperature, *stats = ctx.saved_tensors
    gradient = logits.clone(memory_format=torch.contiguous_format)
    vectors = (*stats, c_logp.contiguous(), c_entropy.contiguous())
    torch.ops.cosmo_fast.vocab_grad_(gradient, None, targets, *vectors, temperature, ctx.softcap)
    return gradient, None, None, None


torch.library.register_autograd("cosmo_fast::vocab_stats", _backward, setup_context=_save)


@torch.library.register_kernel("cosmo_fast::vocab_stats", "cuda")
def _(logits, targets, temperature, softcap):
    from cosmo_fast.kernels.vocab_stats import vocab_stats as launch  # Triton is imported at the first call only

    return launch(logits, targets, temperature, softcap)


@torch.library.register_kernel("cosmo_fast::vocab_grad_", "cuda")
def _(logits, rows, *arguments):
    from cosmo_fast.kernels.vocab_stats import vocab_grad_ as launch

    launch(logits, rows, *arguments)
