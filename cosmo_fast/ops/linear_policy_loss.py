"""LM head, log-probabilities and any policy loss in one op: the gradient is made in the forward, with three GEMMs.

Only vocabulary-sized work is a kernel (`vocab_stats`, `vocab_grad_`); the loss is plain PyTorch on token vectors, whose
derivatives by logp and entropy are the coefficients of each row's gradient. Rows under the mask, and rows whose
coefficients are zero (clipped, zero advantage), cost nothing past the point where that is known.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cosmo_fast.objectives.base import Objective, TokenBatch
from cosmo_fast.ops.linear_head import HandOut, HeadGradient, LinearHead, even_pieces
from cosmo_fast.ops.row_tolerance import RowTolerance
from cosmo_fast.ops.vocab_stats import VocabStats, vocab_stats_reference

_LOSS = "the loss itself"  # its sum is kept beside those of the metrics, under a name that no metric has


class LossOutput(NamedTuple):
    """loss: scalar, differentiable. logp, entropy (N,): 0 under the mask, no gradient. metrics: scalar means by name.

    A metric is its mean under the batch's weights, Σ w·x / Σ w; there is none where everything is masked. dropped: what
    a `row_tolerance` cost (see `RowTolerance.thin`); None without one.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]
    dropped: dict[str, Tensor] | None = None


def linear_policy_loss(
    hidden: Tensor,
    head_weight: Tensor,
    batch: TokenBatch,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int = 4096,
    row_tolerance: RowTolerance | float | None = None,
    accumulate_weight_grad: bool = False,
) -> LossOutput:
    """Σ weight·objective over the tokens of `batch`, from hidden states (N, d) and the head (V, d); no (N, V) is kept.

    hidden, head_weight, bias (V,): one dtype of fp32, bf16, fp64, on one device. The loss is differentiable by them
    and costs 3 GEMMs (2N·V·d each), 2 with a frozen head, 1 without gradients; call backward once, or keep the graph.
    A factor of the loss rounds bf16 gradients once more unless it is a power of two: factors belong into the weights.
    objective: see `objectives.policy`; any callable (logp, entropy, batch) -> (loss (N,), metrics), taken to depend on
    whole sequences unless its `sequence_level` is False. A sequence longer than a chunk then costs 1 GEMM more.
    temperature: a number or (N,), divides the logits after the cap. logits_dtype: fp32 for an fp32 head on bf16.
    chunk_rows: rows of logits that exist at a time; peak memory is chunk_rows·V logits and, for several chunks, one
    fp32 dW. Nothing under the mask (weight 0) is read beyond its weight. Raises ValueError for shapes, dtypes, options.
    row_tolerance: a `RowTolerance`, or its share: rows with the smallest gradients leave the gradient products.
    accumulate_weight_grad: this call, not backward, adds dW to head_weight.grad, which spares autograd's second (V, d)
    matrix. Call zero_grad before it, and backward with gradient 1: the rest is an error, after which the gradient holds
    dW all the same. Refused where something else would have to see dW first: hooks, several ranks, DeepSpeed, a weight
    that is no leaf. A head that is tied to the input embedding may use it.
    """
    if len(batch) != hidden.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, the batch {len(batch)} tokens")
    options = {"temperature": temperature, "logit_softcap": logit_softcap, "chunk_rows": chunk_rows}
    parameters = (hidden, head_weight, bias)
    needs = tuple(torch.is_grad_enabled() and p is not None and p.requires_grad for p in parameters)
    if isinstance(row_tolerance, float | int):
        row_tolerance = RowTolerance(row_tolerance)
    into = None
    if accumulate_weight_grad and needs[1]:
        into = _weight_grad(head_weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead(hidden, head_weight, bias, logits_dtype=logits_dtype, **options)
        output, gradients = _forward(head, batch, objective, needs, row_tolerance, into)
    if not any(needs):
        return output
    return output._replace(loss=HandOut.apply(*parameters, output.loss, gradients, into))


def _weight_grad(weight: Tensor) -> Tensor:
    """The gradient of `weight`, made if there is none. ValueError where adding to it here would go unseen."""
    reason, distributed = None, torch.distributed
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if not weight.is_leaf:
        reason = "head_weight is not a leaf: its gradient belongs to what it was made of"
    elif weight._backward_hooks or weight._post_accumulate_grad_hooks:
        reason = "head_weight has gradient hooks, which would not see dW"
    elif hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
        reason = "head_weight is managed by DeepSpeed"
    elif ranks > 1:
        reason = f"{ranks} ranks reduce their gradients in hooks, which would not see dW"
    if reason:
        raise ValueError(f"{reason}; set accumulate_weight_grad=False")
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return weight.grad


def _forward(
    head: LinearHead,
    batch: TokenBatch,
    objective: Objective,
    needs: tuple[bool, bool, bool],
    tolerance: RowTolerance | None,
    into: Tensor | None,
):
    n, device = len(batch), head.hidden.device
    counted = (batch.weight != 0).nonzero()[:, 0]
    dense = counted.shape[0] == n
    batch = replace(batch, targets=batch.targets.contiguous()) if dense else batch.select(counted)
    plan = _chunks(batch.sequence, head.chunk_rows, getattr(objective, "sequence_level", True))
    pieces = sum(len(group) for group in plan)
    gradient = HeadGradient(head, needs, pieces, into) if any(needs) else None
    dropped = None if tolerance is None or gradient is None else tolerance.nothing(device)
    generator = None if tolerance is None else tolerance.generator(device)
    logp, entropy = (torch.zeros(n, dtype=head.wide, device=device) for _ in range(2))
    sums: dict[str, Tensor] = {}
    for group in plan:
        index = [slice(*piece) if dense else counted[slice(*piece)] for piece in group]
        tokens = batch.select(slice(group[0][0], group[-1][1]))
        parts = [tokens.targets[start - group[0][0] : stop - group[0][0]] for start, stop in group]
        stats = []
        for where, targets in zip(index, parts, strict=True):
            rows = head.rows(where)
            logits = head.logits(rows)
            stats.append(head.stats(logits, targets, where))
            logp[where], entropy[where] = stats[-1].logp, stats[-1].entropy
        c_logp, c_entropy = _coefficients(objective, stats, tokens, sums, any(needs))
        if gradient is None:
            continue
        if tolerance is not None:
            factor, costs = tolerance.thin(*_sizes(head, index, stats, c_logp, c_entropy), generator)
            c_logp = c_logp * factor.to(c_logp.dtype)
            c_entropy = None if c_entropy is None else c_entropy * factor.to(c_entropy.dtype)
            dropped = {name: tolerance.add(name, dropped[name], cost) for name, cost in costs.items()}
        for k, (where, targets, stat) in enumerate(zip(index, parts, stats, strict=True)):
            if len(group) > 1:  # a sequence longer than a chunk: its logits are made again
                rows = head.rows(where)
                logits = head.logits(rows)
            part = slice(group[k][0] - group[0][0], group[k][1] - group[0][0])
            gradient.add(
                logits, rows, where, targets, stat, c_logp[part], None if c_entropy is None else c_entropy[part]
            )
    weight_sum = batch.weight.double().sum()
    metrics = {name: (total / weight_sum).to(head.wide) for name, total in sums.items() if name != _LOSS}
    loss = sums[_LOSS].to(head.wide) if sums else torch.zeros((), dtype=head.wide, device=device)
    logits = rows = None  # noqa: F841  (views of the chunk)
    head.release(keep=pieces == 1)  # where dW is rounded next, the peak is one chunk of logits and one wide dW
    return LossOutput(loss, logp, entropy, metrics, dropped), None if gradient is None else gradient.results()


def _chunks(sequence: Tensor, chunk_rows: int, whole: bool) -> list[list[tuple[int, int]]]:
    """Row ranges of at most `chunk_rows`, about equal; those of one inner list go through the objective together."""
    n = sequence.shape[0]
    if not whole or n <= chunk_rows:
        return [[piece] for piece in even_pieces(0, n, chunk_rows)]
    ends = torch.unique_consecutive(sequence, return_counts=True)[1].cumsum(0).tolist()
    plan, start, last = [], 0, 0
    for end in ends:
        if end - start > chunk_rows and last > start:
            plan.append(even_pieces(start, last, chunk_rows))
            start = last
        last = end
    return [*plan, even_pieces(start, last, chunk_rows)]


def _coefficients(
    objective: Objective, stats: list[VocabStats], tokens: TokenBatch, sums: dict[str, Tensor], differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """∂loss/∂logp and ∂loss/∂entropy (None: no entropy in it) of these tokens; adds loss and metrics to `sums`."""
    with torch.set_grad_enabled(differentiate):
        logp = torch.cat([s.logp for s in stats]).requires_grad_(differentiate)
        entropy = torch.cat([s.entropy for s in stats]).requires_grad_(differentiate)
        token_loss, metrics = objective(logp, entropy, tokens)
        if token_loss.shape != logp.shape:
            raise ValueError(
                f"the objective returned a loss of shape {tuple(token_loss.shape)}, not {tuple(logp.shape)}"
            )
        loss = (token_loss * tokens.weight).sum(dtype=torch.float64)
    for name, value in {**metrics, _LOSS: token_loss.detach()}.items():
        total = (value.double() * tokens.weight.double()).sum()
        sums[name] = sums[name] + total if name in sums else total
    if not (differentiate and loss.requires_grad):
        return torch.zeros_like(logp), None
    # Contiguous: a coefficient may come as one number, expanded.
    c_logp, c_entropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    c_logp = torch.zeros_like(logp) if c_logp is None else c_logp.contiguous()
    return c_logp, None if c_entropy is None else c_entropy.contiguous()


def _sizes(
    head: LinearHead, index: list, stats: list[VocabStats], c_logp: Tensor, c_entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bounds on ‖dz‖₁, and ‖hidden row‖₂, of the rows of one group of chunks."""
    logp, entropy = (torch.cat([getattr(s, name) for s in stats]) for name in ("logp", "entropy"))
    size = c_logp.abs() * -torch.expm1(logp)
    if c_entropy is not None:
        size = size + c_entropy.abs() * entropy
    if head.temperature is not None:
        size = size / torch.cat([head.temperature[where] for where in index])
    norms = torch.cat([torch.linalg.vector_norm(head.hidden[where], dim=1, dtype=size.dtype) for where in index])
    return 2 * size, norms


def linear_policy_loss_reference(
    hidden: Tensor,
    head_weight: Tensor,
    batch: TokenBatch,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """The loss in eager PyTorch with all logits kept, differentiable by autograd."""
    counted = (batch.weight != 0).nonzero()[:, 0]
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[counted]
    logits = torch.nn.functional.linear(hidden[counted], head_weight, bias)
    tokens = batch.select(counted)
    stats = vocab_stats_reference(logits, tokens.targets, temperature=temperature, logit_softcap=logit_softcap)
    return (objective(*stats, tokens)[0] * tokens.weight).sum()
