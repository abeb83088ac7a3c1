"""Greedy completions of a policy on rows, scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row
from cosmo_fast.evaluate.metrics import score
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.rollout import Sampler, SamplingParams


def complete(policy: Policy, rows: list[Row], params: SamplingParams, *, seed: int = 0, **bounds: int) -> list[str]:
    """One completion a row, decoded without special tokens, in the order of the rows; ``bounds`` are Sampler's."""
    encoder = Encoder(policy)
    sampler = Sampler(policy, Vision(policy), **bounds)
    groups = sampler.generate([encoder.prompt(row) for row in rows], params, seed=seed)
    return policy.tokenizer.batch_decode([group[0].ids for group in groups], skip_special_tokens=True)


def evaluate(
    policy: Policy, rows: list[Row], *, max_completion_length: int, stop_strings: Sequence[str] = (), **bounds: int
) -> dict[str, Any]:
    """:func:`cosmo_fast.evaluate.score` of greedy completions; ``bounds`` are Sampler's."""
    params = SamplingParams(max_completion_length, temperature=0, stop_strings=tuple(stop_strings))
    return score([row.columns for row in rows], complete(policy, rows, params, **bounds))
