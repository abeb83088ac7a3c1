"""Host-built plans: pure integers that say where every segment, image and label of a micro-batch lies."""

from cosmo_fast.plan.batches import micro_batches
from cosmo_fast.plan.layout import Media, Plan, Prompt

__all__ = ["Media", "Plan", "Prompt", "micro_batches"]
