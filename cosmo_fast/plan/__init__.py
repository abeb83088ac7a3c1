"""Host-built plans: pure integers that say where every segment, image and label of a micro-batch lies."""

from cosmo_fast.plan.batches import GroupSize, MicroBatch, balance, micro_batches
from cosmo_fast.plan.cost import CostModel, calibrate, flops
from cosmo_fast.plan.layout import Media, Plan, Prompt

__all__ = [
    "CostModel",
    "GroupSize",
    "Media",
    "MicroBatch",
    "Plan",
    "Prompt",
    "balance",
    "calibrate",
    "flops",
    "micro_batches",
]
