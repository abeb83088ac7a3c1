"""Losses, advantages and aggregation: plain functions on token vectors."""

from cosmo_fast.objectives.advantages import advantages
from cosmo_fast.objectives.aggregate import sequence_weights, token_weights
from cosmo_fast.objectives.base import Objective, TokenBatch, sequence_mean, sequence_position, sequence_sum
from cosmo_fast.objectives.correction import importance_correction
from cosmo_fast.objectives.policy import (
    DEFAULTS,
    LOSSES,
    bnpo,
    cispo,
    cpgd,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    gspo,
    luspo,
    objective,
    reinforce,
    reinforce_pp,
    rloo,
    sapo,
    sft,
    vespo,
)
from cosmo_fast.objectives.terms import kl_estimate

__all__ = [
    "DEFAULTS",
    "LOSSES",
    "Objective",
    "TokenBatch",
    "advantages",
    "bnpo",
    "cispo",
    "cpgd",
    "dapo",
    "dr_grpo",
    "gmpo",
    "grpo",
    "gspo",
    "importance_correction",
    "kl_estimate",
    "luspo",
    "objective",
    "reinforce",
    "reinforce_pp",
    "rloo",
    "sapo",
    "sequence_mean",
    "sequence_position",
    "sequence_sum",
    "sequence_weights",
    "sft",
    "token_weights",
    "vespo",
]
