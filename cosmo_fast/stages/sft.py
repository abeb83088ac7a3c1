"""Supervised fine-tuning: cross-entropy over the whole target, packed."""

from __future__ import annotations

import numpy as np

from cosmo_fast.data.mixture import Mixture
from cosmo_fast.objectives import sft
from cosmo_fast.plan import Prompt
from cosmo_fast.stages.base import Context, accumulate, kept_share, step_seed
from cosmo_fast.stages.packed import Group


class SFTStage:
    """``per_device_train_batch_size × gradient_accumulation_steps`` rows a step, mean over their tokens."""

    def __init__(self, context: Context, mixture: Mixture[tuple[Prompt, np.ndarray]]):
        self.context, self.mixture = context, mixture

    def step(self, step: int) -> dict[str, float]:
        """Accumulates the gradient of step ``step``; returns its metrics."""
        stage = self.context.stage
        count = stage.per_device_train_batch_size * stage.gradient_accumulation_steps * self.context.ranks.world
        rows = self.context.draw(self.mixture, count, step)
        tokens = sum(len(target) for _, target in rows)
        groups = [Group(prompt, [target], [np.full(len(target), 1 / tokens)]) for prompt, target in rows]
        loss, metrics, _ = accumulate(self.context, groups, sft(), seed=step_seed(self.context.seed, step, 1))
        metrics.pop("probability", None)
        return {"loss": loss, **metrics, **kept_share([p for p, _ in rows]), "tokens": sum(g.tokens for g in groups)}

    def samples(self) -> list:
        """Supervised steps sample nothing."""
        return []
