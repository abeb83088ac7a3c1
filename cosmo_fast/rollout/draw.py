"""Tokens from logits: temperature, top-k, top-p, min-p, and one uniform number a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cosmo_fast import ops
from cosmo_fast.search import Search


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. Names are those of transformers' GenerationConfig.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 filter nothing. A response ends with the first
    token after which its decoded text contains one of ``stop_strings``, and keeps that token. ``search`` answers the
    calls in a response.

    Raises:
        ValueError: a value out of its range.
    """

    max_completion_length: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] | list[str] = ()
    search: Search | None = None

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 100), ("top_k", 0, 1 << 30), ("top_p", 1e-6, 1), ("min_p", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is not in [{low}, {high}]")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} is too small to divide by; 0 is greedy")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be at least 1")
        if isinstance(self.stop_strings, str) or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise ValueError(f"stop_strings={self.stop_strings!r} must be a list of strings that are not empty")


def sample(
    logits: torch.Tensor, params: SamplingParams, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token a row by inverse transform.

    Args:
        logits: (n, V) fp32 or bf16. uniform: (n,) fp64 in [0, 1); greedy sampling does not read it.

    Returns:
        tokens (n,) int64, their log-probs (n,) fp32 and the entropies (n,) fp32 of the distribution at the sampling
        temperature before any filter, by the op that training uses; at temperature 1 where sampling is greedy.
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled = logits.float() if params.temperature == 1 else logits.float() / params.temperature
        weights, ids = _filtered(scaled.softmax(-1), params)
        tokens = _inverse(weights, uniform)
        tokens = tokens if ids is None else ids.gather(1, tokens[:, None])[:, 0]
    stats = ops.vocab_stats(logits, tokens, temperature=params.temperature or 1.0)
    return tokens, stats.logp, stats.entropy


def _filtered(p: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``p`` (n, V) with what top-k, top-p and min-p exclude set to 0, and the columns' ids (None: in order).

    The best token always stays; of equals the first.
    """
    width = p.shape[1]
    if params.top_p == 1 and not 0 < params.top_k < width:
        return (p.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), 0) if params.min_p else p), None
    if 0 < params.top_k < width:
        # Positive floats are ordered as their bits are; the low half puts the first of equals in front.
        place = torch.arange(width - 1, -1, -1, device=p.device)
        key = ((p.view(torch.int32).long() << 32) | place).topk(params.top_k).values
        ids = (width - 1) - (key & 0xFFFFFFFF)
        ordered = p.gather(1, ids)
    else:
        ordered, ids = torch.sort(p, dim=-1, descending=True, stable=True)
    drop = ordered < params.min_p * ordered[:, :1]
    if params.top_p < 1:  # of what top-k has left, as transformers has it
        drop |= (ordered.cumsum(-1) - ordered) >= params.top_p * ordered.sum(-1, keepdim=True)
    drop[:, 0] = False
    ordered.masked_fill_(drop, 0)
    if ids.shape[1] == width:
        return torch.zeros_like(p).scatter_(1, ids, ordered), None
    ids, order = ids.sort(-1)
    return ordered.gather(1, order), ids


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The column (n,) at which the running sum of ``weights`` (n, m) passes ``uniform`` · the row's sum.

    Sums of blocks first, then inside one block: a running sum in fp64 of every column would cost more than all the
    rest of the draw. A column of weight 0 is never drawn.
    """
    width = weights.shape[1]
    block = 1 << (width.bit_length() + 1) // 2
    whole = width - width % block
    sums = weights[:, :whole].unflatten(1, (-1, block)).sum(-1)
    if whole < width:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    chosen, part = _search(sums, uniform)
    columns = chosen[:, None] * block + torch.arange(block, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=width - 1)).masked_fill_(columns >= width, 0)
    return chosen * block + _search(inside, part)[0]


def _search(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column (n,) where the running sum passes ``uniform`` · the sum, and where in that column, in [0, 1)."""
    running = weights.double().cumsum(-1)
    # Below 1 by more than rounding, so that the product stays below the sum and the column has a weight.
    wanted = (uniform.double().clamp(max=1 - 1e-15) * running[:, -1])[:, None]
    column = torch.searchsorted(running, wanted, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, column).double()
    part = 1 - (running.gather(1, column) - wanted) / weight
    return column[:, 0], part[:, 0].clamp_(min=0)
