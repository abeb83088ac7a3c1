"""Log-probabilities and entropies of tokens straight from hidden states, for use in any autograd graph."""

import torch
from torch import Tensor

from cosmo_fast.ops.linear_head import HeadGradient, LinearHead
from cosmo_fast.ops.vocab_stats import VocabStats, vocab_stats_reference


def linear_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int = 4096,
    top_k: int = 0,
) -> tuple[Tensor, ...]:
    """(logp, entropy), each (N,) fp32 (fp64 for fp64), of `targets` (N,) under softmax(hidden @ head_weight.T + bias).

    1 GEMM in chunks of rows, nothing (N, V) kept. Differentiable by hidden (N, d), head_weight (V, d) and bias (V,) in
    any graph, once: the backward makes the logits again, 4 GEMMs in all over the rows whose incoming gradient is not
    zero. Where the loss can be an objective, `linear_policy_loss` does the same work in 3. Options as there.
    top_k > 0: (logp, entropy, top_logp, top_ids), the k most probable tokens of each row, (N, k), most probable first,
    without gradient.
    """
    if not 0 <= top_k <= head_weight.shape[0]:
        raise ValueError(f"top_k must lie between 0 and the vocabulary's {head_weight.shape[0]}, got {top_k}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must have one element for each of {hidden.shape[0]} rows")
    options = {"temperature": temperature, "logit_softcap": logit_softcap}
    with torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead(hidden, head_weight, bias, logits_dtype=logits_dtype, chunk_rows=chunk_rows, **options)
        return _LinearLogprobs.apply(hidden, head_weight, bias, targets.contiguous(), head, top_k)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, top_k):
        stats = [VocabStats(*[hidden.new_empty(0, dtype=head.wide)] * 4)]
        top = [(hidden.new_empty(0, top_k, dtype=head.wide), targets.new_empty(0, top_k))]
        for start in range(0, hidden.shape[0], head.chunk_rows):
            where = slice(start, start + head.chunk_rows)
            logits = head.logits(head.rows(where))
            stats.append(head.stats(logits, targets[where], where))
            if top_k:
                top.append(head.top(logits, targets[where], stats[-1], where, top_k))
        ctx.head = head.release()
        whole = VocabStats(*(torch.cat(parts) for parts in zip(*stats, strict=True)))
        ctx.save_for_backward(hidden, weight, bias, targets, *whole)
        if not top_k:
            return whole.logp, whole.entropy
        tops = tuple(torch.cat(parts) for parts in zip(*top, strict=True))
        ctx.mark_non_differentiable(*tops)
        return whole.logp, whole.entropy, *tops

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, c_logp, c_entropy, *_top):
        _hidden, _weight, _bias, targets, *stats = ctx.saved_tensors
        head, stats, c_logp, c_entropy = ctx.head, VocabStats(*stats), c_logp.contiguous(), c_entropy.contiguous()
        wanted = ((c_logp != 0) | (c_entropy != 0)).nonzero()[:, 0]
        chunks = wanted.split(head.chunk_rows) if wanted.numel() else []
        with torch.autocast(head.hidden.device.type, enabled=False):
            gradient = HeadGradient(head, ctx.needs_input_grad[:3], len(chunks))
            for where in chunks:
                rows = head.rows(where)
                part = VocabStats(*(s[where] for s in stats))
                gradient.add(head.logits(rows), rows, where, targets[where], part, c_logp[where], c_entropy[where])
        head.release()
        return *gradient.results(), None, None, None


def linear_logprobs_reference(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) in eager PyTorch with all logits kept, differentiable by autograd."""
    logits = torch.nn.functional.linear(hidden, head_weight, bias)
    return vocab_stats_reference(logits, targets, temperature=temperature, logit_softcap=logit_softcap)
