"""Losses, advantages and aggregation: plain functions on token vectors."""

from cosmo_fast.objectives.advantages import advantages
from cosmo_fast.objectives.aggregate import sequence_weights, token_weights
from cosmo_fast.objectives.base import Objective, TokenBatch, sequence_mean
from cosmo_fast.objectives.policy import cpgd, grpo, kl_estimate, sft

__all__ = [
    "Objective",
    "TokenBatch",
    "advantages",
    "cpgd",
    "grpo",
    "kl_estimate",
    "sequence_mean",
    "sequence_weights",
    "sft",
    "token_weights",
]
