"""Supervised fine-tuning: cross-entropy over the target but for tools' results, packed."""

from __future__ import annotations

import numpy as np

from cosmo_fast.data.mixture import Mixture
from cosmo_fast.objectives import sft
from cosmo_fast.plan import Prompt
from cosmo_fast.stages.base import Context, accumulate, kept_share, step_seed
from cosmo_fast.stages.packed import Group


class SFTStage:
    """``per_device_train_batch_size × gradient_accumulation_steps`` rows a step, mean over their tokens.

    A row is its prompt, its target and which of its tokens are learnt.
    """

    def __init__(self, context: Context, mixture: Mixture[tuple[Prompt, np.ndarray, np.ndarray]]):
        self.context, self.mixture = context, mixture

    def step(self, step: int) -> dict[str, float]:
        """Accumulates the gradient of step ``step``; returns its metrics."""
        stage = self.context.stage
        count = stage.per_device_train_batch_size * stage.gradient_accumulation_steps * self.context.ranks.world
        rows = self.context.draw(self.mixture, count, step)
        tokens = sum(int(own.sum()) for *_, own in rows)
        groups = [Group(prompt, [target], [own / tokens]) for prompt, target, own in rows]
        loss, metrics, _ = accumulate(self.context, groups, sft(), seed=step_seed(self.context.seed, step, 1))
        metrics.pop("probability", None)
        return {"loss": loss, **metrics, **kept_share([p for p, *_ in rows]), "tokens": sum(g.tokens for g in groups)}

    def samples(self) -> list:
        """Supervised steps sample nothing."""
        return []
